"""The proof of the pipeline: greedy tokens equal those of transformers, whatever the split, cache and chunking."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import generate_all, running_engine
from transformers import AutoModelForCausalLM

from flexpipe_serve.engine.sampling_params import SamplingParams

NUM_PROMPTS = 32
NUM_NEW_TOKENS = 8
CHUNK = 192
TIE = 1e-4
"""Two best logits of the reference closer than this may change places by rounding; everything else is a bug."""


@dataclass(frozen=True)
class Reference:
    prompt: list[int]
    tokens: list[int]
    gaps: list[float]
    """Distance of the two best logits at each token."""


@pytest.fixture(scope="module")
def references(demo_model: Path) -> list[Reference]:
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    rng = np.random.default_rng(7)
    lengths = [2000, 600, CHUNK - 1, CHUNK, CHUNK + 1, 15, 16, 17, 33, 1, 1]
    lengths += np.unique(np.geomspace(1, 150, 64).astype(int)).tolist()[::2][: NUM_PROMPTS - len(lengths)]
    assert len(lengths) == NUM_PROMPTS
    text = rng.integers(100, 49000, 2000).tolist()
    # Half of the prompts share beginnings, so that the prefix cache has something to find.
    prompts = [text[:n] if i % 2 else rng.integers(100, 49000, n).tolist() for i, n in enumerate(lengths)]
    found = []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=NUM_NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = [logits[0].topk(2).values for logits in out.logits]
        found.append(Reference(prompt, out.sequences[0, len(prompt) :].tolist(), [float(b[0] - b[1]) for b in best]))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("num_stages", "prefix_cache"), list(itertools.product([1, 2, 3, 5], [True, False])))
def test_greedy_tokens_equal_transformers(
    demo_model: Path,
    references: list[Reference],
    num_stages: int,
    prefix_cache: bool,
    record_property: pytest.RecordProperty,
) -> None:
    params = SamplingParams(max_tokens=NUM_NEW_TOKENS, temperature=0.0, ignore_eos=True)
    with running_engine(
        demo_model, num_stages=num_stages, prefix_cache=prefix_cache, max_num_batched_tokens=CHUNK
    ) as engine:
        outputs = generate_all(engine, [r.prompt for r in references], params)
    ties = 0
    for reference, tokens in zip(references, outputs, strict=True):
        assert len(tokens) == NUM_NEW_TOKENS
        at = next((i for i, (a, b) in enumerate(zip(tokens, reference.tokens, strict=True)) if a != b), None)
        if at is not None:
            assert reference.gaps[at] < TIE, (
                f"prompt of {len(reference.prompt)} tokens: token {at} is {tokens[at]}, transformers has "
                f"{reference.tokens[at]}, and its two best logits are {reference.gaps[at]:.2e} apart"
            )
            ties += 1
    record_property("ties", ties)
    print(f"\n{num_stages} stages, prefix cache {prefix_cache}: {len(references)} prompts, {ties} ties")
