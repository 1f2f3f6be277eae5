"""engine/scores.py: the log-probabilities of a prompt are those of one token after the other, however it is cut."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import tiny
import torch
from torch import Tensor

from sfumato.engine import scores
from sfumato.engine.batch import Batch
from sfumato.engine.engine import Engine, EngineSettings
from sfumato.engine.limits import BatchLimits
from sfumato.engine.request import Failure, Request, Row
from sfumato.engine.scores import PromptScores
from sfumato.errors import NumericError
from sfumato.events import Done, Event
from sfumato.model.cache import KVCache
from sfumato.model.network import Model
from sfumato.options import Options

ONE = Options(mode="autoregressive", max_tokens=1, seed=1)
PROMPT = [7, 8, 9, 10, 30, 31, 32, 33, 34, 12, 13]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with tiny.one_thread():
        yield


@torch.inference_mode()
def token_by_token(model: Model, prompt: list[int]) -> list[Tensor]:
    """The distribution behind each token, [V] of each, from as many passes as there are tokens."""
    cache = KVCache.allocate(model.config, 1, len(prompt), model.device, model.dtype)
    hidden = [model.encode(torch.tensor([[token]]), cache)[0, -1] for token in prompt]
    return [torch.log_softmax(model.logits(one), -1) for one in hidden]


def row_of(model: Model, collected: PromptScores, prompt: list[int] = PROMPT) -> Row:
    return Row.of(Request(prompt, ONE), model.config, scores=collected)


def run(engine: Engine) -> list[Event | Failure]:
    events: list[Event | Failure] = []
    while engine.live:
        events += engine.turn()
    return events


@pytest.mark.parametrize("chunk", [1, 4, 2048])
@pytest.mark.parametrize("ops", tiny.OPS)
def test_they_are_those_of_one_token_after_the_other(ops: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.tiny_model(seed=3, name=ops)
    monkeypatch.setattr(scores, "SLICE", 3 * model.config.vocab_size)
    expected = token_by_token(model, PROMPT)
    whole, part = PromptScores(1, 3), PromptScores(6, 1)
    engine = Engine(model, 2, 32, settings=EngineSettings(chunk=chunk))
    engine.join(row_of(model, whole))
    engine.join(row_of(model, part, PROMPT[:9]))  # a shorter one beside it, which pads the pass
    run(engine)
    assert len(whole.logprobs) == len(whole.likeliest) == len(PROMPT) - 1
    for place, (value, top) in enumerate(zip(whole.logprobs, whole.likeliest, strict=True)):
        log_p_V = expected[place]
        assert value == pytest.approx(float(log_p_V[PROMPT[place + 1]]), abs=1e-4)
        assert list(top) == log_p_V.topk(3).indices.tolist()
        assert list(top.values()) == pytest.approx(log_p_V.topk(3).values.tolist(), abs=1e-4)
    assert part.logprobs == pytest.approx(whole.logprobs[5:8], abs=1e-5) and len(part.likeliest[0]) == 1
    assert list(whole.following) == expected[-1].topk(3).indices.tolist()


def test_never_all_logits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.tiny_model(seed=3)
    monkeypatch.setattr(scores, "SLICE", 2 * model.config.vocab_size + 1)
    sizes: list[int] = []
    logits = Model.logits

    def counted(self: Model, hidden: Tensor) -> Tensor:
        sizes.append(hidden.shape[0])
        return logits(self, hidden)

    monkeypatch.setattr(Model, "logits", counted)
    engine = Engine(model, 1, 32)
    engine.join(row_of(model, PromptScores(1, 0)))
    run(engine)
    assert max(sizes) == 2 and sum(sizes) == len(PROMPT) - 1 + 1 + 1  # the following token twice: its scores, its draw


def test_what_is_kept_encoded_loses_no_token() -> None:
    """A row that is scored from its beginning takes nothing of others; one that is scored later takes what it may."""
    full = tiny.tiny_config().layers[1]  # a window that has passed is no place to go back to
    model = tiny.tiny_model(tiny.tiny_config(layers=(full, full)), seed=3)
    prompt = [*range(7, 57), *PROMPT]
    batch = Batch(model, BatchLimits())
    collected = [PromptScores(1, 1), PromptScores(1, 1), PromptScores(51, 1), PromptScores(20, 1)]
    reused = []
    for one in collected:
        batch.submit(row_of(model, one, prompt))
        while not batch.is_idle:
            reused += [event.usage.reused_tokens for event in batch.turn() if isinstance(event, Done)]
    assert reused == [0, 0, 50, 0]  # fewer than 32 are not looked for
    whole = collected[0].logprobs
    for one in collected:
        assert one.logprobs == pytest.approx(whole[one.first - 1 :], abs=1e-5)


@pytest.mark.parametrize("chunk", [2, 2048])
def test_numbers_that_are_none_end_the_row_alone(chunk: int) -> None:
    model = tiny.tiny_model(seed=3)
    engine = Engine(model, 2, 32, settings=EngineSettings(chunk=chunk))
    sound, beside = PromptScores(1, 1), PromptScores(1, 1)
    embedding = model.embed_tokens.weight
    embedding[40] = math.nan  # as a token of the second prompt alone; its logit spoils every place
    logits = Model.logits
    try:
        Model.logits = lambda self, hidden: logits(self, hidden).nan_to_num(0.0)  # type: ignore[method-assign]
        engine.join(row_of(model, sound))
        engine.join(row_of(model, beside, [7, 40, 9, 10, 11]))
        events = run(engine)
    finally:
        Model.logits = logits  # type: ignore[method-assign]
    [failure] = [event for event in events if isinstance(event, Failure)]
    assert failure.row == 1 and isinstance(failure.error, NumericError) and "in the prompt" in str(failure.error)
    assert [event.row for event in events if isinstance(event, Done)] == [0] and len(sound.logprobs) == len(PROMPT) - 1
