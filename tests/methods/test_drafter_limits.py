"""A drafter that cannot give as much as it is asked for says so: it is refused, not cut in silence."""

from __future__ import annotations

import pytest

from hasten import UserError
from hasten.engine import Engine


@pytest.mark.parametrize(
    "spec, most",
    [
        ("stand:nodes={}", 40),
        ("token-recycling:nodes={},candidates=4", 56),
        ("token-recycling:nodes={}", 80),
        ("aded:nodes={}", 128),
        ("dyspec:nodes={}", 128),
        ("suffix:length={}", 128),
        ("specmemo:nodes={}", 128),
        ("vocabtrim:tokens={}", 150),
    ],
)
def test_more_than_there_can_be_is_refused(llm, spec, most):
    engine = Engine(llm.model, llm.tokenizer, folder=str(llm.folder))
    engine.drafter(spec.format(most))
    with pytest.raises(UserError, match=f"(at most|and) {most}"):
        engine.drafter(spec.format(most + 1))


def test_a_smaller_tree_is_used_whole_unless_more_is_asked_for(llm, tmp_path):
    (tmp_path / "tree").write_text("0 00 1")
    engine = Engine(llm.model, llm.tokenizer)
    assert len(engine.drafter(f"stand:tree={tmp_path / 'tree'}")[1]._parents) == 3
    with pytest.raises(UserError, match="nodes must be at most 3"):
        engine.drafter(f"stand:tree={tmp_path / 'tree'},nodes=4")
