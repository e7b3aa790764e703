"""Sockets: who may connect, what is in the way, what an address is called."""

import asyncio
import os
import socket
import stat
from pathlib import Path

import pytest

pytest.importorskip("uvicorn")

from tests.runtime.server.serving import settings_of

from m0kit.errors import M0kitError
from m0kit.server.listening import address, listening


def test_a_socket_of_a_path_is_for_its_user_and_group(tmp_path: Path) -> None:
    path = tmp_path / "m0kit.sock"
    with socket.socket(socket.AF_UNIX) as left:  # by a server that was killed
        left.bind(os.fspath(path))
    settings = settings_of(uds=path)
    with listening(settings) as sockets:
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert address(settings, sockets) == f"unix:{path}"
        with pytest.raises(M0kitError, match="another program listens there already"), listening(settings):
            pass
    assert not path.exists()
    path.write_text("a file of somebody's")
    with pytest.raises(M0kitError, match="is there already, and is no socket"), listening(settings):
        pass
    assert path.read_text() == "a file of somebody's"


def test_a_port_in_use_and_a_host_that_is_none_are_named() -> None:
    with listening(settings_of()) as (sock,):
        port = sock.getsockname()[1]
        match = rf"127\.0\.0\.1, port {port}: another program listens there already"
        with pytest.raises(M0kitError, match=match), listening(settings_of(port=port)):
            pass
    away = settings_of(host="nowhere.invalid", without_keys=True)
    with pytest.raises(M0kitError, match=r"nowhere\.invalid: no such name"), listening(away):
        pass


def test_localhost_is_every_address_of_it_with_one_port() -> None:
    settings = settings_of(host="localhost")
    with listening(settings) as sockets:
        ports = {sock.getsockname()[1] for sock in sockets}
        assert len(ports) != 0
        assert address(settings, sockets) == f"http://localhost:{ports.pop()}"


def test_a_certificate_that_is_none_is_named_before_anything_is_bound(tmp_path: Path) -> None:
    for name in ("cert.pem", "key.pem"):
        (tmp_path / name).write_text("no certificate")
    settings = settings_of(tls_cert=tmp_path / "cert.pem", tls_key=tmp_path / "key.pem")
    with pytest.raises(M0kitError, match="are not a certificate and its private key"), listening(settings):
        pass


def test_a_short_answer_is_sent_at_once() -> None:
    """Head and body are written apart: with Nagle's algorithm the second would wait for the first's acknowledgement."""

    async def no_delay(sock: socket.socket) -> int:
        seen: asyncio.Queue[int] = asyncio.Queue()

        def accepted(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            own = writer.get_extra_info("socket")
            seen.put_nowait(own.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(accepted, sock=sock):
            _, writer = await asyncio.open_connection(*sock.getsockname())
            writer.close()
            return await seen.get()

    with listening(settings_of()) as (sock,):
        assert asyncio.run(no_delay(sock)) != 0
