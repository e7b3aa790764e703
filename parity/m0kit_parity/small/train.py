"""Train the small checkpoint from nothing to its published files, in under two hours on two cores.

    python -m m0kit_parity.small.train --out parity/m0kit_parity/data/small --work /tmp/small-run [--resume]

Owns the lessons, the training step and the loop; drawn data come from corpus.py and pages.py. Everything a
step draws depends on (seed, lesson, step) alone, so a run continued from its checkpoint goes on as if it had
not stopped.

Lessons follow each other when the last one's running loss is low or its cap (steps or minutes) is reached:
lists, one sentence, near misses and other languages, several sentences; then the vision encoder by itself,
every visual token to say which word it is part of, in the decoder's own embeddings, from letters that sit
exactly on the patch grid to any shift and several fonts; then text and pages together.

Batches are padded on the right and run without a mask: attention is causal, so nothing sees the padding.
"""

import argparse
import json
import math
import random
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

from m0kit.files import writing
from m0kit.terminal import show_json
from m0kit_parity.small import corpus, evaluate, model, pages
from m0kit_parity.small.tokenizer import write_tokenizer

SEED: Final = 11
VOCABULARY: Final = 3072  # at most
BASE_NAME: Final = "m0kit/small"
TEXT_QUERIES: Final = 16
TEXT_CANDIDATES: Final = 4
PAGE_SETS: Final = 8  # half of TEXT_QUERIES: two queries each
SEE_PAGES: Final = 16
GRADE_WEIGHT: Final = {3: 1.0, 1: 0.15, 0: 0.0}  # share of the listwise target
GRADE_SCORE: Final = {3: 0.93, 1: 0.35, 0: 0.04}  # what sigmoid(logit − 2.65) should say
CALIBRATION: Final = 0.2  # weight of the second beside the first

Kind = Literal["text", "see", "pages"]


@dataclass(frozen=True, slots=True)
class Lesson:
    """One stretch of training. It ends when the running loss falls under `until`, or at a cap."""

    name: str
    kind: Kind
    level: int  # text level, or look of the pages
    until: float
    steps: int
    minutes: float
    rate: float = 5e-4
    hard: bool = True  # pages: near misses among the candidates
    text_share: float = 0.0  # pages: share of the steps that are text
    lists_across: float = 0.0  # share of the text steps that ask for a word's translation in a list
    decay: bool = False


LESSONS: Final = (
    Lesson("text-lists", "text", 1, 0.30, 3000, 8),
    Lesson("text-sentence", "text", 2, 0.20, 3000, 6),
    Lesson("text-near-misses", "text", 3, 0.50, 3000, 7),
    Lesson("text-translations", "text", 1, 0.30, 3000, 7, lists_across=0.85),
    Lesson("text-several-sentences", "text", 4, 0.25, 4000, 4, lists_across=0.2),
    Lesson("see-grid", "see", 0, 0.25, 2000, 4, rate=1e-3),
    Lesson("see-shifted", "see", 1, 0.25, 2000, 4, rate=1e-3),
    Lesson("see-any-shift", "see", 2, 0.25, 3000, 5, rate=1e-3),
    Lesson("see-fonts", "see", 3, 0.10, 4000, 6, rate=1e-3),
    Lesson("read-pages", "pages", 3, 0.25, 2000, 4, hard=False, text_share=0.3, lists_across=0.2),
    Lesson("rank-pages", "pages", 3, 0.0, 6000, 21, text_share=0.5, lists_across=0.1, decay=True),
)


