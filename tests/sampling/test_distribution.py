"""sampling/distribution.py: what truncation, penalties and biases make of a read-out, by hand and in whole answers."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import tiny_runs
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import CONFIG, LENGTH, examples, text
from torch import Tensor

from sfumato.engine.engine import EngineSettings
from sfumato.engine.request import Request
from sfumato.engine.run import generate
from sfumato.errors import InputError
from sfumato.events import Done
from sfumato.ops.contract import NEVER, ReadOut
from sfumato.ops.reference import inverse_cdf
from sfumato.options import SHAPING, Options
from sfumato.sampling import distribution
from sfumato.sampling.distribution import Penalties, RowSampler, Truncation

P = torch.tensor([[0.05, 0.4, 0.1, 0.25, 0.2], [0.5, 0.0, 0.5, 0.0, 0.0]])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with tiny.one_thread():
        yield


def kept(p: Tensor = P, **rule: Any) -> list[list[int]]:
    """The words that are left, by their numbers."""
    is_kept = Truncation(**rule).kept(p, p.argmax(-1))
    return [row.nonzero()[:, 0].tolist() for row in is_kept]


@pytest.mark.parametrize(
    ("rule", "first", "second"),
    [
        ({}, [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
        ({"top_k": 1}, [1], [0]),
        ({"top_k": 3}, [1, 3, 4], None),
        ({"top_k": 99}, [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
        ({"top_p": 0.0}, [1], [0]),
        ({"top_p": 0.39}, [1], [0]),
        ({"top_p": 0.41}, [1, 3], [0]),
        ({"top_p": 0.86}, [1, 2, 3, 4], [0, 2]),
        ({"min_p": 0.5}, [1, 3, 4], [0, 2]),
        ({"min_p": 0.6}, [1, 3], [0, 2]),
        ({"min_p": 1.0}, [1], [0, 2]),
        # top-p counts within what top-k left: 0.4 of 0.65 is 0.615, and min-p within both.
        ({"top_k": 2, "top_p": 0.6}, [1], [0, 2]),
        ({"top_k": 2, "top_p": 0.65}, [1, 3], [0, 2]),
        ({"top_k": 3, "top_p": 0.99, "min_p": 0.6}, [1, 3], [0, 2]),
    ],
)
def test_which_words_are_left(rule: dict[str, Any], first: list[int], second: list[int] | None) -> None:
    got = kept(**rule)
    assert got[0] == first and (second is None or got[1] == second)


@examples(60)
@given(seed=st.integers(0, 999), top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999]), ranked=st.integers(1, 40))
def test_top_p_is_the_plain_rule(seed: int, top_p: float, ranked: int) -> None:
    """However few of the likeliest words are ranked at first."""
    p = torch.softmax(torch.randn(7, 40, generator=torch.Generator().manual_seed(seed)) * 2, -1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distribution, "RANKED", (ranked, 2 * ranked))
        got = kept(p, top_p=top_p)
    for row, words in zip(p.tolist(), got, strict=True):
        order = sorted(range(40), key=lambda word: -row[word])
        count = next(n for n in range(1, 41) if sum(row[word] for word in order[:n]) >= top_p - 1e-6)
        assert sorted(order[:count]) == words


def test_penalties_by_hand() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.0]])
    count, is_written = torch.tensor([[2.0, 1.0, 0.0, 0.0]]), torch.tensor([[True, True, True, False]])

    def moved(temperature: float = 1.0, **penalty: Any) -> list[float]:
        return [round(x, 4) for x in Penalties(**penalty).moved(logits, count, is_written, temperature)[0].tolist()]

    assert moved() == [2, -2, 1, 0]
    assert moved(presence=0.5) == [1.5, -2.5, 1, 0]
    assert moved(frequency=0.5) == [1, -2.5, 1, 0]
    assert moved(frequency=-1) == [4, -1, 1, 0]
    assert moved(repetition=2) == [1, -4, 0.5, 0]
    assert moved(repetition=2, presence=0.5, frequency=0.25) == [0, -4.75, 0.5, 0]  # the quotient first
    assert moved(temperature=0.5, presence=0.5) == [1, -3, 1, 0]  # of logits over 0.5


def sampler(prompt: list[int] | None = None, **options: Any) -> RowSampler:
    own = RowSampler.of(Options(**options), prompt or [])
    assert own is not None
    return own


def test_the_next_token_sees_what_was_written() -> None:
    """Presence and frequency of the answer, repetition of the prompt too, as vLLM and transformers have it."""
    own = sampler([3, 3], presence_penalty=1, frequency_penalty=0.5, repetition_penalty=2, logit_bias={"0": 5, 4: -100})
    logits = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0])
    assert own.next_logits(logits, []).tolist() == [6, 1, 1, 0.5, -99]
    assert own.next_logits(logits, [1]).tolist() == [6, -1, 1, 0.5, -99]
    assert own.next_logits(logits, [1, 1, 0]).tolist() == [4, -1.5, 1, 0.5, -99]
    assert logits.tolist() == [1] * 5
    assert sampler(top_k=3).next_logits(logits, [1]) is logits


def read_out(logits: Tensor) -> ReadOut:
    """Of one row, as the reference reads it."""
    return ReadOut(logits.argmax(-1)[None], logits.argmax(-1)[None], torch.zeros(1, len(logits)), logits[None].clone())


def applied(
    own: RowSampler, logits: Tensor, canvas: list[int], answer: list[int] | None = None, t: float = 1.0
) -> ReadOut:
    read, uniform = read_out(logits), torch.full((len(logits),), 0.999)
    own.apply_(read, 0, torch.tensor(t), (uniform, None), (answer or [], torch.tensor(canvas)))
    return read


def test_a_position_counts_the_words_before_it() -> None:
    """Of the last step's argmax canvas, and what is committed; not its own word, nor those behind it."""
    logits = torch.tensor([[1.0, 0.9, 0.0]] * 4)
    read = applied(sampler(frequency_penalty=0.25), logits, [0, 0, 0, 1])
    assert read.logits_BLV[0, :, 0].tolist() == [1, 0.75, 0.5, 0.25]
    assert read.logits_BLV[0, :, 1].tolist() == pytest.approx([0.9] * 4)
    assert read.argmax_BL.tolist() == [[0, 1, 1, 1]]
    read = applied(sampler(presence_penalty=0.5), logits, [-1] * 4, [0, 0, 2], t=0.5)
    assert read.logits_BLV[0].tolist() == [pytest.approx([0.0, 0.9, -1.0])] * 4
    read = applied(sampler([1], repetition_penalty=2), logits, [2, -1, -1, -1])
    assert read.logits_BLV[0, 3].tolist() == pytest.approx([1, 0.45, 0])


