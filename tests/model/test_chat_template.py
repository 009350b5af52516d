"""Chat templates are rendered as transformers does, with it or without."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
from transformers import AutoTokenizer

from hasten.errors import UserError
from hasten.model.chat_template import is_simple
from hasten.model.checkpoint import resolve
from hasten.model.tokenizer import load_tokenizer, render_chat

SIMPLE = [
    "{% for m in messages %}\n  {% if loop.first and m.role != 'system' %}\nA\n  {% endif %}\n"
    "{{ bos_token }}{{ m['role'] + '\\n' + m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}",
    "{% for m in messages %}{% if m.role == 'assistant' %}{% continue %}{% endif %}"
    "{{ m | tojson(indent=2) }}{% endfor %}",
    "{{ messages[0].content.split(' ')[0] }}{{ tools is none }}{{ documents is defined }}{{ sep_token is defined }}",
    "{{ messages | map(attribute='content') | join('<') }}{{ strftime_now('%Y') }}{{ range(3) | list }}",
    "{% set found = messages | selectattr('role', 'equalto', 'user') | list %}{{ found[-1]['content'].upper() }}",
    "{%- macro line(m) %}{{ m.role }}{% endmacro %}"
    "{% for m in messages[::-1] %}{{ line(m) }}{% endfor %}{{ eos_token }}",
]
BEYOND = [
    "{% set seen = namespace(found='') %}"
    "{% for m in messages %}{% set seen.found = m.content %}{% endfor %}{{ seen.found }}",
    "{{ dict(a=1) }}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
]
WRONG = [
    "{{ raise_exception('no such role') }}",
    "{{ messages.append(1) }}",
    "{{ messages.__class__.__mro__ }}",
    "{% for m in messages %}",
    "{{ unknown.field.deeper }}",
]
MESSAGES = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "  caf\u00e9\n"},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "{{ bos_token }}"},
]


def outcome(tokenizer: Any, template: str) -> str:
    tokenizer.chat_template = template
    try:
        return render_chat(tokenizer, copy.deepcopy(MESSAGES))
    except UserError as error:
        return f"error: {error}"


@pytest.mark.parametrize("template", [*SIMPLE, *BEYOND, *WRONG])
def test_it_is_rendered_as_transformers_renders_it(template: str):
    ours, theirs = load_tokenizer("tiny"), AutoTokenizer.from_pretrained(resolve("tiny"))
    assert outcome(ours, template) == outcome(theirs, template)
    if template in SIMPLE:
        assert "complete" not in vars(ours)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
        [{"role": "user", "content": "a", "name": "b"}],
        [{"role": "user"}],
        "text",
    ],
)
def test_messages_that_are_more_than_texts(messages: Any):
    assert not is_simple(SIMPLE[0], messages)


def test_a_chat_starts_without_transformers():
    code = (
        "import sys; from hasten.model.tokenizer import load_tokenizer, render_chat; "
        "render_chat(load_tokenizer('tiny'), [{'role': 'user', 'content': 'a'}]); print('transformers' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert ran.stdout == "False\n"
