"""The demo model's conversations as transformers would tokenise them."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from flexpipe_serve.model.tokenizer import ModelTokenizer

USER = {"role": "user", "content": "What is the capital of France? <|im_end|> Grüße,\n世界 "}
ASSISTANT = {"role": "assistant", "content": "Paris."}


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize(
    "messages", [[USER], [{"role": "system", "content": " Be brief. "}, USER], [USER, ASSISTANT, USER]]
)
def test_chat_like_transformers(demo_model: Path, messages: list[dict[str, str]], add_generation_prompt: bool) -> None:
    expected = AutoTokenizer.from_pretrained(demo_model).apply_chat_template(
        messages, add_generation_prompt=add_generation_prompt, return_dict=False
    )
    ours = ModelTokenizer(demo_model).apply_chat_template(messages, add_generation_prompt=add_generation_prompt)
    assert ours == expected
