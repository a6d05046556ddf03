"""Our rendering of chat templates against transformers' own, and the sandbox."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.exceptions import SecurityError
from transformers.utils.chat_template_utils import render_jinja_template

from flexpipe_serve.model.chat_template import ChatTemplate

TEMPLATES = {
    "chatml": """
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message.content | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "headers, date and tools": """
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
    {%- endfor %}
{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
""",
    "turns must alternate": """
{%- if messages[0]["role"] == "system" %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0, last='') %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("roles must alternate user and assistant") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
    {%- set ns.last = message.content %}
    {%- if message["role"] == "user" %}[INST]{{ message["content"] }}[/INST]
    {%- else %}{{ message["content"] }}</s>{%- endif %}
{%- endfor %}
{{ ns.index }}{{ ns.last | length }}
""",
    "generation": """
{% for message in messages %}
{% if message.role == 'assistant' %}
{% generation %}{% set inner = message.content %}{{ inner }}{{ loop.index }}{% endgeneration %}{{ inner is defined }}
{% else %}
{{ message.role }}: {{ message.content }}
{% endif %}
{% endfor %}
""",
    "loop controls": """
{%- for message in messages -%}
{% if message.role == 'system' %}{% continue %}{% endif %}
{% if loop.index > 2 %}{% break %}{% endif %}
{{ message | tojson }}{{ message.items() | list | length }}
{%- endfor -%}
""",
    "filters and whitespace": """
    {# a comment #}
    {% for message in messages if message.content is string %}
    <{{ loop.index0 }}|{{ message.content.split('e')[0] | upper }}>
    {{ message | tojson(ensure_ascii=True, sort_keys=True) }}
    {% endfor %}
    {% macro say(text) %}"{{ text }}"{% endmacro %}
    {{ say(messages[-1].content) }}
    {{ dict(a=1, b=[2, none, true]) | tojson(separators=(',', ':')) }} {{ dict.fromkeys(['x'], 3) }}
    {{ documents is none }} {{ nothing is defined }} {{ nothing }} {{ messages[0]['nothing'] }}
    {{ {'a': '<&>"é'} | tojson }} {{ '<b>' }}
""",
}
VARIABLES = {"bos_token": "<s>", "add_generation_prompt": True}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<é>", "parameters": {}}}]

messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text(max_size=20)}),
    min_size=1,
    max_size=5,
)


def outcome(render: Any) -> str | type[Exception]:
    try:
        return str(render())
    except jinja2.TemplateError as error:
        return type(error)


def check_like_transformers(template: str, conversation: list[dict[str, str]], **variables: Any) -> None:
    expected = outcome(
        lambda: render_jinja_template([conversation], chat_template=template, **VARIABLES, **variables)[0][0]
    )
    assert outcome(lambda: ChatTemplate(template).render(conversation, **VARIABLES, **variables)) == expected


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@given(conversation=messages)
def test_like_transformers(template: str, conversation: list[dict[str, str]]) -> None:
    check_like_transformers(template, conversation)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_like_transformers_with_more_variables(template: str) -> None:
    conversation = [{"role": "user", "content": "Grüße,\n世界? "}, {"role": "assistant", "content": " <b>"}]
    check_like_transformers(template, conversation, tools=TOOLS, documents=[{"title": "t"}], date_string="today")


def test_the_date_is_todays() -> None:
    before = datetime.now()
    year = ChatTemplate("{{ strftime_now('%Y') }}").render([])
    assert before.year <= int(year) <= datetime.now().year


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.x }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ strftime_now.__globals__.x }}",
        "{{ ('' | tojson).__class__.x }}",
        "{{ dict.__init__.x }}",
        "{{ namespace.__init__.x }}",
        "{{ namespace(__class__=1) }}",
        "{{ namespace({'__class__': 1}) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ cycler.__init__.x }}",
    ],
)
def test_templates_stay_in_the_sandbox(template: str) -> None:
    conversation = [{"role": "user", "content": "x"}]
    with pytest.raises(SecurityError):
        ChatTemplate(template).render(conversation)
    assert conversation == [{"role": "user", "content": "x"}]


@pytest.mark.parametrize("conversation", [[None], ["text"], [{"role": "user", "content": "x"}, 1]])
def test_messages_are_mappings(conversation: list[Any]) -> None:
    with pytest.raises(TypeError, match="not a mapping"):
        ChatTemplate("{{ messages }}").render(conversation)
