"""One step of many canvases as a function of tensors on the device: pass, read-out, accept, renoise, stop.

Nothing here waits for the host, and every shape follows from host integers alone. So the same function runs as it is on
a CPU and is recorded as CUDA graphs on a GPU (`recorded`). A row that has stopped is frozen: a step that was already
under way when the host learns of it changes nothing.

A step has two halves, `look` (pass and read-out) and `conclude_` (accept, renoise, stop). Between them a grammar may
change what was read (`Projection`), which takes as long as it takes: a row whose grammar is still at work is left out
of steps meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sfumato.model.cache import KVCache
from sfumato.model.network import Model
from sfumato.model.passes import Pass
from sfumato.ops.contract import ReadOut
from sfumato.sampling.canvases import Canvases
from sfumato.sampling.distribution import Observed, RowSampler
from sfumato.sampling.noise import CountedNoise, StepNoise
from sfumato.sampling.rules import (
    RowRules,
    RuleView,
    accepts,
    count_repeats,
    count_still,
    is_settled,
    leave_one_out_bonus,
    stops,
)


class PlacedSampler(NamedTuple):
    """A row's sampling options, its place among the rows of a step, and what it committed before this canvas."""

    place: int
    sampler: RowSampler
    answer: Sequence[int]


class StepInput(NamedTuple):
    """What a step takes beside the model, the cache and the state. The caller advances the cache afterwards."""

    at_B: Tensor
    """Rows of the state, as int64."""
    run: Pass
    """The pass over their rows of the cache."""
    tokens_BT: Tensor | None = None
    """Tokens to encode in the same pass; every row is then at its first step."""
    noise: StepNoise | None = None
    """None: counted from the state's own words."""
    is_first: bool = False
    """Every row is at its first step, so there is no soft embedding yet."""
    bans_N: Tensor | None = None
    """Tokens that banned positions may not take."""
    samplers: Sequence[PlacedSampler] = ()
    """Of the rows with sampling options of their own; they move logits in all rows or in none."""


class Projection(NamedTuple):
    """What grammars make of read-outs. Where none rules, a read-out stays what it was."""

    tokens_BL: Tensor
    entropy_BL: Tensor
    is_guided_BL: Tensor
    is_open_BL: Tensor
    """Positions that may be accepted."""
    is_forced_BL: Tensor
    """Positions whose token is certain."""
    is_whole_B: Tensor
    """Rows that would be valid as they stand."""
    has_masked: bool
    """Logits were changed in place."""

    @classmethod
    def joined(cls, projections: Sequence[Projection]) -> Projection:
        """Their rows one behind the other."""
        parts = [torch.cat(list(columns)) for columns in zip(*(one[:6] for one in projections), strict=True)]
        return cls._make([*parts, any(one.has_masked for one in projections)])


class PassResult(NamedTuple):
    """What a pass gives before anything is pinned."""

    encoded_BTD: Tensor | None
    """Hidden states of the tokens that were encoded in the same pass."""
    hidden_BLD: Tensor
    read: ReadOut
    noise_BL: Tensor
    """What takes the place of tokens that are not accepted."""


class Look(NamedTuple):
    """The first half of a step: what one pass over these rows' canvases shows."""

    at_B: Tensor
    read: ReadOut
    """Positions that are pinned are read as their tokens, with no entropy."""
    noise_BL: Tensor
    is_finite_B: Tensor
    encoded_BTD: Tensor | None
    """Hidden states of the tokens that were encoded in the same pass."""

    def of(self, places: list[int]) -> Look:
        """The part of some of its rows; of one row the logits themselves, not a copy."""
        if places == list(range(len(self.at_B))):
            return self
        some: Any = slice(places[0], places[0] + 1) if len(places) == 1 else places
        read = self.read
        part = ReadOut(read.sample_BL[some], read.argmax_BL[some], read.entropy_BL[some], read.logits_BLV[some])
        return Look(self.at_B[some], part, self.noise_BL[some], self.is_finite_B[some], None)


def step_(model: Model, cache: KVCache, state: Canvases, inputs: StepInput) -> Tensor | None:
    """One step of the canvases `at_B`: `look`, then `conclude_`.

    Returns the encoded tokens' hidden states, [B, T, D] (None: no tokens)."""
    conclude = model.ops.conclude_
    if conclude is None or state.has_further_rules:
        look_result = look(model, cache, state, inputs)
        conclude_(model, state, look_result)
        return look_result.encoded_BTD
    result = read_canvases(model, cache, state, inputs)
    embed_VD, scale, read = model.embed_tokens.weight, model.embed_scale, result.read
    if (observed := observed_by(model, state, inputs.at_B)) is not None:
        observed.take_back_(read.logits_BLV)
    soft_BLD = model.ops.soft_embedding(read.logits_BLV, embed_VD, scale, read.tiles)
    conclude(state, inputs.at_B, read, result.noise_BL, result.hidden_BLD, soft_BLD, (embed_VD, scale))
    return result.encoded_BTD


