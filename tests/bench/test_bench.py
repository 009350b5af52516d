"""The measuring code: lanes, the exactness check's report, the rows of a comparison, the doctor's figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from hasten import LLM, UserError
from hasten.bench import doctor
from hasten.bench.compare import bench, compare
from hasten.bench.lane import Lane, Run, engine_for, interleave
from hasten.bench.prediction import predicted_speedup
from hasten.bench.prompts import BenchPrompt
from hasten.bench.race import default_method, race
from hasten.bench.verify import verify
from hasten.engine import Draft, Drafter, SamplingParams
from hasten.engine.creation import is_lossless
from hasten.engine.drafting.cost import VerifyCost
from hasten.engine.drafting.verification import Verdict
from hasten.engine.specification import split_methods
from hasten.model import Rows

PROMPT = "the cat and the moon and the cat and the"
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)
CURVE = VerifyCost((1, 2, 64), (64,), ((1.0, 1.05, 4.15),), 0.0)
"""A line, so that the mean step costs what a step of the mean rows does."""


def fake_clock(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass takes what `CURVE` says of its rows, and a look at the clock a ten-thousandth of a plain one."""
    now, forward = 0.0, llm.model.forward

    def timed(rows: Rows, *more: Any) -> Tensor:
        nonlocal now
        now += CURVE.of(len(rows.positions), 64)
        return forward(rows, *more)

    def read() -> float:
        nonlocal now
        now += 1e-4
        return now

    monkeypatch.setattr(llm.model, "forward", timed)
    monkeypatch.setattr("time.perf_counter", read)


def prompts(*texts: str, grade=None) -> list[BenchPrompt]:
    return [BenchPrompt("words", "words", text, grade) for text in texts]


def test_lanes_take_turns_by_their_own_clocks(llm: LLM):
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    lanes = [Lane(llm, engine_for(llm), "plain", llm.encode(PROMPT), params) for _ in range(2)]
    order = [lane for lane, _ in interleave(lanes)]
    assert order.count(lanes[0]) == order.count(lanes[1]) == 8
    assert lanes[0].tokens == lanes[1].tokens
    assert order[:8] != [lanes[0]] * 8


def test_a_runs_seconds_add_up(llm: LLM):
    """Prompt and steps make the whole; the parts of the steps are within them."""
    lane = Lane(llm, engine_for(llm), "ngram", llm.encode(PROMPT), PARAMS)
    while not lane.done:
        lane.step()
    run = lane.run()
    assert run.seconds == pytest.approx(run.prompt_seconds + run.decode_seconds)
    assert 0 < run.draft_seconds + run.forward_seconds + run.verify_seconds < run.decode_seconds
    assert len(run.step_seconds) == len(run.accepted) == lane.request.statistics.steps - 1
    assert run.proposed == lane.request.statistics.proposed
    assert len(run.tokens) == 12


def test_an_aborted_lane_gives_its_memory_back(llm: LLM):
    engine = engine_for(llm)
    lane = Lane(llm, engine, "plain", llm.encode(PROMPT), PARAMS)
    lane.step()
    assert engine.cache.used_bytes > 0
    lane.abort()
    assert engine.cache.used_bytes == 0 and not engine.busy


class Hoarder(Drafter):
    """Holds a kilobyte per token while a request lasts, and one for good."""

    def __init__(self) -> None:
        self.held = 0

    @property
    def memory_bytes(self) -> int:
        return 1024 + 1024 * self.held

    def propose(self, request, budget):
        self.held = len(request.tokens)
        return Draft()

    def end(self, request):
        self.held = 0


def test_memory_is_that_of_the_fullest_moment(llm: LLM):
    lane = Lane(llm, engine_for(llm), "plain", llm.encode(PROMPT), SamplingParams(max_tokens=20, ignore_eos=True))
    lane.request.drafter = Hoarder()
    while not lane.done:
        lane.step()
    assert lane.run().memory_bytes > 1024 * (1 + len(llm.encode(PROMPT)))


