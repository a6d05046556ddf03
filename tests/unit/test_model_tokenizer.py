"""Our tokenizer against transformers' AutoTokenizer, on a small tokenizer trained here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flexpipe_serve.errors import ConfigError, InvalidRequestError
from flexpipe_serve.model.tokenizer import ModelTokenizer

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'tool' %}{{ raise_exception('tools are not known to this model') }}{% endif %}"
    "[{{ message['role'] }}] {{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}{% if shout %}!{% endif %}"
)
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße, 世界?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog barked"] * 3, trainer)
    tokenizer.enable_truncation(5)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=TEMPLATE
    )
    fast.save_pretrained(path)
    return path


def copy(folder: Path, to: Path, **changes: Any) -> Path:
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    config = json.loads((to / "tokenizer_config.json").read_text())
    (to / "tokenizer_config.json").write_text(json.dumps({**config, **changes}))
    return to


@given(text=st.text(max_size=80))
def test_encodes_and_decodes_like_transformers(folder: Path, text: str) -> None:
    ours, theirs = ModelTokenizer(folder), AutoTokenizer.from_pretrained(folder)
    ids = ours.encode(text)
    assert ids == theirs(text).input_ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_nothing_is_truncated(folder: Path) -> None:
    assert len(ModelTokenizer(folder).encode("z" * 50)) == 50


def test_special_tokens_in_text_are_special_and_not_decoded(folder: Path) -> None:
    tokenizer = ModelTokenizer(folder)
    ids = tokenizer.encode("a</s>b")
    assert tokenizer.backend.token_to_id("</s>") in ids
    assert tokenizer.decode(ids) == "ab"


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}])
def test_what_stands_around_a_text_is_up_to_tokenizer_json(
    folder: Path, tmp_path: Path, flags: dict[str, bool]
) -> None:
    changed = copy(folder, tmp_path, **flags)
    backend = tokenizers.Tokenizer.from_file(str(changed / "tokenizer.json"))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    backend.no_truncation()
    backend.save(str(changed / "tokenizer.json"))
    ours, theirs = ModelTokenizer(changed), AutoTokenizer.from_pretrained(changed)
    assert ours.encode("the cat") == theirs("the cat").input_ids
    assert ours.encode("the cat")[0] == backend.token_to_id("<s>")
    assert ours.encode("the cat", add_special_tokens=False) == theirs("the cat", add_special_tokens=False).input_ids


def test_chat_template_like_transformers(folder: Path) -> None:
    ours, theirs = ModelTokenizer(folder), AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert ours.apply_chat_template(MESSAGES) == expected
    closed = theirs.apply_chat_template(MESSAGES, add_generation_prompt=False, return_dict=False)
    assert ours.apply_chat_template(MESSAGES, add_generation_prompt=False) == closed
    assert ours.apply_chat_template(MESSAGES, shout=True)[-1] == ours.encode("!")[0]


@pytest.mark.parametrize("inline", [True, False])
def test_chat_template_in_the_configuration(folder: Path, tmp_path: Path, inline: bool) -> None:
    template: Any = "{{ messages[0]['content'] }}"
    if not inline:
        template = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}]
    changed = copy(folder, tmp_path, chat_template=template)
    (changed / "chat_template.jinja").unlink()
    tokenizer = ModelTokenizer(changed)
    assert tokenizer.decode(tokenizer.apply_chat_template(MESSAGES)) == "Be brief."


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "tool", "content": "x"}],
        [{"role": "user"}, "nonsense"],
        [None],
        ["text"],
    ],
)
def test_refused_messages_are_the_requests_fault(folder: Path, messages: list[Any]) -> None:
    with pytest.raises(InvalidRequestError, match="chat template refuses") as caught:
        ModelTokenizer(folder).apply_chat_template(messages)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "template", ["{{ messages[0].content + 1 }}", "{% for %}", "{{ ''.__class__.__mro__ }}", "{{ 1 / 0 }}"]
)
def test_broken_templates_do_not_escape(folder: Path, tmp_path: Path, template: str) -> None:
    changed = copy(folder, tmp_path)
    (changed / "chat_template.jinja").write_text(template)
    with pytest.raises(InvalidRequestError):
        ModelTokenizer(changed).apply_chat_template(MESSAGES)


def test_no_template(folder: Path, tmp_path: Path) -> None:
    changed = copy(folder, tmp_path)
    (changed / "chat_template.jinja").unlink()
    with pytest.raises(InvalidRequestError, match="no chat template; use /v1/completions"):
        ModelTokenizer(changed).apply_chat_template(MESSAGES)


def test_missing_or_damaged_file(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        ModelTokenizer(tmp_path)
    changed = copy(folder, tmp_path)
    (changed / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be read"):
        ModelTokenizer(changed)
