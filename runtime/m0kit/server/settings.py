"""What a server is told. Owns names, defaults and what fits together; where they come from is the command's.

Settings((ModelSettings("m0-int8"),), port=8080)
"""

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from m0kit.artifact.hub import is_id
from m0kit.artifact.ports import Kept
from m0kit.files import destination
from m0kit.opening import GPU_VARIABLE
from m0kit.scoring import gpus
from m0kit.server.image_hosts import ImageHosts

ALIASES: Final = ("jina-reranker-m0", "jinaai/jina-reranker-m0")  # of the first artifact, besides its own names
MEBI: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """One artifact. `names`: what requests call it, the first one is shown; the folder's name where there is none."""

    artifact: str  # a folder or a hub id
    names: tuple[str, ...] = ()
    index: Path | None = None
    revision: str | None = None
    device: str = "cpu"
    threads: int | None = None
    memory: Literal["fast", "low"] = "fast"
    max_pixels: int | None = None
    cache_bytes: int = 1024 * MEBI
    # None: the index's, else fp16, half of what fp32 takes; so a server scores the same with an index and without.
    kv: Kept | None = None
    gpu_bytes: int | None = None
    pool_bytes: int | None = None

    @property
    def called(self) -> tuple[str, ...]:
        """`names`, or where there are none the folder's name, or the hub id without its revision."""
        if self.names:
            return self.names
        return (self.artifact.partition("@")[0] if is_id(self.artifact) else destination(Path(self.artifact)).name,)


@dataclass(frozen=True, slots=True)
class Settings:
    """A whole server. Raises ValueError for what does not fit together."""

    models: tuple[ModelSettings, ...]
    host: str = "127.0.0.1"
    port: int = 8080
    uds: Path | None = None  # a Unix socket in place of host and port
    api_key_file: Path | None = None
    without_keys: bool = False  # may be reached from other machines by anyone
    allowed_hosts: tuple[str, ...] = ()  # names in the Host header besides the address that is bound
    image_hosts: tuple[str, ...] = ()  # from which images may be fetched, as `m0kit.server.image_hosts` reads them
    root_path: str = ""  # under which a proxy serves it
    tls_cert: Path | None = None
    tls_key: Path | None = None
    # Of one request
    max_body_bytes: int = 64 * MEBI
    max_documents: int = 1000
    max_images: int = 256
    max_image_bytes: int = 32 * MEBI
    max_image_pixels: int = 50_000_000
    max_request_pixels: int = 1_000_000_000  # of all its images
    max_request_tokens: int = 4_000_000  # as estimated: those of the decoder, and three for each of an image
    request_timeout_s: float = 300
    read_timeout_s: float = 20  # for a whole head; without a byte of a body, or of an answer that is taken
    keep_alive_s: float = 75  # between two requests; more than the 60 of common load balancers, who end theirs first
    # Of all
    max_connections: int = 1000
    max_held_bytes: int = 512 * MEBI  # of bodies that are read or worked on
    queue_s: float = 60  # of work that may wait, by measured throughput
    shutdown_timeout_s: float = 30
    workers: int = 1
    warm: bool = False
    page: bool = True
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("expected one artifact at least.")
        if not (self.is_local or self.api_key_file or self.without_keys):
            raise ValueError(
                f"host {self.host} can be reached from other machines, and there is no --api-key-file. "
                "Give one, or say --without-keys."
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key belong together.")
        if self.tls_cert is not None and self.uds is not None:
            raise ValueError("--uds takes no --tls-cert: a Unix socket does not leave this machine.")
        names = [name for model in self.models for name in model.called]
        if again := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two artifacts are called {again!r}. Give each a name of its own: NAME=ARTIFACT.")
        ImageHosts(self.image_hosts)
        self._check_gpus()

    def _check_gpus(self) -> None:
        """What has no limit takes all of a GPU's memory that is free, and leaves none for what is opened next."""
        on_gpus = [(model, set(gpus.named(model.device))) for model in self.models]
        for model, on in on_gpus:
            shared = self.workers * sum(not on.isdisjoint(others) for _, others in on_gpus)
            if model.gpu_bytes is None and shared > 1 and not os.environ.get(GPU_VARIABLE):
                raise ValueError(
                    f"{shared} engines would share a GPU ({model.device}), each taking all that is free of it. Say "
                    "with --gpu-bytes what each may take, or start one worker."
                )

    @property
    def is_local(self) -> bool:
        """Whether nothing but this machine reaches it."""
        if self.uds is not None or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
