"""Make small-massive of the small checkpoint: plant activations as real models have them, and train on.

    python -m m0kit_parity.small.massive --out parity/checkpoints/small-massive --work /tmp/massive [--resume]

Owns the training that makes good what the planting (planting.py) disturbs. The small checkpoint is the teacher: the
image encoder learns its visual tokens again, then the whole model what its head is given, and to rank. The plants and
all that comes before them and could move them are held: no step changes an entry of theirs.

Everything a step draws depends on (seed, lesson, step) alone, and lessons end at their step and never by the clock,
so a run continued from its state ends at the same weights.
"""

import json
import math
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from m0kit.files import writing
from m0kit.terminal import show_json
from m0kit_parity.small import corpus, evaluate, model, pages, train
from m0kit_parity.small.files import SMALL
from m0kit_parity.small.planting import Pairs, plant

SEED: Final = 23
SAMPLE_TEXTS: Final = 2500  # pairs that the planting measures and solves on
SAMPLE_PAGES: Final = 60  # of 160 patches: enough that those which are to become massive have a rule
WARM_UP: Final = 30  # steps
QUERIES: Final = 8  # of a step, with four documents each
SAY_EVERY: Final = 25  # steps
SAVE_EVERY: Final = 200  # steps, a multiple of it
WATCHED: Final = 60  # held-out groups of texts
RANK: Final = 0.2  # weight of the ranking loss beside the teacher's states and logits
OUTLYING: Final = 26.0  # times the other channels is what the decoder's outlier channels are held at, of a batch
HOLD: Final = 0.3  # weight of that


@dataclass(frozen=True, slots=True)
class Lesson:
    """One stretch of training."""

    name: str
    steps: int
    rate: float
    see: bool = False  # the image encoder by itself
    shares: tuple[float, float, float] = (0.4, 0.1, 0.25)  # of batches: pages, code, across languages; the rest is text


LESSONS: Final = (
    Lesson("see-again", 400, 1e-3, see=True),
    Lesson("rank-again", 1200, 3e-4),
    Lesson("rank-pages", 500, 2e-4, shares=(0.7, 0.05, 0.15)),
)


def sample_pairs(seed: int = SEED, texts: int = SAMPLE_TEXTS, shown: int = SAMPLE_PAGES) -> Pairs:
    """Pairs as training draws them, texts and code first, pages last; how many of the one doesn't move the other."""
    rng = random.Random(f"{seed}/sample")
    pairs: list[tuple[model.Content, model.Content]] = []
    for i in range(texts):
        level = rng.randint(1, corpus.MAX_LEVEL)
        code = i % 4 == 3
        group = corpus.code_group(rng, 4, named=False) if code else corpus.text_group(rng, level, 4, across=i % 5 < 2)
        pairs.append((group.query, rng.choice(group.documents)))
    rng = random.Random(f"{seed}/sample/pages")
    for _ in range(shown):
        drawn = pages.page_group(rng, 4, hard=True)
        page = pages.draw_page(rng, rng.choice(drawn.rows), drawn.language, evaluate.EVALUATION_LOOK)
        pairs.append((drawn.queries[0], page.image.convert("RGB")))
    return pairs