def test_many_positions_go_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(13, 20, generator=torch.Generator().manual_seed(1))
    canvas = [n % 3 for n in range(13)]
    options: dict[str, Any] = {"frequency_penalty": 0.3, "top_p": 0.8, "logit_bias": {3: 1}}
    whole = applied(sampler(**options), logits, canvas)
    monkeypatch.setattr(distribution, "SWEEP", 45)
    assert all(
        torch.equal(one, two)
        for one, two in zip(whole[:4], applied(sampler(**options), logits, canvas)[:4], strict=True)
    )


def test_entropy_is_of_the_words_that_are_left() -> None:
    """And finite, whatever is left out or was banned before."""
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [50.0, 0.0, 0.0, NEVER], [0.0, NEVER, NEVER, -90.0]])
    entropy = applied(sampler(top_k=2), logits, [-1] * 3).entropy_BL[0].tolist()
    assert entropy == pytest.approx([math.log(2), 0, 0], abs=1e-6)
    entropy = applied(sampler(top_k=1), logits, [-1] * 3).entropy_BL[0].tolist()
    assert entropy == [0, 0, 0]
    read = applied(sampler(logit_bias={0: -100, 3: 100}), logits, [-1] * 3)
    assert read.argmax_BL.tolist() == [[3, 1, 3]] and bool(read.entropy_BL.isfinite().all())


