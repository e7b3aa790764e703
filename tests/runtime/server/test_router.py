"""The whole app: who is let in, in what form, what every answer has.

Each answer of this file goes through `Asker.ask`, which holds it to what is promised of every answer.
"""

import base64
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="m0kit[serve] is not installed")

from starlette.routing import Route
from tests.runtime.server.asking import KEY, MAX_BODY, RANKING, READERS, Asker
from tests.runtime.server.origins import PNG

from m0kit.server.app import App
from m0kit.server.guard import OPEN
from m0kit.server.pages import MAX_PDFS

METHODS = (
    "GET",
    "HEAD",
    "POST",
    "PUT",
    "DELETE",
    "PATCH",
    "OPTIONS",
    "TRACE",
    "CONNECT",
    "PROPFIND",
    "get",
    "M-SEARCH",
)


def paths(app: App) -> list[tuple[str, Route]]:
    """A path that each route takes."""
    found = [(route.path.replace("{id:path}", "page-1").replace("{name:path}", "m0"), route) for route in app.routes]
    assert not [path for path, _ in found if "{" in path]
    return found


# --- keys --------------------------------------------------------------------------------------------------


def test_every_route_but_health_needs_a_key_for_each_method(asker: Asker) -> None:
    walked = dict.fromkeys(path for path, _ in paths(asker.app))
    assert {"/", "/v1/rerank", "/v1/documents/page-1", "/pdf", "/metrics", "/info", "/app.js", *OPEN} <= set(walked)
    for path in [*walked, "/nowhere", "/v1", "/docs", "/favicon.ico"]:
        for method in METHODS:
            for key, code in ((None, "AUTH_REQUIRED"), ("none-of-this-server's", "AUTH_INVALID_API_KEY")):
                answer = asker.ask(method, path, key=key)
                if path in OPEN:
                    assert answer.status == (200 if method in ("GET", "HEAD") else 405), (method, path)
                else:
                    assert answer.status == 401, (method, path)
                    assert method == "HEAD" or answer.code == code
                    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "path",
    ["/live/", "//live", "/./live", "/LIVE", "/%6cive", "/live%2f", "/live%00", "/live;x", "/live/../v1/models",
     "/ready/../metrics", "/health/.", "/%2flive", "/live%20", "/live%3fx", "/live/v1/rerank"],
)  # fmt: skip
def test_what_only_looks_like_a_path_of_health_needs_a_key(asker: Asker, path: str) -> None:
    assert asker.ask("GET", path, key=None).code == "AUTH_REQUIRED"
    assert asker.ask("GET", path).code in ("NOT_FOUND", "")


def test_a_query_string_makes_no_other_path(asker: Asker) -> None:
    assert asker.ask("GET", "/live?x=/v1/rerank", key=None).status == 200
    assert asker.ask("GET", "/metrics?/live", key=None).status == 401


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"authorization": f"Bearer {KEY}"}, 200),
        ({"authorization": f"bearer   {KEY} "}, 200),
        ({"authorization": KEY}, 200),
        ({"x_api_key": KEY}, 200),
        ({"x_api_key": "another-key-of-this-server"}, 200),
        ({"authorization": "Basic " + base64.b64encode(f"anyone:{KEY}".encode()).decode()}, 200),
        ({"authorization": "Bearer wrong", "x_api_key": KEY}, 200),
        ({"authorization": f"Bearer {KEY[:-1]}"}, 401),
        ({"authorization": f"Bearer {KEY}x"}, 401),
        ({"authorization": f"Bearer {KEY.lower()}"}, 401),
        ({"authorization": "Bearer"}, 401),
        ({"authorization": "Bearer "}, 401),
        ({"authorization": "Basic " + base64.b64encode(f"{KEY}:".encode()).decode()}, 401),
        ({"authorization": "Basic not base64"}, 401),
        ({"authorization": f"Digest {KEY}"}, 401),
        ({"x_api_key": "tester"}, 401),
        ({"x_api_key": f"tester: {KEY}"}, 401),
        ({"api_key": KEY}, 401),
        ({"cookie": f"key={KEY}"}, 401),
    ],
)
def test_a_key_comes_in_two_headers_alone(asker: Asker, headers: dict[str, str], status: int) -> None:
    assert asker.ask("GET", "/v1/models", key=None, **headers).status == status


def test_a_key_in_the_url_is_none(asker: Asker) -> None:
    for path in (f"/v1/models?api_key={KEY}", f"/v1/models?key={KEY}", f"/v1/models?token={KEY}"):
        assert asker.ask("GET", path, key=None).code == "AUTH_REQUIRED"


