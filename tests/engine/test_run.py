"""engine/run.py: what must hold whatever the model says: batches, seeds, limits, pins. On a tiny model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import (
    CONFIG,
    LENGTH,
    encoded,
    examples,
    near,
    probe,
    talker,
    text,
)
from torch import Tensor

from sfumato.engine import request as requests
from sfumato.engine import run as runs
from sfumato.engine.engine import EngineSettings
from sfumato.engine.request import Request, Row
from sfumato.engine.run import Run, generate
from sfumato.errors import InputError
from sfumato.events import Commit, Done, Draft
from sfumato.model.cache import KVCache
from sfumato.model.network import Model
from sfumato.ops.contract import ReadOut
from sfumato.options import Options
from sfumato.sampling.rules import Rules, Schedule


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with tiny.one_thread():
        yield


SETTLES = Options(max_steps=8, entropy_bound=0.5, confidence=0.5)


@dataclass
class Outcome:
    """What the engine said about one row."""

    drafts: list[Draft] = field(default_factory=list)
    commits: list[Commit] = field(default_factory=list)
    done: list[Done] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return self.done[0].tokens

    @property
    def reason(self) -> str:
        return self.done[0].finish_reason


def finish(
    ours: Model,
    prompts: Sequence[Sequence[int]],
    options: Options | Sequence[Options] = SETTLES,
    watch: Callable[[int, list[int]], int | None] | None = None,
    **more: Any,
) -> list[Outcome]:
    """Run to the end, and hold every run to what all runs have in common."""
    outcome = [Outcome() for _ in prompts]
    each = [options] * len(prompts) if isinstance(options, Options) else options
    rows: Sequence[Sequence[int] | Row] = prompts
    if watch is not None:
        requests = [Request(prompt, own) for prompt, own in zip(prompts, each, strict=True)]
        rows = [Row.of(request, ours.config, partial(watch, row)) for row, request in enumerate(requests)]
    for event in generate(ours, rows, options, **more):
        assert not torch.is_inference_mode_enabled(), "the engine's mode leaks into the caller's code"
        row = outcome[event.row]
        assert not row.done, "nothing after Done"
        {Draft: row.drafts, Commit: row.commits, Done: row.done}[type(event)].append(event)  # type: ignore[attr-defined]
    for row, expected, prompt in zip(outcome, each, prompts, strict=True):
        (done,) = row.done
        length = ours.config.canvas_length
        assert done.tokens == [token for commit in row.commits for token in commit.tokens]
        assert not any(token in ours.config.eos_ids for token in done.tokens[:-1])
        if done.tokens and done.tokens[-1] in ours.config.eos_ids:
            assert done.finish_reason == "stop"
        assert done.usage.tokens == len(done.tokens)
        assert done.usage.prompt_tokens == len(prompt)
        assert len(prompt) + len(done.tokens) <= ours.config.max_position
        if expected.max_tokens is not None:
            assert len(done.tokens) <= expected.max_tokens
        assert (done.logprobs is not None) is expected.logprobs
        assert len(row.drafts) == (done.usage.steps if expected.drafts else 0)
        if expected.mode != "autoregressive":
            assert all(len(commit.tokens) == length for commit in row.commits[:-1])
            assert [commit.canvas for commit in row.commits] == list(range(done.usage.canvases))
            assert sum(commit.steps for commit in row.commits) == done.usage.steps
            extra = sum(bool(commit.tokens) for commit in row.commits) if expected.logprobs else 0
            assert done.usage.passes == done.usage.steps + extra  # a commit goes along with the next canvas's step
        else:
            assert done.usage.passes == done.usage.steps == len(row.commits)
    return outcome


PROMPTS = [text(length, 30 + length) for length in (4, 17, 9, 26)]

EACH = [dataclasses.replace(SETTLES, max_tokens=20 + 4 * row, seed=row, max_steps=6 + row) for row in range(4)]


@functools.cache
def alone(row: int) -> tuple[list[int], tuple[int, ...]]:
    (outcome,) = finish(talker((1, 5)), [PROMPTS[row]], EACH[row])
    return outcome.tokens, tuple(commit.steps for commit in outcome.commits)


@examples(15)
@given(rows=st.lists(st.integers(0, 3), min_size=1, max_size=6), chunk=st.sampled_from([1, 5, 2048]))
def test_the_same_seed_gives_the_same_text_in_any_batch(rows: list[int], chunk: int) -> None:
    """Any rows, any order, repeats; prompts, seeds, caps and limits of their own; prompts encoded in any chunks."""
    outcome = finish(
        talker((1, 5)), [PROMPTS[r] for r in rows], [EACH[r] for r in rows], settings=EngineSettings(chunk=chunk)
    )
    assert [(t.tokens, tuple(c.steps for c in t.commits)) for t in outcome] == [alone(r) for r in rows]


def test_rows_really_go_their_own_way() -> None:
    """The teeth of the test above: the rows differ in text, length and steps, and seeds matter."""
    texts = [alone(row) for row in range(4)]
    assert len({tuple(tokens) for tokens, _ in texts}) == 4
    assert len({steps for _, steps in texts}) == 4
    by_seed = {tuple(finish(talker(), [PROMPTS[0]], dataclasses.replace(EACH[0], seed=s))[0].tokens) for s in range(6)}
    assert len(by_seed) == 6


def test_a_mixed_batch_of_both_modes() -> None:
    sampled = Options(max_tokens=9, mode="autoregressive", seed=4, temperature=1.5)
    outcome = finish(talker((1, 5)), [PROMPTS[1], PROMPTS[0], PROMPTS[2]], [sampled, EACH[0], sampled])
    assert outcome[1].tokens == alone(0)[0]
    for row, prompt in ((0, PROMPTS[1]), (2, PROMPTS[2])):
        assert outcome[row].tokens == finish(talker((1, 5)), [prompt], sampled)[0].tokens


def test_the_cache_afterwards_holds_the_committed_text() -> None:
    """Cached equals recomputed, after a run with rows of different length and growth; and a chat goes on from it."""
    ours = talker()
    options = [dataclasses.replace(SETTLES, max_tokens=limit, seed=limit) for limit in (12, 44)]
    run = Run(ours, PROMPTS[:2], options, cache=KVCache.allocate(ours.config, 2, 30))
    answers = {event.row: event.tokens for event in run if isinstance(event, Done)}
    assert run.cache.lengths == [len(PROMPTS[0]) + 8, len(PROMPTS[1]) + 40]
    for row in range(2):
        whole = PROMPTS[row] + answers[row]
        held = whole[: run.cache.lengths[row]]
        assert near(probe(ours, run.cache, [row]), probe(ours, encoded(ours, held, KVCache.allocate(CONFIG, 1, 99))))
    follow = [PROMPTS[row] + answers[row] + text(5, row) for row in range(2)]
    outcome = finish(ours, follow, SETTLES.with_defaults({"max_tokens": 16}), cache=run.cache)
    fresh = finish(ours, follow, SETTLES.with_defaults({"max_tokens": 16}))
    assert [t.tokens for t in outcome] == [t.tokens for t in fresh]
    assert [t.done[0].usage.reused_tokens for t in outcome] == [len(PROMPTS[0]) + 8, len(PROMPTS[1]) + 40]
    assert [t.done[0].usage.reused_tokens for t in fresh] == [0, 0]


@pytest.mark.parametrize("mode", ["diffusion", "autoregressive"])
def test_max_tokens_cuts(mode: Any) -> None:
    options = dataclasses.replace(SETTLES, seed=3, mode=mode, max_tokens=3 * LENGTH)
    (whole,) = finish(talker(), PROMPTS[:1], options)
    assert len(whole.tokens) == 3 * LENGTH
    for limit in (1, 2, LENGTH - 1, LENGTH, LENGTH + 1, 3 * LENGTH - 1):
        (outcome,) = finish(talker(), PROMPTS[:1], dataclasses.replace(options, max_tokens=limit))
        assert outcome.tokens == whole.tokens[:limit]
        assert outcome.reason == "length"
        if mode == "diffusion":
            assert len(outcome.commits) == -(-limit // LENGTH)


def test_an_end_inside_a_canvas_ends_the_row() -> None:
    """A token of the free run is made the eos: the same text up to it, and no further, while another row goes on."""
    options = dataclasses.replace(SETTLES, seed=0, max_tokens=4 * LENGTH)
    free = [outcome.tokens for outcome in finish(talker(), PROMPTS[:3], options)]
    ended = 0
    for at in (LENGTH + 2, 2 * LENGTH - 1, 3 * LENGTH):
        eos = free[0][at]
        outcome = finish(talker((eos,)), PROMPTS[:3], options)
        for row, tokens in enumerate(free):
            stop = tokens.index(eos) + 1 if eos in tokens else len(tokens)
            assert outcome[row].tokens == tokens[:stop]
            assert outcome[row].reason == ("stop" if eos in tokens else "length")
            ended += eos in tokens and stop % LENGTH != 0
    assert ended >= 2
    # An eos that the token limit cuts off is no stop; one that just fits is.
    for limit, reason in ((free[0].index(eos), "length"), (free[0].index(eos) + 1, "stop")):
        (one,) = finish(talker((eos,)), PROMPTS[:1], dataclasses.replace(options, max_tokens=limit))
        assert (len(one.tokens), one.reason) == (limit, reason)


@pytest.mark.parametrize("mode", ["diffusion", "autoregressive"])
@pytest.mark.parametrize("guard", [0, 1, 5, LENGTH, LENGTH + 3])
def test_min_tokens_guards_against_an_early_end(mode: Any, guard: int) -> None:
    """A model for which every token but one ends the turn: unguarded it answers with an end at once."""
    only = 7
    ours = talker(tuple(t for t in range(CONFIG.vocab_size) if t != only))
    options = dataclasses.replace(SETTLES, min_tokens=guard, mode=mode, max_tokens=4 * LENGTH, temperature=0.0)
    unguarded = finish(ours, PROMPTS, dataclasses.replace(options, min_tokens=0))
    assert all(outcome.tokens[0] != only and len(outcome.tokens) == 1 for outcome in unguarded)
    for prompt, outcome in zip(PROMPTS, finish(ours, PROMPTS, options), strict=True):
        assert outcome.tokens[:guard] == [only] * guard
        assert len(outcome.tokens) > guard
        if mode == "diffusion":
            assert outcome.reason == "stop"
        else:  # left alone behind the guard, it goes on as the model would
            assert outcome.tokens[guard : guard + 1] == greedy(ours, prompt + [only] * guard, 1)


def test_min_tokens_bans_only_the_ends() -> None:
    """In a run where no end comes early anyway the guard changes nothing."""
    options = dataclasses.replace(SETTLES, seed=1, max_tokens=20)
    assert not {1, 5} & set(finish(talker(), PROMPTS[:1], options)[0].tokens)
    plain, guarded = (finish(talker((1,)), PROMPTS[:1], dataclasses.replace(options, min_tokens=n))[0] for n in (0, 20))
    assert plain.tokens == guarded.tokens


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("mode", ["diffusion", "autoregressive"])
def test_watch_ends_a_row(mode: Any, logprobs: bool) -> None:
    """The watch sees every committed token once, in order, and may keep any number of the last ones, even none."""
    options = dataclasses.replace(SETTLES, seed=5, mode=mode, max_tokens=3 * LENGTH, logprobs=logprobs)
    whole = [outcome.tokens for outcome in finish(talker(), PROMPTS[:2], options)]
    for stop in (0, 1, LENGTH - 1, LENGTH, LENGTH + 3, 2 * LENGTH):
        shown: dict[int, list[int]] = {0: [], 1: []}

        def watch(row: int, tokens: list[int], shown: Any = shown, stop: int = stop) -> int | None:
            before = len(shown[row])
            shown[row] += tokens
            return stop - before if row == 0 and len(shown[row]) > stop else None

        outcome = finish(talker(), PROMPTS[:2], options, watch)
        assert outcome[0].tokens == whole[0][:stop]
        assert outcome[0].reason == "stop"
        assert outcome[1].tokens == whole[1] == shown[1]
        assert outcome[1].reason == "length"
        assert shown[0] == whole[0][: len(shown[0])]
        if logprobs:
            assert len(outcome[0].done[0].logprobs or []) == stop
        shown[0] = []
        assert finish(talker(), PROMPTS[:1], options, watch)[0].tokens == whole[0][:stop]


def test_the_step_cap() -> None:
    for cap in (1, 2, 5):
        options = Options(max_tokens=3 * LENGTH, max_steps=cap, confidence=0.0)
        assert {c.steps for outcome in finish(talker(), PROMPTS, options) for c in outcome.commits} == {cap}
    outcome = finish(talker(), PROMPTS, dataclasses.replace(SETTLES, max_tokens=3 * LENGTH))
    steps = {commit.steps for row in outcome for commit in row.commits}
    assert min(steps) < 8
    assert max(steps) <= 8
    assert len(steps) > 2


@pytest.mark.parametrize("stability", [0, 1, 3])
def test_every_canvas_must_stand_still_anew(stability: int) -> None:
    """A network that always says the same: each canvas takes as many steps as stability asks, the second one too."""
    ours = tiny.tiny_model(tiny.tiny_config(eos_ids=()), name="fused")
    ours.norm.weight.zero_()
    options = Options(max_tokens=4 * LENGTH, max_steps=9, stability=stability, confidence=5.0)
    for outcome in finish(ours, PROMPTS[:2], [options, dataclasses.replace(options, stability=2, confidence=4.0)]):
        assert outcome.tokens == [0] * 4 * LENGTH
        # Entropies are log 61, about 4.11: sure enough for the first row, never for the second.
        assert [commit.steps for commit in outcome.commits] == [stability + 1 if outcome.done[0].row == 0 else 9] * 4


def test_the_schedule_does_not_depend_on_the_cap() -> None:
    """A lower cap with temperature_steps kept sees the same first steps; by default it cools faster."""
    assert [Schedule(0.4, 0.8, 4).temperature(step) for step in range(4)] == pytest.approx([0.8, 0.7, 0.6, 0.5])
    assert [Schedule(0.4, 0.8, 4).temperature(step) for step in (4, 9)] == pytest.approx([0.5, 0.5])
    assert Rules.of(Options(max_steps=5)).schedule == Schedule(0.4, 0.8, 5)
    assert Rules.of(Options(max_steps=5, temperature_steps=48)).schedule == Schedule(0.4, 0.8, 48)
    assert Rules.of(Options(max_steps=60, temperature_steps=3)).schedule.temperature(59) == pytest.approx(0.4 + 0.4 / 3)
    long = Options(max_tokens=LENGTH, max_steps=12, confidence=0.0, drafts=True, t_max=1.5)
    short = dataclasses.replace(long, max_steps=4, temperature_steps=12)
    tied = dataclasses.replace(long, max_steps=4)
    first, same, other = (finish(talker(), PROMPTS[:1], options)[0].drafts[:4] for options in (long, short, tied))
    assert same == first
    assert other[0] == first[0]
    assert other != first


def test_a_schedule_beyond_the_cap_and_a_cap_beyond_the_schedule() -> None:
    """Every step of the engine is read out at its row's own temperature."""
    ours = talker()
    used: list[list[float]] = []

    def read_out(
        hidden_BLD: Tensor,
        embed_VD: Tensor,
        softcap: float,
        temperature_B: Tensor,
        uniform_BL: Tensor | None = None,
        gumbel_BLV: Tensor | None = None,
        banned: tuple[Tensor, Tensor] | None = None,
    ) -> ReadOut:
        used.append(temperature_B.tolist())
        return reference(hidden_BLD, embed_VD, softcap, temperature_B, uniform_BL, gumbel_BLV, banned)

    reference = ours.ops.read_out
    spied = Model(ours.config, dataclasses.replace(ours.ops, read_out=read_out)).requires_grad_(False)
    spied.load_state_dict(ours.state_dict())
    base = Options(max_tokens=2 * LENGTH, max_steps=3, t_min=0.5, t_max=1.0, confidence=0.0)
    finish(spied, PROMPTS[:2], [base, dataclasses.replace(base, temperature_steps=2)])
    assert used == [pytest.approx(pair) for pair in [[1.0, 1.0], [5 / 6, 0.75], [4 / 6, 0.75]] * 2]


