"""engine/engine.py: numbers that are not finite: the row that meets them ends with an error, and the rows beside it go
on.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterator
from dataclasses import asdict, replace

import pytest
import tiny
import torch
from adapter_files import random_adapter
from torch import Tensor

from sfumato.engine.engine import Engine, EngineSettings
from sfumato.engine.request import Failure, Request, Row
from sfumato.engine.run import Run
from sfumato.errors import NumericError
from sfumato.events import Done, Draft, Event
from sfumato.model.adapters import Adapter, Adapters
from sfumato.model.config import ModelConfig
from sfumato.model.network import Model
from sfumato.model.prompt import Prompt
from sfumato.ops import load
from sfumato.options import Options

CONFIG = tiny.tiny_config()
QUICK = Options(max_tokens=16, max_steps=4, seed=1, entropy_bound=0.5)
PROMPT = [7, 8, 9, 10]
DTYPES = (torch.float32, torch.bfloat16)
NEEDS_CPU = pytest.mark.skipif("cpu" not in tiny.OPS, reason="the cpu operations cannot run here")

PLACES = (
    "embed_tokens.weight",
    "layers.0.self_attn.v_proj.weight",
    "layers.0.self_attn.q_norm.weight",
    "layers.1.input_layernorm.weight",
    "layers.1.router.proj.weight",
    "layers.1.mlp.down_proj.weight",
    "layers.2.experts.gate_up_proj",
    "layers.2.experts.down_proj",
    "norm.weight",
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with tiny.one_thread():
        yield


def broken(
    name: str | None,
    value: float,
    ops: str = "reference",
    dtype: torch.dtype = torch.float32,
    is_all: bool = False,
    config: ModelConfig = CONFIG,
) -> Model:
    """A tiny model of which the last number of one tensor is this value, or all of it; None: a sound one."""
    model = Model(config, load(ops))
    tensors = [*model.named_parameters(), *model.named_buffers()]
    tiny.randomise_(tensors, 3, 1.5, 1.0)
    if name is not None:
        with torch.no_grad():
            dict(tensors)[name].view(-1)[0 if is_all else -1 :] = value
    return model.to(dtype).requires_grad_(False).eval().pack_()


def events(model: Model, options: Options = QUICK) -> list[Event]:
    return list(Run(model, [PROMPT], options))


def answer(engine: Engine, seat: int) -> list[int]:
    while engine.live:
        for event in engine.turn():
            if isinstance(event, Done) and event.row == seat:
                return event.tokens
    raise AssertionError("no answer")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ops", tiny.OPS)
def test_a_broken_weight_is_an_error_wherever_it_stands(ops: str, dtype: torch.dtype, value: float) -> None:
    for name in PLACES:
        with pytest.raises(NumericError, match=r"not finite in step [12] of canvas 1: .* check the checkpoint, or"):
            events(broken(name, value, ops, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ops", tiny.OPS)
def test_weights_too_large_are_an_error(ops: str, dtype: torch.dtype) -> None:
    """Their products overflow; and where only the squares of the last norm do, it says nothing but zeros."""
    for name in "embed_tokens.weight", "layers.0.self_attn.v_proj.weight", "layers.1.post_feedforward_layernorm.weight":
        with pytest.raises(NumericError):
            events(broken(name, 1e38, ops, dtype, is_all=True))


@pytest.mark.parametrize("ops", tiny.OPS)
def test_nothing_that_is_not_finite_is_said_before_the_error(ops: str) -> None:
    for options in QUICK, replace(QUICK, early=True), replace(QUICK, logprobs=True, top_logprobs=2):
        shown: list[Event] = []
        with pytest.raises(NumericError):
            for event in Run(
                broken("layers.2.experts.down_proj", math.nan, ops), [PROMPT], replace(options, drafts=True)
            ):
                shown.append(event)
        json.dumps([asdict(event) for event in shown], allow_nan=False)
        assert all(isinstance(event, Draft) for event in shown)


@pytest.mark.parametrize("ops", tiny.OPS)
def test_what_is_only_encoded_is_asked_too(ops: str) -> None:
    """The last layer's scalar spoils the hidden states of what is encoded, but no key that a canvas sees."""
    model = broken("layers.3.encode_scalar", math.nan, ops)
    assert isinstance(events(model)[-1], Done)
    with pytest.raises(NumericError, match="in the encoding of canvas 1"):
        events(model, replace(QUICK, logprobs=True))
    with pytest.raises(NumericError, match="before token 1 of the answer"):
        events(model, replace(QUICK, mode="autoregressive"))


@pytest.mark.parametrize(
    "settings",
    [EngineSettings(chunk=4), EngineSettings(chunk=4, lag=1), EngineSettings(chunk=4, record=True, lag=1)],
    ids=["plain", "late", "static and late"],
)
@pytest.mark.parametrize("ops", tiny.OPS)
def test_the_rows_beside_go_on_and_the_seat_is_clean(ops: str, settings: EngineSettings) -> None:
    model = tiny.tiny_model(seed=3, name=ops)
    texts = [[7, 8, 9, 10, 11, 12], [13, 14, 15, 16, 17], [18, 19, 20, 21, 22, 23, 24]]
    alone = [next(e.tokens for e in Run(model, [text], QUICK) if isinstance(e, Done)) for text in texts]
    engine = Engine(model, 3, 64, settings=settings)
    for text in texts:
        engine.join(Request(text, QUICK))
    engine.turn()  # a first chunk of each
    for whole_XRGK in engine.cache.v:
        whole_XRGK[1, 0] = math.nan
    ended: dict[int, list[int]] = {}
    failed: list[Failure] = []
    while engine.live:
        for event in engine.turn():
            if isinstance(event, Failure):
                failed.append(event)
                engine.leave(event.row)
            elif isinstance(event, Done):
                ended[event.row] = event.tokens
    assert [one.row for one in failed] == [1] and isinstance(failed[0].error, NumericError)
    assert ended == {0: alone[0], 2: alone[2]}
    for seat in 0, 2:
        engine.leave(seat)
    # A shorter text beside a longer one: its masked keys are where the others' were.
    for text in (texts[0], texts[1]):
        engine.join(Request(text, QUICK))
    assert answer(engine, 1) == alone[1]