class Batcher:
    """Prompts to padded token ids, positions and image slots."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pad = model.token_id(tokenizer, "<|image_pad|>")

    def __call__(
        self, pairs: Sequence[tuple[str | None, str | None]], visual_tokens: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs of (query, document), None for an image. Ids (B, T), positions (3, B, T), last index (B,)."""
        rows = []
        image = Image.new("L", (1, 1))  # stands for any: only its tokens count here
        for query, document in pairs:
            counts = [visual_tokens] * ((query is None) + (document is None))
            rows.append(model.encode_prompt(self._tokenizer, query or image, document or image, counts))
        length = max(len(row) for row in rows)
        ids = np.zeros((len(rows), length), dtype=np.int64)
        positions = np.zeros((3, len(rows), length), dtype=np.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            positions[:, i] = self._positions(ids[i], pages.WIDTH // pages.TOKEN)
        last = torch.tensor([len(row) - 1 for row in rows])
        return torch.from_numpy(ids), torch.from_numpy(positions), last

    def _positions(self, ids: NDArray[np.int64], columns: int) -> NDArray[np.int64]:
        """M-RoPE positions: an image's tokens by (start, row, column), text goes on from the greatest."""
        places = np.tile(np.arange(len(ids)), (3, 1))
        is_image = ids == self._pad
        starts = np.flatnonzero(is_image & ~np.roll(is_image, 1))
        for start in starts:
            count = int(np.argmin(is_image[start:])) if not is_image[start:].all() else len(ids) - start
            offset = places[0, start]
            index = np.arange(count)
            places[0, start : start + count] = offset
            places[1, start : start + count] = offset + index // columns
            places[2, start : start + count] = offset + index % columns
            after = offset + max(columns, math.ceil(count / columns))
            places[:, start + count :] = after + np.arange(len(ids) - start - count)
        return places


def see(ranker: model.Ranker, pixels: Tensor) -> Tensor:
    """The vision encoder over N equal grey pages at once: (N, height, width) bytes → (N, V, D).

    The same sums as transformers' forward over normalised patches: three equal channels and two equal frames
    are folded into the patch embedding's weights.
    """
    visual = ranker.model.visual
    count, height, width = pixels.shape
    rows, columns = height // 28, width // 28
    patches = pixels.view(count, rows, 2, 14, columns, 2, 14).permute(0, 1, 4, 2, 5, 3, 6)
    patches = patches.reshape(count, rows * columns * 4, 196).float() / 255
    weight = visual.patch_embed.proj.weight.sum(2).flatten(2)  # (E, 3, 196)
    mean, std = (torch.tensor(model.PREPROCESSOR[key]) for key in ("image_mean", "image_std"))
    hidden = F.linear(patches, (weight / std[:, None]).sum(1), -(weight * (mean / std)[:, None]).sum((1, 2)))
    row, column = torch.meshgrid(torch.arange(rows * 2), torch.arange(columns * 2), indexing="ij")
    order = [axis.view(rows, 2, columns, 2).transpose(1, 2).flatten() for axis in (row, column)]
    cos, sin = visual.rotary_pos_emb(hidden, torch.stack(order, -1))
    for block in visual.blocks:
        attention = block.attn
        qkv = attention.qkv(block.norm1(hidden)).view(count, -1, 3, attention.num_heads, attention.head_dim)
        query, key, value = qkv.unbind(2)
        query, key = apply_rotary_pos_emb_vision(query, key, cos, sin)
        mixed = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (query, key, value)))
        hidden = hidden + attention.proj(mixed.transpose(1, 2).flatten(2))
        hidden = hidden + block.mlp(block.norm2(hidden))
    merged: Tensor = visual.merger(hidden)
    return merged.view(count, rows * columns, -1)


def states(
    ranker: model.Ranker, batcher: Batcher, pairs: Sequence[tuple[str | None, str | None]], images: Tensor | None
) -> Tensor:
    """What the head is given of pairs, (B, D). images: (B, V, D) for the pairs' images, one each."""
    ids, positions, last = batcher(pairs, images.shape[1] if images is not None else 0)
    decoder = ranker.model.language_model
    embedded = decoder.embed_tokens(ids)
    if images is not None:
        mask = (ids == ranker.config_ids[1]).unsqueeze(-1).expand_as(embedded)
        embedded = embedded.masked_scatter(mask, images.flatten(0, 1))
    hidden = decoder(inputs_embeds=embedded, position_ids=positions, use_cache=False).last_hidden_state
    last_states: Tensor = hidden[torch.arange(len(last)), last]
    return last_states


