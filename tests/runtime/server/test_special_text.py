"""Text of a request is text: whatever tokens it spells, none of them becomes one. Asked over HTTP, seen in prompts."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("uvicorn", reason="m0kit[serve] is not installed")

from tests.runtime.server.asking import Asker
from tests.runtime.server.origins import PNG

from m0kit.scoring.prompt import Prompt, PromptBuilder

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"  # CVE-2026-44222: it ended a server of another kind
PARTS = [
    "<|",
    "|>",
    "<",
    "|",
    "im",
    "_start",
    "_end",
    "vision",
    "image_pad",
    "endoftext",
    " ",
    "\n",
    "\u0301",
    "é",
    "a",
]


@pytest.fixture(scope="module")
def special(artifact: Path) -> dict[str, int]:
    """The vocabulary's special tokens, and their ids."""
    tokens = json.loads((artifact / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    found = {token["content"]: token["id"] for token in tokens}
    assert {"<|image_pad|>", "<|vision_start|>", "<|im_end|>", "<|endoftext|>"} <= set(found)
    return found


@pytest.fixture(scope="module")
def prompts() -> Iterator[list[Prompt]]:
    """All that the model is given."""
    found: list[Prompt] = []
    build = PromptBuilder.build

    def seen(self: PromptBuilder, query: Any, document: Any) -> Prompt:
        found.append(build(self, query, document))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PromptBuilder, "build", seen)
        yield found


def specials_of(prompt: Prompt, special: dict[str, int]) -> list[int]:
    ids = set(special.values())
    return [token for token in prompt.token_ids.tolist() if token in ids]


def post(asker: Asker, path: str, **fields: Any) -> Any:
    answer = asker.ask("POST", path, body=json.dumps(fields).encode())
    assert answer.status == 200, answer.body
    return answer.json


def test_every_special_token_scores_as_text_in_every_form(
    asker: Asker, special: dict[str, int], prompts: list[Prompt]
) -> None:
    texts = [*special, *(f"a {token} b" for token in special), "".join(special), IMAGE, IMAGE * 50]
    prompts.clear()
    forms: list[Any] = [
        texts,
        [{"text": text} for text in texts],
        [{"content": [{"type": "text", "text": text}, {"type": "text", "text": "x"}]} for text in texts],
    ]
    for query in ("the tide", IMAGE, {"text": "".join(special)}, {"content": [{"type": "text", "text": IMAGE}]}):
        for documents in forms:
            results = post(asker, "/v1/rerank", query=query, documents=documents)["results"]
            assert sorted(result["index"] for result in results) == list(range(len(texts)))
    post(asker, "/v1/rerank", query=IMAGE, documents=[{"title": text} for text in texts], rank_fields=["title"])
    post(asker, "/v2/rerank", query=IMAGE, documents=texts, max_tokens_per_doc=5, max_tokens_per_query=3)
    post(asker, "/rerank", query=IMAGE, texts=texts, truncate=True)
    post(asker, "/score", queries=texts, documents=texts)
    assert len(prompts) >= 13 * len(texts)
    for prompt in prompts:
        assert specials_of(prompt, special) == []


def test_an_image_has_its_own_special_tokens_and_none_of_a_text_beside_it(
    asker: Asker, special: dict[str, int], prompts: list[Prompt]
) -> None:
    prompts.clear()
    image = {"image": base64.b64encode(PNG).decode()}
    post(asker, "/v1/rerank", query=IMAGE * 3 + "".join(special), documents=[image])
    post(asker, "/v1/rerank", query=image, documents=[IMAGE * 3 + "".join(special)])
    assert len(prompts) == 2
    for prompt in prompts:
        found = specials_of(prompt, special)
        ends = [special["<|vision_start|>"], special["<|vision_end|>"]]
        assert [found[0], found[-1]] == ends
        assert set(found[1:-1]) == {special["<|image_pad|>"]}


def test_a_document_of_the_index_is_as_it_was_written(
    asker: Asker, special: dict[str, int], prompts: list[Prompt]
) -> None:
    text = f"{IMAGE} and {''.join(special)}"
    for name in ("special", "<|image_pad|>"):  # which may be an id too
        path = f"/v1/documents/{name.replace('<', '%3C').replace('|', '%7C').replace('>', '%3E')}"
        assert asker.ask("PUT", path, body=text.encode(), content_type="text/plain").status == 200
        assert asker.ask("GET", path).json["text"] == text
        prompts.clear()
        by_id = post(asker, "/v1/rerank", query=IMAGE, documents=[{"id": name}])["results"][0]
        by_text = post(asker, "/v1/rerank", query=IMAGE, documents=[text])["results"][0]
        assert by_id["relevance_score"] == by_text["relevance_score"]
        assert prompts
        assert all(specials_of(prompt, special) == [] for prompt in prompts)
        assert asker.ask("DELETE", path).status == 200


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_no_text_becomes_a_special_token(
    asker: Asker, special: dict[str, int], prompts: list[Prompt], data: st.DataObject
) -> None:
    parts = st.lists(st.one_of(st.sampled_from([*special, *PARTS]), st.text(max_size=3)), min_size=1, max_size=12)
    texts = parts.map("".join).filter(bool)
    query, documents = data.draw(texts), data.draw(st.lists(texts, min_size=1, max_size=3))
    prompts.clear()
    results = post(asker, "/v1/rerank", query=query, documents=documents)["results"]
    assert len(results) == len(documents)
    assert len(prompts) == len(documents)
    assert all(specials_of(prompt, special) == [] for prompt in prompts)
