"""Scoring a job's rows on a Ray cluster, with Ray Data. Owns the cluster's side; the job is `m0kit.jobs.job`'s.

    score_file("m0-int8", "candidates.parquet", "scores.parquet", engine=ray_engine(workers=4))

One task on the driver's machine reads the windows and cuts them into blocks; actors, each with a Reranker of its own,
score them; the driver alone keeps the journal. An actor that dies is started again and its block retried, in
ever smaller parts; a row that ends two actors alone has that as its error. Artifact and
images named by paths are opened by the actors: on several machines they must lie on a file system that all share,
under the same path, and m0kit must be installed on each. An actor that finds another artifact, index or version there
than the driver scores nothing. Connects to RAY_ADDRESS, else starts Ray here for the job: it then speaks to nobody but
this machine, and keeps its logs in the folder for temporary files (`ray/`) and the password of its clusters in ~/.ray.
"""

import logging
import os
import pickle
import platform
import signal
import socket
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from m0kit.errors import DependencyError, DeviceError, DeviceLostError, InputError, M0kitError
from m0kit.jobs.engine import Engine, dependencies, ended, score_rows
from m0kit.jobs.journal import MOST_ENDS, PARTS
from m0kit.jobs.rows import Row, Scored
from m0kit.jobs.windows import Work
from m0kit.reranker import Reranker
from m0kit.scoring import gpus

# A block is what one actor gets at a time, and what is scored again if it dies: some runs of the decoder.
BLOCK_ROWS = 128
BLOCK_BYTES = 32 << 20

# On one machine a node that does not answer is one that is busy. Ray would give its only node up after half a minute,
# and with it end the process that scores.
PATIENCE = {
    "RAY_gcs_server_port_wait_time_s": "300",
    "RAY_health_check_failure_threshold": "100",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
    "RAY_worker_register_timeout_seconds": "600",
}


def ray_engine(workers: int | None = None) -> Engine:
    """An engine of `workers` actors: one GPU each for device "cuda", else `threads` cores each.

    By default as many as the cluster has GPUs, or one on CPUs. Without `threads` the actors share this machine's cores.
    Raises DependencyError, and when it runs DeviceError, M0kitError for work that the cluster could not do, and what
    Reranker.load raises.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be 1 or more, got {workers}")
    if not os.environ.get("RAY_ADDRESS"):
        # As on macOS and Windows a cluster of this machine alone keeps to the loopback address. Read at the import.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray.data  # noqa: F401
    except ImportError:
        raise DependencyError(
            "the engine ray needs Ray Data. pip install 'm0kit[ray]', or leave out --engine."
        ) from None

    return RayEngine(workers)


@dataclass(frozen=True, slots=True)
class RayEngine:
    """What `ray_engine` returns."""

    workers: int | None
    elsewhere: ClassVar[bool] = True  # rows that end a process are looked for among the actors

    def __call__(self, artifact: Path, load: Mapping[str, Any], work: Work) -> Generator[Scored | None, None, None]:
        """See `m0kit.jobs.engine.Engine`."""
        import ray

        options, workers = dict(load), self.workers or 1
        device = str(options.get("device", "cpu"))
        ids = gpus.named(device)
        if ids:
            if ids != (0,):
                raise DeviceError(
                    f"device {device!r}: Ray gives each worker a GPU of its own. Say cuda, with CUDA_VISIBLE_DEVICES "
                    "for those that Ray may take here."
                )
            options["device"] = "cuda:0"  # Ray shows an actor the one GPU it gave it
        elif options.get("threads") is None:
            options["threads"] = max(1, (os.cpu_count() or 1) // workers)
        cores = int(options.get("threads") or 1)
        is_ours = connect(cores * workers)
        try:
            if ids and (is_ours or self.workers is None):
                there = int(ray.cluster_resources().get("GPU", 0))
                workers = self.workers or max(1, there)
                if is_ours and there < workers:  # it would wait for one for ever
                    found = f"{there} GPUs" if there else "no GPU"
                    raise DeviceError(
                        f"device cuda: Ray finds {found} on this machine, and each of {workers} workers needs one. "
                        f"{'Use fewer --workers' if there else 'Use --device cpu'}."
                    )
            for block in scored_blocks(artifact, options, work, workers, cores, len(ids)):
                yield from block
                yield None
        finally:
            if is_ours:
                ray.shutdown()


def connect(cores: int) -> bool:
    """Join a cluster, or start one with at least so many cores; returns whether it was started here."""
    import ray

    if ray.is_initialized():
        return False
    # Ray warns, for people who write actors, of how its own Ray Data starts them.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    is_ours = not os.environ.get("RAY_ADDRESS")
    if is_ours:
        for name, value in PATIENCE.items():
            os.environ.setdefault(name, value)
    handler = signal.getsignal(signal.SIGTERM)
    # The process behind Ray's dashboard starts even without one, and asks the metadata services of three clouds where
    # it is even if reports are off. Where its port is taken it stays away, and Ray logs an error and goes on.
    with socket.create_server(("127.0.0.1", 0)) as taken:
        if is_ours:
            quiet |= {"num_cpus": max(cores, os.cpu_count() or 1), "include_dashboard": False}
            quiet |= {"dashboard_port": taken.getsockname()[1], "logging_level": logging.CRITICAL}
        ray.init(**quiet)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray puts its own in its place
    return is_ours


def scored_blocks(
    artifact: Path, load: Mapping[str, Any], work: Work, workers: int, cores: int, gpus: int
) -> Iterator[list[Scored]]:
    """The results of a block at a time, as they come."""
    import ray

    expected = dependencies(artifact, load)
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 1  # bytes: what is yielded is one block, neither joined nor cut
    logging.getLogger("ray.data").setLevel(logging.ERROR)

    def read(_: Any) -> Iterator[Any]:
        try:
            for window in work:
                yield from map(_packed, blocks(window))
        except InputError as error:
            yield _packed(error)

    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    begun = ray.remote(_Begun).options(num_cpus=0, label_selector=here).remote()
    with ray.data.DataContext.current(context):
        scored = (
            ray.data.from_items([0], override_num_blocks=1)
            .map_batches(read, batch_format="pyarrow", num_cpus=0, label_selector=here)
            .map_batches(
                _Scorer,
                fn_constructor_kwargs={"artifact": artifact, "load": load, "expected": expected, "begun": begun},
                batch_format="pyarrow",
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=workers),
                num_cpus=0 if gpus else cores,
                num_gpus=gpus,
            )
        )
    try:
        for table in scored.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for results in _unpacked(table):
                if isinstance(results, Exception):
                    raise results
                yield results
    except ray.exceptions.RayError as error:
        raise M0kitError(
            f"Ray could not finish the work ({type(error).__name__}). What was scored is kept; "
            "run the same command again, with fewer --workers if memory ran out."
        ) from error


class _Begun:
    """An actor on the driver's machine: how often rows were begun together, which outlives who began them."""

    def __init__(self) -> None:
        self._counts: dict[tuple[int, ...], int] = {}

    def begin(self, rows: tuple[int, ...]) -> int:
        """How often they were begun before, by actors that came to no end with them."""
        before = self._counts.get(rows, 0)
        self._counts[rows] = before + 1
        return before

    def end(self, rows: tuple[int, ...]) -> None:
        self._counts.pop(rows, None)