def look(model: Model, cache: KVCache, state: Canvases, inputs: StepInput) -> Look:
    """Pass and read-out of the canvases `at_B`, with pins in place."""
    at_B = inputs.at_B
    encoded_BTD, hidden_BLD, read, noise_BL = read_canvases(model, cache, state, inputs)
    is_finite_B = _are_finite(hidden_BLD, read.entropy_BL)
    if state.has_pins:
        pin_BL = state.pin_XL[at_B]
        is_pinned_BL = pin_BL >= 0
        sample_BL, argmax_BL = (torch.where(is_pinned_BL, pin_BL, x) for x in (read.sample_BL, read.argmax_BL))
        entropy_BL = read.entropy_BL.masked_fill(is_pinned_BL, 0.0)
        read = read._replace(sample_BL=sample_BL, argmax_BL=argmax_BL, entropy_BL=entropy_BL)
    return Look(at_B, read, noise_BL, is_finite_B, encoded_BTD)


def read_canvases(model: Model, cache: KVCache, state: Canvases, inputs: StepInput) -> PassResult:
    """Pass and read-out, before anything is pinned."""
    at_B, run, tokens_BT = inputs.at_B, inputs.run, inputs.tokens_BT
    canvas_BL = state.canvas_XL.index_select(0, at_B)
    # 1. One pass over the canvases; what waits to be encoded goes along.
    encoded_BTD = None
    if tokens_BT is not None:
        encoded_BTD, hidden_BLD = model.encode_and_denoise(tokens_BT, run.counts, canvas_BL, cache, run=run)
    else:  # `index_select` on a CPU takes a quarter of [at_B]'s time
        soft_BLD = None if inputs.is_first else state.soft_XLD.index_select(0, at_B)
        hidden_BLD = model.denoise(canvas_BL, cache, soft_BLD, run=run)
    # 2. Read out: what would be sampled, what is most likely, how sure.
    noise = inputs.noise
    if noise is None:
        noise, temperature_B = _count(state, at_B, model)
    else:
        temperature_B = state.temperature_XS[at_B, state.step_X[at_B]]
    banned = None if inputs.bans_N is None else (state.banned_XL[at_B], inputs.bans_N)
    head_VD = model.head_VD
    read = model.ops.read_out(hidden_BLD, head_VD, model.config.softcap, temperature_B, **noise.sample, banned=banned)
    if (observed := observed_by(model, state, at_B)) is not None:
        read = observed.add_(read, noise.sample)
    if inputs.samplers:
        read = _sampled(state, inputs, read, temperature_B, noise)
    return PassResult(encoded_BTD, hidden_BLD, read, noise.tokens_BL)


def observed_by(model: Model, state: Canvases, at_B: Tensor) -> Observed | None:
    """What the canvases' own tokens say, where the model leaves that out; None where it does not.

    In training a share of the positions keeps its token and the rest is noise. Here the share that is kept is known: a
    step keeps what it has accepted, and pins; the canvas of a first step is noise but for its pins. So on a first step
    nothing is added."""
    if not model.config.is_leave_one_out:
        return None
    step_B, is_pin_BL = state.step_X[at_B], state.pin_XL[at_B] >= 0
    kept_B = torch.where((step_B == 0)[:, None], is_pin_BL, state.accepted_XL[at_B]).float().mean(-1)
    bonus_B = leave_one_out_bonus(kept_B, model.config.vocab_size) / state.temperature_XS[at_B, step_B]
    token_BL1 = state.canvas_XL[at_B][..., None]
    return Observed(token_BL1, bonus_B[:, None, None].expand(token_BL1.shape))


def _sampled(state: Canvases, inputs: StepInput, read: ReadOut, temperature_B: Tensor, noise: StepNoise) -> ReadOut:
    """The read-out as the sampling options of some of its rows have it."""
    changed = {name: getattr(read, name).clone() for name in ("sample_BL", "argmax_BL", "entropy_BL")}
    moves_logits = any(sampler.moves_logits for _, sampler, _ in inputs.samplers)
    read = read._replace(**changed, tiles=None if moves_logits else read.tiles)
    uniform_BL, gumbel_BLV = (noise.sample.get(name) for name in ("uniform_BL", "gumbel_BLV"))
    for place, sampler, answer in inputs.samplers:
        own = tuple(None if x is None else x[place] for x in (uniform_BL, gumbel_BLV))
        canvas_L = state.argmax_XL[inputs.at_B[place]]
        sampler.apply_(read, place, temperature_B[place], (own[0], own[1]), (answer, canvas_L))
    return read


