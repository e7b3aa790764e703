"""sentence-transformers' CrossEncoder behind a plain ASGI app: another server for the same requests, texts alone.

Owns a script: random weights in the sizes of an artifact's decoder, its tokenizer, and one route. As such apps are
written: a thread scores one request after another, each in batches of the library's own.

    python -m m0kit_parity.bench.load.peer m0-int8 --threads 2       # says "serving at URL" when it is ready
"""

import argparse
import asyncio
import json
import socket
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from m0kit.artifact.manifest import TOKENIZER, read_manifest
from m0kit.terminal import say


def main() -> None:
    """Serve until a signal comes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    import torch
    import uvicorn

    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory(prefix="m0kit-peer-") as folder:
        write_model(given.artifact, Path(folder))
        app = _app(folder)
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as sock:
            sock.bind(("127.0.0.1", 0))
            say(f"serving at http://127.0.0.1:{sock.getsockname()[1]}")
            config = uvicorn.Config(app, log_level="warning", access_log=False)
            uvicorn.Server(config).run([sock])


def write_model(artifact: Path, folder: Path) -> None:
    """A sequence classifier with random weights and the sizes of the artifact's decoder, for CrossEncoder to load."""
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForSequenceClassification

    decoder = read_manifest(artifact).model.decoder
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=decoder.hidden_size, num_hidden_layers=decoder.num_layers, num_attention_heads=decoder.num_heads,
        num_key_value_heads=decoder.num_kv_heads, intermediate_size=decoder.intermediate_size,
        vocab_size=decoder.vocab_size, max_position_embeddings=decoder.max_positions, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    Qwen2ForSequenceClassification(config).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(artifact / TOKENIZER), model_max_length=8192)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    tokenizer.save_pretrained(folder)


def _app(folder: str) -> Any:
    from sentence_transformers import CrossEncoder
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    model = CrossEncoder(folder, device="cpu")
    one_by_one = ThreadPoolExecutor(1)

    def score(query: str, texts: list[str]) -> list[float]:
        return [float(value) for value in model.predict([(query, text) for text in texts], show_progress_bar=False)]

    async def rerank(request: Request) -> Response:
        body = json.loads(await request.body())
        texts = [each["text"] for each in body["documents"]]
        scores = await asyncio.get_running_loop().run_in_executor(one_by_one, score, body["query"], texts)
        ranked = sorted(enumerate(scores), key=lambda one: -one[1])
        results = [{"index": index, "relevance_score": value} for index, value in ranked]
        return Response(json.dumps({"results": results}), media_type="application/json")

    return Starlette(routes=[Route("/v1/rerank", rerank, methods=["POST"])])


if __name__ == "__main__":
    main()