def rank(
    ranker: model.Ranker, batcher: Batcher, pairs: Sequence[tuple[str | None, str | None]], images: Tensor | None
) -> Tensor:
    """Logits of pairs (B,); arguments as of `states`."""
    logits: Tensor = ranker.score(states(ranker, batcher, pairs, images))
    return logits[:, 0]


def ranking_loss(logits: Tensor, relevance: Sequence[Sequence[int]]) -> tuple[Tensor, float]:
    """Listwise cross-entropy with a calibration term; logits (groups, candidates). Also the first alone."""
    weights = torch.tensor([[GRADE_WEIGHT[g] for g in row] for row in relevance])
    wanted = torch.tensor([[GRADE_SCORE[g] for g in row] for row in relevance])
    target = weights / weights.sum(1, keepdim=True)
    entropy = -(target * target.clamp_min(1e-9).log()).sum(1).mean()
    listwise = -(target * F.log_softmax(logits, 1)).sum(1).mean() - entropy
    calibration = F.binary_cross_entropy_with_logits(logits - model.LOGIT_BIAS, wanted)
    return listwise + CALIBRATION * calibration, float(listwise.detach())


@dataclass(frozen=True, slots=True)
class Batch:
    """Pairs in groups of equal size, drawn and not yet ranked."""

    pairs: list[tuple[str | None, str | None]]  # None for a page
    relevance: list[Sequence[int]]  # of each group's pairs
    pixels: Tensor | None = None  # (N, height, width) bytes of the pages
    shown: Tensor | None = None  # of each pair which page it is

    def states(self, ranker: model.Ranker, batcher: Batcher) -> Tensor:
        """What the head is given, (pairs, D)."""
        images = None if self.pixels is None else see(ranker, self.pixels)[self.shown]
        return states(ranker, batcher, self.pairs, images)

    def by_group(self, logits: Tensor) -> Tensor:
        """(pairs, 1) to (groups, candidates)."""
        return logits.view(len(self.relevance), -1)


def text_batch(groups: Sequence[corpus.Group]) -> Batch:
    """Text or code groups of equal size."""
    return Batch([(g.query, d) for g in groups for d in g.documents], [g.relevance for g in groups])


def ranking_step(ranker: model.Ranker, batcher: Batcher, batch: Batch) -> tuple[Tensor, float]:
    """Loss, and its listwise part as a number."""
    logits = batch.by_group(ranker.score(batch.states(ranker, batcher)))
    return ranking_loss(logits, batch.relevance)


def text_groups(
    rng: random.Random, level: int, across: bool = False, queries: int = TEXT_QUERIES
) -> list[corpus.Group]:
    """One batch of text groups."""
    return [corpus.text_group(rng, level, TEXT_CANDIDATES, across=across) for _ in range(queries)]


def code_groups(rng: random.Random, named: bool, queries: int = TEXT_QUERIES) -> list[corpus.Group]:
    """One batch of code groups."""
    return [corpus.code_group(rng, TEXT_CANDIDATES, named=named) for _ in range(queries)]


def pixels_of(drawn: Sequence[pages.Page]) -> Tensor:
    """Of pages that were drawn, stacked."""
    return torch.from_numpy(np.stack([page.pixels for page in drawn]))


def page_batch(rng: random.Random, look: int, hard: bool, reverse: bool, sets: int = PAGE_SETS) -> Batch:
    """Two queries over each set of four pages; reverse: a page asks for the sentence that says what it says."""
    if reverse:
        return _reverse_batch(rng, look, 2 * sets)
    groups = [pages.page_group(rng, TEXT_CANDIDATES, hard) for _ in range(sets)]
    drawn = [pages.draw_page(rng, rows, g.language, look) for g in groups for rows in g.rows]
    pairs: list[tuple[str | None, str | None]] = [(query, None) for g in groups for query in g.queries for _ in g.rows]
    shown = torch.arange(len(drawn)).view(sets, 1, TEXT_CANDIDATES).expand(-1, 2, -1).flatten()
    return Batch(pairs, [relevance for g in groups for relevance in g.relevance], pixels_of(drawn), shown)


