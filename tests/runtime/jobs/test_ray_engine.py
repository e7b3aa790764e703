"""On Ray the scores are the same, and neither a dead worker nor a dead driver loses a row or counts one twice."""

import contextlib
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from m0kit.errors import ArtifactError, DependencyError, DeviceError, InputError, M0kitError
from m0kit.jobs import ray_engine as engine_file
from m0kit.jobs.engine import dependencies
from m0kit.jobs.job import score_file
from m0kit.jobs.ray_engine import PATIENCE, blocks, ray_engine
from m0kit.jobs.rows import Row, Scored
from m0kit.jobs.windows import Work

ONE = {"threads": 1}
SAME = 1e-5  # fp32 noise of another batch, as in test_reranker
WORDS = ["small", "language", "models", "write", "markdown", "Wetter", "Oslo", "漢字"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A cluster with several workers; its address."""
    os.environ.update(PATIENCE)
    context = ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield context.address_info["address"]
    ray.shutdown()


def candidates(path: Path, count: int) -> Path:
    """Texts; each tenth row is bad."""
    rng = np.random.default_rng(count)
    documents = [" ".join(rng.choice(WORDS, rng.integers(1, 30))) for _ in range(count // 10 + 1)]
    rows = [
        {"id": i * 10, "query": "" if i % 10 == 9 else f"{WORDS[i % 8]} {i}", "document": str(rng.choice(documents))}
        for i in range(count)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def same(found: Path, wanted: Path) -> None:
    one, other = pq.read_table(found), pq.read_table(wanted)
    assert one.schema == other.schema
    for name in ("row", "id", "truncated", "error"):
        assert one.column(name).to_pylist() == other.column(name).to_pylist()
    for name, tolerance in (("score", SAME), ("logit", 10 * SAME)):
        values, expected = (np.asarray(t.column(name).to_pylist(), np.float64) for t in (one, other))
        np.testing.assert_allclose(values, expected, atol=tolerance, rtol=0, equal_nan=True)


def actors() -> list[psutil.Process]:
    """The processes of actors of the cluster that this process started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "MapWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_texts_and_images_have_the_same_scores(
    cluster: str, artifact: Path, tmp_path: Path, picture: Callable[..., Image.Image]
) -> None:
    picture(60, 90, 1).save(tmp_path / "page.png")
    raw = (tmp_path / "page.png").read_bytes()
    contents = [{"text": "markdown"}, {"image": {"bytes": raw, "path": None}}, {"image": {"path": "page.png"}}]
    contents += [{"image": {"path": "no.png"}}, {"text": ""}]
    rows = [{"id": f"{i}", "query": contents[i % 3], "document": contents[i % 5]} for i in range(300)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    for name, engine in (("wanted", None), ("found", ray_engine(3))):
        options = {} if engine is None else {"engine": engine}
        done = score_file(artifact, tmp_path / "in.parquet", tmp_path / f"{name}.parquet", load=ONE, **options)
        assert (done.rows, done.errors) == (300, 120)
    same(tmp_path / "found.parquet", tmp_path / "wanted.parquet")
    assert ray.is_initialized()  # a cluster that was there before stays


def test_a_killed_worker_loses_nothing(cluster: str, artifact: Path, tmp_path: Path) -> None:
    source = candidates(tmp_path / "in.parquet", 6000)
    killed: list[int] = []
    numbers: list[int] = []

    def murderous(artifact: Path, load: Mapping[str, Any], work: Work) -> Generator[Scored | None, None, None]:
        for result in ray_engine(2)(artifact, load, work):
            if result is not None:
                numbers.append(result.number)
            if result is not None and len(numbers) in (1, 2000):
                victim = max(actors(), key=lambda process: process.create_time())
                victim.kill()
                killed.append(victim.pid)
            yield result

    score_file(artifact, source, tmp_path / "found.parquet", load=ONE, engine=murderous)
    score_file(artifact, source, tmp_path / "wanted.parquet", load=ONE)
    same(tmp_path / "found.parquet", tmp_path / "wanted.parquet")
    assert len(set(killed)) == 2
    assert set(numbers) == set(range(6000))


# Runs the command; after commit number `hold` it says so and waits for a line, or for its end.
COMMAND = """
import os, sys
from m0kit.cli.commands import main
from m0kit.jobs import job, journal

journal.COMMIT_S = job.PROGRESS_S = 1e9  # nothing that the clock decides: a block is committed once it is there
hold, count, commit = int(sys.argv.pop(1)), 0, journal.Journal.commit

def committed(one):
    global count
    commit(one)
    count += 1
    if count == hold:
        os.write(1, b"%d rows\\n" % one.count())
        sys.stdin.readline()

journal.Journal.commit = committed
sys.argv[0] = "m0kit"
main()
"""


def held(*args: object, hold: int, environment: Mapping[str, str]) -> "tuple[subprocess.Popen[str], int]":
    """The command, stopped after so many commits, and the rows that it keeps by then."""
    child = subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(hold), "score", *map(str, args)], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout is not None
    said = child.stdout.readline()
    assert said, child.communicate()[1]
    return child, int(said.split()[0])


