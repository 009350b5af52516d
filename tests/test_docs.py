"""What the documents show is true: methods and commands are listed, examples run, links lead somewhere."""

from __future__ import annotations

import ast
import json
import re
import sys
import types
from pathlib import Path

import pytest

from hasten import LLM, SamplingParams
from hasten.engine import registry

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks/README.md",
]


def test_readme_lists_every_method_and_command():
    readme = (ROOT / "README.md").read_text()
    own = [slug for slug, method in registry.methods().items() if method.parameters.__module__.startswith("hasten.")]
    for slug in own:
        assert f"`{slug}`" in readme
    for command in ("race", "generate", "chat", "methods", "verify", "bench", "sweep", "tune", "doctor", "train lm"):
        assert f"`hasten {command}" in readme


def test_the_method_in_contributing_is_a_method(monkeypatch: pytest.MonkeyPatch):
    code = re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert code is not None
    module = types.ModuleType("repeat_example")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    try:
        exec(compile(code[1], "CONTRIBUTING.md", "exec"), module.__dict__)
        llm = LLM("tiny")
        prompt = "Copy the list: red red red red red red cat\nAnswer:"
        params = SamplingParams(max_tokens=12, temperature=0.7, seed=1)
        plain, fast = llm.generate([prompt, prompt], params, ["plain", "repeat:times=3"])
        assert plain.token_ids == fast.token_ids
        assert fast.choices[0].statistics.proposed > 0
    finally:
        registry._METHODS.pop("repeat", None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_structured_output_as_shown(capsys: pytest.CaptureFixture[str]):
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/structured-output.md").read_text(), re.DOTALL)
    assert code is not None
    exec(compile(code[1], "structured-output.md", "exec"), {})
    person, answer, empty, *lines = capsys.readouterr().out.splitlines()
    assert set(ast.literal_eval(person)) == {"name", "age"}
    assert answer in (" yes", " no") and empty == ""
    assert [set(json.loads(line)) for line in lines] == [{"name", "age"}] * 2
