"""Images by URL: what may be reached, and how much of it. Servers on loopback, names by a resolver of our own."""

import asyncio
import gzip
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("h11", reason="m0kit[serve] is not installed")

from tests.runtime.server.origins import OK, PNG, Origin
from tests.runtime.server.serving import settings_of, until

from m0kit.server import fetching
from m0kit.server.fetching import Fetcher
from m0kit.server.image_hosts import ImageHosts
from m0kit.server.problems import RequestError

PATIENCE_S = 20.0
WHERE = "documents[3].image"
PUBLIC = "93.184.215.14"  # an address of the internet; nothing here sends anything to it


@pytest.fixture
def origin() -> Iterator[Origin]:
    one = Origin()
    yield one
    one.close()


@pytest.fixture
def no_way_out(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Whatever is connected to ends here, and is written down."""
    tried: list[Any] = []

    async def connect(self: Any, sock: Any, address: Any) -> None:
        tried.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(asyncio.SelectorEventLoop, "sock_connect", connect)
    return tried


def fetched(url: str, *hosts: str, max_bytes: int = 1 << 20, **options: Any) -> bytes:
    async def fetch() -> bytes:
        fetcher = Fetcher(hosts, max_bytes, **options)
        try:
            return await fetcher.fetch(url, WHERE)
        finally:
            fetcher.close()

    return asyncio.run(fetch())


def refusal(url: str, *hosts: str, **options: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        fetched(url, *hosts, **options)
    assert str(caught.value).startswith(f"{WHERE}: ")
    assert caught.value.status == 422
    assert "SECRET" not in str(caught.value)
    return caught.value


# --- what is allowed ---------------------------------------------------------------------------------------


def test_an_image_comes_as_it_is_and_nothing_else_goes_out(
    origin: Origin, names: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names["images.test"] = ["127.0.0.1"]
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine images.test login SECRET password SECRET\n")
    netrc.chmod(0o600)
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(netrc))
    at = f"images.test:{origin.port}"
    cookie = b"HTTP/1.1 200 OK\r\nSet-Cookie: SECRET=1\r\nConnection: close\r\n\r\n" + PNG
    origin.answers = [cookie]
    for _ in range(2):
        assert fetched(f"HTTP://Images.TEST:{origin.port}/a b/é?q=%2F#part", f"{at}=127.0.0.1") == PNG
    head = (
        f"GET /a%20b/%C3%A9?q=%2F HTTP/1.1\r\nHost: {at}\r\nUser-Agent: m0kit\r\nAccept: image/*\r\n"
        "Accept-Encoding: identity\r\nConnection: close\r\n\r\n"
    )
    assert origin.heads == [head.encode()] * 2


def test_chunks_and_notes_before_the_answer_are_http(origin: Origin, names: dict[str, list[str]]) -> None:
    names["images.test"] = ["127.0.0.1"]
    origin.answer = (
        b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    origin.answer += b"%x\r\n%b\r\n%x\r\n%b\r\n0\r\nTrailer: x\r\n\r\n" % (100, PNG[:100], len(PNG) - 100, PNG[100:])
    assert fetched(f"http://images.test:{origin.port}", f"images.test:{origin.port}=127.0.0.0/8") == PNG


def test_an_address_that_does_not_answer_gives_way_to_the_next(origin: Origin, names: dict[str, list[str]]) -> None:
    names["images.test"] = ["127.0.0.9", "127.0.0.1"]  # nobody listens at the first
    assert fetched(f"http://images.test:{origin.port}/", f"images.test:{origin.port}=127.0.0.0/8") == PNG


def test_redirects_are_followed_to_hosts_that_are_allowed(origin: Origin, names: dict[str, list[str]]) -> None:
    names |= {"images.test": ["127.0.0.1"], "other.test": ["127.0.0.1"]}
    allowed = [f"{name}:{origin.port}=127.0.0.1" for name in names]
    for locations in (["/b", "c?d", "//other.test:PORT/e"], ["http://other.test:PORT/x"], ["?q=1"]):
        origin.heads.clear()
        to = [one.replace("PORT", str(origin.port)).encode() for one in locations]
        origin.answers = [b"HTTP/1.1 302 Found\r\nLocation: %b\r\nContent-Length: 0\r\n\r\n" % one for one in to]
        assert fetched(f"http://images.test:{origin.port}/a", *allowed) == PNG
        assert len(origin.heads) == len(locations) + 1
        if len(locations) == 3:
            targets = [head.split(b" ")[1] for head in origin.heads]
            assert targets == [b"/a", b"/b", b"/c?d", b"/e"]


# --- what is not reached -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://images.test.evil.test/",
        "http://evil.test/images.test",
        "http://evil.test#images.test",
        "http://evil.test?images.test",
        "http://evil.test\\@images.test/",
        "http://images.test\\@evil.test/",
        "http://images.test\\.evil.test/",
        "http:\\\\images.test/",
        "http:/\\images.test/",
        "http:///images.test/",
        "http:images.test/",
        "//images.test/",
        "http://user@images.test/",
        "http://user:word@images.test/",
        "http://images.test:80@evil.test/",
        "http://images.test@evil.test/",
        "http://@images.test/",
        "http://images.test:/",
        "http://images.test:080/",
        "http://images.test:0/",
        "http://images.test:99999/",
        "http://images.test:8080/",
        "http://images.test:22/",
        "http://images.test./",
        "http://.images.test/",
        "http://images..test/",
        "http://images.test%2eevil.test/",
        "http://images.test%00.evil.test/",
        "http://images.test\x00.evil.test/",
        "http://images.test\t/",
        "http://images.test\n/",
        "http://images.test/\r\nX: y",
        "http://images.test /",
        " http://images.test/",
        "http://ima\u00adges.test/",
        "http://\u24d8mages.test/",
        "http://images\u3002test/",
        "http://\uff49mages.test/",
        "http://ımages.test/",
        "http://image\u017f.test/",
        "http://xn--mages-0ra.test/",
        "http://127.0.0.1/",
        "http://127.1/",
        "http://2130706433/",
        "http://0x7f000001/",
        "http://0x7f.1/",
        "http://0177.0.0.1/",
        "http://017700000001/",
        "http://0/",
        "http://localhost/",
        "http://[::1]/",
        "http://[::]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[::ffff:7f00:1]/",
        "http://[64:ff9b::7f00:1]/",
        "http://[2002:7f00:1::]/",
        "http://[fe80::1%25lo]/",
        "http://[fe80::1%lo]/",
        "http://[images.test]/",
        "http://[v1.images.test]/",
        "http://[::1",
        "http://169.254.169.254/latest/meta-data/",
        "ftp://images.test/",
        "file:///etc/passwd",
        "file://images.test/etc/passwd",
        "gopher://images.test/",
        "data:image/png;base64,AAAA",
        "http",
        "",
    ],
)
def test_what_is_not_exactly_an_allowed_host_is_not_even_looked_up(
    url: str, monkeypatch: pytest.MonkeyPatch, no_way_out: list[Any]
) -> None:
    looked_up: list[Any] = []
    monkeypatch.setattr(fetching.socket, "getaddrinfo", lambda *args, **_: looked_up.append(args))
    assert refusal(url, "images.test").code == "INVALID_INPUT"
    assert (looked_up, no_way_out) == ([], [])


INSIDE = [
    "127.0.0.1", "127.8.9.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "100.64.0.1", "169.254.169.254",
    "192.0.0.1", "192.88.99.1", "198.18.0.1", "192.0.2.1", "224.0.0.1", "239.255.255.250", "240.0.0.1",
    "255.255.255.255", "::1", "::", "::ffff:127.0.0.1", "::ffff:93.184.215.14", "::127.0.0.1", "::93.184.215.14",
    "64:ff9b::7f00:1", "64:ff9b::5db8:d70e", "64:ff9b:1::7f00:1", "2002:7f00:1::", "2002:5db8:d70e::1", "2001::1",
    "2001:db8::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%lo", "2606:4700::1%lo", "fec0::1", "ff02::1",
    "ff0e::1", "100::1", "3fff::1", "not an address",
]  # fmt: skip


@pytest.mark.parametrize("address", INSIDE)
def test_an_allowed_name_at_an_address_that_is_not_public_is_not_connected_to(
    address: str, names: dict[str, list[str]], no_way_out: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    names["images.test"] = [address, address]
    error = refusal("https://images.test/", "images.test")
    assert error.code == "INVALID_INPUT"
    assert address not in str(error)
    assert no_way_out == []
    assert [record.fields for record in caplog.records] == [  # type: ignore[attr-defined]
        {"host": "images.test", "address": address}
    ]


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "2606:4700::1111", "2a00:1450:4001::2004"])
def test_a_public_address_is_connected_to_and_those_beside_it_are_not(
    address: str, names: dict[str, list[str]], no_way_out: list[Any]
) -> None:
    names["images.test"] = ["127.0.0.1", address, "10.0.0.1", "::1"]
    assert refusal("https://images.test/", "images.test").code == "FETCH_FAILED"
    assert [(one[0], one[1]) for one in no_way_out] == [(address, 443)]


def test_an_allowed_name_that_is_this_machine_gets_no_byte(origin: Origin, names: dict[str, list[str]]) -> None:
    names["images.test"] = ["127.0.0.1"]
    error = refusal(f"http://images.test:{origin.port}/", f"images.test:{origin.port}")
    assert "no address that it may have" in str(error)
    assert (origin.num_connections, origin.num_bytes) == (0, 0)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_the_socket_is_asked_whom_it_reached_before_a_byte_is_sent(
    scheme: str, origin: Origin, names: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What between here and there turns a public address into this machine: a rule of a firewall, a library."""
    names["images.test"] = [PUBLIC]
    connect = asyncio.SelectorEventLoop.sock_connect

    async def elsewhere(self: Any, sock: Any, address: Any) -> None:
        assert address == (PUBLIC, origin.port)
        await connect(self, sock, ("127.0.0.1", origin.port))

    monkeypatch.setattr(asyncio.SelectorEventLoop, "sock_connect", elsewhere)
    error = refusal(f"{scheme}://images.test:{origin.port}/", f"images.test:{origin.port}")
    assert "no address that it may have" in str(error)
    until(lambda: origin.has_ended)  # it has read to the end
    assert origin.num_bytes == 0


def test_a_name_that_changes_between_two_looks_is_looked_up_once_and_each_time_held(
    origin: Origin, names: dict[str, list[str]], no_way_out: list[Any]
) -> None:
    names["again"] = [PUBLIC, "127.0.0.1"]  # the first for the check, the second for the connection: DNS rebinding
    assert refusal(f"http://again:{origin.port}/", f"again:{origin.port}").code == "FETCH_FAILED"
    assert [one[0] for one in no_way_out] == [PUBLIC]
    assert refusal(f"http://again:{origin.port}/", f"again:{origin.port}").code == "INVALID_INPUT"
    assert [one[0] for one in no_way_out] == [PUBLIC]
    assert (origin.num_connections, origin.num_bytes) == (0, 0)


@pytest.mark.parametrize(
    ("location", "code"),
    [
        ("http://127.0.0.1:PORT/", "INVALID_INPUT"),
        ("//127.0.0.1:PORT/", "INVALID_INPUT"),
        ("http://localhost:PORT/", "INVALID_INPUT"),
        ("http://inside.test:PORT/", "INVALID_INPUT"),  # allowed by name, and at an address that it may not have
        ("http://[::1]:PORT/", "INVALID_INPUT"),
        ("http://2130706433:PORT/", "INVALID_INPUT"),
        ("http://images.test:PORT@127.0.0.1:PORT/", "INVALID_INPUT"),
        ("http:\\\\127.0.0.1:PORT/", "INVALID_INPUT"),
        ("\\\\127.0.0.1:PORT/", "INVALID_INPUT"),
        ("/\\127.0.0.1:PORT/", "INVALID_INPUT"),
        ("http://user:word@images.test:PORT/", "INVALID_INPUT"),
        ("\thttp://127.0.0.1:PORT/", "INVALID_INPUT"),
        ("file:///etc/passwd", "INVALID_INPUT"),
        ("ftp://images.test:PORT/", "INVALID_INPUT"),
        ("data:image/png;base64,AAAA", "INVALID_INPUT"),
        ("javascript:alert(1)", "INVALID_INPUT"),
        ("\xff", "FETCH_FAILED"),
    ],
)
def test_a_redirect_is_held_to_the_same_rules(
    location: str, code: str, origin: Origin, names: dict[str, list[str]]
) -> None:
    names |= {"images.test": ["127.0.0.1"], "inside.test": ["127.0.0.1"]}
    inside = Origin()
    origin.answer = b"HTTP/1.1 307 Temporary Redirect\r\nLocation: %b\r\n\r\n" % location.replace(
        "PORT", str(inside.port)
    ).encode("latin-1")
    allowed = (f"images.test:{origin.port}=127.0.0.1", f"inside.test:{inside.port}")
    error = refusal(f"http://images.test:{origin.port}/", *allowed)
    inside.close()
    assert error.code == code
    assert (len(origin.heads), inside.num_connections, inside.num_bytes) == (1, 0, 0)


def test_redirects_end(origin: Origin, names: dict[str, list[str]]) -> None:
    names["images.test"] = ["127.0.0.1"]
    allowed = f"images.test:{origin.port}=127.0.0.1"
    for answer, num_asked in ((b"Location: /again", 4), (b"X: y", 1), (b"Location: /a\r\nLocation: /b", 1)):
        origin.heads.clear()
        origin.answer = b"HTTP/1.1 301 Moved\r\n%b\r\nContent-Length: 0\r\n\r\n" % answer
        assert refusal(f"http://images.test:{origin.port}/", allowed).code == "FETCH_FAILED"
        assert len(origin.heads) == num_asked


def test_a_name_that_nobody_knows_and_a_host_that_is_down_are_said(names: dict[str, list[str]]) -> None:
    assert "whose address is not known" in str(refusal("http://nobody.test/", "nobody.test"))
    names["images.test"] = ["127.0.0.1"]
    with socket.socket() as bound:  # and does not listen
        bound.bind(("127.0.0.1", 0))
        at = f"images.test:{bound.getsockname()[1]}"
        assert "does not answer" in str(refusal(f"http://{at}/", f"{at}=127.0.0.1"))


_PARTS = [
    "http", "https", "HTTP", ":", "//", "/", "\\", "@", "?", "#", ":80", ":443", ":08", "[", "]", "::1", "%", "%00",
    "%2f", "%40", "\t", "\n", " ", "a.test", "b.test", "A.Test", ".", "xn--", "127.0.0.1", "0x7f.1", "é", "\u3002",
    "\uff0f", "\u2024", "ſ", "&", ";", "user", "1",
]  # fmt: skip
_URLS = st.lists(st.sampled_from(_PARTS), max_size=10).map("".join)
_WHOLE = st.tuples(
    st.sampled_from(["http://", "https://", "HTTP://", "//", "http:/", ""]), st.one_of(st.just(""), _URLS),
    st.sampled_from(["a.test", "b.test", "a.test:80", "A.TEST", ""]), st.sampled_from(["", "", "/", "?", "#"]), _URLS,
).map("".join)  # fmt: skip


@settings(max_examples=300)
@given(url=_WHOLE)
def test_what_is_looked_up_is_what_other_readers_of_the_url_see(url: str) -> None:
    """CVE-2026-24779: a check and a fetch whose parsers did not agree. What they could disagree on is refused."""
    hosts: list[str] = []

    def look_up(host: str, *_: Any, **__: Any) -> Any:
        hosts.append(host)
        raise socket.gaierror

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", look_up)
        error = refusal(url, "a.test", "b.test")
    if hosts:
        (host,) = hosts
        assert host in ("a.test", "b.test")
        assert urlsplit(url).hostname == host
        assert (urlsplit(url).username, urlsplit(url).password) == (None, None)
        assert urlsplit(url).port in (None, 80, 443)
    else:
        assert error.code == "INVALID_INPUT"


# --- what comes --------------------------------------------------------------------------------------------


def _endless(begin: bytes, piece: bytes, every_s: float = 0.0) -> Callable[[Any], None]:
    def talk(sock: Any) -> None:
        sock.sendall(begin)
        while True:  # until it is hung up on
            sock.sendall(piece)
            time.sleep(every_s)

    return talk


def _silent(sock: Any) -> None:
    while sock.recv(1):  # until it is hung up on
        pass


HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(PNG), PNG)
LARGE = HEAD + b"Content-Length: 9999999\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "code", "told"),
    [
        (LARGE + PNG, "TOO_MUCH", "has 9999999 bytes"),
        (_endless(HEAD + b"\r\n" + PNG, b"x" * 4096), "TOO_MUCH", "more than"),
        (_endless(CHUNKED, b"1000\r\n" + b"x" * 4096 + b"\r\n"), "TOO_MUCH", "more than"),
        (_endless(CHUNKED, b"1\r\nx\r\n" * 5000), "FETCH_FAILED", "too small"),
        (_endless(HEAD, b"X: " + b"y" * 100 + b"\r\n"), "FETCH_FAILED", "no whole answer"),
        (_endless(HEAD, b"y" * 100), "FETCH_FAILED", "no whole answer"),
        (_endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), "FETCH_FAILED", "no whole answer"),
        (_endless(b"", b"SSH-2.0-SECRET\r\n"), "FETCH_FAILED", "no whole answer"),
        (_endless(HEAD, b"X: y\r\n", 0.01), "FETCH_FAILED", "within 0.3 seconds"),
        (_endless(HEAD + b"\r\n" + PNG, b"x", 0.01), "FETCH_FAILED", "within 0.3 seconds"),
        (_silent, "FETCH_FAILED", "within 0.3 seconds"),
        (HEAD + b"Content-Length: 5000\r\n\r\n" + PNG[:2000], "FETCH_FAILED", "no whole answer"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n" + PNG[:3], "FETCH_FAILED", "no whole answer"),
        (b"", "FETCH_FAILED", "no whole answer"),
        (b"SECRET banner\r\n", "FETCH_FAILED", "no whole answer"),
        (b"HTTP/1.1 404 SECRET\r\nContent-Length: 6\r\n\r\nSECRET", "FETCH_FAILED", "with status 404"),
        (b"HTTP/1.1 304 Not Modified\r\n\r\n", "FETCH_FAILED", "with status 304"),
        (b"HTTP/1.1 206 Partial Content\r\nContent-Length: %d\r\n\r\n" % len(PNG) + PNG, "FETCH_FAILED", "status 206"),
        (HEAD + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(bytes(1 << 22)), "FETCH_FAILED", "compressed"),
        (HEAD + b"Content-Encoding: identity, br\r\n\r\n" + PNG, "FETCH_FAILED", "compressed"),
        (HEAD + b"\r\n" + gzip.compress(bytes(1 << 22)), "INVALID_INPUT", "no image in a format"),
        (HEAD + b"Content-Type: image/png\r\n\r\n<html>SECRET</html>", "INVALID_INPUT", "no image in a format"),
        (_endless(HEAD + b"\r\n", b"<html>SECRET</html>" * 100), "INVALID_INPUT", "no image in a format"),
        (HEAD + b"Content-Length: 0\r\n\r\n", "INVALID_INPUT", "no image in a format"),
    ],
)  # fmt: skip
def test_what_comes_is_bounded_in_bytes_and_time_and_never_quoted(
    answer: Any, code: str, told: str, origin: Origin, names: dict[str, list[str]]
) -> None:
    names["images.test"] = ["127.0.0.1"]
    origin.answer = answer
    slow = "within" in told
    error = refusal(
        f"http://images.test:{origin.port}/", f"images.test:{origin.port}=127.0.0.1", max_bytes=200_000,
        timeout_s=0.3 if slow else PATIENCE_S,
    )  # fmt: skip
    assert (error.code, told in str(error)) == (code, True), str(error)
    until(lambda: origin.has_ended)  # the connection was ended, not only forgotten