def test_a_killed_driver_goes_on(cluster: str, artifact: Path, tmp_path: Path) -> None:
    """Through the command and RAY_ADDRESS."""
    source, output = candidates(tmp_path / "in.parquet", 3000), tmp_path / "found.parquet"
    args = [artifact, source, "-o", output, "--engine", "ray", "--workers", 2, "--threads", 1]
    environment = {**os.environ, "RAY_ADDRESS": cluster}
    child, kept = held(*args, hold=3, environment=environment)
    child.kill()
    child.communicate()
    assert 0 < kept < 3000
    assert not output.exists()
    command = [sys.executable, "-m", "m0kit", "score", *map(str, args)]
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert f"{output}: 3000 rows, {kept} of them from before, " in done.stderr
    score_file(artifact, source, tmp_path / "wanted.parquet", load=ONE)
    same(output, tmp_path / "wanted.parquet")


def test_a_row_that_ends_its_worker_does_not_stop_the_job(
    cluster: str, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"query": f"{WORDS[i % 8]} {i}", "document": "Wetter"} for i in range(300)]
    rows[37]["document"] = "Wetter " * 2000
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    (tmp_path / "deadly_graphs.py").write_text(DEADLY_GRAPHS)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("deadly_graphs")
    ray.cloudpickle.register_pickle_by_value(module)  # the workers cannot import it
    load = {**ONE, "open_graph": module.open_deadly}
    score_file(artifact, tmp_path / "in.parquet", tmp_path / "out.parquet", engine=ray_engine(2), load=load)
    found = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["row"] for row in found if row["error"]] == [37]
    assert found[37]["error"].startswith("row 37: the process was ended while this row was scored (twice). ")


DEADLY_GRAPHS = """
import os
from m0kit.scoring.sessions import open_graph

class Deadly:
    def __init__(self, graph):
        self.graph = graph

    def run(self, feeds, outputs):
        if len(feeds.get("token_ids", ())) > 1500:
            os.kill(os.getpid(), 9)
        return self.graph.run(feeds, outputs)

def open_deadly(folder, name, **options):
    return Deadly(open_graph(folder, name, device="cpu", threads=1, prepack=False, **options))
"""


