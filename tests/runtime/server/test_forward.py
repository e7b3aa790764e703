"""A worker that does not write, before one that does: two apps on one index, behind a path of a proxy."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="m0kit[serve] is not installed")
if os.name != "posix":
    pytest.skip("needs Unix sockets", allow_module_level=True)

from tests.runtime.server.asking import KEY, Asker
from tests.runtime.server.serving import served, settings_of, until

from m0kit.server.app import build
from m0kit.server.settings import ModelSettings


@pytest.mark.parametrize("root", ["", "/ranking"])
def test_what_writes_is_passed_on_as_it_came(artifact: Path, tmp_path: Path, root: str) -> None:
    (tmp_path / "keys").write_text(f"tester: {KEY}\n")
    (tmp_path / "keys").chmod(0o600)
    socket = tmp_path / "writer"
    options: dict[str, Any] = {
        "models": (ModelSettings(str(artifact), ("m0",), index=tmp_path / "library", threads=1),),
        "api_key_file": tmp_path / "keys",
        "root_path": root,
        "max_body_bytes": 1000,
        "page": False,
    }
    writer = build(settings_of(**options), worker=0)
    with served(writer, writer.service.metrics, **options, uds=socket) as behind:
        until(lambda: writer.service.problem is None)
        other = build(settings_of(**options), worker=1, writer_socket=socket)
        with served(other, other.service.metrics, **options) as at:
            until(lambda: other.service.problem is None)
            asker = Asker(at, other)
            put = asker.ask("PUT", "/v1/documents/a%2Fb%20c?model=m0", body=b"the sea", content_type="text/plain")
            assert (put.status, put.json["id"], put.json["status"]) == (200, "a/b c", "read")
            assert asker.ask("GET", "/v1/documents/a%2Fb%20c").json["text"] == "the sea"
            ranked = asker.ask(
                "POST", "/v1/rerank", body=json.dumps({"query": "x", "documents": [{"id": "a/b c"}]}).encode()
            )
            assert ranked.status == 200
            assert asker.ask("PUT", "/v1/documents/x", body=b"y" * 1001).code == "BODY_TOO_LARGE"
            assert (
                asker.ask("PUT", "/v1/documents/x", body=b"{", key="none of this server's").code
                == "AUTH_INVALID_API_KEY"
            )
            assert asker.ask("PUT", "/v1/documents/x", body=b"{", origin="http://evil.test").code == "FORBIDDEN_ORIGIN"
            assert asker.ask("DELETE", "/v1/documents/a%2Fb%20c").json == {"id": "a/b c", "deleted": True}
            at.stop()
        behind.stop()
