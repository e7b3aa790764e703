"""Connections over real sockets: what a client does with bytes and time costs that client alone."""

import asyncio
import json
import socket
import threading
from http.client import HTTPException
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from tests.runtime.server.serving import PATIENCE_S, served, settings_of, until

from m0kit.server.bodies import read_body
from m0kit.server.guard import Guard, call_of
from m0kit.server.metrics import Metrics

SHORT_S = 0.3  # a limit; what is awaited may take PATIENCE_S
LARGE = 64 << 20


async def say(send: Any, body: bytes, status: int = 200, headers: Any = ()) -> None:
    told = [(b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": told})
    await send({"type": "http.response.body", "body": body})


class Small:
    """An app: /read reads the body and says its length, /large says much, /wait until it may, all else "hello"."""

    def __init__(self) -> None:
        self.may_go = threading.Event()
        self.waiting = threading.Event()
        self.seen: list[str] = []
        self.limit_s = SHORT_S

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while True:
                message = await receive()
                await send({"type": f"{message['type']}.complete"})
                if message["type"] == "lifespan.shutdown":
                    return
        self.seen.append(scope["path"])
        if scope["path"] == "/read":
            body = await read_body(receive, 1 << 20, self.limit_s, call_of(scope).hold)
            await say(send, str(len(body)).encode())
        elif scope["path"] == "/large":
            await say(send, b"x" * LARGE)
        elif scope["path"] == "/wait":
            self.waiting.set()
            while not self.may_go.is_set():
                await asyncio.sleep(0.01)
            await say(send, b"waited")
        else:
            await say(send, b"hello", headers=[(b"content-type", b"text/plain")])


def guarded(small: Small, **changes: Any) -> Guard:
    return Guard(small, settings_of(**changes), Metrics())


def get(path: str = "/", more: str = "", version: str = "1.1") -> bytes:
    return f"GET {path} HTTP/{version}\r\nHost: localhost\r\n{more}\r\n".encode()


def error_of(answer: tuple[int, dict[str, str], bytes]) -> tuple[int, str]:
    status, headers, body = answer
    assert headers["content-type"] == "application/json"
    assert headers["connection"] == "close"
    found = json.loads(body)
    assert found["detail"] == found["message"] == found["error"]["message"]
    assert headers["x-request-id"] == found["request_id"]
    return status, found["code"]


def test_one_connection_takes_requests_one_after_the_other() -> None:
    with served(Small()) as at:
        client = at.ask(get())
        for _ in range(3):
            status, headers, body = client.answer()
            assert (status, body) == (200, b"hello")
            assert "date" in headers
            assert "server" not in headers
            client.send(get())


def test_pipelined_requests_are_answered_in_order() -> None:
    with served(Small()) as at:
        client = at.ask(get("/large") + get() + get("/x", "Connection: close\r\n"))
        rest = client.rest()
        heads = [part.partition(b"\r\n")[0] for part in rest.split(b"HTTP/1.1 ")[1:]]
        assert heads == [b"200 OK"] * 3
        assert rest.endswith(b"hello")
        assert rest.count(b"x" * 1000) == LARGE // 1000


def test_http_1_0_is_answered_and_closed() -> None:
    with served(guarded(Small())) as at:
        rest = at.ask(get(version="1.0")).rest()
        assert rest.startswith(b"HTTP/1.1 200 OK\r\n")
        assert rest.endswith(b"\r\n\r\nhello")


@pytest.mark.parametrize("wanted", ["websocket", "h2c", "TLS/1.2"])
def test_an_upgrade_is_passed_over(wanted: str, caplog: pytest.LogCaptureFixture) -> None:
    with served(guarded(Small())) as at:
        more = f"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: {wanted}\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"
        more += "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
        client = at.ask(get("/", more))
        assert client.answer()[::2] == (200, b"hello")
        client.send(get())
        assert client.answer()[::2] == (200, b"hello")
    assert not caplog.messages


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50) + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"GET /\x01 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET http://localhost/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"CONNECT example.org:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"hello\r\n\r\n",
    ],
)
def test_what_is_no_request_is_answered_in_json(sent: bytes) -> None:
    small = Small()
    with served(guarded(small)) as at:
        status, headers, body = at.ask(sent).answer()
        assert (status, json.loads(body)["code"]) == (400, "BAD_HTTP")
        assert headers["content-type"] == "application/json"
        assert at.ask(get()).answer()[0] == 200
        assert small.seen == ["/"]


def test_a_bad_piece_of_a_body_ends_that_request() -> None:
    with served(guarded(Small())) as at:
        head = b"POST /read HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        assert error_of(at.ask(head + b"2\r\nab\r\nnot hex\r\n").answer()) == (400, "BAD_HTTP")


