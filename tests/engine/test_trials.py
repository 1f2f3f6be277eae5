"""engine/trials.py: canvases that begin again: unsure at their cap, or refused by the causal direction."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import tiny
import tiny_runs
import torch
from tiny_runs import LENGTH, SETTLES, talker, text
from torch import Tensor

from sfumato import LLM
from sfumato.engine.engine import Engine, EngineSettings
from sfumato.engine.request import TRY_BITS, GrammarSpan, Request, Row
from sfumato.engine.run import Run
from sfumato.engine.trials import CommitLikelihoods, Likeliest, Trial
from sfumato.errors import CapacityError, InputError, SfumatoError
from sfumato.events import Commit, Done, Draft
from sfumato.model.cache import KVCache
from sfumato.model.network import Model
from sfumato.options import Options
from sfumato.sampling.noise import CountedNoise, NoiseSource
from sfumato.templates.slots import Slot

PROMPTS = [text(length, 30 + length) for length in (4, 17, 9, 26)]
SEEDS = 5
SOME = 19.0
"""Nats at which the causal direction of the tiny model refuses about every second canvas."""
CAP, SURE = 3, 0.053
"""Steps, and nats of mean entropy, at which about every second canvas of the tiny model is unsure."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with tiny.one_thread():
        yield


@dataclasses.dataclass(frozen=True)
class Shifted:
    """The noise of one row, as its canvases have it after so many tries."""

    plain: CountedNoise
    tries: int

    def canvas(self, rows: Sequence[int], canvas: Sequence[int]) -> Tensor:
        return self.plain.canvas(rows, self._shifted(canvas))

    def sample(self, rows: Sequence[int], canvas: Sequence[int], step: Sequence[int]) -> dict[str, Tensor]:
        return self.plain.sample(rows, self._shifted(canvas), step)

    def renoise(self, rows: Sequence[int], canvas: Sequence[int], step: Sequence[int]) -> Tensor:
        return self.plain.renoise(rows, self._shifted(canvas), step)

    def _shifted(self, canvas: Sequence[int]) -> list[int]:
        return [number + (self.tries << TRY_BITS) for number in canvas]


def shifted(ours: Model, seed: int, tries: int) -> NoiseSource:
    return Shifted(CountedNoise([seed], [0], LENGTH, ours.config.vocab_size), tries)


def events_of(ours: Model, prompts: Sequence[list[int]], options: Sequence[Options], **more: Any) -> list[list[Any]]:
    """The events of each row, without times."""
    events: list[list[Any]] = [[] for _ in prompts]
    for event in Run(ours, prompts, options, **more):
        plain: Any = dataclasses.replace(event, row=0, request="")
        if isinstance(plain, Done):
            plain = dataclasses.replace(
                plain, usage=dataclasses.replace(plain.usage, seconds=0.0, first_commit_seconds=None)
            )
        events[event.row].append(plain)
    return events


def log_p_of(ours: Model, prompt: list[int], tokens: list[int]) -> Tensor:
    """Log-probabilities of all tokens in the places of these, from one fresh encode pass."""
    whole = prompt + tokens
    cache = KVCache.allocate(ours.config, 1, len(whole))
    return ours.logits(ours.encode(torch.tensor([whole]), cache)).log_softmax(-1)[0, len(prompt) - 1 : -1]


def gap_and_mean(log_p_TV: Tensor, tokens: list[int]) -> tuple[float, float]:
    own = [float(log_p_TV[place, token]) for place, token in enumerate(tokens)]
    gaps = [float(log_p_TV[place].max()) - value for place, value in enumerate(own)]
    return max(gaps), sum(own) / len(own)


def each(**changes: Any) -> list[Options]:
    """Several canvases a row, of seeds and lengths of their own."""
    return [dataclasses.replace(SETTLES, seed=row, max_tokens=20 + 4 * row, **changes) for row in range(4)]


class OneTry(NamedTuple):
    tokens: list[int]
    steps: int
    entropy: float
    gap: float
    mean: float

    def stands(self, threshold: float | None) -> bool:
        return self.steps < CAP or self.entropy < SURE if threshold is None else self.gap <= threshold

    def rank(self, threshold: float | None) -> float:
        return -self.entropy if threshold is None else self.mean