_ANSWERS = [
    OK,
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(PNG), PNG),
    b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n" + OK,
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n" + PNG,
    b"HTTP/1.0 200 OK\r\n\r\n" + PNG,
]
_TOKENS = st.sampled_from([
    b"\r\n", b"\r\n\r\n", b"\n", b"\0", b":", b" ", b"HTTP/1.1 ", b"HTTP/2 ", b"999", b"-1", b"0", b"chunked", b";",
    b"\xff", b"Content-Length: 5\r\n", b"Transfer-Encoding: gzip\r\n", b"Content-Encoding: gzip\r\n",
    b"Location: //x\r\n", PNG[:9],
])  # fmt: skip


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    answer=st.sampled_from(_ANSWERS),
    changes=st.lists(st.tuples(st.integers(0, 150), st.integers(0, 20), _TOKENS), max_size=4),
    end=st.one_of(st.none(), st.integers(0, 300)),
)
def test_whatever_a_server_answers_is_an_image_or_a_refusal(
    origin: Origin, names: dict[str, list[str]], answer: bytes, changes: list[tuple[int, int, bytes]], end: int | None
) -> None:
    names["images.test"] = ["127.0.0.1"]
    for place, length, put in changes:
        answer = answer[:place] + put + answer[place + length :]
    origin.answer = answer[:end]
    url, allowed = f"http://images.test:{origin.port}/", f"images.test:{origin.port}=127.0.0.1"
    problem: RequestError | None = None
    data = b""
    try:
        data = fetched(url, allowed, max_bytes=1 << 16, timeout_s=PATIENCE_S)
    except RequestError as error:
        problem = error
    if problem is not None:
        assert (problem.status, problem.where) == (422, WHERE)
    else:
        assert 0 < len(data) <= 1 << 16


