"""Auto: which drafter is heard, how much of its draft is verified, and when it keeps quiet."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from hasten import SamplingParams, UserError
from hasten.engine import Draft, Drafter, Engine, Target
from hasten.engine.drafting.cost import VerifyCost
from hasten.methods.drafters import auto, auto_candidate
from hasten.methods.drafters.auto import Auto, AutoParameters

FREE = VerifyCost((1, 2, 64), (64,), ((1.0, 1.0, 1.0),), 0.0)
DEAR = VerifyCost((1, 2, 64), (64,), ((1.0, 1.9, 58.0),), 0.0)


class Guesser(Drafter):
    """Proposes a chain: the known answer of the first `right` steps, wrong tokens after them."""

    def __init__(self, answers, right: bool, estimate: float, length: int = 4, work=lambda: None) -> None:
        self.answers, self.right, self.estimate, self.length = answers, right, estimate, length
        self.work, self.asked = work, 0

    def propose(self, request, budget):
        self.asked += 1
        self.work()
        prompt = tuple(request.tokens[: request.prompt_length])
        done = len(request.output)
        tokens = self.answers[prompt][done : done + self.length]
        if not self.right:
            tokens = [(token + 1) % 150 for token in tokens]
        return Draft.chain(tokens, [self.estimate**depth for depth in range(1, len(tokens) + 1)])


PROMPTS = [[2, 3, 4] * 4, [9] * 7, list(range(10, 30))]
PARAMS = SamplingParams(max_tokens=40, ignore_eos=True)


def make(llm, monkeypatch, cost, *drafters: Drafter) -> Auto:
    monkeypatch.setattr(auto, "verify_cost", lambda model, folder: cost)
    made = iter(drafters)
    monkeypatch.setattr(auto, "create", lambda name, target: next(made))
    return Auto(Target(llm.model, llm.tokenizer), AutoParameters("/".join(["plain"] * len(drafters))))


def run(llm, drafter: Drafter, prompts=PROMPTS):
    engine = Engine(llm.model, llm.tokenizer, llm.engine.end_ids)
    requests = [engine.add(prompt, PARAMS, drafter)[0] for prompt in prompts]
    for _ in engine.run():
        pass
    return requests


@pytest.fixture(autouse=True)
def steps_clock(llm, monkeypatch):
    """Forward passes take what `seconds` says of their rows (one), and nothing else takes any time."""
    forward, clock = llm.model.forward, SimpleNamespace(now=0.0, seconds=lambda rows: 1.0)

    def timed(rows, *others):
        clock.now += clock.seconds(len(rows.tokens))
        return forward(rows, *others)

    monkeypatch.setattr(llm.model, "forward", timed)
    # The engine and all others look at the same clock: nothing here depends on how busy the machine is.
    monkeypatch.setattr(auto_candidate.time, "perf_counter", lambda: clock.now)
    return clock


@pytest.fixture
def answers(llm) -> dict[tuple[int, ...], list[int]]:
    return {tuple(each.prompt_token_ids): each.token_ids for each in llm.generate(PROMPTS, PARAMS, "plain")}


@pytest.mark.parametrize("batch", [1, 3])
def test_the_drafter_that_is_right_is_heard(llm, monkeypatch, answers, batch):
    liar, prophet = Guesser(answers, False, 0.9), Guesser(answers, True, 0.5)
    drafter = make(llm, monkeypatch, FREE, liar, prophet)
    requests = run(llm, drafter, PROMPTS[:batch])
    for request in requests:
        assert request.output == answers[tuple(request.tokens[: request.prompt_length])]
        # The liar is believed for a while; then nearly every step gives five tokens.
        assert request.statistics.tokens_per_step > 2.5


def working(clock, seconds: float):
    """Work of a drafter that takes so long."""

    def work() -> None:
        clock.now += seconds

    return work


def test_nothing_is_verified_where_rows_are_dear_and_drafts_bad(llm, monkeypatch, answers, steps_clock):
    liar = Guesser(answers, False, 0.9, work=working(steps_clock, 0.05))
    (request,) = run(llm, make(llm, monkeypatch, DEAR, liar), PROMPTS[:1])
    assert request.output == answers[tuple(PROMPTS[0])]
    assert request.statistics.proposed < 12
    # And it is asked less and less.
    assert liar.asked < 25


def test_dear_rows_are_still_worth_a_sure_draft(llm, monkeypatch, answers):
    (request,) = run(llm, make(llm, monkeypatch, DEAR, Guesser(answers, True, 0.99)), PROMPTS[:1])
    assert request.statistics.tokens_per_step > 1.5


def test_a_poor_request_does_not_spoil_the_next_one(llm, monkeypatch, answers):
    guesser = Guesser(answers, False, 0.5)
    drafter = make(llm, monkeypatch, FREE, guesser)
    engine = Engine(llm.model, llm.tokenizer, llm.engine.end_ids)
    engine.add(PROMPTS[0], PARAMS, drafter)
    list(engine.run())
    guesser.right = True
    (request,) = engine.add(PROMPTS[1], PARAMS, drafter)
    list(engine.run())
    assert request.output == answers[tuple(PROMPTS[1])]
    assert request.statistics.tokens_per_step > 2


class Slow(Guesser):
    """A guesser that takes a fifth of a second per draft, by its own account."""

    now = 0.0

    def propose(self, request, budget):
        Slow.now += 0.2
        return super().propose(request, budget)


@pytest.fixture
def slow_clock(llm, monkeypatch):
    """Time passes only where a slow guesser drafts, and in forward passes: a second each."""
    forward = llm.model.forward

    def timed(*arguments, **others):
        Slow.now += 1.0
        return forward(*arguments, **others)

    monkeypatch.setattr(llm.model, "forward", timed)
    monkeypatch.setattr(auto_candidate.time, "perf_counter", lambda: Slow.now)


def test_a_costly_drafter_that_disappoints_is_not_asked_for_prompts_of_that_kind(llm, monkeypatch, answers, slow_clock):
    liar = Slow(answers, False, 0.9)
    drafter = make(llm, monkeypatch, FREE, liar)
    run(llm, drafter, PROMPTS[:1])
    first = liar.asked
    for _ in range(3):
        run(llm, drafter, PROMPTS[:1])
    assert first >= auto_candidate.TRIALS
    # Once known, it is tried now and then.
    assert liar.asked - first <= 6


def test_a_costly_drafter_that_is_right_is_asked_on(llm, monkeypatch, answers, slow_clock):
    prophet = Slow(answers, True, 0.9)
    drafter = make(llm, monkeypatch, FREE, prophet)
    for _ in range(2):
        (request,) = run(llm, drafter, PROMPTS[:1])
    assert request.statistics.tokens_per_step > 4


def test_a_drafter_that_must_read_the_prompt_first_is_tried_again_more_and_more_rarely(
    llm, monkeypatch, answers, steps_clock
):
    """A draft takes over half a step, the first one of a request three: in the long run all of it is a hundredth.

    One that is right by now gets its chances back.
    """
    seen = set()

    def work() -> None:
        (request,) = running
        steps_clock.now += 0.6 if request in seen else 3.0
        seen.add(request)

    head, running = Guesser(answers, False, 0.5, length=2, work=work), [0]
    drafter = make(llm, monkeypatch, VerifyCost((1, 2, 64), (64,), ((1.0, 1.05, 4.0),), 0.0), head)
    steps_clock.seconds = lambda rows: 1 + 0.05 * (rows - 1)
    lost = []
    for number in range(60):
        running[0] = number
        before, prompt = steps_clock.now, PROMPTS[number % 3]
        run(llm, drafter, [prompt])
        lost.append(steps_clock.now - before - PARAMS.max_tokens - 0.05 * (len(prompt) - 1))
    assert sum(lost[30:]) <= 0.01 * 30 * PARAMS.max_tokens
    asked, head.right = head.asked, True
    for number in range(60, 76):
        running[0] = number
        run(llm, drafter, PROMPTS[:1])
    (lessons,) = drafter.candidates[0].lessons.values()
    assert head.asked > asked and lessons.patience == auto_candidate.RETRIAL


def test_a_session_without_gain_loses_little(llm, monkeypatch, answers, steps_clock):
    """Drafting takes a twentieth of a step and is never right: all of it is a fiftieth of the time, at most."""
    liar = Guesser(answers, False, 0.3, work=working(steps_clock, 0.05))
    drafter = make(llm, monkeypatch, VerifyCost((1, 2, 64), (64,), ((1.0, 1.1, 8.0),), 0.0), liar)
    steps_clock.seconds = lambda rows: 1 + 0.1 * (rows - 1)
    run(llm, drafter, PROMPTS[:1])
    started, steps = steps_clock.now, 0
    for _ in range(4):
        (request,) = run(llm, drafter, PROMPTS[:1])
        steps += request.statistics.steps
        # Its own prompt is one pass of many rows.
        started += 1 + 0.1 * (request.prompt_length - 1) - 1
    assert steps_clock.now - started <= 1.02 * steps


def test_doubtful_drafts_that_pay_in_the_mean_are_not_given_up(llm, monkeypatch, answers, steps_clock):
    """Right at every fourth draft only: rows are cheap enough for that, so none is left out."""

    class Sometimes(Guesser):
        def propose(self, request, budget):
            self.right = len(request.output) % 4 == 0
            return super().propose(request, budget)

    sometimes = Sometimes(answers, True, 0.25, length=1, work=working(steps_clock, 0.02))
    drafter = make(llm, monkeypatch, VerifyCost((1, 2, 64), (64,), ((1.0, 1.02, 8.0),), 0.0), sometimes)
    (request,) = run(llm, drafter, PROMPTS[:1])
    assert sometimes.asked >= request.statistics.steps - 2


def test_a_drafter_that_rests_sees_nothing(llm, monkeypatch, answers, steps_clock):
    class Watcher(Guesser):
        seen = 0

        def observe(self, request, seen):
            self.seen += 1

    watcher = Watcher(answers, False, 0.9, work=working(steps_clock, 0.05))
    (request,) = run(llm, make(llm, monkeypatch, DEAR, watcher), PROMPTS[:1])
    assert watcher.seen < request.statistics.steps / 2


def test_a_batch_measures_the_pace_of_its_step_once(llm, monkeypatch, answers, steps_clock):
    """Many requests see the same step: its pace must not multiply."""
    steps_clock.seconds = lambda rows: 0.01
    drafter = make(llm, monkeypatch, FREE, Guesser(answers, True, 0.5))
    requests = run(llm, drafter, PROMPTS * 8)
    assert requests[0].statistics.forward_seconds == pytest.approx(0.01 * requests[0].statistics.steps)
    assert drafter._plans.seconds(1, 64) == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize("scale", [1e-2, 1e2])
def test_a_curve_of_another_hour_is_scaled_to_what_steps_take(llm, monkeypatch, answers, steps_clock, scale):
    steps = VerifyCost((1, 2, 64), (64,), ((scale,) * 3,), 0.0)
    drafter = make(llm, monkeypatch, steps, Guesser(answers, False, 0.9))
    run(llm, drafter, PROMPTS[:1])
    assert drafter._plans.seconds(1, 64) == pytest.approx(1.0, rel=0.1)


def test_a_prompt_in_the_step_is_not_held_against_the_drafts(llm, monkeypatch, answers, steps_clock):
    """Eight requests see the one step that also reads a long prompt: nothing of it stays in the record."""
    steps_clock.seconds = lambda rows: 1000.0 if rows > 100 else 1.0
    drafter = make(llm, monkeypatch, FREE, Guesser(answers, True, 0.9))
    engine = Engine(llm.model, llm.tokenizer, llm.engine.end_ids)
    requests = [engine.add(PROMPTS[0], PARAMS, drafter)[0] for _ in range(8)]
    for _ in range(3):
        engine.step()
    engine.add([7] * 200, SamplingParams(max_tokens=1), "plain")
    engine.step()
    assert steps_clock.now > 1000
    assert drafter.candidates[0].extra.value == 0 and drafter._plans.pace == 1
    before = [(request.statistics.steps, len(request.output)) for request in requests]
    list(engine.run())
    for request, (steps, tokens) in zip(requests, before, strict=True):
        assert request.output == answers[tuple(PROMPTS[0])]
        assert (len(request.output) - tokens) / (request.statistics.steps - steps) > 3


def test_a_step_counts_once_however_many_requests_see_it(llm, monkeypatch, answers, steps_clock):
    """One hiccup of the machine, in a step of eight requests, changes no median."""
    drafter = make(llm, monkeypatch, FREE, Guesser(answers, True, 0.9))
    engine = Engine(llm.model, llm.tokenizer, llm.engine.end_ids)
    for _ in range(8):
        engine.add(PROMPTS[0], PARAMS, drafter)
    for _ in range(3):
        engine.step()
    steps_clock.seconds = lambda rows: 1000.0
    engine.step()
    assert drafter.candidates[0].extra.value == 0 and drafter._plans.pace == 1


def test_a_bad_hour_of_the_machine_is_forgotten(llm, monkeypatch, answers, steps_clock):
    """Steps with drafts that took long for another reason: after a while, drafts are tried again, and heard."""
    drafter = make(llm, monkeypatch, FREE, Guesser(answers, True, 0.9))
    drafter.candidates[0].extra = auto_candidate.Typical([1000.0] * auto_candidate.LATEST)
    (request,) = run(llm, drafter, PROMPTS[:1])
    assert request.statistics.tokens_per_step == 1
    for _ in range(5):
        (request,) = run(llm, drafter, PROMPTS[:1])
    assert request.statistics.tokens_per_step > 3


def test_state_of_finished_requests_is_dropped(llm, monkeypatch, answers):
    drafter = make(llm, monkeypatch, FREE, Guesser(answers, True, 0.5))
    run(llm, drafter)
    assert not drafter._chosen
    assert not any(candidate.records for candidate in drafter.candidates)


def test_the_shipped_candidates_are_exact(llm, monkeypatch):
    monkeypatch.setattr(auto, "verify_cost", lambda model, folder: FREE)
    params = [
        SamplingParams(max_tokens=24, temperature=t, seed=3, acceptance=a)
        for t, a in ((0, "match"), (0.8, "match"), (0.8, "max"))
    ]
    for each in params:
        expected = [generation.token_ids for generation in llm.generate(PROMPTS, each, "plain")]
        got = llm.generate(PROMPTS, each, "auto")
        if each.acceptance == "match":
            assert [generation.token_ids for generation in got] == expected
        assert sum(generation.choices[0].statistics.accepted for generation in got) > 0


@pytest.mark.parametrize(
    ("candidates", "sentence"), [("auto", "itself"), ("ngram/auto:candidates=ngram", "itself"), ("nope", "unknown")]
)
def test_bad_candidates(candidates, sentence):
    with pytest.raises(UserError, match=sentence):
        AutoParameters(candidates)


def test_a_candidate_that_must_be_the_whole_method_is_named(llm, monkeypatch):
    with pytest.raises(UserError, match=r"^specmemo cannot be a candidate of auto.*\(specmemo:drafter=\.\.\.\)$"):
        Auto(Target(llm.model, llm.tokenizer), AutoParameters("ngram/specmemo:budget=1MB"))

    class Alone(Drafter):
        alone = True

    with pytest.raises(UserError, match=r"^plain cannot be a candidate of auto, since it must be the whole method$"):
        make(llm, monkeypatch, FREE, Alone())