def test_a_grammar_is_not_asked_about_numbers_that_are_none() -> None:
    model = broken("norm.weight", math.nan)
    shown: list[Tensor] = []
    with pytest.raises(NumericError):
        list(Run(model, [Row.of(Request(PROMPT, QUICK), model.config, inspect=shown.append)]))
    assert not shown


def test_it_goes_through_pickle() -> None:
    error = pickle.loads(pickle.dumps(NumericError("not finite")))
    assert isinstance(error, NumericError) and str(error) == "not finite"


# ---- the cpu operations, which compare ------------------------------------------------------------------------------


# ---- every weight ----------------------------------------------------------------------------------------------------

DEEP = replace(tiny.THIN, vocab_size=128, hidden_size=32, intermediate_size=48, expert_size=16, canvas_length=16)
"""The released model's 30 layers, each with 128 experts."""
BOUNDED = (".router.proj.weight", ".router.scale", "q_norm.weight", "k_norm.weight", "norm.weight")
"""Where a large number may stand: a softmax, or the softcap of the logits, is behind it, and its results are finite."""


def kinds_of(config: ModelConfig) -> list[str]:
    """One weight of each kind: of the first layer with a window, of the first without, and of the last one."""
    layers = {0, next(n for n, layer in enumerate(config.layers) if layer.window is None), len(config.layers) - 1}
    model = Model(config, load("reference"))
    names = [name for name, _ in [*model.named_parameters(), *model.named_buffers()]]
    return [name for name in names if not name.startswith("layers.") or int(name.split(".")[1]) in layers]


def outcome(model: Model, name: str, value: float, options: Options, sound: list[int]) -> str:
    """What becomes of a request to a model with this value in all of one weight."""
    try:
        [done] = [event for event in events(model, options) if isinstance(event, Done)]
    except NumericError:
        return "error"
    if done.tokens == sound:
        return "same"
    return "bounded" if math.isfinite(value) and name.endswith(BOUNDED) and done.tokens else f"said {done.tokens}"


@pytest.mark.parametrize("mode", ["diffusion", "autoregressive"])
@pytest.mark.parametrize(
    ("ops", "config"),
    [
        pytest.param("cpu", CONFIG, marks=NEEDS_CPU),
        *(pytest.param(ops, CONFIG, marks=pytest.mark.slow) for ops in ("reference", "fused")),
        *(pytest.param(ops, DEEP, marks=pytest.mark.slow) for ops in tiny.OPS),
    ],
)
def test_every_weight_is_an_error_or_changes_nothing(ops: str, config: ModelConfig, mode: str) -> None:
    """NaN, infinity and numbers whose squares overflow, in each kind of weight: never another text, and none empty."""
    options = replace(QUICK, max_tokens=8, max_steps=2, mode=mode)  # type: ignore[arg-type]
    sound = next(
        event.tokens for event in events(broken(None, 0.0, ops, config=config), options) if isinstance(event, Done)
    )
    outcomes = {
        (name, value): outcome(broken(name, value, ops, is_all=True, config=config), name, value, options, sound)
        for name in kinds_of(config)
        for value in (math.nan, math.inf, 1e38)
    }
    wrong = {place: what for place, what in outcomes.items() if what not in ("error", "same", "bounded")}
    assert not wrong
    # What changes nothing is not read: by an answer without a canvas, or by the last layer of what is only encoded.
    unread = {name for (name, value), what in outcomes.items() if what == "same" and math.isnan(value)}
    if mode == "autoregressive":
        assert unread == {name for name in kinds_of(config) if "self_conditioning" in name or "denoise_scalar" in name}
    else:
        assert unread == {f"layers.{len(config.layers) - 1}.encode_scalar"}


@pytest.mark.parametrize("ops", tiny.OPS)
def test_an_adapter_that_is_not_finite_ends_its_own_rows_and_is_named(ops: str) -> None:
    model = tiny.tiny_model(seed=3, name=ops)
    text, bank = [7, 8, 9, 10, 11, 12], Adapters(model)
    sound, wild = (random_adapter(model, seed=seed) for seed in (1, 2))
    alone = {}
    for name in (None, "sound"):
        if name is not None:
            bank.load(name, sound)
        prompt = Prompt(tuple(text), adapter=None if name is None else bank.get(name))
        alone[name] = next(e.tokens for e in Run(model, [prompt], QUICK) if isinstance(e, Done))
    bank.load("wild", Adapter({name: own._replace(scale=1e38) for name, own in wild.factors.items()}))
    engine = Engine(model, 4, 64)
    for name in (None, "wild", "sound", None):
        engine.join(Request(Prompt(tuple(text), adapter=None if name is None else bank.get(name)), QUICK))
    ended: dict[int, list[int]] = {}
    failed: list[Failure] = []
    while engine.live:
        for event in engine.turn():
            if isinstance(event, Failure):
                failed.append(event)
            elif isinstance(event, Done):
                ended[event.row] = event.tokens
    assert [one.row for one in failed] == [1]
    assert "with adapter 'wild': " in str(failed[0].error) and "check the adapter" in str(failed[0].error)
    assert ended == {0: alone[None], 2: alone["sound"], 3: alone[None]}