def test_it_is_read_no_further_than_it_has_to_be(origin: Origin, names: dict[str, list[str]]) -> None:
    names["images.test"] = ["127.0.0.1"]
    sent = 0

    def talk(sock: Any) -> None:
        nonlocal sent
        sock.sendall(HEAD + b"\r\n" + PNG)
        while True:
            sock.sendall(b"x" * 65536)
            sent += 65536

    origin.answer = talk
    refusal(f"http://images.test:{origin.port}/", f"images.test:{origin.port}=127.0.0.1", max_bytes=100_000)
    until(lambda: origin.has_ended)
    assert sent < 16 << 20  # what the system and the stream hold of it


def test_a_handshake_that_does_not_come_is_not_waited_for(origin: Origin, names: dict[str, list[str]]) -> None:
    names["images.test"] = ["127.0.0.1"]
    origin.greets = False
    at = f"images.test:{origin.port}"
    assert "within 0.3 seconds" in str(refusal(f"https://{at}/", f"{at}=127.0.0.1", timeout_s=0.3))
    until(lambda: origin.has_ended)


def test_redirects_share_one_time(origin: Origin, names: dict[str, list[str]]) -> None:
    names["images.test"] = ["127.0.0.1"]

    def talk(sock: Any) -> None:
        origin.is_over.wait(0.2)
        sock.sendall(b"HTTP/1.1 302 Found\r\nLocation: /more\r\nContent-Length: 0\r\n\r\n")

    origin.answer = talk
    error = refusal(f"http://images.test:{origin.port}/", f"images.test:{origin.port}=127.0.0.1", timeout_s=0.3)
    assert "within 0.3 seconds" in str(error)


