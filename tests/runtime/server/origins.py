"""A server of images on loopback, which counts what reaches it. Shared by tests of the server."""

import io
import socket
import ssl
import threading
from collections.abc import Callable
from typing import Any

from PIL import Image

PATIENCE_S = 20.0


def _png() -> bytes:
    Image.effect_noise((64, 64), 90).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


PNG = _png()
OK = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(PNG) + PNG


class Origin:
    """A server on loopback that counts what reaches it, and answers with `answer`: bytes, or a talk over the socket."""

    def __init__(self, address: str = "127.0.0.1") -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = socket.socket(family)
        self._listener.bind((address, 0))
        self._listener.listen()
        self.port = self._listener.getsockname()[1]
        self.answer: bytes | Callable[[Any], None] = OK
        self.answers: list[bytes] = []  # first these, one a request
        self.tls: ssl.SSLContext | None = None
        self.greets = True  # answers what is no HTTP, as the beginning of TLS
        self.num_connections = self.num_bytes = 0
        self.heads: list[bytes] = []
        self.is_over = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True)]
        self._threads[0].start()

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.num_connections += 1
            self._threads.append(thread := threading.Thread(target=self._talk, args=(sock,), daemon=True))
            thread.start()

    def _talk(self, sock: Any) -> None:
        sock.settimeout(PATIENCE_S)
        try:
            if self.tls is not None:
                self.num_bytes += len(sock.recv(1, socket.MSG_PEEK))
                sock = self.tls.wrap_socket(sock, server_side=True)
            head = b""
            while b"\r\n\r\n" not in head and not (self.greets and head.startswith(b"\x16")):
                piece = sock.recv(1 << 16)
                self.num_bytes += len(piece)
                head += piece
                if not piece:
                    return
            self.heads.append(head)
            answer = self.answers.pop(0) if self.answers else self.answer
            sock.sendall(answer) if isinstance(answer, bytes) else answer(sock)
        except OSError:
            pass
        finally:
            sock.close()

    @property
    def has_ended(self) -> bool:
        """Whether the last one that came has gone."""
        return self.num_connections > 0 and not self._threads[-1].is_alive()

    def close(self) -> None:
        self.is_over.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(PATIENCE_S)