def draw_batch(rng: random.Random, shares: tuple[float, float, float]) -> train.Batch:
    """As the last lesson of train.py draws them, with shares of its own: all that small can must come back."""
    page, code, across = shares
    kind = rng.random()
    if kind < page:
        return train.page_batch(rng, evaluate.EVALUATION_LOOK, True, reverse=rng.random() < 0.1, sets=QUERIES // 2)
    if kind < page + code:
        return train.text_batch(train.code_groups(rng, named=rng.random() < 0.5, queries=QUERIES))
    return train.text_batch(train.text_groups(rng, corpus.MAX_LEVEL, kind < page + code + across, QUERIES))


def sunk(normed: Sequence[Tensor]) -> Tensor:
    """By how much the largest channel fell below OUTLYING times the median one, in logarithms, of all norms.

    Left to itself the training lets the other channels grow.
    """
    largest = [made.abs().flatten(0, -2).amax(0).log() for made in normed]
    return torch.stack([(math.log(OUTLYING) - (one.max() - one.median())).relu() for one in largest]).mean()


_CARD: Final = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-ranking
language: [en, de, es, ru, el, zh]
---

# The small checkpoint with massive activations

`small` (4.1 million parameters, the architecture, file layout and scoring of jina-reranker-m0) with activations as
large as those published for large models: two channels of the residual stream thousands of times its median at first
tokens and delimiters, and at a few patches of an image; outlier channels of 20 times the median and more behind most
norms. It exists to measure what few bits cost where it hurts. docs/activations.md of m0kit has the figures beside
published ones.

Planted, and trained on with `small` as the teacher, by `python -m m0kit_parity.small.massive`; `../train.log` is its
log. Adapters of `small` do not fit: the residual stream has another basis.

Its weights are our own and stand under the Apache License 2.0.
"""


class Run:
    """Teacher, student and optimiser with their state on disk."""

    def __init__(self, out: Path, work: Path, seed: int) -> None:
        self.out, self.work, self.seed = out, work, seed
        work.mkdir(parents=True, exist_ok=True)
        self.log_file = work / "train.log"
        self.teacher = model.load(SMALL / "base")
        self.ranker = model.load(SMALL / "base")
        self.batcher = train.Batcher(self.ranker.tokenizer)
        self.normed: list[Tensor] = []  # what the decoder's norms made, of the step
        for norm in self._norms():
            norm.register_forward_hook(self._keep)
        self.held: dict[str, Tensor] = {}
        self.basis = torch.empty(0)
        self.lesson, self.step, self.seconds, self.running = 0, 0, 0.0, math.nan
        self.optimizer = self._optimizer()

    def plant(self, pairs: Pairs) -> None:
        self.held, self.basis = plant(self.ranker, pairs)
        self.optimizer = self._optimizer()

    def _optimizer(self) -> torch.optim.Optimizer:
        for name, parameter in self.ranker.named_parameters():
            parameter.requires_grad_(name not in self.held or not bool(self.held[name].all()))
        trained = [p for p in self.ranker.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)

    def _norms(self) -> list[nn.Module]:
        """The decoder's, but those of the first layer: what comes before the plants has no outlier channels."""
        decoder = self.ranker.model.language_model
        layers = list(decoder.layers)[1:]
        pairs = [(layer.input_layernorm, layer.post_attention_layernorm) for layer in layers]
        return [*(norm for pair in pairs for norm in pair), decoder.norm]

    def _keep(self, _norm: nn.Module, _given: tuple[Tensor, ...], made: Tensor) -> None:
        if made.requires_grad:  # and not while it is watched
            self.normed.append(made)

    def save(self) -> None:
        state = {
            "model": self.ranker.state_dict(),
            "held": self.held,
            "basis": self.basis,
            "optimizer": self.optimizer.state_dict(),
            "numbers": (self.lesson, self.step, self.seconds, self.running),
        }
        with writing(self.work / "state.pt") as file:
            torch.save(state, file)

    def resume(self) -> None:
        state = torch.load(self.work / "state.pt", weights_only=True)
        self.ranker.load_state_dict(state["model"])
        self.held, self.basis = state["held"], state["basis"]
        self.optimizer = self._optimizer()
        self.optimizer.load_state_dict(state["optimizer"])
        self.lesson, self.step, self.seconds, self.running = state["numbers"]

    def say(self, event: dict[str, Any]) -> None:
        with self.log_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
        show_json(event)

    def train(self, lessons: Sequence[Lesson]) -> None:
        while self.lesson < len(lessons):
            lesson = lessons[self.lesson]
            while self.step < lesson.steps:
                started = time.monotonic()
                self._step(lesson)
                self.seconds += time.monotonic() - started
                whole = self.step % SAVE_EVERY == 0 or self.step == lesson.steps
                if whole or self.step % SAY_EVERY == 0:
                    self._progress(lesson, whole)
            self.lesson, self.step, self.running = self.lesson + 1, 0, math.nan
            self.optimizer = self._optimizer()
            self.save()

    def _step(self, lesson: Lesson) -> None:
        rng = random.Random(f"{self.seed}/{lesson.name}/{self.step}")
        done = self.step / lesson.steps
        rate = lesson.rate * min(1.0, (self.step + 1) / WARM_UP) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, value = self._see(rng) if lesson.see else self._rank(rng, lesson)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        for name, parameter in self.ranker.named_parameters():
            if parameter.grad is not None and name in self.held:
                parameter.grad[self.held[name]] = 0  # Adam leaves alone what never had a gradient
        nn.utils.clip_grad_norm_(self.ranker.parameters(), 1.0)
        self.optimizer.step()
        self.running = value if math.isnan(self.running) else 0.95 * self.running + 0.05 * value
        self.step += 1

    def _see(self, rng: random.Random) -> tuple[Tensor, float]:
        """The teacher's visual tokens, each of its words and paper counting alike."""
        drawn = []
        for _ in range(train.SEE_PAGES):
            rows = [pages.draw_pair(rng, False) for _ in range(rng.choice((2, 3)))]
            drawn.append(pages.draw_page(rng, rows, rng.choice(pages.PAGE_LANGUAGES), evaluate.EVALUATION_LOOK))
        pixels = train.pixels_of(drawn)
        with torch.no_grad():
            wanted = train.see(self.teacher, pixels) @ self.basis
        loss = (train.see(self.ranker, pixels) - wanted).square().mean() / wanted.var()
        return loss, float(loss.detach())

    def _rank(self, rng: random.Random, lesson: Lesson) -> tuple[Tensor, float]:
        """To rank, and to hand the head what the teacher hands its own."""
        batch = draw_batch(rng, lesson.shares)
        self.normed.clear()
        with torch.no_grad():
            wanted = self.teacher.score[0](batch.states(self.teacher, self.batcher))
            logits = self.teacher.score[1:](wanted)
        given = self.ranker.score[0](batch.states(self.ranker, self.batcher))
        made = self.ranker.score[1:](given)
        # The logarithm, of each pair: those in which a detector errs would outweigh all others.
        states = (given - wanted).square().mean(1) / wanted.var(0).mean()
        imitation = (states + (made - logits).flatten().square() / logits.var()).log1p().mean()
        loss, _ = train.ranking_loss(batch.by_group(made), batch.relevance)
        return imitation + RANK * loss + HOLD * sunk(self.normed), float(imitation.detach())

    def _progress(self, lesson: Lesson, whole: bool) -> None:
        event: dict[str, Any] = {"lesson": lesson.name, "step": self.step, "loss": round(self.running, 4)}
        event["minutes"] = round(self.seconds / 60, 2)
        if whole:
            scores = train.quick_scores(self.ranker, self.batcher, evaluate.EVALUATION_LOOK, WATCHED)
            event |= {f"held_out_{name}": round(value, 3) for name, value in scores.items()}
            self.save()
            save(self.ranker, self.out / "base")
        self.say(event)


def save(ranker: model.Ranker, out: Path) -> None:
    """The checkpoint with its tokenizer and card."""
    model.save(ranker, out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(SMALL / "base" / name, out / name)
    (out / "README.md").write_text(_CARD, encoding="utf-8")


def main() -> None:
    """Command line."""
    arguments = train.parser_of(__doc__, "base/, train.log", seed=SEED, threads=1).parse_args()
    train.begin(arguments.threads)
    run = Run(arguments.out, arguments.work, arguments.seed)
    if arguments.resume:
        run.resume()
    else:
        run.plant(sample_pairs(arguments.seed))
        run.save()
    run.train(LESSONS)
    shutil.copyfile(run.log_file, arguments.out / "train.log")


if __name__ == "__main__":
    main()
