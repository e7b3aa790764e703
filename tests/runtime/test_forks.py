"""A process that forks or pickles gives the right scores on both sides, and both come to their end.

What is wrong here hangs, so every script has a limit of time, which no machine needs; nothing else goes by the clock.
"""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m0kit import M0kitError, Reranker, forks
from m0kit.errors import StoreError
from m0kit.index import add, open_index
from m0kit.scoring import sessions

HANGS_S = 300
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
DOCUMENTS = [(f"d{i}", f"document {i} " * 9, "") for i in range(6)]

START = """
import json, os, sys, threading
import numpy as np
from pathlib import Path
from PIL import Image
from m0kit import Reranker, forks

def image(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (60, 90, 3), np.uint8))

def pairs(by_id=False):
    texts = [("a query", {"id": f"d{i}"} if by_id else f"document {i} " * 9) for i in range(6)]
    return texts + [("a query", image(1)), (image(2), "a text for an image")]

def child(work):
    # A child that ends as any process does, with all that Python tidies up then.
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        work()
        sys.exit(0)
    assert os.waitpid(pid, 0)[1] == 0

artifact, options, by_id = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
reranker = Reranker.load(artifact, **options)
expected = reranker.score(pairs(by_id))
# Floats on two threads sum in another order; other scores lie far apart.
def check(scores):
    np.testing.assert_allclose(scores, expected, atol=1e-5, rtol=0)
"""


