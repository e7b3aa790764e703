"""What a process that was forked must not take over from its parent: threads, locks, connections. Owns the hooks.

A child has the memory of its parent and one thread. What waits for another thread there, a lock that one held or the
end of a session's thread pool, waits for ever.

    forks.watch(self)       # self.after_fork() is called in every child that is forked while self lives
    forks.abandon(session)  # … and must not destroy this

A lock that stands in an attribute `fork_lock` is held while the process forks, so that what it guards is whole in the
child. Such a lock must only ever be held for moments; after some seconds the process forks without it.
"""

import ctypes
import os
import weakref
from typing import Any, Protocol


class Watched(Protocol):
    """What something does in a child before anything else runs there."""

    def after_fork(self) -> None:
        """Make locks anew, abandon what belongs to the parent's threads."""


_WAIT_S = 10.0  # a thread that forks while it holds the lock itself would wait for ever
_watched: set[weakref.ref[Watched]] = set()
_held: list[Any] = []


def watch(thing: Watched) -> None:
    """Have `thing` told in every forked child, for as long as it lives."""
    _watched.add(weakref.ref(thing, _watched.discard))


def abandon(thing: object) -> None:
    """Keep an object of the parent from ever being destroyed in this child, not even at the end of the process.

    The destructor of an inference session joins threads that are not there; that of a database connection would tidy
    up after its parent. A reference more than there are is what no garbage collector takes away.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def living() -> list[Watched]:
    """What is told in a child that is forked now."""
    return [thing for ref in list(_watched) if (thing := ref()) is not None]  # in one step: other threads add to it


def _before() -> None:
    for thing in living():
        if (lock := getattr(thing, "fork_lock", None)) is not None and lock.acquire(timeout=_WAIT_S):
            _held.append(lock)


def _in_parent() -> None:
    while _held:
        _held.pop().release()


def _in_child() -> None:
    _held.clear()  # each makes its own anew
    for thing in living():
        thing.after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