def test_no_more_than_a_few_are_fetched_at_a_time(origin: Origin, names: dict[str, list[str]]) -> None:
    names["images.test"] = ["127.0.0.1"]
    now, most, lock = 0, 0, threading.Lock()

    def talk(sock: Any) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        origin.is_over.wait(0.02)
        with lock:
            now -= 1
        sock.sendall(OK)

    origin.answer = talk

    async def all_of_them() -> list[bytes]:
        fetcher = Fetcher([f"images.test:{origin.port}=127.0.0.1"], 1 << 20)
        urls = [f"http://images.test:{origin.port}/{number}" for number in range(3 * fetching.MAX_FETCHES)]
        found = await asyncio.gather(*(fetcher.fetch(url, WHERE) for url in urls))
        fetcher.close()
        return found

    before = threading.active_count()
    assert asyncio.run(all_of_them()) == [PNG] * 3 * fetching.MAX_FETCHES
    assert 1 < most <= fetching.MAX_FETCHES
    assert threading.active_count() <= before + 3 * fetching.MAX_FETCHES  # the origin's own


def test_who_waits_no_longer_leaves_nothing_behind(origin: Origin, names: dict[str, list[str]]) -> None:
    names["images.test"] = ["127.0.0.1"]
    origin.answer = _endless(HEAD + b"\r\n" + PNG, b"x", 0.01)

    async def leave() -> None:
        fetcher = Fetcher([f"images.test:{origin.port}=127.0.0.1"], 1 << 20)
        task = asyncio.create_task(fetcher.fetch(f"http://images.test:{origin.port}/", WHERE))
        while not origin.heads:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        fetcher.close()

    asyncio.run(leave())
    until(lambda: origin.has_ended)