def _reverse_batch(rng: random.Random, look: int, count: int) -> Batch:
    drawn, relevance = [], []
    pairs: list[tuple[str | None, str | None]] = []
    for _ in range(count):
        group = pages.page_group(rng, TEXT_CANDIDATES, hard=True)
        chosen = rng.randrange(TEXT_CANDIDATES)
        drawn.append(pages.draw_page(rng, group.rows[chosen], group.language, look))
        grades = []
        for rows in group.rows:
            adjective, noun = rng.choice(rows)
            fact = (adjective, noun, rng.randrange(len(corpus.PLACES)))
            pairs.append((None, corpus.statement(rng, fact, group.language)))
            grades.append(pages.grade_page((adjective, noun), group.rows[chosen]))
        relevance.append(grades)
    shown = torch.arange(len(drawn)).repeat_interleave(TEXT_CANDIDATES)
    return Batch(pairs, [*relevance], pixels_of(drawn), shown)


def see_step(ranker: model.Ranker, targets: Tensor, rng: random.Random, look: int) -> tuple[Tensor, float, float]:
    """Every visual token says which word it is part of: loss, the loss as a number, accuracy on words.

    targets: (words + 1, D) the decoder's embeddings of the page words, paper last. A token's output is to be
    close to its word's embedding, so that the decoder can go on as if it had read the word.
    """
    drawn = []
    for _ in range(SEE_PAGES):
        rows = [pages.draw_pair(rng, False) for _ in range(rng.choice((2, 3)))]
        drawn.append(pages.draw_page(rng, rows, rng.choice(pages.PAGE_LANGUAGES), look))
    labels = torch.from_numpy(np.stack([page.labels.ravel() for page in drawn])).flatten()
    paper = labels < 0
    labels = torch.where(paper, len(targets) - 1, labels)
    output = see(ranker, pixels_of(drawn)).flatten(0, 1)
    logits = F.normalize(output, dim=-1) @ F.normalize(targets, dim=-1).T * 16
    weights = torch.ones(len(targets))
    weights[-1] = 0.2  # two tokens in three are paper
    named = F.cross_entropy(logits, labels, weights)
    distance = (output - targets[labels]).square().mean() / targets.square().mean()
    right = (logits.argmax(1) == labels)[~paper].float().mean()
    return named + 0.3 * distance, float(named.detach()), float(right)


def word_targets(ranker: model.Ranker) -> Tensor:
    """Decoder embeddings of " word" for each page word, and of a line break for paper."""
    table = ranker.model.language_model.embed_tokens.weight.detach()
    ids = [ranker.tokenizer.encode(f" {text}", add_special_tokens=False).ids for text in pages.vocabulary()]
    ids.append(ranker.tokenizer.encode("\n", add_special_tokens=False).ids)
    return torch.stack([table[one].mean(0) for one in ids])