def test_a_sample_is_drawn_of_what_is_left() -> None:
    logits, uniform = P[:1].log().expand(2000, -1), (torch.arange(2000) + 0.5) / 2000
    read = read_out(logits)
    sampler(top_k=3).apply_(read, 0, torch.tensor(1.0), (uniform, None), ([], torch.full((2000,), -1)))
    count = Counter(read.sample_BL[0].tolist())
    assert {word: round(n / 2000, 2) for word, n in count.items()} == {1: 0.47, 3: 0.29, 4: 0.24}
    gumbel = torch.zeros(2000, 5)
    gumbel[:, 0] = 50
    sampler(top_k=3).apply_(read, 0, torch.tensor(1.0), (None, gumbel), ([], torch.full((2000,), -1)))
    assert set(read.sample_BL[0].tolist()) == {1}  # the most noise is on a word that is left out


def test_all_words_left_is_the_plain_read_out() -> None:
    """Bit for bit: top-k of the whole vocabulary changes nothing."""
    logits = torch.randn(9, 40, generator=torch.Generator().manual_seed(2))
    uniform = torch.rand(9, generator=torch.Generator().manual_seed(3))
    read = read_out(logits)
    sampler(top_k=40).apply_(read, 0, torch.tensor(1.0), (uniform, None), ([], torch.full((9,), -1)))
    assert torch.equal(read.sample_BL[0], inverse_cdf(torch.softmax(logits, -1), uniform))
    assert torch.equal(read.argmax_BL[0], logits.argmax(-1)) and torch.equal(read.logits_BLV[0], logits)


# ---- whole answers ---------------------------------------------------------------------------------------------------

OPTIONS = Options(max_steps=6, max_tokens=2 * LENGTH, t_min=0.5, t_max=1.0)
"""Two canvases, whose tokens differ from step to step."""
PROMPTS = [text(5, 1), text(7, 2), text(3, 3)]
RULES: dict[str, dict[str, Any]] = {
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.2},
    "presence_penalty": {"presence_penalty": 1.5},
    "frequency_penalty": {"frequency_penalty": 0.8},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "logit_bias": {"logit_bias": {11: -100, 12: 3}},
}


def answer(prompt: list[int], options: Options, name: str = "fused") -> list[int]:
    done = next(e for e in generate(tiny_runs.model(name), [prompt], options) if isinstance(e, Done))
    return done.tokens


def several(requests: list[Request], name: str = "fused") -> list[list[int]]:
    """Their answers from one batch, in order."""
    from sfumato.engine.batch import Batch

    batch, tokens = Batch(tiny_runs.model(name)), dict[str, list[int]]()
    ids = [batch.submit(request) for request in requests]
    while len(tokens) < len(ids):
        tokens |= {event.request: event.tokens for event in batch.turn() if isinstance(event, Done)}
    return [tokens[id] for id in ids]


@pytest.mark.parametrize("mode", ["diffusion", "autoregressive"])
def test_a_row_is_the_same_alone_and_in_a_batch(mode: Any) -> None:
    """With every rule, beside rows with others and with none; and every rule changes some answer."""
    plain = dataclasses.replace(OPTIONS, mode=mode, max_tokens=LENGTH + 4, min_tokens=LENGTH + 4)
    every = [plain, *(dataclasses.replace(plain, **rule) for rule in RULES.values())]
    requests = [Request(PROMPTS[n % 3], dataclasses.replace(one, seed=n % 3)) for n, one in enumerate(every)]
    alone = [answer(list(one.prompt), one.options) for one in requests]
    assert several(requests) == alone
    for n, one in enumerate(requests[1:], 1):
        without = dataclasses.replace(one.options, **{name: getattr(plain, name) for name in SHAPING})
        assert alone[n] != answer(list(one.prompt), without), one.options


