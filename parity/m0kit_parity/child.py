"""A process of its own, for what may crash, hang or print, and must give its memory back.

Owns starting it, asking it, and saying in one sentence how it ended. What is made and what is asked travel by pickle,
so functions must be those of a module.

    with Child(partial(open_peer, "llama-q8_0")) as ask:  # open_peer runs there, and returns …
        seconds = ask(pairs)                              # … what is called there
"""

import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, Final

from m0kit.errors import M0kitError
from m0kit.terminal import debugging, ended, run

# For one turn, or for loading: it ends what hangs, and must not end what is slow, such as PyTorch at full depth.
PATIENCE_S: Final = 2 * 3600.0

_LEAVING_S: Final = 10.0
_KILLED: Final = 9  # SIGKILL, which not every system names

Maker = Callable[[], Callable[..., Any]]


class Child:
    """Calls in another process. After an error other than one that m0kit raises on purpose there, it is over."""

    def __init__(self, make: Maker, patience_s: float | None = PATIENCE_S, *, nested: bool = False) -> None:
        """Start it and wait until `make()` has returned there; `nested`: it may start such processes itself.

        Raises M0kitError as a call does.
        """
        self.patience_s = patience_s
        self._over: M0kitError | None = None
        self._busy = True  # has not answered yet
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(make, theirs), daemon=not nested)
        with _quietly():
            self._process.start()
        theirs.close()
        self._answer()

    def __call__(self, *arguments: Any) -> Any:
        """What the made function returns there.

        Raises the M0kitError that it raised there, and M0kitError for any other exception, when the process was ended
        by a signal, left by itself, or said nothing for `patience_s`; after those three every call raises it again.
        """
        if self._over is not None:
            raise self._over
        self._busy = True
        try:
            self._pipe.send(arguments)
        except OSError:
            raise self._died() from None
        return self._answer()

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def close(self) -> None:
        """End the process, which leaves by itself when it has nothing to do; its memory is free on return."""
        self._pipe.close()
        self._process.join(0 if self._busy else _LEAVING_S)
        self._process.kill()
        self._process.join()

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> Any:
        try:
            if not wait([self._pipe, self._process.sentinel], self.patience_s):
                raise self._ended(f"it said nothing for {self.patience_s:g} seconds, so it was stopped.")
            error, result = self._pipe.recv()
            self._busy = False
        except (EOFError, OSError, pickle.UnpicklingError):
            raise self._died() from None
        except KeyboardInterrupt:
            self.close()
            raise
        if error is not None:
            raise error
        return result

    def _died(self) -> M0kitError:
        self._process.join(5)  # it is ending: its end of the pipe is closed
        code = self._process.exitcode
        hint = " That is how Linux answers when memory runs out." if code == -_KILLED else ""
        return self._ended(f"its process {ended(-_KILLED if code is None else code)}.{hint}")

    def _ended(self, how: str) -> M0kitError:
        self.close()
        self._over = M0kitError(how)
        return self._over


def _serve(make: Maker, pipe: Connection) -> None:
    """The child's side, until the parent's end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who ends this process
    sys.exit(run(lambda: _answer_all(make, pipe)))


def _answer_all(make: Maker, pipe: Connection) -> None:
    os.dup2(2, 1)  # what is printed here is no result of the command
    sys.stdout = sys.stderr
    function: Callable[..., Any] | None = None
    arguments: tuple[Any, ...] = ()
    while True:
        answer: tuple[M0kitError | None, Any]
        try:
            if function is None:
                function, answer = make(), (None, None)
            else:
                answer = None, function(*arguments)
        except M0kitError as error:
            answer = error, None
        except MemoryError:
            answer = M0kitError("out of memory."), None
        except Exception as error:
            if debugging():
                raise
            text = " ".join(str(error).split())
            answer = M0kitError(f"{type(error).__name__}{f': {text[:300]}' if text else ''}"), None
        pipe.send(answer)
        if function is None:
            return
        try:
            arguments = pipe.recv()
        except EOFError:
            return


@contextmanager
def _quietly() -> Iterator[None]:
    """Start processes that keep silent when they are ended: about Ctrl-C, and about what a killed one left open.

    The second is Python's tracker of semaphores, a process of its own that the first start brings; it closes them.
    """
    shown = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [shown, "ignore:resource_tracker"]))
    masked = hasattr(signal, "pthread_sigmask") and threading.current_thread() is threading.main_thread()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if masked else set()
    try:
        yield
    finally:
        if masked:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if shown is None:
            del os.environ["PYTHONWARNINGS"]
        else:
            os.environ["PYTHONWARNINGS"] = shown