def test_verify_reports_the_first_divergence(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    """A verification that accepts whatever is drafted must be caught."""

    def gullible(draft: Draft, chosen: list[int]) -> Verdict:
        return Verdict(list(range(len(draft))), chosen[len(draft)])

    class Wrong(Drafter):
        def propose(self, request, budget):
            return Draft.chain([7])

    monkeypatch.setattr("hasten.engine.drafting.verification.match", gullible)
    monkeypatch.setattr("hasten.engine.creation.create", lambda spec, target: Wrong() if spec == "wrong" else plain)
    plain = type("Nothing", (Drafter,), {"propose": lambda self, request, budget: Draft()})()
    result = verify(llm, "wrong", [PROMPT, llm.encode(PROMPT + " red")], max_tokens=6)
    assert result.identical == 0 and result.prompts == 2
    found = result.first_divergence
    assert found is not None and found["prompt"] == 0 and found["mode"] == "greedy"
    assert found["got"] != found["expected"] and found["top2_gap"] >= 0


def test_rows_count_what_happened(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    fake_clock(llm, monkeypatch)
    method, texts = "ngram:minimum=1", (PROMPT, "stars and stars and stars and")
    rows = compare(llm, [method], prompts(*texts, grade=lambda output: "a" in output), PARAMS, curve=CURVE)
    assert [(row["method"], row["category"]) for row in rows] == [
        (name, category) for name in ("plain", method) for category in ("words", "overall")
    ]
    plain, fast = rows[1], rows[3]
    assert plain["tokens_per_step"] == plain["speedup"] == plain["speedup_of_rates"] == plain["decode_speedup"] == 1
    assert plain["acceptance"] is None and plain["accepted_per_step"] == 0 and plain["accepted_histogram"] == [22]
    assert plain["predicted_speedup"] == pytest.approx(1, rel=1e-3)

    expected = [llm.generate([text], PARAMS, method)[0].choices[0].statistics for text in texts]
    steps, accepted = sum(each.steps - 1 for each in expected), sum(each.accepted for each in expected)
    histogram = fast["accepted_histogram"]
    assert fast["tokens_per_step"] == pytest.approx(24 / (steps + 2), abs=1e-4)
    assert sum(histogram) == steps
    assert sum(count * times for count, times in enumerate(histogram)) == accepted
    kept = [steps]
    for share in fast["acceptance_by_depth"]:
        kept.append(kept[-1] * share)
    assert kept == pytest.approx([sum(histogram[depth:]) for depth in range(len(histogram))], rel=1e-3)
    assert plain["acceptance_by_depth"] == []
    assert fast["accepted_per_step"] == pytest.approx(accepted / steps, abs=1e-4)
    assert fast["mean_accepted_tokens"] == pytest.approx((24 - 2) / steps, abs=1e-4)
    assert plain["mean_accepted_tokens"] == 1 and fast["questions"] == 2
    assert fast["proposed_per_step"] == pytest.approx(sum(each.proposed for each in expected) / steps, abs=1e-4)
    assert fast["identical"] == fast["prompts"] == 2 and fast["accuracy"] == plain["accuracy"]
    assert fast["time_split"].keys() == {"prompt", "draft", "forward", "verify", "other"}
    total = sum(fast["time_split"].values())
    assert total == pytest.approx(24 / fast["tokens_per_second"], rel=1e-2)
    assert fast["draft_us_per_step"] == pytest.approx(fast["time_split"]["draft"] / steps * 1e6, rel=0.1)
    assert fast["draft_overhead"] > 0
    assert fast["predicted_speedup"] == pytest.approx(fast["decode_speedup"], rel=1e-3)


def test_an_answer_of_one_token_is_counted(llm: LLM):
    """There is nothing to decode behind it, so nothing to predict."""
    rows = compare(llm, ["ngram"], prompts(PROMPT), SamplingParams(max_tokens=1), curve=CURVE)
    assert rows[-1]["tokens_per_step"] == 1 and rows[-1]["speedup"] > 0
    assert rows[-1]["decode_speedup"] is rows[-1]["predicted_speedup"] is rows[-1]["accepted_per_step"] is None
    assert rows[-1]["mean_accepted_tokens"] is None


def test_samples_have_noise_of_their_own(llm: LLM):
    params = SamplingParams(max_tokens=12, temperature=0.9, seed=3, ignore_eos=True)
    rows = compare(llm, ["stand:minimum=1,maximum=2"], prompts(PROMPT, PROMPT), params, curve=CURVE, samples=4)
    plain, stand = rows[1], rows[3]
    assert stand["prompts"] == stand["identical"] == 8
    assert plain["tokens_per_step_by_sample"] == [1.0] * 4
    assert len(stand["tokens_per_step_by_sample"]) == 4
    # Were all answers the same, the later ones would be drafted whole.
    assert stand["tokens_per_step"] < 6


def test_greedy_samples_are_refused(llm: LLM):
    with pytest.raises(UserError, match="temperature"):
        compare(llm, ["ngram"], prompts(PROMPT), PARAMS, curve=CURVE, samples=2)


def test_every_round_starts_with_fresh_drafters(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    """A drafter that remembers answers would replay the round before."""
    made: list[Drafter] = []

    def create(spec, target):
        made.append(type("Nothing", (Drafter,), {"propose": lambda self, request, budget: Draft()})())
        return made[-1]

    monkeypatch.setattr("hasten.engine.creation.create", create)
    rows = compare(llm, ["fake"], prompts(PROMPT), SamplingParams(max_tokens=2), rounds=3, curve=CURVE)
    assert len(made) == 2 * 3 and rows[-1]["prompts"] == 3


def test_each_method_goes_on_with_its_own_conversation(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    """Tokens that differ are in what is read next, so that nothing hides them."""
    read: dict[str, list[Lane]] = {}

    class Noted(Lane):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            read.setdefault(self.method, []).append(self)

    def gullible(draft: Draft, chosen: list[int]) -> Verdict:
        return Verdict(list(range(len(draft))), chosen[len(draft)])

    class Wrong(Drafter):
        def propose(self, request, budget):
            return Draft.chain(llm.encode(" moon"))

    monkeypatch.setattr("hasten.bench.compare.Lane", Noted)
    monkeypatch.setattr("hasten.engine.drafting.verification.match", gullible)
    monkeypatch.setattr("hasten.engine.creation.create", lambda spec, target: Wrong() if spec == "wrong" else plain)
    plain = type("Nothing", (Drafter,), {"propose": lambda self, request, budget: Draft()})()
    talk = [BenchPrompt("talk", "talk", "sing", None, turns) for turns in (("the cat",), ("the cat", "sing"))]
    rows = compare(llm, ["wrong"], talk, PARAMS, rounds=2)
    for method, lanes in read.items():
        for first, second in (lanes[:2], lanes[2:]):
            answer = llm.tokenizer.decode(first.tokens, skip_special_tokens=True).strip()
            turns = [("user", "the cat"), ("assistant", answer), ("user", "sing")]
            expected = llm.apply_chat_template([{"role": role, "content": text} for role, text in turns])
            assert second.request.tokens[: second.request.prompt_length] == expected, method
    assert "moon" in llm.tokenizer.decode(read["wrong"][1].request.tokens)
    assert rows[-1]["identical"] == 0 and rows[-1]["prompts"] == 4 and rows[-1]["questions"] == 2


def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_measured(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hasten.bench.compare._decode", lambda *given: pytest.fail("something was measured"))
    with pytest.raises(UserError, match="no room in the context"):
        compare(llm, ["ngram"], prompts(PROMPT, "the cat " * 500), PARAMS)


def test_rates_are_of_questions_and_compared_within_rounds(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    """As in Spec-Bench the turns of a question are one; a round in which something else ran decides nothing alone."""

    def run(tokens: int, seconds: float) -> Run:
        return Run(list(range(tokens)), seconds, 0.0, [seconds / 4] * 4, 5, 5, 4, tokens - 1, [0] * 4, 0, 0, 0, 0, 0)

    rounds = [
        [(run(10, 1 * slow), run(10, 0.5 * fast)), (run(30, 3 * slow), run(30, 1.5 * fast)), (run(10, 2), run(10, 2))]
        for slow, fast in ((1.0, 1.0), (1.0, 1.0), (1.0, 50.0))
    ]
    decoded = iter([{"plain": plain, "fast": fast} for each in rounds for plain, fast in each])
    monkeypatch.setattr("hasten.bench.compare._decode", lambda *given: next(decoded))
    monkeypatch.setattr("hasten.bench.compare.warm_engines", lambda *given: {"plain": engine_for(llm)})
    turns: list[tuple[str, ...]] = [("a",), ("a", "b"), ("c",)]
    asked = [BenchPrompt("talk", "talk", each[-1], None, each) for each in turns]
    fast = compare(llm, ["fast"], asked, PARAMS, rounds=3)[-1]
    assert fast["speedup_of_rates"] == pytest.approx((20 + 5) / (10 + 5), abs=1e-4)
    assert fast["mean_accepted_tokens"] == pytest.approx((9 + 29 + 9) / 12, abs=1e-4)
    assert (fast["prompts"], fast["questions"]) == (9, 6)


def test_predictions():
    # Free drafts and free rows: as many times sooner as there are tokens per step.
    assert predicted_speedup(VerifyCost((1, 9), (64,), ((1.0, 1.0),), 0.0), 2e-3, 1e-3, 4.0, 9, 0.0) == pytest.approx(
        4.0
    )
    # A block of nine rows is what plain decoding computes, too.
    curve = VerifyCost((1, 9), (64,), ((1.0, 3.0),), 0.0)
    assert predicted_speedup(curve, 2e-3, 1e-3, 4.0, 9, 0.0, plain_rows=9) == pytest.approx(4.0)
    # A step of 2 ms, half of it the forward pass, which takes three times as long; and 1 ms for the draft.
    dear = VerifyCost((1, 9), (64,), ((1.0, 3.0),), 0.0)
    assert predicted_speedup(dear, 2e-3, 1e-3, 4.0, 9, 1e-3) == pytest.approx(4.0 * 2 / 5)


def test_method_lists():
    assert split_methods("a, b:x=1,y=2,c") == ["a", "b:x=1,y=2", "c"]
    with pytest.raises(UserError):
        split_methods(" ,")


def test_rows_are_bit_identical_or_not(llm: LLM):
    assert isinstance(doctor.row_invariant(llm), bool)


# Models that fill masked positions


def figures_of(llm: LLM, method: str, params: SamplingParams):
    return llm.generate([PROMPT], params, method)[0].choices[0].statistics


@pytest.mark.parametrize("attention", ["full", "block-causal"])
def test_steps_of_a_canvas_are_forward_passes(
    diffusion_llm: Callable[..., LLM], attention: str, monkeypatch: pytest.MonkeyPatch
):
    llm = diffusion_llm(attention)
    fake_clock(llm, monkeypatch)
    methods = ["denoise:per_step=4", "freedave"]
    rows = compare(llm, methods, prompts(PROMPT, grade=lambda output: 0.25), PARAMS, curve=CURVE)
    rows = {row["method"]: row for row in rows if row["category"] == "overall"}
    for method, row in rows.items():
        numbers = figures_of(llm, method, PARAMS)
        assert row["tokens_per_step"] == pytest.approx(12 / numbers.steps, abs=1e-4)
        assert row["rows_per_token"] == pytest.approx(numbers.rows / 12, abs=1e-4)
        assert row["accuracy"] == 0.25
        assert len(numbers.accepted_per_step) == numbers.steps and sum(numbers.accepted_per_step) == numbers.accepted
    plain, four, freedave = rows.values()
    assert plain["tokens_per_step"] <= 1 and plain["agreement"] == 1
    assert four["tokens_per_step"] > 2 * plain["tokens_per_step"]
    assert (
        freedave["identical"] == freedave["agreement"] == 1 and freedave["tokens_per_step"] > plain["tokens_per_step"]
    )
    assert sum(count * times for count, times in enumerate(freedave["accepted_histogram"])) > 0
    assert plain["decode_speedup"] == 1 and four["decode_speedup"] > 1
    for row in rows.values():
        assert row["predicted_speedup"] == pytest.approx(row["decode_speedup"], rel=1e-3)


def test_agreement_is_the_share_of_equal_positions(diffusion_llm: Callable[..., LLM]):
    llm = diffusion_llm("full")
    row = compare(llm, ["denoise:per_step=12"], prompts(PROMPT), PARAMS)[-1]
    plain, fast = (llm.generate([PROMPT], PARAMS, method)[0].token_ids for method in ("plain", "denoise:per_step=12"))
    assert row["agreement"] == pytest.approx(sum(a == b for a, b in zip(plain, fast, strict=True)) / 12, abs=1e-4)
    assert row["identical"] == (plain == fast) and row["predicted_speedup"] is None


def test_there_is_no_curve_of_a_whole_canvas(diffusion_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hasten.bench.compare.measure", lambda model: CURVE)
    few = SamplingParams(max_tokens=4)
    assert bench(diffusion_llm("full"), ["threshold"], prompts(PROMPT), [few])["verify_cost"] is None
    assert bench(diffusion_llm("block-causal"), ["threshold"], prompts(PROMPT), [few])["verify_cost"]["1"] == 1


def test_a_prompts_own_budget_holds_if_nothing_else_is_asked_for(diffusion_llm: Callable[..., LLM]):
    own = [replace(prompt, max_tokens=5) for prompt in prompts(PROMPT)]
    for params, length in ((SamplingParams(ignore_eos=True), 5), (PARAMS, 12)):
        row = compare(diffusion_llm("full"), ["denoise:per_step=12"], own, params)[-1]
        assert row["tokens_per_step"] == length


@pytest.mark.parametrize(
    ("attention", "method"),
    [
        ("full", "freedave"),
        ("full", "freedave:cache=dual,order=margin,block=4"),
        ("context-causal", "freedave"),
        ("context-causal", "tidar"),
    ],
)
def test_verify_passes_lossless_methods_of_diffusion_models(
    diffusion_llm: Callable[..., LLM], attention: str, method: str
):
    result = verify(diffusion_llm(attention), method, [PROMPT, "red"], max_tokens=8)
    assert result.identical == 2 and result.first_divergence is None and result.proposed > 0


@pytest.mark.parametrize(
    ("attention", "method", "known"),
    [
        ("full", "freedave", "plain"),
        ("full", "freedave:cache=dual,drafts=2,order=margin,block=4", "denoise:block=4,cache=dual,order=margin"),
        ("full", "threshold", "plain"),
        ("context-causal", "freedave", "denoise"),
        ("context-causal", "threshold", "denoise"),
        ("context-causal", "tidar", "plain"),
    ],
)
def test_a_race_is_run_against_the_methods_reference(
    diffusion_llm: Callable[..., LLM], attention: str, method: str, known: str
):
    result = race(diffusion_llm(attention), PROMPT, method, SamplingParams(max_tokens=8), rounds=1)
    assert [lane["method"] for lane in result.lanes] == [known, method]
    assert result.identical or not is_lossless(method)


def test_a_race_does_not_draft_the_answer_of_the_round_before(llm: LLM):
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=3, ignore_eos=True)
    per_step = [race(llm, PROMPT, "suffix", params, rounds).lanes[1]["tokens_per_step"] for rounds in (1, 3)]
    assert per_step[0] == per_step[1] < 3


def test_verify_says_where_a_lossy_denoiser_differs(diffusion_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch):
    """What a canvas would have become has no one row to look at: no pass is made that the model was not made for."""
    result = verify(diffusion_llm("full"), "denoise:per_step=8", [PROMPT], max_tokens=8)
    assert result.identical == 0
    assert result.first_divergence is not None and result.first_divergence["top2_gap"] is None
    assert result.first_divergence["got"] != result.first_divergence["expected"]


def test_a_method_that_fits_the_model(llm: LLM, diffusion_llm: Callable[..., LLM]):
    def fitting(model: LLM) -> tuple[str, str]:
        config = model.model.config
        return default_method(config), default_method(config, lossless=True)

    assert fitting(llm) == ("ngram", "ngram")
    for attention in ("full", "block-causal"):
        assert fitting(diffusion_llm(attention)) == ("threshold", "freedave")
    assert fitting(diffusion_llm("context-causal")) == ("tidar", "tidar")
    assert fitting(diffusion_llm("context-causal", "shifted")) == ("ngram", "ngram")


def test_bandwidth_is_read_in_the_rounds_of_the_steps(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    """A machine that is half as fast in some rounds has the same shares as one that is not."""
    speeds = iter([0.01, 0.005, 0.01])
    monkeypatch.setattr(doctor.Reader, "bandwidth", lambda self: next(speeds))
    monkeypatch.setattr(doctor, "BANDWIDTH_BYTES", 4)

    def times(model, shapes, context, beside):
        for _ in range(3):
            beside()
        return {(1, rows): [rows * 0.1, rows * 0.2, rows * 0.1] for _, rows in shapes}

    monkeypatch.setattr(doctor, "step_times", times)
    found = doctor.step_costs(llm)
    assert found["bandwidth_gbs"] == 0.01
    assert found["bandwidth_share"] == pytest.approx(llm.model.weight_bytes() / 0.01e9 / 0.1, abs=1e-4)
    assert found["verify_cost"] == {str(rows): float(rows) for rows in doctor.ROWS}
    assert found["token_cost"] == 1.0