def test_a_row_with_sampling_options_leaves_the_recording() -> None:
    """Beside one that is recorded as long as it is alone; both as without recordings, and with early answers."""
    changes: list[dict[str, Any]] = [{}, {"early": True, "frequency_penalty": 0.8}, {"top_p": 0.7}]
    every = [dataclasses.replace(OPTIONS, seed=n, **more) for n, more in enumerate(changes)]
    run = functools.partial(generate, tiny_runs.model("fused"), PROMPTS, every)
    tokens = {e.row: e.tokens for e in run(settings=EngineSettings(record=True)) if isinstance(e, Done)}
    assert tokens == {n: answer(PROMPTS[n], one) for n, one in enumerate(every)}


def test_off_is_off() -> None:
    """The values that turn a rule off make no sampler, whatever they are called."""
    for options in (
        Options(),
        Options(top_k=-1, top_p=1.0, min_p=0.0, presence_penalty=0, frequency_penalty=-0.0, repetition_penalty=1),
        Options(logit_bias={5: 0}),
    ):
        assert RowSampler.of(options, [1]) is None
    assert set(RULES) == set(SHAPING) and all(RowSampler.of(Options(**rule), []) for rule in RULES.values())


@pytest.mark.parametrize("mode", ["diffusion", "autoregressive"])
def test_a_forbidden_token_never_comes_and_a_forced_one_always(mode: Any) -> None:
    """In 200 answers of random weights, some of which would have it."""
    plain = Options(max_steps=2, max_tokens=LENGTH if mode == "diffusion" else 6, t_min=2.0, t_max=2.0, mode=mode)
    without = several([Request(text(4, n), dataclasses.replace(plain, seed=n)) for n in range(200)])
    most = Counter(token for tokens in without for token in tokens).most_common(1)[0][0]
    forbidden = dataclasses.replace(plain, logit_bias={most: -100})
    got = several([Request(text(4, n), dataclasses.replace(forbidden, seed=n)) for n in range(200)])
    assert all(most not in tokens for tokens in got)
    forced = dataclasses.replace(plain, logit_bias={most: 100})
    assert all(set(tokens) == {most} for tokens in several([Request(text(4, n), forced) for n in range(20)]))


def test_one_word_left_is_the_argmax() -> None:
    """In autoregressive mode at any temperature; on a canvas every position is sure, so it is accepted at once."""
    greedy = Options(mode="autoregressive", max_tokens=9, temperature=0.0)
    narrow = Options(mode="autoregressive", max_tokens=9, temperature=1.5, top_k=1, seed=3)
    assert answer(PROMPTS[0], narrow) == answer(PROMPTS[0], greedy)
    done = next(
        e
        for e in generate(tiny_runs.talker(), [PROMPTS[0]], Options(max_tokens=LENGTH, top_k=1, seed=1))
        if isinstance(e, Done)
    )
    other = next(
        e for e in generate(tiny_runs.talker(), [PROMPTS[0]], Options(max_tokens=LENGTH, seed=1)) if isinstance(e, Done)
    )
    assert done.usage.steps <= other.usage.steps


@pytest.mark.parametrize("ops", [name for name in tiny_runs.OPS if name != "reference"])
def test_every_implementation_gives_the_same_text(ops: str) -> None:
    options = dataclasses.replace(OPTIONS, top_p=0.8, frequency_penalty=0.5, logit_bias={11: -100}, seed=4)
    assert answer(PROMPTS[1], options, ops) == answer(PROMPTS[1], options, "reference")


def test_a_bias_names_tokens_of_the_vocabulary() -> None:
    words = CONFIG.vocab_size
    with pytest.raises(InputError, match=f"logit_bias names token {words}; the vocabulary has {words}") as error:
        Request([5], Options(logit_bias={words: 1})).checked(CONFIG)
    assert error.value.option == "logit_bias"
    assert Request([5], Options(logit_bias={words - 1: 1})).checked(CONFIG)
