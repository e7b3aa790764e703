"""Mistakes an implementation could make, made on purpose, and how far they move scores. Not a test file."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray

from m0kit_parity.proof.cases import builtin_cases
from m0kit_parity.reference import Reference

Pair = tuple[Any, Any]
Mistake = Callable[[Reference], Any]


def pairs_of(*names: str) -> list[Pair]:
    """(query, document) of built-in cases."""
    groups = [group for case in builtin_cases(names) for group in case.groups]
    return [(group.query.value(), document.value()) for group in groups for document in group.documents]


def assert_spread(scores: NDArray[np.float32]) -> None:
    """Scores of different pairs lie all over (0, 1), neither together nor at its ends."""
    assert scores.std() > 0.12
    assert scores.max() - scores.min() > 0.5
    assert np.mean((scores > 0.02) & (scores < 0.98)) > 0.8
    assert 0.25 < np.median(scores) < 0.75


@contextmanager
def swapped_layers(reference: Reference) -> Iterator[None]:
    layers = reference.core.language_model.layers
    layers[0], layers[1] = layers[1], layers[0]
    yield
    layers[0], layers[1] = layers[1], layers[0]


@contextmanager
def swapped_blocks(reference: Reference) -> Iterator[None]:
    blocks = reference.core.visual.blocks
    blocks[0], blocks[1] = blocks[1], blocks[0]
    yield
    blocks[0], blocks[1] = blocks[1], blocks[0]


@contextmanager
def changed_inputs(reference: Reference, change: Callable[[Any], None]) -> Iterator[None]:
    right = reference.inputs

    def wrong(pair: Any) -> Any:
        inputs = right(pair)
        change(inputs)
        return inputs

    with patch.object(reference, "inputs", wrong):
        yield


def neighbours_swapped(inputs: Any) -> None:
    """Two patches of every 2×2 group change places: as if rows and columns were mixed up while merging."""
    for i, patches in enumerate(inputs.patches):
        inputs.patches[i] = patches.reshape(-1, 4, patches.shape[1])[:, [0, 2, 1, 3]].reshape(patches.shape)


def grids_turned(inputs: Any) -> None:
    """Height and width exchanged, where that makes a difference."""
    for i, grid in enumerate(inputs.grids):
        inputs.grids[i] = grid[[0, 2, 1]]


@contextmanager
def shifted_positions(reference: Reference) -> Iterator[None]:
    """The second half of the prompt starts two positions late."""
    right = reference.core.get_rope_index

    def wrong(token_ids: torch.Tensor, **options: Any) -> Any:
        positions, deltas = right(token_ids, **options)
        positions = positions.clone()
        positions[..., positions.shape[-1] // 2 :] += 2
        return positions, deltas

    with patch.object(reference.core, "get_rope_index", wrong):
        yield


MISTAKES: dict[str, Mistake] = {
    "two decoder layers swapped": swapped_layers,
    "positions shifted": shifted_positions,
    "two vision blocks swapped": swapped_blocks,
    "two patches of every group swapped": lambda reference: changed_inputs(reference, neighbours_swapped),
    "height and width exchanged": lambda reference: changed_inputs(reference, grids_turned),
}
OF_IMAGES = ("two vision blocks swapped", "two patches of every group swapped", "height and width exchanged")


def assert_noticed(reference: Reference, name: str, pairs: Sequence[Pair]) -> None:
    """The mistake moves most scores by 10 tolerances (1e-4 each), and some by a hundred."""
    right = reference.score(pairs)
    with MISTAKES[name](reference):
        wrong = reference.score(pairs)
    assert reference.score(pairs[:1])[0] == right[0], "the mistake must be undone"
    change = np.abs(wrong - right)
    assert np.mean(change > 1e-3) > 0.6, change
    assert change.max() > 1e-2, change