def test_drafts_show_every_step() -> None:
    options = dataclasses.replace(SETTLES, max_tokens=2 * LENGTH + 3, seed=2)
    outcome = finish(talker((1, 5)), PROMPTS, dataclasses.replace(options, drafts=True))
    for row, silent in zip(outcome, finish(talker((1, 5)), PROMPTS, options), strict=True):
        assert row.tokens == silent.tokens
        assert silent.drafts == []
        for commit in row.commits:
            drafts = [draft for draft in row.drafts if draft.canvas == commit.canvas]
            assert [draft.step for draft in drafts] == list(range(1, commit.steps + 1))
            assert drafts[-1].tokens[: len(commit.tokens)] == commit.tokens
            for draft in drafts:
                assert len(draft.tokens) == len(draft.entropies) == len(draft.accepted) == LENGTH
                assert all(type(token) is int and 0 <= token < CONFIG.vocab_size for token in draft.tokens)
                assert all(0 <= h < 4.2 for h in draft.entropies)  # log 61 is 4.11
                assert all(type(flag) is bool for flag in draft.accepted)
                assert draft.accepted[draft.entropies.index(min(draft.entropies))], "the surest one is always accepted"


@pytest.mark.parametrize("mode", ["diffusion", "autoregressive"])
@pytest.mark.parametrize("guard", [0, 6])
def test_logprobs_are_those_of_a_fresh_encode(mode: Any, guard: int) -> None:
    """Of every committed token, in cut and in stopped answers, whatever the sampling did to the distribution."""
    eos = tuple(range(1, 25))  # so many that the guard has something to forbid
    options = [
        dataclasses.replace(SETTLES, seed=s, max_tokens=2 * LENGTH + 3, logprobs=True, mode=mode, min_tokens=guard)
        for s in range(4)
    ]
    ours = talker(eos)
    outcome = finish(ours, PROMPTS, options)
    assert {"stop", "length"} >= {row.reason for row in outcome}
    for row, prompt in zip(outcome, PROMPTS, strict=True):
        whole = prompt + row.tokens
        cache = KVCache.allocate(ours.config, 1, len(whole))
        log_p = ours.logits(ours.encode(torch.tensor([whole]), cache)).log_softmax(-1)[0]
        expected = [float(log_p[len(prompt) + n - 1, token]) for n, token in enumerate(row.tokens)]
        assert row.done[0].logprobs == pytest.approx(expected, abs=1e-3)
        assert row.done[0].logprobs == [p for commit in row.commits for p in commit.logprobs or []]
    silent = finish(ours, PROMPTS, [dataclasses.replace(o, logprobs=False) for o in options])
    assert [row.tokens for row in silent] == [row.tokens for row in outcome]
    assert all(commit.logprobs is None for row in silent for commit in row.commits)


