"""engine/request.py: what is refused before any work, what a request is, and the row that it becomes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import tiny
import torch
from tiny_runs import CONFIG, LENGTH, talker, text

from sfumato.engine.request import Request, Row
from sfumato.engine.run import Run, generate
from sfumato.errors import CapacityError, InputError
from sfumato.events import Done, Event
from sfumato.model.cache import KVCache
from sfumato.model.prompt import Prompt
from sfumato.options import Options

SETTLES = Options(max_steps=8, entropy_bound=0.5, confidence=0.5)


def ended(run: Run) -> Done:
    last: Event = list(run)[-1]
    assert isinstance(last, Done)
    return last


def test_a_prompt_must_leave_room_for_a_canvas() -> None:
    ours = talker(max_position=40)
    assert len(ended(Run(ours, [text(40 - LENGTH)], SETTLES)).tokens) == LENGTH
    with pytest.raises(
        CapacityError, match=r"prompt 1 has 33 tokens and a canvas needs 8 more, beyond the context of 40"
    ):
        generate(ours, [text(4), text(41 - LENGTH)], SETTLES)
    assert len(ended(Run(ours, [text(39)], Options(mode="autoregressive"))).tokens) == 1
    with pytest.raises(CapacityError, match="context of 40"):
        generate(ours, [text(40)], Options(mode="autoregressive"))


@pytest.mark.parametrize(
    ("prompts", "more", "sentence"),
    [
        ([], {}, r"0 prompts with 0 sets of options"),
        ([[3], [4]], {"options": [Options()]}, r"2 prompts with 1 sets of options; give one set for each prompt"),
        ([[3], []], {}, r"prompt 1 is empty; give at least one token"),
        ([[3, 61]], {}, r"prompt 0 holds token 61; the vocabulary has ids from 0 to 60"),
        ([[3, -1]], {}, r"prompt 0 holds token -1; the vocabulary has ids from 0 to 60"),
        ([[3]], {"pins": [{10**6: 1}]}, r"pin 1 at position 1000000 of prompt 0 .* positions go to \d+, tokens to 60"),
        ([[3]], {"pins": [{0: 61}]}, r"pin 61 at position 0 of prompt 0 does not fit"),
    ],
)
def test_bad_input_is_named_before_any_work(prompts: Any, more: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        generate(talker(), prompts, **more)


def test_pins_and_cache_must_fit_the_prompts() -> None:
    model = tiny.tiny_model()
    with pytest.raises(InputError, match="1 prompts came with 2 sets of pins"):
        Run(model, [[3, 4]], Options(max_tokens=8), pins=[{}, {}])
    cache = KVCache.allocate(model.config, 3, 64)
    with pytest.raises(InputError, match="a cache of 3 rows"):
        Run(model, [[3, 4]], Options(max_tokens=8), cache=cache)
    with pytest.raises(InputError, match="autoregressive"):
        Run(model, [[3, 4]], Options(max_tokens=8, mode="autoregressive"), pins=[{0: 7}])


@pytest.mark.parametrize(
    "prompt",
    [
        Prompt((3, 4), embeddings=torch.zeros(1, CONFIG.hidden_size), content={1: b"cat"}),
        Prompt((3, 4), blocks=((0, 2),)),
    ],
)
def test_a_prompt_with_more_than_tokens_is_refused(prompt: Prompt) -> None:
    with pytest.raises(InputError, match="the prompt has embeddings or blocks, which this version cannot encode"):
        Request(prompt).checked(CONFIG)


def test_a_request_is_a_value() -> None:
    """Nothing of it changes: rows of it are made and run, and two requests never have one id."""
    request = Request(text(9), dataclasses.replace(SETTLES, seed=1, max_tokens=12))
    before = dataclasses.astuple(dataclasses.replace(request, name="the same"))
    runs = [ended(Run(talker(), [request])) for _ in range(2)]
    assert runs[0].tokens == runs[1].tokens and {done.request for done in runs} == {request.id}
    assert dataclasses.astuple(dataclasses.replace(request, name="the same")) == before
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.prompt = []  # type: ignore[misc]
    assert Request(text(9)).id != Request(text(9)).id
    row = Row.of(request, CONFIG)
    assert row.prompt == Prompt.of(text(9)) and row.request is not request and row.rest == text(9)


def test_token_ids_and_prompts_are_the_same_to_a_run() -> None:
    options = dataclasses.replace(SETTLES, seed=1, max_tokens=12)
    assert ended(Run(talker(), [Prompt.of(text(9))], options)).tokens == ended(Run(talker(), [text(9)], options)).tokens