# --- TLS ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    try:
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
             "-keyout", key, "-out", cert, "-subj", "/CN=images.test", "-addext", "subjectAltName=DNS:images.test"],
            check=True, capture_output=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the openssl command to make a certificate")
    return cert, key


def test_a_certificate_is_checked_for_the_name_that_was_asked(
    origin: Origin, names: dict[str, list[str]], certificate: tuple[Path, Path]
) -> None:
    names |= {"images.test": ["127.0.0.1"], "other.test": ["127.0.0.1"]}
    origin.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    origin.tls.load_cert_chain(*certificate)
    allowed = [f"{name}:{origin.port}=127.0.0.1" for name in names]
    trusted = {"cafile": str(certificate[0])}
    assert fetched(f"https://images.test:{origin.port}/", *allowed, **trusted) == PNG
    assert len(origin.heads) == 1
    for url, options in (("images.test", {}), ("other.test", trusted)):
        error = refusal(f"https://{url}:{origin.port}/", *allowed, **options)
        assert "whose certificate is not trusted" in str(error)
    assert len(origin.heads) == 1
    origin.answer = b"HTTP/1.1 302 Found\r\nLocation: http://images.test:%d/\r\n\r\n" % origin.port
    error = refusal(f"https://images.test:{origin.port}/", *allowed, **trusted)
    assert "redirects from https to http" in str(error)
    origin.tls = None
    assert "no TLS connection" in str(refusal(f"https://images.test:{origin.port}/", *allowed))