@torch.no_grad()
def quick_scores(ranker: model.Ranker, batcher: Batcher, look: int, groups: int = 40) -> dict[str, float]:
    """nDCG@10 on held-out groups drawn for watching the training (other groups than the evaluation set's)."""
    ranker.eval()
    seed = evaluate.EVALUATION_SEED + 1
    found: dict[str, float] = {}
    for name, items in (("text", evaluate.text_items(groups, seed)), ("code", evaluate.code_items(groups // 2, seed))):
        values = []
        for item in items:
            logits = rank(ranker, batcher, [(item.query, str(d)) for d in item.documents], None)
            values.append(evaluate.ndcg_at_k(logits.tolist(), item.relevance))
        found[name] = fmean(values)
    values = []
    for number, group in enumerate(evaluate.page_groups(groups // 4, seed)):
        drawn = evaluate.draw_group(group, f"{seed}/{number}", look)
        images = see(ranker, torch.from_numpy(np.stack([np.asarray(image) for image in drawn])))
        for query, relevance in zip(group.queries, group.relevance, strict=True):
            logits = rank(ranker, batcher, [(query, None)] * len(drawn), images)
            values.append(evaluate.ndcg_at_k(logits.tolist(), relevance))
    found["pages"] = fmean(values)
    ranker.train()
    return found


class Run:
    """The state of a training run: weights, optimiser, lesson, step; saved whole, replaced atomically."""

    def __init__(self, out: Path, work: Path, seed: int, status: Path | None) -> None:
        self.out, self.work, self.seed, self.status = out, work, seed, status
        work.mkdir(parents=True, exist_ok=True)
        base = out / "base"
        base.mkdir(parents=True, exist_ok=True)
        tokenizer_file = base / "tokenizer.json"
        tokenizer = (
            Tokenizer.from_file(str(tokenizer_file)) if tokenizer_file.exists() else write_tokenizer(base, VOCABULARY)
        )
        torch.manual_seed(seed)
        self.ranker = model.build(tokenizer)
        with torch.no_grad():  # white paper is a large constant in every patch; ignore it at the start
            weight = self.ranker.model.visual.patch_embed.proj.weight
            weight -= weight.mean(dim=(1, 2, 3, 4), keepdim=True)
        self.batcher = Batcher(tokenizer)
        self.optimizer = torch.optim.AdamW(self.ranker.parameters(), lr=5e-4, betas=(0.9, 0.98), weight_decay=0.01)
        self.lesson, self.step, self.total = 0, 0, 0
        self.seconds = 0.0  # spent in this lesson
        self.all_seconds = 0.0
        self.running = math.nan
        self.log_file = work / "train.log"

    def save(self) -> None:
        state = {
            "model": self.ranker.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "numbers": (self.lesson, self.step, self.total, self.seconds, self.all_seconds, self.running),
        }
        with writing(self.work / "state.pt") as file:
            torch.save(state, file)

    def resume(self) -> None:
        state = torch.load(self.work / "state.pt", weights_only=True)
        self.ranker.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lesson, self.step, self.total, self.seconds, self.all_seconds, self.running = state["numbers"]

    def say(self, event: dict[str, Any]) -> None:
        line = json.dumps(event)
        with self.log_file.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        show_json(event)
        if self.status:
            self.status.write_text(line + "\n", encoding="utf-8")

    def train(self, lessons: Sequence[Lesson]) -> None:
        while self.lesson < len(lessons):
            self._lesson(lessons[self.lesson])
            self.lesson, self.step, self.seconds, self.running = self.lesson + 1, 0, 0.0, math.nan
            self.save()
            model.save(self.ranker, self.out / "base")

    def _lesson(self, lesson: Lesson) -> None:
        targets = word_targets(self.ranker) if lesson.kind == "see" else torch.empty(0)
        extra = math.nan
        while self.step < lesson.steps and self.seconds < 60 * lesson.minutes and not self.running < lesson.until:
            started = time.monotonic()
            rng = random.Random(f"{self.seed}/{lesson.name}/{self.step}")
            self._set_rate(lesson)
            counted = True
            if lesson.kind == "see":
                loss, value, right = see_step(self.ranker, targets, rng, lesson.level)
                extra = right if math.isnan(extra) else 0.98 * extra + 0.02 * right
            elif lesson.kind == "text" or rng.random() < lesson.text_share:
                level = lesson.level if lesson.kind == "text" else corpus.MAX_LEVEL
                counted = lesson.kind == "text"
                # a little of the earlier lesson stays in, and a little code in the last ones
                if lesson.kind == "text" and level > 1 and rng.random() < 0.1:
                    level, counted = level - 1, False
                code = lesson.kind == "pages" and rng.random() < 0.06
                across = lesson.lists_across > 0 and rng.random() < lesson.lists_across
                if across:
                    counted = counted and level == 1
                    level = 1
                elif lesson.lists_across and level == 1:  # between translations, sentences
                    level, counted = 3, False
                groups = code_groups(rng, named=False) if code else text_groups(rng, level, across)
                loss, value = ranking_step(self.ranker, self.batcher, text_batch(groups))
            else:
                reverse = lesson.hard and rng.random() < 0.1
                counted = not reverse
                batch = page_batch(rng, lesson.level, lesson.hard, reverse)
                loss, value = ranking_step(self.ranker, self.batcher, batch)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.ranker.parameters(), 1.0)
            self.optimizer.step()
            if counted:  # start at twice the first value: a lesson isn't over after one lucky step
                self.running = 2 * value if math.isnan(self.running) else 0.98 * self.running + 0.02 * value
            self.step, self.total = self.step + 1, self.total + 1
            spent = time.monotonic() - started
            self.seconds, self.all_seconds = self.seconds + spent, self.all_seconds + spent
            if self.step % 50 == 0:
                self._progress(lesson, extra)
        self._progress(lesson, extra, ended=True)

    def _set_rate(self, lesson: Lesson) -> None:
        rate = lesson.rate * min(1.0, (self.step + 1) / 100)
        if lesson.decay:
            done = max(self.step / lesson.steps, self.seconds / (60 * lesson.minutes))
            rate *= 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _progress(self, lesson: Lesson, extra: float, ended: bool = False) -> None:
        event: dict[str, Any] = {
            "lesson": lesson.name, "step": self.step, "total": self.total, "loss": round(self.running, 4),
            "minutes": round(self.all_seconds / 60, 2),
        }  # fmt: skip
        if lesson.kind == "see":
            event["word_accuracy"] = round(extra, 3)
        if ended or self.step % 300 == 0:
            if lesson.kind != "see":
                scores = quick_scores(self.ranker, self.batcher, evaluate.EVALUATION_LOOK)
                event |= {f"held_out_{name}": round(value, 3) for name, value in scores.items()}
            self.save()
            model.save(self.ranker, self.out / "base")
        if ended:
            event["ended"] = True
        self.say(event)


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter and what it is trained on."""

    name: str
    rank: int
    targets: str  # regular expression over module names
    saved: tuple[str, ...]  # modules trained and kept whole
    task: Literal["code", "across"]
    steps: int
    minutes: float
    rate: float


ADAPTERS: Final = (
    Adapter("code", 8, r"model\.language_model\.layers\..*_proj", (), "code", 1500, 5, 2e-3),
    Adapter("score", 4, r"model\.language_model\.layers\..*\.[qv]_proj", ("score",), "across", 600, 2.5, 5e-4),
)


_ADAPTER_CARD: Final = """---
license: apache-2.0
library_name: peft
base_model: m0kit/small
---

# {name}

A LoRA adapter (rank {rank}) for the small checkpoint beside it, trained by `m0kit_parity.small.train` on the
task "{task}": code = a description asks for the function that computes it in the language it names; across = no
document is in the query's language. Modules kept whole: {saved}.
"""


def train_adapter(out: Path, adapter: Adapter, seed: int, say: Callable[[dict[str, Any]], None]) -> None:
    """Train one adapter on the finished base and save it in PEFT's own layout, in half precision.

    An adapter is minutes of work: a run stopped here starts it again from its beginning.
    """
    torch.manual_seed(seed)
    ranker = model.load(out / "base")
    vars(ranker)["name_or_path"] = BASE_NAME  # goes into adapter_config.json
    batcher = Batcher(ranker.tokenizer)
    settings = LoraConfig(
        r=adapter.rank, lora_alpha=2 * adapter.rank, target_modules=adapter.targets,
        modules_to_save=list(adapter.saved) or None,
    )  # fmt: skip
    wrapped = get_peft_model(ranker, settings)
    wrapped.train()
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=adapter.rate, betas=(0.9, 0.98), weight_decay=0.0)
    running, began = math.nan, time.monotonic()
    for step in range(adapter.steps):
        done = max(step / adapter.steps, (time.monotonic() - began) / (60 * adapter.minutes))
        if done >= 1:
            break
        rng = random.Random(f"{seed}/adapter-{adapter.name}/{step}")
        for group in optimizer.param_groups:
            group["lr"] = adapter.rate * min(1.0, (step + 1) / 50) * (0.05 + 0.95 * (1 - done))
        code = adapter.task == "code"
        groups = code_groups(rng, named=True) if code else text_groups(rng, corpus.MAX_LEVEL, across=True)
        loss, value = ranking_step(ranker, batcher, text_batch(groups))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        running = 2 * value if math.isnan(running) else 0.98 * running + 0.02 * value
        if (step + 1) % 50 == 0:
            minutes = round((time.monotonic() - began) / 60, 2)
            say({"adapter": adapter.name, "step": step + 1, "loss": round(running, 4), "minutes": minutes})
    for parameter in trained:
        parameter.data = parameter.data.clamp(-model.FP16_MAX, model.FP16_MAX).half()
    folder = out / "adapters" / adapter.name
    wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").write_text(_ADAPTER_CARD.format(**asdict(adapter)), encoding="utf-8")
    (folder / "adapter_model.safetensors").chmod(0o644)


_PERCENTILES: Final = (0, 5, 25, 50, 75, 95, 100)


def score_report(out: Path) -> dict[str, Any]:
    """nDCG@10 of chance, BM25, the base and the adapters on the evaluation sets, from the files."""
    found: dict[str, Any] = {}
    for kind in evaluate.KINDS:
        items = evaluate.read_set(out / "eval", kind)
        ranker = model.load(out / "base")
        scores, values = evaluate.measure(ranker.score_documents, items)
        flat = sorted(score for row in scores for score in row)
        row: dict[str, Any] = {
            "queries": len(items),
            "chance": fmean(evaluate.chance_ndcg(item.relevance) for item in items),
            "bm25": fmean(evaluate.measure(evaluate.bm25_text, items)[1]),
            "base": fmean(values),
            "base_score_percentiles": {str(p): flat[p * (len(flat) - 1) // 100] for p in _PERCENTILES},
            "base_per_query": values,
            "base_scores": scores,
        }
        for adapter in ADAPTERS:
            adapted = model.load_adapter(ranker, out / "adapters" / adapter.name)
            values = evaluate.measure(adapted.score_documents, items)[1]
            row[f"adapter_{adapter.name}"] = fmean(values)
            if kind == adapter.task:
                row[f"adapter_{adapter.name}_per_query"] = values
            ranker = model.load(out / "base")
        found[kind] = row
    rounded: dict[str, Any] = json.loads(json.dumps(found), parse_float=lambda text: round(float(text), 4))
    return rounded


def finish(out: Path, seed: int, say: Callable[[dict[str, Any]], None]) -> None:
    """Adapters, evaluation sets and metrics.json."""
    for adapter in ADAPTERS:
        train_adapter(out, adapter, seed, say)
    evaluate.write_sets(out / "eval")
    sets = score_report(out)
    say({name: row["base"] for name, row in sets.items()})
    report = {
        "measure": "nDCG@10, ten candidates, gains 2^grade - 1",
        "bm25": "sees the text of documents and nothing of a page: there it keeps the pages' random order",
        "parameters": sum(p.numel() for p in model.load(out / "base").parameters()),
        "sets": sets,
    }
    text = re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), json.dumps(report, indent=1))
    (out / "metrics.json").write_text(text + "\n", encoding="utf-8")


def parser_of(description: str | None, made: str, *, seed: int, threads: int) -> argparse.ArgumentParser:
    """What all trainings take; `made`: what is in the folder of the checkpoint afterwards."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help=f"folder of the checkpoint: {made}")
    parser.add_argument("--work", type=Path, required=True, help="folder of the run's own state and log")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --work")
    parser.add_argument("--seed", type=int, default=seed)
    parser.add_argument("--threads", type=int, default=threads)
    return parser


def begin(threads: int) -> None:
    """Set PyTorch up as trainings are reproduced with."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)


def main() -> None:
    """Command line."""
    parser = parser_of(__doc__, "base/, adapters/, eval/", seed=SEED, threads=2)
    parser.add_argument("--status", type=Path, help="file to keep the last progress line in")
    arguments = parser.parse_args()
    begin(arguments.threads)
    run = Run(arguments.out, arguments.work, arguments.seed, arguments.status)
    if arguments.resume:
        run.resume()
    run.train(LESSONS)
    finish(arguments.out, arguments.seed, run.say)
    shutil.copyfile(run.log_file, arguments.out / "train.log")


if __name__ == "__main__":
    main()
