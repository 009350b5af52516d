"""The registry: what is registered, how specifications are read, and how third parties join."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from hasten import SamplingParams, UserError, methods
from hasten.engine import Draft, Drafter, Knob, Target, creation, register, registry
from hasten.engine.specification import split_methods
from hasten.model import OracleModel


@dataclass(frozen=True)
class Parameters:
    count: int = 3
    share: float = 0.5
    eager: bool = False
    name: str = "none"

    def __post_init__(self) -> None:
        if self.count > 10:
            raise UserError("a-test-method: count must be at most 10")


class Nothing(Drafter):
    def __init__(self, target: Target, parameters: Parameters) -> None:
        self.target, self.parameters = target, parameters

    def propose(self, request, budget):
        return Draft()


def add(**more: Any) -> Callable[[type[Nothing]], type[Nothing]]:
    return register(
        "a-test-method", family="drafters", exactness="lossless", paper="0000.00000", title="Nothing",
        parameters=Parameters, **more,
    )  # fmt: skip


@pytest.fixture
def method() -> Iterator[str]:
    add()(Nothing)
    yield "a-test-method"
    registry._METHODS.pop("a-test-method")


def test_what_comes_with_hasten():
    known = methods()
    assert {"plain", "ngram", "draft-model"} <= set(known)
    assert list(known) == sorted(known)
    for slug, each in known.items():
        assert each.slug == slug
        assert each.family and each.title and each.command.startswith("hasten ")
        for alias in each.aliases:
            assert registry.find(alias) is each
        if each.create is None:
            with pytest.raises(UserError, match=f"{slug} is an? {each.role}, not a way of decoding; .* by: hasten"):
                registry.parse(slug)
            continue
        assert each.exactness in ("lossless", "lossy")
        each.parameters()  # every parameter has a default
        assert registry.parse(slug) == (each, each.parameters())
    assert registry.decoders().keys() == {slug for slug, each in known.items() if each.create is not None}


PUBLISHED = (
    "aded copyspec dparallel dyspec fast-dllm-v2 ffn-skipllm flashdecoding-pp freedave learn2pd localleap nbdiff "
    "parallelbench prophet scylla skipdecode specmemo stand suffix-decoding swift tidar token-recycling vocabtrim"
)
"""The published systems that work here, under the names by which they are known."""


@pytest.mark.parametrize("name", PUBLISHED.split())
def test_published_systems(name):
    assert registry.find(name).paper


def test_the_listing_and_the_package_share_a_name():
    """Importing the package `hasten.methods` must not take `hasten.methods()` away."""
    import hasten
    import hasten.methods.drafters

    assert hasten.methods() == hasten.methods() == registry.methods()
    assert hasten.methods.drafters.ngram.Ngram


def test_listing_is_a_copy():
    methods().clear()
    assert "plain" in methods()


def test_values_have_their_types(method):
    _, parameters = registry.parse("a-test-method:count=7, share=0.25,eager=on,name=a=b/c")
    assert parameters == Parameters(7, 0.25, True, "a=b/c")
    assert registry.parse("a-test-method:")[1] == Parameters()
    assert registry.parse(" a-test-method :eager=No")[1] == Parameters()
    assert registry.parse("ngram:length=4,minimum=1")[1].length == 4
    assert registry.parse("a-test-method:name=[a,b=[c+d]],count=7")[1] == Parameters(7, name="a,b=[c+d]")


def test_brackets_hold_specifications_within_specifications(llm):
    inner = "suffix:length=4,depth=8/ngram:length=3,minimum=1"
    spec = f"auto:candidates=[{inner}]"
    assert registry.parse(spec)[1].candidates == inner
    assert registry.split(f"{spec}+copyspec") == [spec, "copyspec"]
    assert split_methods(f"ngram:length=6,maximum=3,{spec},plain") == ["ngram:length=6,maximum=3", spec, "plain"]
    asked = SamplingParams(max_tokens=12, ignore_eos=True)
    for outer in (spec, f"specmemo:drafter=[{inner}],nodes=5"):
        assert llm.generate("the cat and", asked, outer)[0].token_ids == llm.generate("the cat and", asked)[0].token_ids


@pytest.mark.parametrize(
    "spec, message",
    [
        ("ngarm", r"unknown method 'ngarm'; did you mean .*ngram"),
        ("draft_model", r"unknown method 'draft_model'; did you mean .*draft-model"),
        ("", r"unknown method ''; did you mean .*plain"),
        ("zzzzzzzz", r"unknown method 'zzzzzzzz'; did you mean .*ngram.*plain"),
        ("ngram:size=3", r"ngram has no parameter 'size'; its parameters are: length, minimum, maximum"),
        ("ngram:length", r"ngram: length needs a value: length="),
        ("plain:length=3", r"plain has no parameter 'length'; its parameters are: none"),
        ("a-test-method:count=many", r"a-test-method: count must be a whole number, not 'many'"),
        ("a-test-method:count=1.5", r"a-test-method: count must be a whole number, not '1.5'"),
        ("a-test-method:share=half", r"a-test-method: share must be a number, not 'half'"),
        ("a-test-method:eager=perhaps", r"a-test-method: eager must be true or false, not 'perhaps'"),
        ("a-test-method:count=11", r"a-test-method: count must be at most 10"),
        ("ngram:length=0", r"ngram: length must be between 1 and 64"),
        ("ngram:minimum=5", r"ngram: 1 <= minimum <= maximum <= 16 must hold"),
        ("draft-model:width=9", r"draft-model: width must be between 1 and 8"),
        ("draft-model:confidence=1.5", r"draft-model: confidence must be between 0 and 1"),
        ("draft-model:confidence=nan", r"draft-model: confidence must be a finite number, not 'nan'"),
        ("auto:candidates=[ngram", r"more opening brackets than closing"),
        ("auto:candidates=ngram]", r"fewer opening brackets than closing"),
        ("auto:candidates=[ngram:length=0]", r"ngram: length must be between 1 and 64"),
        ("auto:candidates=[ngarm]", r"unknown method 'ngarm'"),
    ],
)
def test_bad_specifications(method, spec, message):
    with pytest.raises(UserError, match=message):
        registry.parse(spec)


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (lambda: Knob("heat", (1, 2)), "a-test-method has no parameter 'heat'; its parameters are: count, share"),
        (lambda: Knob("all", (1, 2), ("count", "heat")), "a-test-method has no parameter 'heat'"),
        (lambda: Knob("count", (1, 2.5)), "a-test-method: count must be a whole number, not '2.5'"),
        (lambda: Knob("count", (8, 12)), "a-test-method: count must be at most 10"),
        (lambda: Knob("count", ()), "the knob 'count' has no values"),
    ],
)
def test_knobs_turn_parameters(turn, message):
    with pytest.raises(UserError, match=message):
        add(knob=turn())(Nothing)
    assert "a-test-method" not in methods()


def test_created_for_a_target(method):
    target = Target(OracleModel(lambda history: None, 5))
    drafter = creation.create("a-test-method:count=2", target)
    assert drafter.target is target
    assert drafter.parameters == Parameters(count=2)


def test_a_targets_own_defaults_give_way_to_what_is_named(method):
    add(defaults=lambda target: {"count": target.model.config.vocab_size, "name": "its own"})(Nothing)
    target = Target(OracleModel(lambda history: None, 5))
    made = [creation.create(f"a-test-method{rest}", target) for rest in ("", ":count=2", ":count=3,name=")]
    assert [drafter.parameters for drafter in made] == [
        Parameters(5, name="its own"), Parameters(2, name="its own"), Parameters(3, name=""),
    ]  # fmt: skip
    composed = creation.create("ngram+a-test-method:share=1", target)
    assert composed.drafters[1].parameters == Parameters(5, 1.0, name="its own")


def test_third_parties_register_through_entry_points(tmp_path: Path, monkeypatch):
    (tmp_path / "elsewhere_methods.py").write_text(
        "from dataclasses import dataclass\n"
        "from hasten.engine import Draft, Drafter, register\n"
        "@dataclass\n"
        "class P:\n"
        "    depth: int = 2\n"
        "@register('elsewhere', family='drafters', exactness='lossless', paper='', title='t', parameters=P)\n"
        "class Elsewhere(Drafter):\n"
        "    def __init__(self, target, parameters): self.depth = parameters.depth\n"
        "    def propose(self, request, budget): return Draft()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("elsewhere", "elsewhere_methods", registry.ENTRY_POINTS)
    found = registry.entry_points(group=registry.ENTRY_POINTS)
    monkeypatch.setattr(registry, "entry_points", lambda group: [*found, point])
    registry._load_entry_points.cache_clear()
    try:
        assert "elsewhere" in methods()
        assert creation.create("elsewhere:depth=5", Target(OracleModel(lambda history: None, 5))).depth == 5
    finally:
        registry._METHODS.pop("elsewhere", None)


FLOATS = [
    (slug, field.name)
    for slug, each in registry.methods().items()
    for field in dataclasses.fields(each.parameters)
    if get_type_hints(each.parameters)[field.name] is float
]


@pytest.mark.parametrize("text", ["nan", "inf", "-Infinity", "1e400"])
@pytest.mark.parametrize(("slug", "name"), FLOATS)
def test_no_parameter_is_nan_or_infinite(slug, name, text):
    with pytest.raises(UserError, match=f"{slug}: {name} must be a finite number, not '{text}'"):
        registry.parse(f"{slug}:{name}={text}")
