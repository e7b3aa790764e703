"""What a server tells of itself: health, models, limits, numbers. Owns these routes; none of them does any work.

Clients ask some of them before they ask for scores: Dify's plugin for Text Embeddings Inference reads /info,
Xinference's client /v1/cluster/auth and /v1/models/NAME.
"""

import importlib.util
import time
from importlib.metadata import version
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from m0kit.reading.formats import FORMATS
from m0kit.server.lane import Lane
from m0kit.server.service import Service
from m0kit.server.wire.openapi import openapi

LIMITS: Final = (
    "max_body_bytes", "max_documents", "max_images", "max_image_bytes", "max_image_pixels", "max_request_pixels",
    "max_request_tokens",
)  # fmt: skip


class Telling:
    """The routes of one app."""

    def __init__(self, service: Service) -> None:
        self._service, self._begun, self._version = service, int(time.time()), version("m0kit")

    def routes(self) -> list[Route]:
        """All of them."""
        found = {
            "/live": self._live,
            "/ready": self._ready,
            "/health": self._ready,
            "/info": self._info,
            "/v1/models": self._models,
            "/models": self._models,
            "/v1/models/{name:path}": self._model,
            "/v1/cluster/auth": self._auth,
            "/openapi.json": self._openapi,
            "/metrics": self._metrics,
        }
        return [Route(path, endpoint, methods=["GET"]) for path, endpoint in found.items()]

    async def _live(self, _: Request) -> Response:
        return _json({"status": "live"})

    async def _ready(self, _: Request) -> Response:
        if (problem := self._service.problem) is not None:
            raise problem
        return _json({"status": "ready"})

    async def _info(self, _: Request) -> Response:
        service, settings = self._service, self._service.settings
        first = service.lane(None)
        reranker, manifest = first.reranker, first.reranker.manifest
        return _json({
            "model_id": first.names[0],
            "model_sha": manifest.fingerprint,
            "model_dtype": manifest.scheme,
            "served_model_name": first.names[0],
            "model_type": {"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}},
            "max_concurrent_requests": settings.max_connections,
            "max_input_length": reranker.config.prompt.max_length,
            "max_batch_tokens": reranker.engine.rows,
            "max_client_batch_size": settings.max_documents,
            "auto_truncate": True,
            "version": self._version,
            "limits": {name: getattr(settings, name) for name in LIMITS},
            "formats": FORMATS,
            "pdf": settings.page and importlib.util.find_spec("pypdfium2") is not None,
            "index": first.writer is not None,
            "keys": settings.api_key_file is not None,
            "models": [_told(lane, self._names(lane)) for lane in self._lanes()],
        })  # fmt: skip

    async def _models(self, _: Request) -> Response:
        self._service.lane(None)
        return _json({"object": "list", "data": [self._entry(lane.names[0], lane) for lane in self._lanes()]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        return _json(self._entry(name, self._service.lane(name)))

    async def _auth(self, _: Request) -> Response:
        return _json({"auth": False})  # of Xinference's own accounts; keys are asked for in any case

    async def _openapi(self, _: Request) -> Response:
        settings = self._service.settings
        return _json(openapi(self._version, keys=settings.api_key_file is not None, page=settings.page))

    async def _metrics(self, _: Request) -> Response:
        body, kind = self._service.metrics.render()
        return Response(body, headers={"Content-Type": kind})

    def _lanes(self) -> list[Lane]:
        return list({id(lane): lane for lane in self._service.lanes.values()}.values())

    def _names(self, lane: Lane) -> list[str]:
        return [name for name, one in self._service.lanes.items() if one is lane and name != lane.names[0]]

    def _entry(self, name: str, lane: Lane) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._begun,
            "owned_by": "m0kit",
            "model_type": "rerank",
            "model_name": lane.names[0],
            "max_model_len": lane.reranker.config.prompt.max_length,
        }


def _told(lane: Lane, aliases: list[str]) -> dict[str, Any]:
    return {
        "name": lane.names[0],
        "aliases": aliases,
        "precision": lane.reranker.manifest.scheme,
        "device": lane.reranker.device,
        "index": lane.reranker.store is not None,
    }


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