@functools.cache
def tries_of(seed: int) -> list[OneTry]:
    """Three tries of one canvas: a plain run for each, with that try's noise, and an encode pass of its own."""
    ours, prompt, tries = talker(), PROMPTS[seed % 4], []
    for number in range(3):
        options, settings = plain_of(seed, drafts=True), EngineSettings(noise=shifted(ours, seed, number))
        ((*_, draft, _, done),) = events_of(ours, [prompt], [options], settings=settings)
        entropy = sum(draft.entropies) / LENGTH
        judged = gap_and_mean(log_p_of(ours, prompt, done.tokens), done.tokens)
        tries.append(OneTry(done.tokens, done.usage.steps, entropy, *judged))
    return tries


def plain_of(seed: int, **changes: Any) -> Options:
    return dataclasses.replace(SETTLES, seed=seed, max_tokens=LENGTH, max_steps=CAP, confidence=SURE, **changes)


@torch.inference_mode()
@pytest.mark.parametrize("threshold", [None, 0.0, SOME, 100.0])
def test_the_first_try_that_stands_commits_else_the_best(threshold: float | None) -> None:
    ours, ways = talker(), set()
    for seed in range(SEEDS):
        tries = tries_of(seed)
        standing = next((n for n, one in enumerate(tries) if one.stands(threshold)), None)
        last = 2 if standing is None else standing
        chosen = max(range(3), key=lambda n: tries[n].rank(threshold)) if standing is None else standing
        ways.add((standing is None, last, chosen))
        ((commit, done),) = events_of(ours, [PROMPTS[seed % 4]], [plain_of(seed, verify=threshold, redos=2)])
        some = tries[: last + 1]
        steps = sum(one.steps for one in some)
        assert isinstance(commit, Commit) and commit.tokens == done.tokens == tries[chosen].tokens
        assert commit.steps == done.usage.steps == steps and commit.canvas == 0
        assert done.usage.passes == steps + (0 if threshold is None else len(some)), "an encode pass for each verdict"
        assert done.usage.canvases == 1 and done.finish_reason == "length"
    assert len(ways) >= (1 if threshold == 100.0 else 2), "the tries are all alike"


@torch.inference_mode()
def test_a_canvas_that_repeated_itself_begins_again_where_it_is_unsure() -> None:
    ours, again = talker(), []
    for seed in range(2 * SEEDS):
        options = dataclasses.replace(plain_of(seed, repeats=2), max_steps=16)
        ((*_, draft, _, done),) = events_of(ours, [PROMPTS[seed % 4]], [dataclasses.replace(options, drafts=True)])
        ((_, second),) = events_of(ours, [PROMPTS[seed % 4]], [dataclasses.replace(options, redos=1)])
        is_unsure = sum(draft.entropies) / LENGTH >= SURE
        assert (second.usage.steps > done.usage.steps) == is_unsure
        if done.usage.steps < 16:
            again.append(is_unsure)
    assert {*again} == {True, False}


def test_off_and_never_refusing_write_the_same() -> None:
    off, generous = (
        events_of(talker((38, 45)), PROMPTS, each(max_steps=16, **more)) for more in ({}, {"verify": 100.0, "redos": 1})
    )
    for plain, verified in zip(off, generous, strict=True):
        *commits, done = verified
        usage = dataclasses.replace(done.usage, passes=done.usage.passes - len(commits))
        assert [*commits, dataclasses.replace(done, usage=usage)] == plain


@pytest.mark.parametrize("is_finished", [False, True])
@pytest.mark.parametrize(
    "settings", [EngineSettings(lag=1), EngineSettings(lag=3), EngineSettings(record=True), EngineSettings(chunk=5)]
)
def test_no_way_of_stepping_and_no_neighbour_changes_it(settings: EngineSettings, is_finished: bool) -> None:
    """Rows that are judged beside rows that are not, read late, recorded, and with prompts in chunks."""
    ours = talker((38, 45))
    sorts: list[dict[str, Any]] = [
        {},
        {"verify": SOME, "redos": 2},
        {"redos": 1, "max_steps": CAP, "confidence": SURE},
        {"verify": SOME, "finish": True} if is_finished else {"mode": "autoregressive"},
    ]
    options = [dataclasses.replace(own, **sort) for own, sort in zip(each(), sorts, strict=True)]
    expected = [events_of(ours, [prompt], [own])[0] for prompt, own in zip(PROMPTS, options, strict=True)]
    actual = events_of(ours, PROMPTS, options, settings=settings)
    if settings.lag:  # a late read costs passes, and nothing else
        for events in (*expected, *actual):
            events[-1] = dataclasses.replace(events[-1], usage=dataclasses.replace(events[-1].usage, passes=0))
    assert actual == expected