def run(script: str, artifact: Path, options: Mapping[str, Any], *, by_id: bool = False) -> str:
    """What the script says, with nothing on stderr: no warning of a library either."""
    environment = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    command = [
        sys.executable,
        "-W",
        "error",
        "-c",
        START + script,
        str(artifact),
        json.dumps(options),
        str(by_id).lower(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_S, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.fixture(scope="module")
def library(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index") / "library"
    with Reranker.load(artifact, threads=1, kv="fp16") as reranker, open_index(folder, reranker) as store:
        add(reranker, store, DOCUMENTS)
    return folder


WAYS: list[dict[str, Any]] = [
    {"threads": 1},
    {"threads": 2},
    {"threads": 2, "memory": "low"},
    {"threads": 2, "cache_bytes": 1 << 26, "kv": "int8"},
    {"threads": 2, "index": True},
    {"threads": 2, "index": True, "memory": "low", "cache_bytes": 1 << 26},
]


@pytest.fixture(params=WAYS, ids=lambda way: "-".join(f"{name}={value}" for name, value in way.items()))
def options(request: pytest.FixtureRequest, library: Path) -> dict[str, Any]:
    return {name: str(library) if name == "index" else value for name, value in request.param.items()}


def test_children_score_and_end_as_does_the_parent_beside_them(artifact: Path, options: dict[str, Any]) -> None:
    script = """
child(lambda: None)  # one that never touches it
child(lambda: check(reranker.score(pairs(by_id))))
child(lambda: child(lambda: check(reranker.score(pairs(by_id)))))  # a child of a child
check(reranker.score(pairs(by_id)))
child(lambda: (check(reranker.score(pairs(by_id))), reranker.close()))
check(reranker.score(pairs(by_id)))
print("ended")
"""
    assert run(script, artifact, options, by_id="index" in options) == "ended\n"


def test_a_fork_in_the_middle_of_other_threads_work_does_no_harm(artifact: Path, library: Path) -> None:
    """Whatever lock a thread of the parent holds at that moment."""
    script = """
stop = threading.Event()
def work():
    while not stop.is_set():
        reranker.score(pairs(by_id))
        reranker.cache.__init__(reranker.cache.max_bytes)
threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads: thread.start()
for _ in range(12): child(lambda: check(reranker.score(pairs(by_id))))
stop.set()
for thread in threads: thread.join()
print("ended")
"""
    options = {"threads": 2, "cache_bytes": 1 << 26, "index": str(library)}
    assert run(script, artifact, options, by_id=True) == "ended\n"


def test_a_fork_while_another_thread_asks_the_known_answers_does_no_harm(artifact: Path) -> None:
    script = """
fresh = Reranker.load(artifact, **options)  # it has met no image
asked, go_on = threading.Event(), threading.Event()
def asking(_):
    asked.set()
    go_on.wait()
    raise SystemExit
thread = threading.Thread(target=lambda: fresh._trials[0][0].check("image", asking, again=True))
thread.start()
asked.wait()
child(lambda: check(fresh.score(pairs(by_id))))
go_on.set()
thread.join()
print("ended")
"""
    assert run(script, artifact, {"threads": 1}) == "ended\n"


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_pools_of_processes_take_a_reranker(artifact: Path, library: Path, method: str, tmp_path: Path) -> None:
    """A pool that forks inherits it, the others pickle it."""
    script = tmp_path / "pooled.py"
    body = START.replace("reranker = Reranker", "if __name__ == '__main__': reranker = Reranker").replace(
        "expected = ", "if __name__ == '__main__': expected = "
    )
    script.write_text(
        body
        + f"""
import functools, multiprocessing
def one(reranker, pair):
    return float(reranker.score([pair])[0])
if __name__ == "__main__":
    with multiprocessing.get_context({method!r}).Pool(2) as pool:
        check(pool.map(functools.partial(one, reranker), pairs(by_id)))
        pool.close()
        pool.join()
    print("ended")
"""
    )
    command = [sys.executable, str(script), str(artifact), json.dumps({"threads": 2, "index": str(library)}), "true"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_S, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended\n", "")


# --- pickles and copies ----------------------------------------------------------------------------------


def opener(folder: Path, name: str, /, *, also: Sequence[str] = ()) -> sessions.Graph:
    """Of a module, so that it can be pickled; if a pickle can find the module."""
    return sessions.open_graph(folder, name, threads=1, also=also)


def test_a_pickled_reranker_is_loaded_again_from_the_same_places(
    artifact: Path, library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"threads": 1, "memory": "low", "max_pixels": 784 * 9, "cache_bytes": 1 << 20}
    monkeypatch.chdir(artifact.parent)
    with Reranker.load(artifact.name, **options) as reranker:
        pair = ("q", Image.new("RGB", (300, 300)))
        expected = reranker.score([pair])
        pickled = pickle.dumps(reranker)
    monkeypatch.chdir(tmp_path)
    with pickle.loads(pickled) as again:
        np.testing.assert_array_equal(again.score([pair]), expected)
        assert (again.low_memory, again.config) == (True, reranker.config)
        assert again.cache is not None
        assert again.cache.max_bytes == 1 << 20
    with Reranker.load(artifact, threads=1, index=library) as reranker, pickle.loads(pickle.dumps(reranker)) as again:
        assert again.kv == "fp16"
        np.testing.assert_array_equal(again.score([("q", {"id": "d1"})]), reranker.score([("q", {"id": "d1"})]))


def test_what_cannot_be_pickled_says_so(artifact: Path) -> None:
    local = Reranker.load(artifact, open_graph=lambda folder, name, /, **_: opener(folder, name))
    with pytest.raises(TypeError, match=r"^cannot pickle a Reranker with open_graph=<function .*function of a module"):
        pickle.dumps(local)
    bare = Reranker(artifact, local.manifest, local.config, opener)
    with pytest.raises(TypeError, match=r"^cannot pickle a Reranker that Reranker\.load did not open"):
        pickle.dumps(bare)


def test_a_copy_opens_nothing(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reranker = Reranker.load(artifact, threads=1)
    monkeypatch.setattr(Reranker, "load", lambda *_: pytest.fail("loaded"))
    assert copy.copy(reranker).score([("q", "d")]) == reranker.score([("q", "d")])


# --- the end ---------------------------------------------------------------------------------------------


def test_a_closed_reranker_lets_everything_go_and_says_so(artifact: Path, library: Path) -> None:
    alive: list[weakref.ref[Any]] = []

    class Held:
        def __init__(self, graph: sessions.Graph) -> None:
            self.run = graph.run

    def opening(folder: Path, name: str, /, *, also: Sequence[str] = ()) -> sessions.Graph:
        graph = Held(opener(folder, name, also=also))
        alive.append(weakref.ref(graph))
        return graph

    with Reranker.load(artifact, open_graph=opening, index=library, cache_bytes=1 << 20) as reranker:
        reranker.score([("q", {"id": "d1"}), ("q", Image.new("RGB", (60, 60)))])
        assert len(alive) == 3
        stream = reranker.stream([("q", "d"), *[("of many words " * 300, "another")] * 8])
        next(stream)
    assert [ref() for ref in alive] == [None] * 3
    assert reranker.store is not None
    with pytest.raises(StoreError, match="has been closed"):
        reranker.store.ids()
    reranker.close()  # once more does no harm
    for call in (
        lambda: reranker.score([("q", "d")]),
        lambda: reranker.evaluate([]),
        lambda: reranker.evaluate([("q", "")]),
        lambda: reranker.rank("q", ["d"]),
        lambda: reranker.compute_score(["q", "d"]),
        lambda: reranker.trace(("q", "d")),
        lambda: list(stream),
    ):
        with pytest.raises(M0kitError, match=r"closed.*(Load the artifact|Open it) again"):
            call()
    assert len(alive) == 3


# --- the hooks -------------------------------------------------------------------------------------------


def test_a_store_may_be_read_in_a_child_and_not_written(artifact: Path, library: Path, tmp_path: Path) -> None:
    script = """
from m0kit.errors import StoreBusyError, StoreError
from m0kit.keeping.store import Store
reranker.close()
store = Store.open(options["index"], writable=True)
def work():
    assert len(store) == 6 and store.document("d1").data.startswith(b"document 1")
    for attempt, kind, said in (
        (lambda: store.remove(["d1"]), StoreError, "opened before this process was forked"),
        (lambda: Store.open(options["index"], writable=True), StoreBusyError, ""),
    ):
        try:
            attempt()
        except kind as error:
            assert said in str(error)
        else:
            raise AssertionError
child(work)
assert store.remove(["d0"]) == [] and len(store) == 5
store.close()
child(lambda: Store.open(options["index"], writable=True).close())
print("ended")
"""
    own = tmp_path / "library"
    shutil.copytree(library, own)
    assert run(script, artifact, {"threads": 1, "index": str(own)}, by_id=True) == "ended\n"


def test_what_is_watched_is_not_kept_alive() -> None:
    class Thing:
        def after_fork(self) -> None: ...

    before = len(forks.living())
    thing = Thing()
    forks.watch(thing)
    assert len(forks.living()) == before + 1
    del thing
    assert len(forks.living()) == before


def test_a_graph_of_the_parent_refuses_to_run_in_a_child(artifact: Path) -> None:
    graph = sessions.open_graph(artifact, "head", threads=1)
    graph.after_fork()
    with pytest.raises(M0kitError, match="head graph was opened before this process was forked"):
        graph.run({}, [])
