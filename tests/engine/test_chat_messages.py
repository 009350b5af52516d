"""Content of chat messages: text, or parts of it."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten import UserError
from hasten.model.tokenizer import with_text


def test_parts_are_lines(llm):
    parts = [{"type": "text", "text": "the cat"}, {"text": "the moon", "type": "text"}]
    got = llm.apply_chat_template([{"role": "user", "content": parts}])
    assert got == llm.apply_chat_template([{"role": "user", "content": "the cat\nthe moon"}])
    assert llm.chat([{"role": "user", "content": parts[:1]}]).prompt_token_ids == llm.apply_chat_template(
        [{"role": "user", "content": "the cat"}]
    )


@pytest.mark.parametrize(
    "content",
    [5, b"the", {"type": "text"}, ["the cat"], [{"type": "image_url", "image_url": {}}], [{"type": "text"}], [None]],
)
def test_what_is_no_text(llm, content: Any):
    with pytest.raises(UserError, match="message"):
        llm.apply_chat_template([{"role": "user", "content": content}])


SCALARS = st.none() | st.integers() | st.text(max_size=3) | st.just("text")
PARTS = st.lists(st.dictionaries(st.sampled_from(["type", "text", "image_url"]), SCALARS) | SCALARS, max_size=3)


@given(SCALARS | PARTS | st.dictionaries(st.text(max_size=2), SCALARS, max_size=2))
def test_any_content(content: Any):
    with suppress(UserError):
        assert isinstance(with_text({"role": "user", "content": content})["content"], str | None)
