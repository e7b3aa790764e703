"""The whole app on loopback, and who asks it over HTTP. Shared by tests of the server.

Each answer goes through `Asker.taken`, which holds it to what is promised of every answer.
"""

import json
from dataclasses import dataclass
from typing import Any

from tests.runtime.server.serving import Client, Served

from m0kit.server.app import App
from m0kit.server.problems import STATUS

KEY = "SECRET-of-the-one-who-asks"
MAX_BODY = 64 << 10
READERS = (  # routes that read a body
    ("POST", "/v1/rerank"), ("POST", "/v2/rerank"), ("POST", "/rerank"), ("POST", "/"), ("POST", "/score"),
    ("POST", "/v1/score"), ("PUT", "/v1/documents/page-1"), ("POST", "/v1/documents"), ("POST", "/pdf"),
)  # fmt: skip
RANKING = b'{"query": "the tide", "documents": ["the sea", "a recipe"]}'


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """Of an error; "" of what is none."""
        return self.json["code"] if self.status >= 400 else ""


@dataclass
class Asker:
    """Asks one server, and holds every answer to what is promised of each."""

    at: Served
    app: App

    def ask(self, method: str, path: str, body: bytes | None = None, key: str | None = KEY, **headers: str) -> Answer:
        """`headers`: with _ in the place of -; an empty one is left out."""
        answer = self.failed(method, path, body, key, **headers)
        assert answer.status != 500, answer.body
        return answer

    def failed(
        self, method: str, path: str, body: bytes | None = None, key: str | None = KEY, **headers: str
    ) -> Answer:
        """The same where a mistake of the server may be the answer."""
        given = {"Host": "localhost"} | ({"Authorization": f"Bearer {key}"} if key is not None else {})
        if body is not None:
            given |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
        given |= {name.replace("_", "-").title(): value for name, value in headers.items()}
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items() if value)]
        return self.send("\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b""), method)

    def send(self, data: bytes, method: str = "GET") -> Answer:
        client = self.at.ask(data)
        try:
            return self.taken(client, method)
        finally:
            client.close()

    def taken(self, client: Client, method: str = "GET") -> Answer:
        answer = Answer(*client.answer(method))
        headers = answer.headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] in ("no-store", "no-cache")
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert not [name for name in headers if name.startswith("access-control-") or name in ("server", "set-cookie")]
        assert headers["x-request-id"]
        if answer.status >= 400 and method != "HEAD":
            told = answer.json
            assert headers["content-type"] == "application/json"
            assert STATUS[told["code"]] == answer.status
            assert isinstance(told["detail"], str)
            assert told["detail"] == told["message"]
            in_error = told["error"]["message"] if isinstance(told["error"], dict) else told["error"]
            assert in_error == told["detail"]
            assert told["request_id"] == headers["x-request-id"]
        return answer