def test_who_has_no_key_is_told_so_before_the_body_is_read(asker: Asker) -> None:
    for method, path in READERS:
        client = asker.at.ask(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 60000\r\n\r\n".encode())
        assert asker.taken(client).code == "AUTH_REQUIRED"
        client.close()


def test_a_browser_is_asked_for_the_key_where_it_shows_pages(asker: Asker) -> None:
    answer = asker.ask("GET", "/", key=None, accept="text/html,*/*;q=0.8")
    assert (answer.status, answer.headers["www-authenticate"][:15]) == (401, 'Basic realm="m0')


def test_a_method_that_a_path_does_not_take_is_said_with_those_it_does(asker: Asker) -> None:
    taken: dict[str, set[str]] = {}
    for path, route in paths(asker.app):
        taken.setdefault(path, set()).update(route.methods or ())
    for path, methods in taken.items():
        for method in set(METHODS[:-3]) - methods:
            answer = asker.ask(method, path, body=b"{}" if method in ("POST", "PUT", "PATCH") else None)
            assert (answer.status, set(answer.headers["allow"].split(", "))) == (405, methods), (method, path)


@pytest.mark.parametrize("name", ["a%ff", "a%c3", "a%ed%a0%80", "%fe", "a%c0%af"])
def test_a_path_that_is_not_utf_8_is_no_other_ones(asker: Asker, name: str) -> None:
    for method in ("GET", "DELETE"):
        assert asker.ask(method, f"/v1/documents/{name}").code == "BAD_HTTP"
    assert asker.ask("PUT", f"/v1/documents/{name}", body=b"x", content_type="text/plain").code == "BAD_HTTP"


@pytest.mark.parametrize("name", ["%2e%2e%2fx", "..", "a//b", "%e2%80%ae", "a%20b?x", "x;y=z", "%25ff", "%C3%A9"])
def test_a_name_of_a_document_is_a_name_and_nothing_else(asker: Asker, name: str) -> None:
    path = f"/v1/documents/{name}"
    assert asker.ask("PUT", path, body=name.encode(), content_type="text/plain").status == 200
    assert asker.ask("GET", path).json["text"] == name
    assert len(asker.ask("GET", "/v1/documents").json["ids"]) == 1
    assert asker.ask("DELETE", path).status == 200


@pytest.mark.parametrize("name", ["a%00b", "a%0ab", "a%e2%80%a8b"])
def test_a_name_with_a_control_character_is_none(asker: Asker, name: str) -> None:
    told = asker.ask("PUT", f"/v1/documents/{name}", body=b"x", content_type="text/plain")
    assert told.status in (404, 422)  # 404: a path has no line ends


# --- bodies ------------------------------------------------------------------------------------------------


def test_these_are_all_that_read_a_body(asker: Asker) -> None:
    writing = {
        (method, path)
        for path, route in paths(asker.app)
        for method in (route.methods or ())
        if method not in ("GET", "HEAD", "DELETE")
    }
    assert writing == set(READERS)


@pytest.mark.parametrize(("method", "path"), READERS)
def test_a_body_over_the_limit_ends_while_it_comes(asker: Asker, method: str, path: str) -> None:
    assert asker.ask(method, path, content_length=str(MAX_BODY + 1), content_type="application/json").code == (
        "BODY_TOO_LARGE"
    )
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {KEY}\r\nTransfer-Encoding: chunked\r\n\r\n"
    client = asker.at.ask(head.encode())
    piece = b"4000\r\n" + b" " * 0x4000 + b"\r\n"
    for _ in range(MAX_BODY // 0x4000):
        client.send(piece)
    client.send(b"1\r\n \r\n")  # one byte more, and no end
    assert asker.taken(client).code == "BODY_TOO_LARGE"
    client.close()


@pytest.mark.parametrize(("method", "path"), READERS)
def test_a_compressed_body_is_not_read(asker: Asker, method: str, path: str) -> None:
    for encoding in ("gzip", "GZIP", "deflate", "br", "zstd", "identity, gzip", "x", "gzip,identity"):
        assert asker.ask(method, path, body=RANKING, content_encoding=encoding).code == "UNSUPPORTED_ENCODING"
    assert asker.ask(method, path, body=b"{", content_encoding="identity").code != "UNSUPPORTED_ENCODING"


@pytest.mark.parametrize(("method", "path"), READERS)
def test_a_body_of_another_type_is_not_read(asker: Asker, method: str, path: str) -> None:
    wrong = ["text/html", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", "application/xml",
             "application/json, text/plain", "json", "image", "application/pickle"]  # fmt: skip
    wrong += [] if method == "PUT" else ["text/plain", "image/png", "text/plain;charset=utf-8"]
    wrong += [] if path == "/pdf" else ["application/pdf"]
    for kind in wrong:
        assert asker.ask(method, path, body=RANKING, content_type=kind).code == "UNSUPPORTED_TYPE", kind
    twice = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {KEY}\r\nContent-Length: 2\r\n"
    twice += "Content-Type: application/json\r\nContent-Type: application/json\r\n\r\n{}"
    assert asker.send(twice.encode()).code == "UNSUPPORTED_TYPE"


def test_a_body_of_the_types_that_clients_send_is_read(asker: Asker) -> None:
    for kind in ("application/json", "Application/JSON; charset=utf-8", "", "application/octet-stream"):
        assert asker.ask("POST", "/v1/rerank", body=RANKING, content_type=kind).status == 200
    for kind, body in (("text/plain", b"the sea"), ("text/plain; charset=utf-8", b"the sea"), ("image/png", PNG)):
        assert asker.ask("PUT", "/v1/documents/typed", body=body, content_type=kind).status == 200
    assert asker.ask("DELETE", "/v1/documents/typed").status == 200


def test_a_pdf_that_comes_slowly_takes_nobody_s_place(asker: Asker) -> None:
    pytest.importorskip("pypdfium2", reason="m0kit[pdf] is not installed")
    head = f"POST /pdf HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {KEY}\r\nContent-Length: 100\r\n\r\n%PDF-1.7"
    slow = [asker.at.ask(head.encode()) for _ in range(MAX_PDFS + 1)]
    for _ in range(3):
        assert asker.ask("POST", "/pdf", body=b"no PDF", content_type="application/pdf").code == "INVALID_INPUT"
    for client in slow:
        client.close()


def test_a_body_of_two_lengths_is_refused_and_ends_the_connection(asker: Asker) -> None:
    """Whoever stands before this server may have gone by the other one: what follows would be somebody's request."""
    head = f"POST /v1/rerank HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {KEY}\r\nContent-Length: 5\r\n"
    client = asker.at.ask(f"{head}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /metrics HTTP/1.1\r\n".encode())
    assert asker.taken(client).code == "BAD_HTTP"
    assert b"HTTP/1.1" not in client.rest()


# --- other sites -------------------------------------------------------------------------------------------


def test_no_other_site_is_told_that_it_may_ask(asker: Asker) -> None:
    asks = {
        "origin": "https://evil.test",
        "access_control_request_method": "POST",
        "access_control_request_headers": "x",
    }
    for path in dict.fromkeys(path for path, _ in paths(asker.app)):
        assert asker.ask("OPTIONS", path, **asks).code == "FORBIDDEN_ORIGIN"
        assert asker.ask("OPTIONS", path, key=None, **asks).code == "FORBIDDEN_ORIGIN"
        assert asker.ask("OPTIONS", path, **asks | {"origin": ""}).status == 405


@pytest.mark.parametrize(
    ("host", "code"),
    [
        ("localhost", ""), ("LOCALHOST:8080", ""), ("127.0.0.1", ""), ("127.0.0.1:1", ""), ("[::1]:8080", ""),
        ("rerank.test", ""), ("Rerank.Test:443", ""), ("evil.test", "FORBIDDEN_HOST"),
        ("localhost.evil.test", "FORBIDDEN_HOST"),
        ("localhost.", "FORBIDDEN_HOST"), ("93.184.215.14", "FORBIDDEN_HOST"), ("rerank.test.", "FORBIDDEN_HOST"),
        ("localhost@evil.test", "BAD_HTTP"), ("localhost, evil.test", "BAD_HTTP"), ("localhost/x", "BAD_HTTP"),
        ("localhost:x", "BAD_HTTP"), ("http://localhost", "BAD_HTTP"),
    ],
)  # fmt: skip
def test_a_host_is_one_of_this_server(asker: Asker, host: str, code: str) -> None:
    for path in ("/v1/models", "/live"):
        assert asker.ask("GET", path, host=host).code == code
    assert asker.ask("POST", "/v1/rerank", body=RANKING, host=host).code == code


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"origin": "http://localhost"}, ""),
        ({"origin": "http://localhost:80"}, ""),
        ({"origin": "https://localhost"}, "FORBIDDEN_ORIGIN"),  # its port is 443, and the Host's none: 80
        ({"origin": "http://localhost:3000"}, "FORBIDDEN_ORIGIN"),
        ({"origin": "http://127.0.0.1"}, "FORBIDDEN_ORIGIN"),
        ({"origin": "http://evil.test"}, "FORBIDDEN_ORIGIN"),
        ({"origin": "http://localhost.evil.test"}, "FORBIDDEN_ORIGIN"),
        ({"origin": "http://localhost@evil.test"}, "FORBIDDEN_ORIGIN"),
        ({"origin": "null"}, "FORBIDDEN_ORIGIN"),
        ({"origin": "file://"}, "FORBIDDEN_ORIGIN"),
        ({"origin": "chrome-extension://abc"}, "FORBIDDEN_ORIGIN"),
        ({"sec_fetch_site": "same-origin"}, ""),
        ({"sec_fetch_site": "none"}, ""),
        ({"sec_fetch_site": "same-site"}, "FORBIDDEN_ORIGIN"),
        ({"sec_fetch_site": "cross-site"}, "FORBIDDEN_ORIGIN"),
        ({"sec_fetch_site": "cross-site", "sec_fetch_mode": "no-cors", "sec_fetch_dest": "image"}, "FORBIDDEN_ORIGIN"),
        ({"sec_fetch_site": "something-new"}, "FORBIDDEN_ORIGIN"),
        ({"origin": "http://localhost", "sec_fetch_site": "cross-site"}, "FORBIDDEN_ORIGIN"),
    ],
)
def test_a_page_of_another_site_is_refused(asker: Asker, headers: dict[str, str], code: str) -> None:
    if headers.get("origin") == "https://localhost":
        code = ""  # behind a proxy that ends TLS this server's own page comes so
    assert asker.ask("GET", "/v1/models", **headers).code == code
    assert asker.ask("POST", "/v1/rerank", body=RANKING, **headers).code == code
    assert asker.ask("DELETE", "/v1/documents/none", **headers).code == (code or "DOCUMENT_NOT_FOUND")


