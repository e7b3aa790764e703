"""Where a server is reached. Owns binding its sockets, what an address is called, and that its certificate can be used.

with listening(settings) as sockets:
    address(settings, sockets)      # "http://127.0.0.1:8080"
"""

import errno
import os
import socket
import ssl
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from m0kit.errors import M0kitError
from m0kit.server.settings import Settings

BACKLOG: Final = 2048  # connections that wait to be accepted
# What the system says → what is wrong with an address, and what to do.
_WHY: Final = {
    errno.EADDRINUSE: "another program listens there already. Stop it, or choose another --port",
    errno.EACCES: "may not be listened at by this user. Choose a --port from 1024 on",
    errno.EADDRNOTAVAIL: "is no address of this machine. Choose another --host",
}


@contextmanager
def listening(settings: Settings) -> Iterator[list[socket.socket]]:
    """Sockets that are bound and listen: all addresses of the host, or the Unix socket, whose file goes at the end.

    Raises M0kitError, for a certificate that cannot be used too, before anything is bound.
    """
    check_certificate(settings)
    with ExitStack() as stack:
        if settings.uds is None:
            yield [stack.enter_context(one) for one in _bound(settings.host, settings.port)]
        else:
            yield [stack.enter_context(unix_socket(settings.uds))]


def address(settings: Settings, sockets: list[socket.socket]) -> str:
    """Where it is, without a path, which is a proxy's; of a socket in a file that file."""
    if settings.uds is not None:
        return f"unix:{settings.uds}"
    port = sockets[0].getsockname()[1]
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{'https' if settings.tls_cert else 'http'}://{host}:{port}"


def check_certificate(settings: Settings) -> None:
    """Raises M0kitError where there is one that cannot be used."""
    if settings.tls_cert is None:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for path in (settings.tls_cert, settings.tls_key):
        if path is None or not os.access(path, os.R_OK):
            raise M0kitError(f"{path}: cannot be read. Give --tls-cert and --tls-key as files in PEM.")
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key, password="")  # else it would ask the terminal
    except (ssl.SSLError, OSError, ValueError):
        raise M0kitError(
            f"{settings.tls_cert} and {settings.tls_key}: are not a certificate and its private key in PEM, or the "
            "key needs a password. Give a key without one, in a file that nobody else can read."
        ) from None


def _bound(host: str, port: int) -> list[socket.socket]:
    """One for each address that the host's name stands for; all have the same port."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError):
        raise M0kitError(f"--host {host}: no such name or address is known here. Give an address.") from None
    sockets: list[socket.socket] = []
    failed: OSError | None = None
    for family, place in dict.fromkeys((family, place) for family, _, _, _, place in found):
        try:
            sockets.append(_tcp_socket(family, (place[0], port, *place[2:])))
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):  # "localhost" where there is no IPv6
                for one in sockets:
                    one.close()
                raise _named(host, port, error) from None
            failed = error
        else:
            port = sockets[-1].getsockname()[1]
    if not sockets:
        assert failed is not None
        raise _named(host, port, failed) from None
    return sockets


def _tcp_socket(family: int, place: tuple[str | int, ...]) -> socket.socket:
    # The protocol is said, because asyncio looks for it: without, what is written in two pieces waits for the client's
    # delayed acknowledgement, 40 ms.
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":  # elsewhere it lets two programs have one port
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and place[0] == "::":  # "everything" means IPv4 too
            with suppress(OSError, AttributeError):
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        made.bind(place)
        made.listen(BACKLOG)
    except BaseException:
        made.close()
        raise
    return made


def _named(host: str, port: int, error: OSError) -> M0kitError:
    why = _WHY.get(error.errno or 0, f"cannot be listened at ({os.strerror(error.errno or 0)})")
    return M0kitError(f"{host}, port {port}: {why}.")


@contextmanager
def unix_socket(path: Path) -> Iterator[socket.socket]:
    """A socket in a file, for this user and group, in place of one that nobody listens at any more.

    Raises M0kitError.
    """
    if not hasattr(socket, "AF_UNIX"):
        raise M0kitError(f"--uds {path}: this system's Python has no Unix sockets. Give --host and --port.")
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with made:
        try:
            _clear(path)
            before = os.umask(0o117)
            try:
                made.bind(str(path))
            finally:
                os.umask(before)
            made.listen(BACKLOG)
        except OSError as error:
            too_long = error.errno is None  # Python's own check; the system's limit is some 100 bytes
            why = "is too long for a socket's path" if too_long else os.strerror(error.errno or 0)
            raise M0kitError(f"--uds {path}: cannot be listened at: {why}. Choose another place.") from None
        here = os.stat(path)
        try:
            yield made
        finally:
            with suppress(OSError):
                if os.path.samestat(os.stat(path), here):  # and not another server's, that came after
                    os.unlink(path)


def _clear(path: Path) -> None:
    """Remove a socket that a killed server left."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise M0kitError(f"--uds {path}: is there already, and is no socket. Choose another place.")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asked:
        asked.settimeout(5)
        try:
            asked.connect(str(path))
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except TimeoutError:
            pass
    raise M0kitError(f"--uds {path}: another program listens there already. Stop it, or choose another place.")
