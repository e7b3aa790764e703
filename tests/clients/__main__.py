"""`make clients`: makes the environments of real clients, runs all of them, and writes docs/clients.md anew.

CLIENTS=folder make clients    # the environments elsewhere than in .clients
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.clients import environments
from tests.clients.page import KEPT, PAGE, SEEN, make


def main() -> int:
    for name in environments.missing():
        print(f"making {name} …", flush=True)
        begun = time.monotonic()
        environments.make(name)
        print(f"  {time.monotonic() - begun:.0f} s", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "seen.json"
        code = run("test_clients.py", {KEPT: str(kept)})
        if kept.exists():
            SEEN.write_text(kept.read_text("utf-8"), "utf-8")
            PAGE.write_text(make(), "utf-8")
    return code or run("test_page.py", {})


def run(tests: str, variables: dict[str, str]) -> int:
    words = [sys.executable, "-m", "pytest", "-q", "--durations=5", str(Path(__file__).with_name(tests))]
    return subprocess.run(words, env={**os.environ, **variables}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