def test_a_link_on_another_site_opens_the_page_and_does_nothing(asker: Asker) -> None:
    follows = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate", "sec_fetch_dest": "document"}
    assert asker.ask("GET", "/", **follows).status == 200
    assert asker.ask("POST", "/", body=RANKING, **follows).code == "FORBIDDEN_ORIGIN"
    assert asker.ask("GET", "/", **follows | {"sec_fetch_dest": "iframe"}).code == "FORBIDDEN_ORIGIN"


# --- what never becomes a request --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (b"hello\r\n\r\n", "BAD_HTTP"),
        (b"GET / HTTP/1.1\r\n\r\n", "BAD_HTTP"),
        (b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", "BAD_HTTP"),
        (b"GET http://localhost/v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n", "BAD_HTTP"),
        (b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * (64 << 10), "HEADERS_TOO_LARGE"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 101 + b"\r\n", "HEADERS_TOO_LARGE"),
    ],
)
def test_what_is_no_request_is_answered_like_all_others(asker: Asker, sent: bytes, code: str) -> None:
    assert asker.send(sent).code == code


# --- what a request names ----------------------------------------------------------------------------------


def test_nothing_that_a_request_names_is_opened(asker: Asker, tmp_path: Path) -> None:
    """Of this machine's files, in any form that a request has for an image or a text, and a few that none has."""
    (tmp_path / "page.png").write_bytes(PNG)
    (tmp_path / "notes.txt").write_text("notes")
    opened: list[str] = []
    listens = True

    def hear(event: str, args: tuple[object, ...]) -> None:
        if listens and event in ("open", "os.listdir", "os.scandir", "glob.glob", "shutil.copyfile"):
            opened.append(str(args[0]))

    sys.addaudithook(hear)  # which cannot be taken away again
    (tmp_path / "notes.txt").read_text()
    assert opened == [str(tmp_path / "notes.txt")]
    opened.clear()
    for name in (tmp_path / "page.png", tmp_path / "notes.txt", tmp_path):
        for said in (str(name), f"file://{name}", f"file:{name}", f"FILE://localhost{name}", f"../../../../..{name}"):
            for form in ("image", "url", "bytes", "path", "file", "local_path"):
                for body in ({"query": "x", "documents": [{form: said}]}, {"query": {form: said}, "documents": ["x"]}):
                    answer = asker.ask("POST", "/v1/rerank", body=json.dumps(body).encode())
                    assert (answer.status, answer.code) == (422, "INVALID_INPUT"), (form, said)
            part = {"type": "image_url", "image_url": {"url": said}}
            body = {"query": "x", "documents": [{"content": [part]}]}
            assert asker.ask("POST", "/v1/rerank", body=json.dumps(body).encode()).code == "INVALID_INPUT"
            put = json.dumps({"image": said}).encode()
            assert asker.ask("PUT", "/v1/documents/x", body=put).code == "INVALID_INPUT"
            text = json.dumps({"query": said, "documents": [said, {"text": said}]}).encode()
            assert asker.ask("POST", "/v1/rerank", body=text).status == 200
            assert asker.ask("GET", f"/v1/models/{said}").code in ("MODEL_NOT_FOUND", "NOT_FOUND")
    asker.ask("GET", "/" + "%2e%2e/" * 8 + "etc/passwd")
    listens = False
    assert [name for name in opened if str(tmp_path) in name or "passwd" in name] == []
