"""Layouts, prompts and fixtures for tests of a stage in several epochs at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from stage_harness import Harness, Part, harness

PROMPTS = [[9, 4, 77, 23, 5, 61], [3, 17, 99], [40, 41, 42, 43, 44, 45, 46, 47, 48]]
NUM_STEPS = 9
OLD: tuple[Part, ...] = (("stage-0", 0, 2), ("stage-1", 2, 4))
NEW_LAYOUTS: dict[str, tuple[Part, ...]] = {
    "shift right": (("stage-0", 0, 3), ("stage-1", 3, 4)),
    "shift left": (("stage-0", 0, 1), ("stage-1", 1, 4)),
    "split": (("stage-0", 0, 1), ("stage-2", 1, 2), ("stage-1", 2, 3), ("stage-3", 3, 4)),
    "merge to the first": (("stage-0", 0, 4),),
    "merge to the last": (("stage-1", 0, 4),),
    "turn around": (("stage-1", 0, 2), ("stage-0", 2, 4)),
    "all new": (("stage-2", 0, 3), ("stage-3", 3, 4)),
}


@pytest.fixture(scope="module")
def expected(tied_model: Path) -> list[tuple[list[int], list[float]]]:
    """Tokens and log probabilities of the prompts, each decoded alone on a single stage."""
    found = []
    with harness(tied_model) as h:
        h.start(("stage-0", 0, 4))
        for prompt in PROMPTS:
            seq = h.sequence(prompt, num_tokens=32)
            for _ in range(NUM_STEPS):
                h.step(1, [seq])
            found.append((seq.tokens, seq.logprobs))
    return found


@pytest.fixture
def h(tied_model: Path) -> Iterator[Harness]:
    with harness(tied_model) as made:
        yield made


def sequences(h: Harness) -> list:
    return [h.sequence(prompt, num_tokens=32) for prompt in PROMPTS]


def decode(h: Harness, epoch: int, seq, num_steps: int) -> None:
    for _ in range(num_steps):
        h.step(epoch, [seq])


def assert_as_expected(seqs: Sequence, expected: list[tuple[list[int], list[float]]]) -> None:
    assert [(seq.tokens, seq.logprobs) for seq in seqs] == expected, "every bit of every step"