@torch.inference_mode()
@pytest.mark.parametrize("finish", [False, True])
def test_what_is_cached_is_what_was_committed(finish: bool) -> None:
    """After refused tries, and after earlier tries that won: log-probabilities and the next canvases see no other."""
    ours = talker((38, 45))
    run = Run(ours, PROMPTS, each(verify=SOME, redos=1, finish=finish, logprobs=True, top_logprobs=3))
    done = {event.row: event for event in run if isinstance(event, Done)}
    for row, prompt in enumerate(PROMPTS):
        tokens = done[row].tokens
        log_p_TV = log_p_of(ours, prompt, tokens)
        expected = [float(log_p_TV[place, token]) for place, token in enumerate(tokens)]
        assert done[row].logprobs == pytest.approx(expected, abs=1e-3)
        held = run.cache.lengths[row]
        fresh = tiny_runs.encoded(ours, (prompt + tokens)[:held])
        canvas = torch.tensor([text(LENGTH)])
        own = ours.denoise(canvas, run.cache, None, [row])
        assert held > len(prompt) and tiny_runs.near(own, ours.denoise(canvas, fresh))
    silent = events_of(ours, PROMPTS, each(verify=SOME, redos=1, finish=finish))
    assert [events[-1].tokens for events in silent] == [done[row].tokens for row in range(4)]


def one_after_another(ours: Model, start: list[int], count: int) -> list[int]:
    """The likeliest tokens behind these, each from those before it."""
    if count == 0:
        return []
    options = Options(mode="autoregressive", temperature=0.0, max_tokens=count)
    return [*events_of(ours, [start], [options])[0][-1].tokens]


@torch.inference_mode()
@pytest.mark.parametrize(("redos", "threshold"), [(0, SOME), (2, 14.0)])
def test_a_refused_canvas_is_finished_one_token_after_another(redos: int, threshold: float) -> None:
    """Up to the first gap it is the likeliest try, there the likeliest token, behind it what a request would get."""
    ours, places = talker(), set[int]()
    for seed in range(SEEDS):
        tries, prompt = tries_of(seed)[: redos + 1], PROMPTS[seed % 4]
        some = tries[: next((n for n, one in enumerate(tries) if one.stands(threshold)), redos) + 1]
        options = plain_of(seed, verify=threshold, redos=redos, finish=True)
        ((*commits, done),) = events_of(ours, [prompt], [options])
        steps, verdicts = sum(one.steps for one in some), len(some)
        if some[-1].stands(threshold):
            assert done.tokens == some[-1].tokens
            assert (done.usage.steps, done.usage.passes) == (steps, steps + verdicts)
            continue
        best = max(some, key=lambda one: one.mean)
        log_p_TV = log_p_of(ours, prompt, best.tokens)
        gaps = log_p_TV.amax(-1) - log_p_TV.gather(1, torch.tensor(best.tokens)[:, None])[:, 0]
        place = int((gaps > threshold).nonzero()[0])
        start = [*best.tokens[:place], int(log_p_TV[place].argmax())]
        rest = one_after_another(ours, prompt + start, LENGTH - len(start))
        assert done.tokens == start + rest
        assert [len(one.tokens) for one in commits] == [len(start), *(1 for _ in rest)]
        assert done.usage.steps == steps + len(rest), "a token is a step"
        assert done.usage.passes == done.usage.steps + verdicts + bool(rest), "and what is kept is encoded again"
        places.add(place)
    assert len(places) > 1