# --- what an operator writes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "host", "port", "address", "is_allowed"),
    [
        ("images.test", "images.test", 80, PUBLIC, True),
        ("images.test", "images.test", 443, PUBLIC, True),
        ("Images.TEST", "images.test", 443, PUBLIC, True),
        ("images.test", "images.test", 8080, PUBLIC, False),
        ("images.test", "test", 443, PUBLIC, False),
        ("images.test:8080", "images.test", 8080, PUBLIC, True),
        ("images.test:8080", "images.test", 80, PUBLIC, False),
        ("scans=10.1.2.0/24", "scans", 80, "10.1.2.77", True),
        ("scans=10.1.2.0/24", "scans", 80, "10.1.3.77", False),
        ("scans=10.1.2.0/24", "scans", 80, PUBLIC, False),  # it has an address, and then no other one
        ("scans=10.1.2.0/24", "scans", 80, "127.0.0.1", False),
        ("scans:81=fd12::/64", "scans", 81, "fd12::7", True),
        ("scans:81=fd12::/64", "scans", 81, "fd12::7%eth0", False),
        ("scans=fd12::/64", "scans", 80, "::ffff:10.0.0.1", False),
        ("10.1.2.3", "10.1.2.3", 80, "10.1.2.3", True),
        ("10.1.2.3", "10.1.2.3", 80, "10.1.2.4", False),
        ("[fd12:0::7]:81", "fd12::7", 81, "fd12::7", True),
        ("images.test=93.184.0.0/16", "images.test", 80, PUBLIC, True),
        ("images.test=93.184.0.0/16", "images.test", 80, "8.8.8.8", False),
        ("images.test=8.0.0.0/6", "images.test", 80, "10.1.2.3", False),  # which is in that range, and not public
        ("localhost=127.0.0.0/8", "localhost", 80, "127.0.0.1", True),
    ],
)
def test_an_entry_allows_what_it_says(entry: str, host: str, port: int, address: str, is_allowed: bool) -> None:
    assert ImageHosts([entry]).allows(host, port, address) is is_allowed
    assert ImageHosts(["other.test", entry]).allows(host, port, address) is is_allowed
    assert not ImageHosts([]).allows(host, port, address)