def conclude_(model: Model, state: Canvases, look_result: Look, projection: Projection | None = None) -> None:
    """Accept, renoise, stop and the soft embedding of what a look shows, and what grammars make of it."""
    at_B, read = look_result.at_B, look_result.read
    observed = observed_by(model, state, at_B)
    old_B = state.step_X[at_B]
    pinned = _pin(state, at_B, read, projection)
    argmax_BL, entropy_BL = pinned.argmax_BL, pinned.entropy_BL
    # 3. Accept the surest positions, renoise the rest.
    view, rules = rule_view(state, at_B, argmax_BL, entropy_BL)
    accepted_BL = accepts(view, rules)
    if projection is not None:
        accepted_BL &= projection.is_open_BL
    if pinned.pin_BL is not None:
        accepted_BL |= pinned.pin_BL >= 0
    next_BL = torch.where(accepted_BL, pinned.sample_BL, look_result.noise_BL)
    # 4. Stop where the canvas stands still and is sure, or at the cap.
    is_done_B = _stops(state, at_B, pinned, view, rules) | (old_B + 1 >= rules.max_steps_X)
    # 5. The next step sees the soft embedding of this one.
    embed_VD, logits_BLV = model.embed_tokens.weight, read.logits_BLV
    if observed is not None:
        logits_BLV = observed.take_back_(logits_BLV)
    soft_BLD = model.ops.soft_embedding(logits_BLV, embed_VD, model.embed_scale, pinned.tiles)
    if pinned.pin_BL is not None:
        pinned_BLD = embed_VD[pinned.pin_BL.clamp_min(0)] * model.embed_scale
        soft_BLD = torch.where((pinned.pin_BL >= 0)[..., None], pinned_BLD, soft_BLD)
    # A row whose numbers are not finite stops here too; the host reads the flag.
    is_finite_B = look_result.is_finite_B & _are_finite(soft_BLD)
    # 6. A row that had stopped before stays as it was.
    was_done_B = state.is_done_X[at_B]
    keep_B1 = was_done_B[:, None]
    for whole_XL, new_BL in (
        (state.canvas_XL, next_BL),
        (state.argmax_XL, argmax_BL),
        (state.entropy_XL, entropy_BL),
        (state.accepted_XL, accepted_BL),
    ):
        whole_XL[at_B] = torch.where(keep_B1, whole_XL[at_B], new_BL)
    state.still_XL[at_B] = view.still_BL  # of rows that go on: nobody reads that of a stopped one
    if state.has_further_rules:
        state.recent_XWL[at_B, old_B % state.recent_XWL.shape[1]] = argmax_BL.int()
    state.soft_XLD[at_B] = soft_BLD
    state.step_X[at_B] = torch.where(was_done_B, old_B, old_B + 1)
    state.is_done_X[at_B] = was_done_B | is_done_B | ~is_finite_B
    state.is_finite_X[at_B] &= was_done_B | is_finite_B


def _are_finite(*some: Tensor) -> Tensor:
    """Which rows are finite in all of these: a sum with NaN or infinity in it is one of them too."""
    sums = [x.flatten(1).sum(-1, dtype=torch.float32) for x in some]
    total_B = sum(sums[1:], sums[0])
    return total_B - total_B == 0  # the same as `isfinite`, in two operations


class _Pinned(NamedTuple):
    """A read-out with pins in place, and what a grammar makes of it."""

    sample_BL: Tensor
    argmax_BL: Tensor
    entropy_BL: Tensor
    pin_BL: Tensor | None
    """-1 where free; None where nothing is pinned."""
    projection: Projection | None
    tiles: Any


def _pin(state: Canvases, at_B: Tensor, read: ReadOut, projection: Projection | None) -> _Pinned:
    """A read-out with pins in place; what a grammar forces is pinned too."""
    sample_BL, argmax_BL, entropy_BL = read.sample_BL, read.argmax_BL, read.entropy_BL
    if projection is None:
        return _Pinned(
            sample_BL, argmax_BL, entropy_BL, state.pin_XL[at_B] if state.has_pins else None, None, read.tiles
        )
    pin_BL = state.pin_XL[at_B]
    argmax_BL, entropy_BL = projection.tokens_BL, projection.entropy_BL
    sample_BL = torch.where(projection.is_guided_BL, argmax_BL, sample_BL)
    pin_BL = torch.where(projection.is_forced_BL & (pin_BL < 0), argmax_BL, pin_BL)
    is_pinned_BL = pin_BL >= 0
    sample_BL, argmax_BL = (torch.where(is_pinned_BL, pin_BL, x) for x in (sample_BL, argmax_BL))
    entropy_BL = entropy_BL.masked_fill(is_pinned_BL, 0.0)
    tiles = None if projection.has_masked else read.tiles
    return _Pinned(sample_BL, argmax_BL, entropy_BL, pin_BL, projection, tiles)