@torch.inference_mode()
def test_behind_a_finished_canvas_the_next_one_is_denoised() -> None:
    """On the grid of its canvases; pins hold, and no end comes before `min_tokens`."""
    ours, prompt = talker(), PROMPTS[1]
    pins = {place: 13 for place in (5, LENGTH - 1, LENGTH, 2 * LENGTH + 3)}
    options = dataclasses.replace(
        SETTLES, seed=2, max_tokens=3 * LENGTH, min_tokens=3 * LENGTH, verify=0.0, finish=True
    )
    ((*commits, done),) = events_of(ours, [prompt], [options], pins=[pins])
    assert len(done.tokens) == 3 * LENGTH and all(done.tokens[place] == token for place, token in pins.items())
    assert done.usage.canvases == 3 and {commit.canvas for commit in commits} == {0, 1, 2}
    for number in range(3):
        own = [commit for commit in commits if commit.canvas == number]
        assert sum(len(commit.tokens) for commit in own) == LENGTH and own[0].steps > 1
    assert sum(commit.steps for commit in commits) == done.usage.steps
    free = [place for place in range(3 * LENGTH) if place not in pins]
    log_p_TV = log_p_of(ours, prompt, done.tokens)
    log_p_TV[:, list(ours.config.eos_ids)] = -torch.inf
    assert [done.tokens[place] for place in free] == log_p_TV.argmax(-1)[free].tolist(), "no gap is left above 0"


def test_drafts_show_every_try() -> None:
    options = [dataclasses.replace(SETTLES, seed=0, max_tokens=LENGTH, verify=0.0, redos=2, drafts=True)]
    (events,) = events_of(talker(), PROMPTS[:1], options)
    steps = [event.step for event in events if isinstance(event, Draft)]
    assert steps.count(1) == 3 and len(steps) == events[-1].usage.steps
    assert all(event.canvas == 0 for event in events[:-1])


def test_a_stop_string_cuts_what_was_judged() -> None:
    ours, options = talker(), dataclasses.replace(SETTLES, seed=5, max_tokens=3 * LENGTH, verify=SOME, redos=1)
    (whole,) = (events[-1].tokens for events in events_of(ours, PROMPTS[:1], [options]))
    for stop in (0, 3, LENGTH, LENGTH + 2):
        shown: list[int] = []

        def watch(tokens: list[int], shown: Any = shown, stop: int = stop) -> int | None:
            before = len(shown)
            shown.extend(tokens)
            return stop - before if len(shown) > stop else None

        for logprobs in False, True:
            shown.clear()
            request = Request(PROMPTS[0], dataclasses.replace(options, logprobs=logprobs))
            engine = Engine(ours)
            engine.join(Row.of(request, ours.config, watch))
            events: list[Any] = []
            while engine.live:
                events += engine.turn()
            done = events[-1]
            assert done.tokens == whole[:stop] and done.finish_reason == "stop"
            assert not logprobs or len(done.logprobs) == stop
            assert engine.cache.lengths[0] <= len(PROMPTS[0]) + stop, "the cache holds what was cut off"


def test_with_early_answers_a_prefix_waits_for_its_verdict() -> None:
    options = [dataclasses.replace(own, early=True) for own in each(verify=SOME, redos=2)]
    for events in events_of(talker((38, 45)), PROMPTS, options):
        *commits, done = events
        assert [commit.canvas for commit in commits] == list(range(done.usage.canvases))
        assert sum(commit.steps for commit in commits) == done.usage.steps


def test_what_is_pinned_is_not_judged() -> None:
    """A canvas of pins stands, however unlikely they are; with one position free, that one decides."""
    ours, prompt = talker(), PROMPTS[0]
    unlikely = {place: 13 for place in range(LENGTH)}
    for pins in (unlikely, {place: token for place, token in unlikely.items() if place != 2}):
        options = dataclasses.replace(SETTLES, seed=1, max_tokens=LENGTH, verify=0.0, redos=1)
        ((*_, done),) = events_of(ours, [prompt], [options], pins=[pins])
        assert done.usage.passes - done.usage.steps == (1 if len(pins) == LENGTH else 2)