@pytest.mark.parametrize("more", ["X: " + "y" * 100_000 + "\r\n", "".join(f"X{i}: y\r\n" for i in range(101))])
def test_a_flood_of_headers_is_refused(more: str) -> None:
    small = Small()
    with served(guarded(small)) as at:
        status, _, body = at.ask(get("/", more)).answer()
        assert (status, json.loads(body)["code"]) == (431, "HEADERS_TOO_LARGE")
        client = at.ask(get("/", more)[: 40_000 if len(more) > 50_000 else -2] + b"" * 2)
        if len(more) > 50_000:  # which ends nowhere
            assert error_of(client.answer()) == (431, "HEADERS_TOO_LARGE")
    assert not small.seen


@pytest.mark.parametrize("begun", [b"", b"G", b"GET / HTTP/1.1\r\nHost: localhost\r\n"])
def test_a_head_that_does_not_come_is_not_waited_for(begun: bytes) -> None:
    with served(Small(), read_timeout_s=SHORT_S) as at:
        client = at.ask(begun)
        if begun:
            assert error_of(client.answer()) == (408, "TOO_SLOW")
        assert client.rest() == b""


def test_a_head_that_drips_is_not_waited_for() -> None:
    with served(Small(), read_timeout_s=SHORT_S) as at:
        assert at.ask().drip(b"G")
        until(lambda: not at.server.server_state.connections)


def test_a_second_head_that_stops_in_the_middle_is_not_waited_for() -> None:
    with served(Small(), read_timeout_s=SHORT_S) as at:
        first, _, second = at.ask(get() + b"GET / HT").rest().partition(b"hello")
        assert first.startswith(b"HTTP/1.1 200 ")
        assert second.startswith(b"HTTP/1.1 408 ")
        client = at.ask(get())
        assert client.answer()[0] == 200
        client.send(b"GET /")
        assert error_of(client.answer()) == (408, "TOO_SLOW")


def test_a_connection_that_asks_nothing_more_is_closed() -> None:
    with served(Small(), keep_alive_s=SHORT_S) as at:
        client = at.ask(get())
        assert client.answer()[0] == 200
        assert client.rest() == b""


def test_a_body_that_drips_is_not_waited_for() -> None:
    with served(guarded(Small())) as at:
        client = at.ask(b"POST /read HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nab")
        assert error_of(client.answer()) == (408, "TOO_SLOW")
        client.send(b"c" * 998)  # which is read and forgotten
        client.sock.shutdown(socket.SHUT_WR)
        assert client.rest() == b""