class _Scorer:
    """An actor: opens the artifact once, scores blocks. Errors of ours travel as results, so that they stay whole.

    `expected` are the driver's `dependencies`: scores of others must not come in among them.
    """

    def __init__(self, artifact: Path, load: Mapping[str, Any], expected: Mapping[str, str], begun: Any) -> None:
        self._begun = begun
        try:
            self._reranker: Reranker | Exception = Reranker.load(artifact, **load)
            _check_same(dependencies(artifact, load), expected)
        except (M0kitError, ValueError) as error:
            self._reranker = error

    def __call__(self, table: Any) -> Any:
        (rows,) = _unpacked(table)
        if isinstance(rows, Exception):  # of the reading
            return table
        if isinstance(self._reranker, Exception):
            return _packed(self._reranker)
        try:
            return _packed(list(self._scored(rows)))
        except DeviceLostError:
            os._exit(1)  # this process cannot use its GPU again; Ray starts another, which goes on with these rows
        except M0kitError as error:
            return _packed(error)

    def _scored(self, rows: Sequence[Row]) -> Iterator[Scored]:
        """The results; of rows that an actor has died with, in parts that get smaller with each that dies."""
        import ray

        assert isinstance(self._reranker, Reranker)
        numbers = tuple(row.number for row in rows)
        ends = ray.get(self._begun.begin.remote(numbers))
        if len(rows) == 1 and ends >= MOST_ENDS:
            yield ended(rows[0])
        elif ends == 0 or len(rows) == 1:
            yield from score_rows(self._reranker, rows)
        else:
            size = max(1, len(rows) // PARTS)
            for start in range(0, len(rows), size):
                yield from self._scored(rows[start : start + size])
        self._begun.end.remote(numbers)


def _check_same(found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    if names := [name for name in expected if found.get(name) != expected[name]]:
        told = ", ".join(f"{name} ({str(found.get(name))[:20]} there, {expected[name][:20]} here)" for name in names)
        raise M0kitError(
            f"a worker of Ray on {platform.node()} would give other scores; different: {told}. "
            "Install the same versions and put the same files on all machines, then run the same command again."
        )


def blocks(window: Sequence[Row]) -> Iterator[list[Row]]:
    """Consecutive rows of a window, at most so many rows and bytes, or a single row."""
    block: list[Row] = []
    seen: set[int] = set()  # what rows share is packed once
    num_bytes = 0
    for row in window:
        sizes = {id(value): len(value) for value in _values(row) if isinstance(value, str | bytes)}
        cost = sum(size for key, size in sizes.items() if key not in seen)
        if block and (len(block) == BLOCK_ROWS or num_bytes + cost > BLOCK_BYTES):
            yield block
            block, seen, num_bytes = [], set(), 0
        block.append(row)
        seen.update(sizes)
        num_bytes += cost
    if block:
        yield block


def _values(row: Row) -> Iterator[Any]:
    for content in row.pair.values():
        yield from content.values() if isinstance(content, Mapping) else (content,)


def _packed(content: list[Any] | Exception) -> Any:
    """A block of one row, and of no type that Ray would look into."""
    import pyarrow as pa

    return pa.table({"packed": pa.array([pickle.dumps(content)], pa.large_binary())})


def _unpacked(table: Any) -> list[Any]:
    return [pickle.loads(packed) for packed in table.column("packed").to_pylist()]
