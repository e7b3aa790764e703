"""A hub on this machine: a repository served over HTTP as huggingface_hub asks for it, and a cache made by hand."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """`files` of one repository "org/name"; what was asked for, and with which token, is noted."""

    def __init__(self, url: str, files: dict[str, bytes]) -> None:
        self.url = url
        self.files = files
        self.revisions = {"main", "v2", COMMIT}
        self.asked: list[tuple[str, str]] = []  # method, path
        self.tokens: set[str | None] = set()
        self.token: str | None = None  # needed when set

    @property
    def fetched(self) -> list[str]:
        """Names of files whose content was asked for."""
        return [path.rpartition("/")[2] for method, path in self.asked if method == "GET" and "/resolve/" in path]


@contextmanager
def served(files: dict[str, bytes]) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            token = self.headers.get("Authorization")
            hub.asked.append((self.command, path))
            hub.tokens.add(token)
            if hub.token is not None and token != f"Bearer {hub.token}":
                return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
            if path.startswith("/api/models/org/name"):
                rest = path.removeprefix("/api/models/org/name").strip("/").split("/")
                revision = rest[1] if len(rest) > 1 else "main"
                if revision not in hub.revisions:
                    return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
                if rest[0] == "tree":
                    listed = [
                        {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                        for n, c in hub.files.items()
                    ]
                    return self.answer(200, json.dumps(listed).encode(), {"Content-Type": "application/json"})
                siblings = [{"rfilename": n} for n in hub.files]
                about = {"id": "org/name", "modelId": "org/name", "sha": COMMIT, "siblings": siblings, "tags": []}
                return self.answer(200, json.dumps(about).encode(), {"Content-Type": "application/json"})
            if path.startswith("/org/name/resolve/"):
                revision, _, name = path.removeprefix("/org/name/resolve/").partition("/")
                if revision not in hub.revisions:
                    return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
                if name not in hub.files:
                    return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
                content = hub.files[name]
                etag = f'"{hashlib.sha256(content).hexdigest()}"'
                return self.answer(200, content, {"X-Repo-Commit": COMMIT, "ETag": etag})
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

        def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}", files)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def cached(folder: Path, home: Path, name: str = "org/name", revision: str = "main") -> Path:
    """`folder` as huggingface_hub keeps it under HF_HOME: blobs by hash, links to them in a snapshot; returns that."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    for part in (repository / "blobs", repository / "refs", snapshot):
        part.mkdir(parents=True)
    (repository / "refs" / revision).write_text(COMMIT)
    for file in folder.iterdir():
        blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(os.path.join("..", "..", "blobs", blob.name))
    return snapshot