def test_a_body_that_nobody_reads_ends_the_connection() -> None:
    with served(Small(), read_timeout_s=SHORT_S) as at:
        client = at.ask(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\nab")
        assert client.answer()[::2] == (200, b"hello")
        assert client.drip(b"c")


def test_who_sends_much_in_vain_still_reads_why() -> None:
    with served(guarded(Small(), max_body_bytes=1000)) as at:
        for head in (f"Content-Length: {LARGE}", "Transfer-Encoding: chunked"):
            client = at.ask(f"POST /read HTTP/1.1\r\nHost: localhost\r\n{head}\r\n\r\n".encode())
            if head.startswith("T"):
                client.send(b"%x\r\n" % LARGE)
            client.send(b"x" * LARGE)
            assert error_of(client.answer()) == (413, "BODY_TOO_LARGE")


def test_who_waits_to_be_told_to_continue_is_told_so_or_refused() -> None:
    with served(guarded(Small(), max_body_bytes=1000)) as at:
        head = "POST /read HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: {}\r\n\r\n"
        client = at.ask(head.format(2).encode())
        assert client.sock.recv(1000).startswith(b"HTTP/1.1 100 ")
        client.send(b"ab")
        assert client.answer()[::2] == (200, b"2")
        assert error_of(at.ask(head.format(2000).encode()).answer()) == (413, "BODY_TOO_LARGE")


def test_an_answer_that_nobody_takes_is_given_up() -> None:
    for app in (Small(), guarded(Small())):
        with served(app, read_timeout_s=SHORT_S) as at:
            client = at.ask(get("/large"))
            until(lambda at=at: at.server.server_state.connections)
            until(lambda at=at: not at.server.server_state.connections)
            assert len(client.rest()) < LARGE


def test_answers_that_wait_for_their_clients_are_held_like_bodies() -> None:
    small = Small()
    with served(guarded(small, max_held_bytes=LARGE * 3 // 2), read_timeout_s=PATIENCE_S) as at:
        slow = at.ask(get("/large"))
        until(lambda: at.server.server_state.connections)
        assert slow.sock.recv(12) == b"HTTP/1.1 200"
        status, headers, body = at.ask(get("/large")).answer()
        assert (status, json.loads(body)["code"], "retry-after" in headers) == (429, "OVERLOADED", True)
        assert at.ask(get()).answer()[0] == 200
        slow.close()
        until(lambda: at.ask(get("/large")).sock.recv(12) == b"HTTP/1.1 200")


def test_an_answer_that_is_taken_slowly_arrives() -> None:
    with served(guarded(Small()), read_timeout_s=SHORT_S) as at:
        client = at.ask(get("/large"))
        length = 0
        while length < LARGE:
            piece = client.sock.recv(1 << 20)
            assert piece
            length += len(piece)
            threading.Event().wait(0.002)


def test_one_connection_too_many_is_told_so() -> None:
    small = Small()
    with served(small, max_connections=2, read_timeout_s=PATIENCE_S) as at:
        held = [at.ask(get("/wait")), at.ask(b"GET / HT")]
        until(lambda: len(at.server.server_state.connections) == 2)
        status, headers, body = (client := at.ask(get())).answer()
        assert (status, json.loads(body)["code"]) == (503, "TOO_MANY_CONNECTIONS")
        assert headers["retry-after"] == "1"
        client.close()
        assert b'm0kit_rejected_total{reason="too_many_connections"} 1.0' in at.metrics.render()[0]
        held[1].close()
        until(lambda: len(at.server.server_state.connections) == 1)
        assert at.ask(get()).answer()[::2] == (200, b"hello")
        small.may_go.set()
        assert held[0].answer()[::2] == (200, b"waited")


def test_a_flood_of_connections_leaves_the_server_as_it_was() -> None:
    with served(Small(), max_connections=5, read_timeout_s=PATIENCE_S) as at:
        flood = [socket.create_connection(("127.0.0.1", at.port), timeout=PATIENCE_S) for _ in range(100)]
        until(lambda: len(at.server.server_state.connections) <= 2 * 5)
        for sock in flood:
            sock.close()
        until(lambda: not at.server.server_state.connections)

        def answered() -> bool:
            """Some of the flood may still wait in the system to be accepted, and take the room."""
            try:
                return at.ask(get()).answer()[0] == 200
            except OSError:  # it gave way to them
                return False

        until(answered)


def test_a_connection_that_asks_nothing_gives_way() -> None:
    with served(Small(), max_connections=2, read_timeout_s=PATIENCE_S) as at:
        idle = [at.ask(get()) for _ in range(2)]
        assert [client.answer()[0] for client in idle] == [200, 200]
        assert at.ask(get()).answer()[0] == 200
        until(lambda: len(at.server.server_state.connections) == 2)


def test_stopping_lets_requests_end_and_takes_no_more() -> None:
    small = Small()
    with served(guarded(small)) as at:
        idle, begun, running = at.ask(get()), at.ask(b"GET / HT"), at.ask(get("/wait"))
        assert idle.answer()[0] == 200
        assert small.waiting.wait(PATIENCE_S)
        at.server.should_exit = True
        assert (idle.rest(), begun.rest()) == (b"", b"")
        assert at.stopped == [True]
        with pytest.raises(ConnectionRefusedError):
            at.ask()
        assert at.thread.is_alive()
        small.may_go.set()
        status, headers, body = running.answer()
        assert (status, headers["connection"], body) == (200, "close", b"waited")
        at.stop()


def test_stopping_waits_no_longer_than_it_may_and_says_so() -> None:
    small = Small()
    with served(guarded(small), shutdown_timeout_s=SHORT_S) as at:
        running = at.ask(get("/wait"))
        taker = at.ask(get("/large"))
        assert small.waiting.wait(PATIENCE_S)
        until(lambda: len(small.seen) == 2)
        at.server.should_exit = True
        status, headers, body = running.answer()
        assert (status, json.loads(body)["code"], headers["retry-after"]) == (503, "STOPPING", "1")
        at.stop()
        taker.close()


def test_a_client_that_hangs_up_is_told_to_the_app() -> None:
    gone = threading.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

    with served(app) as at:
        at.ask(get()).close()
        assert gone.wait(PATIENCE_S)


def test_an_idle_connection_makes_room_for_one_other() -> None:
    """However many are accepted before it is seen to have ended."""
    with served(guarded(Small()), max_connections=2) as at:
        for _ in range(2):
            assert at.ask(get()).answer()[0] == 200  # and stays, asking nothing
        (loop,) = {each.loop for each in at.server.server_state.connections}
        may_go = threading.Event()
        loop.call_soon_threadsafe(may_go.wait)
        late = [at.ask(get()) for _ in range(12)]
        may_go.set()
        assert sum(_is_answered(client) for client in late) == 2


def _is_answered(client: Any) -> bool:
    try:
        return bool(client.answer()[0] == 200)
    except (OSError, HTTPException):
        return False