def rule_view(state: Canvases, at_B: Tensor, argmax_BL: Tensor, entropy_BL: Tensor) -> tuple[RuleView, RowRules]:
    """What the rules of a step look at, and the rules of these rows."""
    still_BL = count_still(argmax_BL, state.argmax_XL[at_B], state.still_XL[at_B])
    repeats_BL = None
    if state.has_further_rules:
        repeats_BL = count_repeats(argmax_BL, state.recent_XWL[at_B], state.step_X[at_B])
    return RuleView(argmax_BL, entropy_BL, still_BL, repeats_BL), state.rules.at(at_B)


def _stops(state: Canvases, at_B: Tensor, pinned: _Pinned, view: RuleView, rules: RowRules) -> Tensor:
    """Which rows stop before the cap, and are, where a grammar rules, valid as they stand."""
    projection = pinned.projection
    if state.has_early:
        view = view._replace(counts_BL=_counting(state, at_B, view.argmax_BL))
        # What a grammar has not reached is not sure, whatever the model says.
        if projection is not None:
            view = view._replace(entropy_BL=view.entropy_BL.masked_fill(~projection.is_open_BL, torch.inf))
        is_settled_B = _settle_(state, at_B, view, rules)
    else:
        is_settled_B = is_settled(view, rules)
    stops_B = stops(is_settled_B, view, rules)
    return stops_B if projection is None else stops_B & projection.is_whole_B


def _counting(state: Canvases, at_B: Tensor, argmax_BL: Tensor) -> Tensor:
    """Positions that count for stopping, [B, L]: of a row that may settle early, what can become its answer."""
    position_L = torch.arange(argmax_BL.shape[1], device=argmax_BL.device)
    is_end_BL = torch.isin(argmax_BL, state.eos_E)
    counts_BL = (is_end_BL.cumsum(-1) - is_end_BL.long() == 0) & (position_L < state.room_X[at_B, None])
    return counts_BL | ~state.early_X[at_B, None]


def _settle_(state: Canvases, at_B: Tensor, view: RuleView, rules: RowRules) -> Tensor:
    """Which rows stand still and are sure.

    Of a row that may settle early only what can become its answer counts: all up to its first end, and no more than its
    room; and its leading positions that stand still, each of them sure, are pinned from now on."""
    argmax_BL, entropy_BL, still_BL, _, counts_BL = view
    assert counts_BL is not None
    early_B, stability_B, bound_B = state.early_X[at_B], rules.stability_X, rules.confidence_X
    mean_B = entropy_BL.masked_fill(~counts_BL, 0.0).sum(-1) / counts_BL.sum(-1)
    is_still_BL = still_BL >= stability_B[:, None]
    is_settled_B = (is_still_BL | ~counts_BL).all(-1) & (mean_B < bound_B)
    # The leading positions, one by one.
    is_sure_BL = is_still_BL & (entropy_BL < bound_B[:, None])
    settled_B = (is_sure_BL & counts_BL & early_B[:, None]).long().cumprod(-1).sum(-1)
    state.settled_X[at_B] = settled_B
    position_L = torch.arange(argmax_BL.shape[1], device=argmax_BL.device)
    state.pin_XL[at_B] = torch.where(position_L < settled_B[:, None], argmax_BL, state.pin_XL[at_B])
    return is_settled_B


def _count(state: Canvases, at_B: Tensor, model: Model) -> tuple[StepNoise, Tensor]:
    """The noise of this step, from the state's words, and its temperature.

    The noise is what `CountedNoise` gives for the same seed, canvas and step."""
    length, vocab_size = state.canvas_XL.shape[1], model.config.vocab_size
    if model.ops.noise is not None:
        places = state.rng_counter_X4, state.step_X, state.temperature_XS, at_B
        uniform_BL, tokens_BL, temperature_B = model.ops.noise(*places, length, vocab_size)
        return StepNoise({"uniform_BL": uniform_BL}, tokens_BL), temperature_B
    step_B = state.step_X[at_B]
    counter_B5 = torch.cat([state.rng_counter_X4[at_B], step_B[:, None]], dim=1)
    return CountedNoise.step(counter_B5, length, vocab_size), state.temperature_XS[at_B, step_B]