def test_an_error_of_ours_comes_out_as_it_is(cluster: str, artifact: Path, tmp_path: Path) -> None:
    source = candidates(tmp_path / "in.parquet", 20)
    with pytest.raises(DeviceError, match="NonsenseExecutionProvider"):
        score_file(
            artifact, source, tmp_path / "out.parquet", engine=ray_engine(1),
            load={**ONE, "device": "NonsenseExecutionProvider"},
        )  # fmt: skip
    with pytest.raises(ValueError, match="max_pixels"):
        score_file(
            artifact, source, tmp_path / "out.parquet", engine=ray_engine(1), load={**ONE, "max_pixels": 1}
        )  # fmt: skip
    (artifact_copy := tmp_path / "copy").mkdir()
    (artifact_copy / "manifest.json").write_bytes((artifact / "manifest.json").read_bytes())
    with pytest.raises(ArtifactError, match="is missing"):
        score_file(artifact_copy, source, tmp_path / "out.parquet", engine=ray_engine(1), load=ONE)
    source.write_bytes(source.read_bytes()[:-9])
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        score_file(artifact, source, tmp_path / "out.parquet", engine=ray_engine(1), load=ONE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "in.parquet"]


@pytest.mark.parametrize("name", ["onnxruntime", "the artifact", "the index"])
def test_a_worker_that_would_score_otherwise_is_refused_by_name(
    cluster: str, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """As if the driver's machine had another version, or other files under the same paths."""
    source, output = candidates(tmp_path / "in.parquet", 20), tmp_path / "out.parquet"
    monkeypatch.setattr(engine_file, "dependencies", lambda *args: {**dependencies(*args), name: "another"})
    with pytest.raises(M0kitError, match=f"a worker of Ray on .*; different: {name} \\(\\S+ there, another here\\)"):
        score_file(artifact, source, output, engine=ray_engine(1), load=ONE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.parquet"]


def test_the_command_starts_a_cluster_and_leaves_none(artifact: Path, tmp_path: Path) -> None:
    source = candidates(tmp_path / "in.parquet", 300)
    args = [artifact, source, "-o", tmp_path / "out.jsonl", "--engine", "ray", "--workers", 2]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    child, _ = held(*args, hold=1, environment=environment)
    seen = {process: process.name() for process in psutil.Process(child.pid).children(recursive=True)}
    _, said = child.communicate("\n")
    assert child.returncode == 3, said
    ours = [line for line in said.splitlines() if "logging.cc" not in line]
    assert ours == [f"{tmp_path}/out.jsonl: 300 rows, 30 could not be scored: see {tmp_path}/out.jsonl.errors.jsonl"]
    assert "raylet" in seen.values()
    _, left = psutil.wait_procs(list(seen), timeout=300)  # only against hanging
    assert not left


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the engine asks of a cluster that others started and that has four GPUs."""
    said: list[tuple[Any, ...]] = []
    monkeypatch.setattr(engine_file, "connect", lambda cores: said.append(("cores", cores)) or False)
    monkeypatch.setattr(engine_file, "scored_blocks", lambda *args: said.append(args) or iter(()))
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 4.0})
    return said


def test_on_gpus_each_actor_has_one(asked: list[tuple[Any, ...]], tmp_path: Path) -> None:
    """It sees no other, so that it is the first of those it sees."""
    work = Work(tmp_path / "in.jsonl", [])
    for device in ("cuda", "cuda:0", "CUDAExecutionProvider"):
        asked.clear()
        list(ray_engine(3)(tmp_path, {"device": device}, work))
        assert asked == [("cores", 3), (tmp_path, {"device": "cuda:0"}, work, 3, 1, 1)]
    asked.clear()
    list(ray_engine()(tmp_path, {"device": "cuda"}, work))
    assert asked[1] == (tmp_path, {"device": "cuda:0"}, work, 4, 1, 1), "one for each GPU"
    asked.clear()
    list(ray_engine(3)(tmp_path, {"device": "cpu", "threads": 2}, work))
    list(ray_engine()(tmp_path, {"device": "cpu", "threads": 2}, work))
    assert asked[1] == (tmp_path, {"device": "cpu", "threads": 2}, work, 3, 2, 0)
    assert asked[3] == (tmp_path, {"device": "cpu", "threads": 2}, work, 1, 2, 0)


@pytest.mark.parametrize("device", ["cuda:1", "cuda:0,cuda:1"])
def test_which_gpu_an_actor_has_is_for_ray_to_say(asked: list[tuple[Any, ...]], tmp_path: Path, device: str) -> None:
    with pytest.raises(DeviceError, match=f"^device '{device}': Ray gives each worker a GPU of its own. Say cuda"):
        list(ray_engine(2)(tmp_path, {"device": device}, Work(tmp_path / "in.jsonl", [])))
    assert asked == []


@pytest.mark.parametrize(
    ("there", "said"), [({}, "finds no GPU .*--device cpu"), ({"GPU": 2.0}, "finds 2 GPUs .* of 3 .*fewer --workers")]
)
def test_more_actors_than_gpus_would_wait_for_ever(
    asked: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: dict[str, float], said: str
) -> None:
    monkeypatch.setattr(engine_file, "connect", lambda _: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: there)
    monkeypatch.setattr(ray, "shutdown", lambda: asked.append(("shutdown",)))
    with pytest.raises(DeviceError, match=said):
        list(ray_engine(3)(tmp_path, {"device": "cuda"}, Work(tmp_path / "in.jsonl", [])))
    assert asked == [("shutdown",)]


def test_an_actor_whose_gpu_is_lost_is_started_again(
    cluster: str, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = candidates(tmp_path / "in.parquet", 300)
    (tmp_path / "lost_graphs.py").write_text(LOST_GRAPHS)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("lost_graphs")
    ray.cloudpickle.register_pickle_by_value(module)  # the workers cannot import it
    monkeypatch.setattr(module, "MARK", str(tmp_path / "lost"))
    load = {**ONE, "open_graph": module.open_lost}
    score_file(artifact, source, tmp_path / "out.parquet", engine=ray_engine(1), load=load)
    assert (tmp_path / "lost").exists()
    score_file(artifact, source, tmp_path / "wanted.parquet", load=ONE)
    same(tmp_path / "out.parquet", tmp_path / "wanted.parquet")


LOST_GRAPHS = """
import os
from m0kit.errors import DeviceLostError
from m0kit.scoring.sessions import open_graph

MARK = ""

class Lost:
    def __init__(self, graph):
        self.graph, self.runs = graph, 0

    def run(self, feeds, outputs):
        self.runs += 1
        if self.runs > 6 and not os.path.exists(MARK):
            open(MARK, "w").close()
            raise DeviceLostError("the GPU cuda:0 was lost")
        return self.graph.run(feeds, outputs)

def open_lost(folder, name, **options):
    return Lost(open_graph(folder, name, device="cpu", threads=1, prepack=False, **options))
"""


def test_without_ray_the_extra_is_named() -> None:
    script = (
        "import sys\nsys.modules['ray'] = None\nfrom m0kit.errors import DependencyError\n"
        "from m0kit.jobs.ray_engine import ray_engine\n"
        "try:\n    ray_engine()\nexcept DependencyError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "pip install 'm0kit[ray]'" in done.stdout
    assert issubclass(DependencyError, M0kitError)


def test_the_module_alone_imports_neither_ray_nor_pyarrow() -> None:
    script = "import sys, m0kit.jobs.ray_engine\nassert not {'ray', 'pyarrow', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("workers", [0, -1])
def test_no_workers_are_too_few(workers: int) -> None:
    with pytest.raises(ValueError, match="workers must be 1 or more"):
        ray_engine(workers)


def test_blocks_are_bounded_by_rows_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_file, "BLOCK_ROWS", 3)
    monkeypatch.setattr(engine_file, "BLOCK_BYTES", 250)
    large, other = b"x" * 200, b"y" * 200
    sources = [large, large, other, b"", b"", b"", b"z" * 1000, b""]
    rows = [Row(i, f"line {i + 1}", None, {"query": "q", "document": {"image": raw}}) for i, raw in enumerate(sources)]
    found = list(blocks(rows))
    assert [[row.number for row in block] for block in found] == [[0, 1], [2, 3, 4], [5], [6], [7]]