def greedy(ours: Model, prompt: list[int], count: int) -> list[int]:
    """Argmax after argmax, the whole text encoded anew for each token."""
    whole = list(prompt)
    for _ in range(count):
        cache = KVCache.allocate(ours.config, 1, len(whole))
        whole.append(int(ours.logits(ours.encode(torch.tensor([whole]), cache))[0, -1].argmax()))
    return whole[len(prompt) :]


def test_greedy_is_the_argmax_of_a_full_recompute() -> None:
    ours = talker()
    outcome = finish(ours, PROMPTS, Options(max_tokens=12, mode="autoregressive", temperature=0.0))
    assert [row.tokens for row in outcome] == [greedy(ours, prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-3}, {"temperature": 1e-40}])
def test_the_narrowest_choice_is_greedy(narrow: dict[str, Any]) -> None:
    plain = Options(max_tokens=12, mode="autoregressive", temperature=2.0, seed=1)
    wide = [row.tokens for row in finish(talker(), PROMPTS, plain)]
    got = [row.tokens for row in finish(talker(), PROMPTS, dataclasses.replace(plain, **narrow))]
    assert got == [greedy(talker(), prompt, 12) for prompt in PROMPTS]
    assert got != wide


def test_without_a_limit_the_answer_runs_to_the_end_of_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache grows on the way, and growth changes nothing."""
    ours = talker(max_position=100)
    for mode in ("diffusion", "autoregressive"):
        options = dataclasses.replace(SETTLES, seed=1, mode=mode)
        with monkeypatch.context() as small:
            small.setattr(requests, "FIRST_ROOM", 4 * LENGTH)
            small.setattr(runs, "ROUND", 1)
            run = Run(ours, PROMPTS[:2], options)
        assert run.cache.capacity == len(PROMPTS[1]) + 4 * LENGTH
        done = {event.row: event for event in run if isinstance(event, Done)}
        assert run.cache.capacity > len(PROMPTS[1]) + 4 * LENGTH
        limited = finish(ours, PROMPTS[:2], dataclasses.replace(options, max_tokens=90))
        for row, prompt in enumerate(PROMPTS[:2]):
            room = 100 - len(prompt)
            assert len(done[row].tokens) == (room // LENGTH * LENGTH if mode == "diffusion" else room)
            assert done[row].finish_reason == "length"
            assert limited[row].tokens == done[row].tokens[:90]


def test_pins_stay() -> None:
    """In every draft and in the commit, on the first canvas only; a row without pins is as if alone."""
    options = dataclasses.replace(SETTLES, max_tokens=2 * LENGTH, drafts=True, seed=9)
    free = finish(talker(), PROMPTS[:2], options)
    pins = {0: 11, 3: 12, LENGTH - 1: 13}
    assert not set(pins.values()) & set(free[0].tokens)
    outcome = finish(talker(), PROMPTS[:2], options, pins=[pins, {}])
    for draft in outcome[0].drafts:
        if draft.canvas == 0:
            assert all(draft.tokens[at] == token and draft.accepted[at] for at, token in pins.items())
            assert all(draft.entropies[at] == 0 for at in pins)
        else:
            assert [draft.tokens[at] for at in pins] != list(pins.values())
    assert all(outcome[0].tokens[at] == token for at, token in pins.items())
    assert outcome[0].tokens != free[0].tokens
    assert [draft.tokens for draft in outcome[1].drafts] == [draft.tokens for draft in free[1].drafts]
    assert outcome[1].commits == free[1].commits


def test_pinned_positions_are_seen_as_certain() -> None:
    """The network sees a pin at its place in every canvas, and as its exact embedding, not as what it guessed."""
    ours = talker()
    shown_canvases: list[Tensor] = []
    shown_soft: list[Tensor] = []
    denoise, both = ours.denoise, ours.encode_and_denoise

    class Spy(Model):
        def denoise(
            self, canvas_BL: Tensor, cache: KVCache, soft_BLD: Tensor | None = None, *more: Any, **named: Any
        ) -> Tensor:
            shown_canvases.append(canvas_BL.clone())
            if soft_BLD is not None:
                shown_soft.append(soft_BLD.clone())
            return denoise(canvas_BL, cache, soft_BLD, *more, **named)

        def encode_and_denoise(
            self, tokens_BT: Tensor, counts: Any, canvas_BL: Tensor, *more: Any, **named: Any
        ) -> Any:
            shown_canvases.append(canvas_BL.clone())
            return both(tokens_BT, counts, canvas_BL, *more, **named)

    spy = Spy(ours.config, ours.ops).requires_grad_(False)
    spy.load_state_dict(ours.state_dict())
    options = Options(max_tokens=LENGTH, max_steps=4, confidence=0.0)
    finish(spy, PROMPTS[:1], options, pins=[{2: 11, 5: 12}])
    assert len(shown_canvases) == 4
    assert len(shown_soft) == 3
    assert all(canvas[0, [2, 5]].tolist() == [11, 12] for canvas in shown_canvases)
    exact = ours.embed_tokens.weight[[11, 12]] * ours.embed_scale
    assert all(torch.equal(soft[0, [2, 5]], exact) for soft in shown_soft)


def test_a_canvas_of_pins_is_that_canvas() -> None:
    tokens = text(LENGTH, 77)
    (outcome,) = finish(
        talker(), PROMPTS[:1], dataclasses.replace(SETTLES, max_tokens=LENGTH), pins=[dict(enumerate(tokens))]
    )
    assert outcome.tokens == tokens
    assert outcome.commits[0].steps == 2  # stable at its second step


def test_a_cache_that_holds_the_whole_prompt_is_refused() -> None:
    ours = talker()
    cache = encoded(ours, PROMPTS[0])
    with pytest.raises(InputError, match=r"the cache holds 4 tokens of a prompt of 4; truncate it to fewer first"):
        generate(ours, PROMPTS[:1], SETTLES, cache=cache)


def test_an_abandoned_run_leaves_no_mode_behind() -> None:
    events = generate(talker(), PROMPTS[:1], SETTLES)
    next(events)
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