@pytest.mark.parametrize(
    "entry",
    [
        "", "*", "*.test", ".test", "test.", "a..b", "-a.test", "a-.test", "a_b.test", "a b", "http://images.test",
        "images.test/", "images.test/path", "user@images.test", "images.test:", "images.test:0", "images.test:65536",
        "images.test:80:81", "images.test=", "images.test=x", "images.test=10.0.0.1/8", "images.test=0.0.0.0/0",
        "images.test=10.0.0.0/7", "images.test=169.254.169.254", "images.test=224.0.0.1", "images.test=0.0.0.0",
        "images.test=::/0", "images.test=64:ff9b::/96", "images.test=2002::/16", "images.test=fe80::/10",
        "images.test=::ffff:10.0.0.1", "images.test=ff0e::1", "0177.0.0.1", "2130706433", "0x7f.1", "127.1", "1.2.3",
        "169.254.169.254", "0.0.0.0", "[::]", "[fe80::1%lo]", "::1", "bücher.test", "a" * 64 + ".test",
        ".".join(["a" * 60] * 5), "ımages.test", "image\u017f.test", "images.test\n",
    ],
)  # fmt: skip
def test_what_is_no_entry_is_said_when_the_server_starts(entry: str) -> None:
    with pytest.raises(ValueError, match=r"(?s)--image-host .*(expected the exact name|neither a range)"):
        settings_of(image_hosts=("images.test", entry))
