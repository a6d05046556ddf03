"""Requests for tests of sampling."""

from __future__ import annotations

from typing import Any

import numpy as np

from flexpipe_serve.pipeline.messages import SampleSpec

NO_HISTORY = np.zeros(0, np.int32)


def spec(position: int = 0, **options: Any) -> SampleSpec:
    return SampleSpec(row=0, position=position, **options)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 30},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 0.9, "top_p": 0.8, "top_k": 400, "num_logprobs": 3},
    {"temperature": 1.0, "min_p": 0.02, "num_logprobs": 0},
    {"num_logprobs": 7, "logit_bias": ((5, 3.0),)},
    {"temperature": 2.0, "repetition_penalty": 1.3, "presence_penalty": 0.4, "num_history": 40, "num_prompt": 10},
]
