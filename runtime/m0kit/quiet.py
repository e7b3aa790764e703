"""What libraries would report about their use, or note down for it: switched off here, in one place.

Owns the list. It must be in the environment before the library is imported, so m0kit's packages apply it when they are
imported themselves; processes that m0kit starts inherit it. What the user's environment says already stays.

    silence()
"""

import os
import sys
from collections.abc import Mapping
from typing import Any, Final

ENVIRONMENT: Final[Mapping[str, str]] = {
    # 1.29 and newer write a device id and a database to the user's cache folder as they are imported, and send that
    # (CPU, memory, the interpreter's path) half a minute later and at exit.
    "ORT_DISABLE_TELEMETRY": "1",
    # Versions of all that is installed, in the headers of each request. What is asked of a hub is sent all the same.
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # A cluster that is started here would report itself every hour.
    "RAY_USAGE_STATS_ENABLED": "0",
    # nncf's only switch: it would report each use to an analytics service, with an id kept in ~/intel.
    "NNCF_CI": "1",
    # It would report pipelines as they run, with an id kept in ~/.haystack.
    "HAYSTACK_TELEMETRY_ENABLED": "False",
}


def silence() -> None:
    """Put `ENVIRONMENT` into the environment of this process and of those that it starts."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def silence_onnxruntime(onnxruntime: Any) -> None:
    """Stop the reports that can still be stopped in an onnxruntime that was imported before m0kit was.

    It then has written its files and will send its first event; nothing but ORT_DISABLE_TELEMETRY=1 before the import
    prevents that. What it would say of sessions and models is kept back.
    """
    if os.environ.get("ORT_DISABLE_TELEMETRY") == ENVIRONMENT["ORT_DISABLE_TELEMETRY"]:
        onnxruntime.disable_telemetry_events()


def silence_openvino() -> None:
    """Before OpenVINO or nncf is imported: their reporter counts as not installed, and they have stubs for that.

    It reports each import of the converter to an analytics service, with an id kept in ~/intel, and no variable of
    its own stops it.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