def test_a_try_by_hand() -> None:
    log_p_TV = torch.log(torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.1, 0.8]]))
    likelihoods = CommitLikelihoods.of([1, 1, 0], log_p_TV, 2)
    assert likelihoods.top is not None and [*map(len, likelihoods.top)] == [2, 2, 2] and 2 in likelihoods.top[2]

    def verdict(pinned: Mapping[int, int], lacking: int) -> tuple[float, float]:
        best = Likeliest.of(log_p_TV, (2,), lacking)
        one = Trial([1, 1, 0], 5, 0.01).judged(likelihoods, best, pinned)
        assert one.rank == one.mean and (one.tokens, one.steps, one.entropy) == ([1, 1, 0], 5, 0.01)
        return one.gap, one.mean

    log = {p: float(torch.tensor(p).log()) for p in (0.1, 0.3, 0.6, 0.7, 0.8)}
    assert verdict({}, 0) == pytest.approx((log[0.8] - log[0.1], (log[0.3] + log[0.7] + log[0.1]) / 3))
    assert verdict({2: 0}, 0) == pytest.approx((log[0.6] - log[0.3], (log[0.3] + log[0.7]) / 2))
    assert verdict({}, 3) == pytest.approx((log[0.6] - log[0.3], (log[0.3] + log[0.7] + log[0.1]) / 3)), "2 is an end"
    assert verdict({0: 1, 1: 1, 2: 0}, 0) == (0.0, 0.0)
    one = Trial([1, 1, 0], 5, 0.01).judged(likelihoods, Likeliest.of(log_p_TV, (), 0), {})
    first, last = one.corrected(0.5), one.corrected(1.0)
    assert (first.tokens, last.tokens) == ([0], [1, 1, 2]) and one.corrected(5.0).tokens == [1, 1, 0]
    for cut in first, last:
        assert cut.likelihoods == CommitLikelihoods.of(cut.tokens, log_p_TV, 2)
    assert likelihoods.first(1) == CommitLikelihoods.of([1], log_p_TV, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"redos": 0}, "verify is 4.0 without redos; set redos to 1 or more, or finish to true"),
        ({"verify": None, "finish": True}, "finish is true without verify; set verify to a number of nats"),
        ({"redos": 0, "finish": True, "mode": "autoregressive"}, "finish needs mode 'diffusion'"),
        ({"redos": 0, "finish": True, "choices": ["a"]}, "finish cannot go with choices"),
        ({"mode": "autoregressive"}, "redos needs mode 'diffusion'; the mode is 'autoregressive'"),
        ({"regex": "a+"}, "redos cannot go with regex, whose grammar walks a canvas once"),
        ({"must_call": True}, "redos cannot go with must_call"),
        ({"logit_bias": {5: -100}}, "verify cannot go with logit_bias, which changes what"),
        ({"repetition_penalty": 1.2}, "verify cannot go with repetition_penalty"),
    ],
)
def test_options_that_cannot_go_with_it_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Options(**{"verify": 4.0, "redos": 1, **options})
    assert caught.value.option == message.partition(" ")[0]


def test_requests_that_it_cannot_judge_are_refused() -> None:
    ours, options = talker(), Options(redos=1, max_tokens=8)
    span: Any = GrammarSpan(0, None, None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="has a span with a grammar; redos cannot"):
        Request(PROMPTS[0], options, spans=[span]).checked(ours.config)
    plain = dataclasses.replace(ours.config, is_diffusion=False)
    with pytest.raises(SfumatoError, match="redos needs a canvas"):
        Request(PROMPTS[0], options).checked(plain)
    llm = LLM.load("nano")
    filled = llm.fill(["1", Slot("x", length=2)], options=Options(redos=1, max_steps=1, seed=1))
    assert filled.usage.steps == 2, "a template's canvas may begin again"
    with pytest.raises(InputError, match="verify does not apply to a template"):
        llm.fill(["1", Slot("x", length=1)], options=Options(verify=4.0, redos=1))
    with pytest.raises(InputError, match="redos is 1; a decision reads"):
        llm.decide("a text", {"x": ["a", "b"]}, options=Options(verify=4.0, redos=1))


def test_it_ends_at_the_end_of_the_context() -> None:
    ours = talker(max_position=40)
    options = dataclasses.replace(SETTLES, seed=0, verify=0.0, redos=1)
    ((*_, done),) = events_of(ours, [PROMPTS[1]], [options])
    assert done.finish_reason == "length" and len(PROMPTS[1]) + len(done.tokens) <= 40
    with pytest.raises(CapacityError):
        events_of(ours, [text(39)], [options])
