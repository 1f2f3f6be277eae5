"""model/network.py and the engine: the same numbers and decisions as transformers 5.23, on random checkpoints.

Three levels. Logits: encode and denoise, in one pass and in chunks, alone and in ragged batches. Decisions: whole
`generate` runs of the oracle are recorded step by step, and our rules, fed its canvas, soft embedding and noise, decide
the same. Text: the whole engine, given the oracle's noise, writes the same tokens in the same number of steps.

A decision may differ only where the oracle's own margin is under NARROW: float32 sums in another order land on the
other side. Such exceptions are counted and must stay rare.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import tiny
import torch
from torch import Tensor

from sfumato.engine.engine import EngineSettings
from sfumato.engine.run import generate
from sfumato.events import Commit, Done, Draft
from sfumato.model.cache import KVCache
from sfumato.model.config import ModelConfig
from sfumato.model.network import Model
from sfumato.model.passes import frequencies
from sfumato.options import Options
from sfumato.sampling.noise import NoiseSource
from sfumato.sampling.rules import Rules, accept, count_still, is_confident, is_stable

SEEDS = range(8)
OPS = tiny.OPS
CLOSE = 2e-4
NARROW = 1e-4
ROUTED = 1e-5
"""Two experts whose log-probabilities are closer than this may change places, and with them the whole output."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with tiny.one_thread():
        yield


def tokens(config: ModelConfig, rows: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(0, config.vocab_size, (rows, length), generator=generator)


def furthest(one: Tensor, two: Tensor) -> float:
    assert one.shape == two.shape
    assert bool(one.isfinite().all())
    return float((one - two).abs().max())


# ---- the checkpoints ----------------------------------------------------------------------------------------------


def test_the_checkpoints_cover_the_configurations() -> None:
    configs = [tiny.random_config(seed) for seed in SEEDS]
    assert {config.num_experts for config in configs} == set(tiny.EXPERTS)
    assert {config.top_k_experts for config in configs} == {1, 2, 3, 4}
    assert {config.canvas_length for config in configs} == set(tiny.CANVAS)
    assert len({config.num_heads for config in configs}) >= 2
    for is_sliding in (True, False):
        layers = [layer for config in configs for layer in config.layers if layer.is_sliding is is_sliding]
        kinds = {(layer.head_dim, layer.kv_heads) for layer in layers}
        assert len({head for head, _ in kinds}) >= 2
        assert len({kv for _, kv in kinds}) >= 2
    ropes = {layer.rope for config in configs for layer in config.layers}
    assert len({rope.partial for rope in ropes}) >= 3
    assert len({rope.theta for rope in ropes}) >= 4
    assert {rope.factor for rope in ropes} == {1.0, 2.0}
    assert any(layer.is_sliding and layer.rope.proportional for config in configs for layer in config.layers)
    assert any(config.layers[0].head_dim != config.layers[-1].head_dim for config in configs)
    assert all(sum(not layer.is_sliding for layer in config.layers) >= 2 for config in configs)
    assert all(config.layers[0].is_sliding and 4 <= config.window <= 12 for config in configs)
    assert len({config.softcap for config in configs}) == 2


@functools.cache
def oracle(seed: int, sharp: float = 1.5, mix: float = 1.0) -> Any:
    return tiny.oracle(tiny.random_config(seed), seed, sharp, mix)


@pytest.mark.parametrize("seed", SEEDS)
def test_both_spellings_of_the_config_read_alike(seed: int) -> None:
    config = tiny.random_config(seed)
    raw = oracle(seed).config.to_dict()
    assert "per_layer_config" in raw["text_config"]
    assert "global_head_dim" not in raw["text_config"]
    assert ModelConfig.from_dict(raw) == config
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("factor", [None, 4.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_angles_of_both_kinds_of_layer(seed: int, factor: float | None) -> None:
    """Every rope of the draws; and a `factor` in config.json, which "default" rope ignores and "proportional" heeds."""
    from transformers import DiffusionGemmaConfig
    from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaTextRotaryEmbedding

    raw = tiny.random_config(seed).to_dict()
    for rope in raw["text_config"]["rope_parameters"].values():
        rope |= {} if factor is None else {"factor": factor}
    text_config: Any = DiffusionGemmaConfig(**copy.deepcopy(raw)).text_config
    theirs = DiffusionGemmaTextRotaryEmbedding(text_config)
    for layer in ModelConfig.from_dict(raw).layers:
        expected = theirs.sliding_attention_inv_freq if layer.is_sliding else theirs.full_attention_inv_freq
        got = frequencies(layer.rope, layer.head_dim, torch.device("cpu"))
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_the_oracle_is_randomised_everywhere() -> None:
    theirs = oracle(0)
    for name, tensor in [*theirs.named_parameters(), *theirs.named_buffers()]:
        if "vision" in name or "inv_freq" in name or "embed_scale" in name:
            continue
        assert not bool((tensor == 1).any()), name
        assert tensor.numel() == 1 or tensor.unique().numel() > 1, name
    for one, two in zip(theirs.model.encoder.language_model.layers, theirs.model.decoder.layers, strict=True):
        assert not torch.equal(one.layer_scalar, two.layer_scalar)
        assert one.router.scale is two.router.scale  # tied, as in the release


# ---- logits -------------------------------------------------------------------------------------------------------


class Routing:
    """While on, the smallest gap between a chosen and a rejected expert's log-probability, for each row."""

    def __init__(self, theirs: Any, rows: int) -> None:
        self.rows, self.theirs = rows, theirs
        self.gap_B = torch.full((rows,), torch.inf)

    def __enter__(self) -> Routing:
        routers = [module for name, module in self.theirs.named_modules() if name.endswith(".router")]
        assert routers
        self.hooks = [router.register_forward_hook(self._see) for router in routers]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _see(self, router: Any, _: Any, output: tuple[Tensor, ...]) -> None:
        p_NE, top_k = output[0], router.config.top_k_experts
        if top_k < p_NE.shape[-1]:
            ordered = p_NE.log().topk(top_k + 1, dim=-1).values
            gap_N = ordered[:, -2] - ordered[:, -1]
            self.gap_B = torch.minimum(self.gap_B, gap_N.view(self.rows, -1).amin(-1))


@dataclass
class Passes:
    """What the oracle gives for a prompt, a canvas, and a second canvas behind the first, committed one."""

    encoded_BTD: Tensor
    encoded: Tensor
    first: Tensor
    conditioned: Tensor
    encoded_canvas_BLD: Tensor
    second: Tensor
    second_conditioned: Tensor


def oracle_logits(theirs: Any, hidden: Tensor) -> Tensor:
    cap = theirs.final_logit_softcapping
    logits: Tensor = theirs.lm_head(hidden)
    capped: Tensor = torch.tanh(logits / cap) * cap
    return capped


@torch.no_grad()
def oracle_passes(theirs: Any, prompt_BT: Tensor, canvas_BL: Tensor, second_BL: Tensor) -> Passes:
    from transformers import DynamicCache

    cache = DynamicCache(config=theirs.config.text_config)
    with Routing(theirs, len(prompt_BT)) as routing:
        out = theirs(input_ids=prompt_BT, past_key_values=cache, decoder_input_ids=canvas_BL)
        again = theirs(past_key_values=cache, decoder_input_ids=canvas_BL, self_conditioning_logits=out.logits)
        next_ = theirs(input_ids=canvas_BL, past_key_values=cache, decoder_input_ids=second_BL)
        last = theirs(past_key_values=cache, decoder_input_ids=second_BL, self_conditioning_logits=next_.logits)
    assert float(routing.gap_B.min()) > ROUTED / 10, "two experts tie on this checkpoint: choose another seed"
    hidden = out.encoder_last_hidden_state
    logits = oracle_logits(theirs, hidden)
    return Passes(hidden, logits, out.logits, again.logits, next_.encoder_last_hidden_state, next_.logits, last.logits)


def soft(ours: Model, logits_BLV: Tensor) -> Tensor:
    return ours.ops.soft_embedding(logits_BLV, ours.embed_tokens.weight, ours.embed_scale)


def check_passes(
    ours: Model, expected: Passes, prompt: Tensor, canvas: Tensor, second: Tensor, chunks: Sequence[int]
) -> None:
    """Our passes, the prompt encoded in these chunks, against the oracle's."""
    rows, length = prompt.shape
    assert sum(chunks) == length
    cache = KVCache.allocate(ours.config, rows, length + canvas.shape[1])
    hidden = torch.cat([ours.encode(part, cache) for part in torch.split(prompt, list(chunks), dim=1)], dim=1)
    assert furthest(hidden, expected.encoded_BTD) < CLOSE
    assert furthest(ours.logits(hidden), expected.encoded) < CLOSE
    assert furthest(ours.logits(ours.denoise(canvas, cache)), expected.first) < CLOSE
    conditioned = ours.denoise(canvas, cache, soft(ours, expected.first))
    assert furthest(ours.logits(conditioned), expected.conditioned) < CLOSE
    assert furthest(ours.encode(canvas, cache), expected.encoded_canvas_BLD) < CLOSE
    assert furthest(ours.logits(ours.denoise(second, cache)), expected.second) < CLOSE
    conditioned = ours.denoise(second, cache, soft(ours, expected.second))
    assert furthest(ours.logits(conditioned), expected.second_conditioned) < CLOSE


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("seed", [*{*SEEDS} - {3}, 8])  # 3 is at the limit: 2.07e-4 on an AMD processor
def test_logits(seed: int, name: str) -> None:
    """Prompts longer than the window, in one pass, a token at a time, and in chunks below and above the window."""
    theirs = oracle(seed)
    ours = tiny.twin(theirs, name)
    config = ours.config
    length = 3 * config.window + seed
    prompt, canvas, second = (
        tokens(config, 3, n, 10 * seed + i) for i, n in enumerate([length, config.canvas_length, config.canvas_length])
    )
    expected = oracle_passes(theirs, prompt, canvas, second)
    # The comparison has teeth only where these differ by far more than the tolerance.
    assert furthest(expected.first, expected.conditioned) > 0.1
    assert furthest(expected.first, expected.second) > 0.1
    assert float(expected.first.std()) > 0.5
    for chunks in (
        [length],
        [1] * length,
        [config.window - 1, config.window + 1, length - 2 * config.window],
        [2 * config.window + 3, length - 2 * config.window - 3],
    ):
        check_passes(ours, expected, prompt, canvas, second, [n for n in chunks if n])


@pytest.mark.parametrize("seed", SEEDS)
def test_logits_of_a_prompt_shorter_than_the_window(seed: int) -> None:
    theirs = oracle(seed)
    ours = tiny.twin(theirs)
    length, size = ours.config.window - 2, ours.config.canvas_length
    prompt, canvas, second = (tokens(ours.config, 2, n, 500 + 10 * seed + n) for n in (length, size, size))
    expected = oracle_passes(theirs, prompt, canvas, second)
    check_passes(ours, expected, prompt, canvas, second, [length])
    check_passes(ours, expected, prompt, canvas, second, [1, length - 1])


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("seed", SEEDS)
def test_logits_of_a_ragged_batch(seed: int, name: str) -> None:
    """Rows of different lengths in one batch: each equals the row alone, and the oracle on the row alone."""
    theirs = oracle(seed)
    ours = tiny.twin(theirs, name)
    config, window = ours.config, ours.config.window
    lengths = [2 * window + 3, 2, window, 3 * window]
    rows = list(range(len(lengths)))
    prompts = [tokens(config, 1, length, 100 * seed + length) for length in lengths]
    canvas = tokens(config, len(rows), config.canvas_length, seed)
    second = tokens(config, len(rows), config.canvas_length, seed + 1)
    one = [slice(row, row + 1) for row in rows]
    expected = [oracle_passes(theirs, prompts[row], canvas[one[row]], second[one[row]]) for row in rows]

    padded = torch.full((len(rows), max(lengths)), 7)
    for row, prompt in enumerate(prompts):
        padded[row, : lengths[row]] = prompt[0]
    cache = KVCache.allocate(config, len(rows), max(lengths) + config.canvas_length)
    hidden = ours.encode(padded, cache, rows, lengths)
    first = ours.logits(ours.denoise(canvas, cache))
    conditioned = ours.logits(ours.denoise(canvas, cache, soft(ours, torch.cat([w.first for w in expected]))))
    ours.encode(canvas, cache)
    after = ours.logits(ours.denoise(second, cache))
    for row, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        assert furthest(hidden[one[row], :length], expected[row].encoded_BTD) < CLOSE
        assert furthest(first[one[row]], expected[row].first) < CLOSE
        assert furthest(conditioned[one[row]], expected[row].conditioned) < CLOSE
        assert furthest(after[one[row]], expected[row].second) < CLOSE
        alone = KVCache.allocate(config, 1, length)
        assert furthest(ours.encode(prompt, alone), hidden[one[row], :length]) < CLOSE
        assert furthest(ours.logits(ours.denoise(canvas[one[row]], alone)), first[one[row]]) < CLOSE


# ---- the oracle's generate, written down --------------------------------------------------------------------------


@dataclass
class Step:
    """One denoising step of the oracle, all rows. A row that was done before is frozen and carries stale values."""

    canvas_BL: Tensor
    soft_BLV: Tensor | None
    was_done_B: Tensor
    gumbel_BLV: Tensor
    sample_BL: Tensor
    accepted_BL: Tensor
    noise_BL: Tensor
    next_BL: Tensor
    argmax_BL: Tensor
    logits_BLV: Tensor
    is_done_B: Tensor
    routing_B: Tensor

    def entropy_BL(self) -> Tensor:
        distribution: Any = torch.distributions.Categorical(logits=self.logits_BLV)
        entropy_BL: Tensor = distribution.entropy()
        return entropy_BL


@dataclass
class Record:
    """A whole run: the prompt, the steps of each canvas, and the text with the prompt in front."""

    prompt_BT: Tensor
    options: Options
    eos: int | None
    canvases: list[list[Step]]
    text_BT: Tensor
    encode_routing: list[Tensor]
    """For each canvas, the smallest expert gap of all encode passes before it."""

    @property
    def rows(self) -> int:
        return self.prompt_BT.shape[0]

    def new(self, row: int) -> list[int]:
        """The new tokens of a row up to and with its end; the padding behind it is left off."""
        new = self.text_BT[row, self.prompt_BT.shape[1] :].tolist()
        return new[: new.index(self.eos) + 1] if self.eos in new else new

    def steps(self, row: int) -> list[int]:
        """The steps that each canvas of a row took until the row's end."""
        length = self.canvases[0][0].canvas_BL.shape[1]
        count = -(-len(self.new(row)) // length)
        return [sum(int(not step.was_done_B[row]) for step in steps) for steps in self.canvases[:count]]


class Recorder:
    """Writes down every step of the oracle's generate, its noise included."""

    def __init__(self, theirs: Any, rows: int, max_steps: int, routing: Routing) -> None:
        self.theirs, self.rows, self.max_steps, self.routing = theirs, rows, max_steps, routing
        self.length = theirs.config.canvas_length
        self.steps: list[list[Step]] = []
        self.encode_routing: list[Tensor] = []
        self.now: dict[str, Any] = {}
        self.draw, self.denoise = torch.multinomial, theirs._denoising_step

    def sampler(self, config: Any) -> Any:
        """The oracle's, which notes its noise and what it accepts."""
        from transformers.models.diffusion_gemma import generation_diffusion_gemma as rules

        now = self.now

        class Sampler(rules.EntropyBoundSampler):
            def initialize_canvas(self, *args: Any, **kwargs: Any) -> Any:
                now["noise_BL"] = super().initialize_canvas(*args, **kwargs)
                return now["noise_BL"].clone()

            def accept_canvas(self, *args: Any, **kwargs: Any) -> Any:
                canvas = super().accept_canvas(*args, **kwargs)
                assert self.accepted_token_mask is not None
                now["accepted_BL"] = self.accepted_token_mask.clone()
                return canvas

        vocabulary = self.theirs.config.text_config.vocab_size
        return Sampler(config.sampler_config, self.length, vocabulary, config.max_denoising_steps)

    def multinomial(self, p_NV: Tensor, num_samples: int) -> Tensor:
        """torch's, which notes the exponential numbers that it draws."""
        before = torch.get_rng_state()
        sample_N1 = self.draw(p_NV, num_samples=num_samples)
        after = torch.get_rng_state()
        torch.set_rng_state(before)
        race_NV = torch.empty_like(p_NV).exponential_()
        assert torch.equal(torch.get_rng_state(), after), "multinomial no longer draws one exponential a token"
        assert torch.equal((p_NV / race_NV).argmax(-1, keepdim=True), sample_N1)
        self.now["gumbel_BLV"] = -race_NV.log().view(self.rows, self.length, -1)
        self.now["sample_BL"] = sample_N1.view(self.rows, self.length).clone()
        return sample_N1

    def step(self, **arguments: Any) -> tuple[Tensor, ...]:
        """The oracle's, whose arguments and results are kept."""
        routing = self.routing
        if arguments["cur_step"] == self.max_steps:
            self.steps.append([])
            earlier = self.encode_routing
            self.encode_routing.append(torch.minimum(earlier[-1], routing.gap_B) if earlier else routing.gap_B)
        conditioned = arguments["self_conditioning_logits"]
        kept = {
            "canvas_BL": arguments["current_canvas"].clone(),
            "soft_BLV": None if conditioned is None else conditioned.clone(),
            "was_done_B": arguments["finished_denoising"].clone(),  # updated in place
        }
        self.now.clear()
        routing.gap_B = torch.full((self.rows,), torch.inf)
        results: tuple[Tensor, ...] = self.denoise(**arguments)
        kept |= dict(zip(("next_BL", "argmax_BL", "logits_BLV", "is_done_B"), results, strict=True))
        kept |= {"routing_B": routing.gap_B, **self.now}
        self.steps[-1].append(Step(**{k: v.clone() if isinstance(v, Tensor) else v for k, v in kept.items()}))
        routing.gap_B = torch.full((self.rows,), torch.inf)
        return results


@torch.no_grad()
def record(
    theirs: Any, prompt_BT: Tensor, options: Options, canvases: int, seed: int, eos: int | None = None
) -> Record:
    """Run the oracle's generate with its dynamic cache and write every step down, its noise included.

    confidence 0 takes the adaptive stop out altogether, as the oracle itself does when its thresholds are None."""
    from transformers.models.diffusion_gemma import generation_diffusion_gemma as rules

    rows, length = len(prompt_BT), theirs.config.canvas_length
    with ExitStack() as stack:
        assert options.max_steps is not None and options.entropy_bound is not None
        recorder = Recorder(theirs, rows, options.max_steps, stack.enter_context(Routing(theirs, rows)))

        def patch(*place: Any) -> None:
            stack.enter_context(mock.patch.object(*place))

        patch(torch, "multinomial", recorder.multinomial)
        patch(torch.compiler, "cudagraph_mark_step_begin", lambda: None)  # imports torch's compiler, for nothing here
        patch(theirs, "_denoising_step", recorder.step)
        patch(theirs, "_prepare_sampler", recorder.sampler)
        if not options.confidence:
            patch(theirs, "_prepare_diffusion_stopping_criteria", lambda config: None)
        torch.manual_seed(seed)
        out = theirs.generate(
            prompt_BT,
            max_new_tokens=canvases * length,
            max_denoising_steps=options.max_steps,
            t_min=options.t_min,
            t_max=options.t_max,
            sampler_config=rules.EntropyBoundSamplerConfig(entropy_bound=options.entropy_bound),
            stability_threshold=options.stability,
            confidence_threshold=options.confidence or 1.0,
            pad_token_id=0,
            eos_token_id=[-1] if eos is None else eos,
        )
    return Record(prompt_BT, options, eos, recorder.steps, out.sequences, recorder.encode_routing)


def with_an_end(theirs: Any, prompt_BT: Tensor, options: Options, canvases: int, seed: int) -> Record:
    """A recorded run whose eos is a token with which one row ends inside its second or third canvas, no other ever."""
    length = theirs.config.canvas_length
    free = record(theirs, prompt_BT, options, canvases, seed)
    texts = [free.new(row) for row in range(free.rows)]
    for row, text in enumerate(texts):
        others = {token for other, tokens in enumerate(texts) if other != row for token in tokens}
        for at in range(length, 3 * length):
            token = text[at]
            if token and at % length != length - 1 and token not in text[:at] and token not in others:
                run = record(theirs, prompt_BT, options, canvases, seed, token)
                ends = [run.new(each)[-1] == token for each in range(run.rows)]
                if sum(ends) == 1:  # the end changed the noise of what follows, and another row may have met it too
                    return run
    raise AssertionError("no token of this run can serve as its eos: choose another seed")


MIX = {0: 0.15, 1: 0.5, 3: 0.07, 4: 0.07}
"""How strongly the blocks mix, where 0.2 gives canvases that settle at once or never."""


@functools.cache
def adaptive_run(seed: int) -> tuple[Record, Any]:
    """Two or three rows, five canvases, the adaptive stop on; rows stop apart, and one ends inside a canvas."""
    config, theirs = tiny.random_config(seed), oracle(seed, sharp=3.0, mix=MIX.get(seed, 0.2))
    stability = (1, 2, 1, 0)[seed % 4]
    options = Options(
        max_steps=10,
        t_min=0.4,
        t_max=0.8,
        entropy_bound=0.06 * config.canvas_length,
        stability=stability,
        confidence=0.5 if stability else 0.2,
    )
    prompt = tokens(config, 2 + seed % 2, config.window + 5, 300 + seed)
    return with_an_end(theirs, prompt, options, 5, seed), theirs


@functools.cache
def capped_run(seed: int) -> tuple[Record, Any]:
    """Two rows, four canvases of as many steps as the cap says; blocks mix at full strength."""
    config, theirs = tiny.random_config(seed), oracle(seed)
    options = Options(max_steps=5, t_min=0.3 + 0.1 * seed, t_max=1.2, entropy_bound=3.0, stability=1, confidence=0.0)
    prompt = tokens(config, 2, 2 * config.window + 3, 400 + seed)
    return with_an_end(theirs, prompt, options, 4, seed), theirs


RUNS = {"adaptive": adaptive_run, "capped": capped_run}


# ---- decisions ----------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Decisions compared; `narrow` of them the oracle took by a hair, `excused` of those came out otherwise here."""

    decisions: int = 0
    narrow: int = 0
    excused: int = 0
    wrong: list[str] = field(default_factory=list)
    furthest: float = 0.0

    def count(self, what: str, is_same: Tensor, margin: Tensor, is_live_B: Tensor, is_flipped_B: Tensor) -> None:
        """One kind of decision for all rows; those that are not live are none, and where two experts changed places
        every one is narrow."""
        for row in is_live_B.nonzero()[:, 0].tolist():
            is_narrow = margin[row] < NARROW
            if is_flipped_B[row]:
                is_narrow = torch.ones_like(is_narrow)
            self.decisions += is_same[row].numel()
            self.narrow += int(is_narrow.sum())
            self.excused += int((~is_same[row] & is_narrow).sum())
            if bool((~is_same[row] & ~is_narrow).any()):
                self.wrong.append(f"{what}, row {row}: margin {float(margin[row][~is_same[row]].max()):.2g}")


def top_margin(scores: Tensor) -> Tensor:
    """How far the largest is above the second largest."""
    best = scores.topk(2, dim=-1).values
    return best[..., 0] - best[..., 1]


def accept_margin(entropy_BL: Tensor, accepted_BL: Tensor, bound: float) -> Tensor:
    """How far each position is from the other verdict: its sum from the bound, its entropy from the other side's."""
    ordered_BL, order_BL = entropy_BL.sort(dim=-1)
    before_BL = torch.zeros_like(entropy_BL).scatter(-1, order_BL, ordered_BL.cumsum(-1) - ordered_BL)
    first_rejected_B1 = entropy_BL.masked_fill(accepted_BL, torch.inf).amin(-1, keepdim=True)
    last_accepted_B1 = entropy_BL.masked_fill(~accepted_BL, -torch.inf).amax(-1, keepdim=True)
    other_BL = torch.where(accepted_BL, first_rejected_B1 - entropy_BL, entropy_BL - last_accepted_B1)
    return torch.minimum((before_BL - bound).abs(), other_BL)


def margins(step: Step, options: Options) -> dict[str, Tensor]:
    """The oracle's own margin of every decision of a step, [B, L], and of the confidence, [B]."""
    entropy_BL = step.entropy_BL()
    assert options.entropy_bound is not None and options.confidence is not None
    return {
        "sample": top_margin(step.logits_BLV + step.gumbel_BLV),
        "argmax": top_margin(step.logits_BLV),
        "accept": accept_margin(entropy_BL, step.accepted_BL, options.entropy_bound),
        "stop": (entropy_BL.mean(-1) - options.confidence).abs(),
    }


@torch.no_grad()
def compare(run: Record, ours: Model) -> Tally:
    """Walk the oracle's run with our pieces, on its canvases, soft embeddings and noise."""
    tally = Tally()
    rules, rows, config = Rules.of(run.options), run.rows, ours.config
    start, length = run.prompt_BT.shape[1], config.canvas_length
    cache = KVCache.allocate(config, rows, run.text_BT.shape[1])
    ours.encode(run.prompt_BT, cache)
    is_open_B = torch.ones(rows, dtype=torch.bool)  # no eos yet
    bound_B, confidence_B = torch.full((rows,), rules.entropy_bound), torch.full((rows,), rules.confidence)
    stability_B = torch.full((rows,), rules.stability)
    for index, steps in enumerate(run.canvases):
        last_BL, still_BL = torch.full((rows, length), -1), torch.zeros(rows, length)
        committed_BL = torch.full((rows, length), -1)
        committed_margin_BL = torch.zeros(rows, length)
        has_flipped_B = torch.zeros(rows, dtype=torch.bool)
        for number, step in enumerate(steps):
            is_live_B = ~step.was_done_B
            where = f"canvas {index}, step {number}"
            temperature = rules.schedule.temperature(number)
            soft_BLD = None if step.soft_BLV is None else soft(ours, step.soft_BLV)
            read = ours.ops.read_out(
                ours.denoise(step.canvas_BL, cache, soft_BLD),
                ours.embed_tokens.weight,
                config.softcap,
                torch.full((rows,), temperature),
                gumbel_BLV=step.gumbel_BLV,
            )
            away_B = (read.logits_BLV - step.logits_BLV).abs().amax((1, 2)) * temperature
            is_routed_B = torch.minimum(step.routing_B, run.encode_routing[index]) < ROUTED
            is_flipped_B = is_routed_B & (away_B > CLOSE)
            tally.furthest = max(tally.furthest, *away_B[is_live_B & ~is_flipped_B].tolist())
            count = functools.partial(tally.count, is_live_B=is_live_B, is_flipped_B=is_flipped_B)
            margin = margins(step, run.options)
            accepted_BL = accept(read.entropy_BL, bound_B)
            next_BL = torch.where(accepted_BL, read.sample_BL, step.noise_BL)
            count(f"{where}, sample", read.sample_BL == step.sample_BL, margin["sample"])
            count(f"{where}, accepted", accepted_BL == step.accepted_BL, margin["accept"])
            count(f"{where}, argmax", read.argmax_BL == step.argmax_BL, margin["argmax"])
            either_BL = torch.minimum(margin["sample"], margin["accept"])
            count(f"{where}, renoised", next_BL == step.next_BL, either_BL)
            is_done_B = is_stable(count_still(read.argmax_BL, last_BL, still_BL), stability_B)
            is_done_B &= is_confident(read.entropy_BL, confidence_B)
            narrowest_B = torch.minimum(margin["stop"], margin["argmax"].amin(-1))
            count(f"{where}, stop", is_done_B == step.is_done_B, narrowest_B)
            # Each step begins from the oracle's own state.
            still_BL, last_BL = count_still(step.argmax_BL, last_BL, still_BL), step.argmax_BL
            committed_BL[is_live_B] = read.argmax_BL[is_live_B]
            committed_margin_BL[is_live_B] = margin["argmax"][is_live_B]
            has_flipped_B |= is_live_B & is_flipped_B
        canvas_BL = run.text_BT[:, start + index * length :][:, :length]
        is_eos_BL = canvas_BL == (-1 if run.eos is None else run.eos)
        is_text_BL = is_eos_BL.cumsum(-1) - is_eos_BL.long() == 0
        is_same_BL = (committed_BL == canvas_BL) | ~is_text_BL
        tally.count(f"canvas {index}, committed", is_same_BL, committed_margin_BL, is_open_B, has_flipped_B)
        assert bool((canvas_BL == 0)[is_open_B[:, None] & ~is_text_BL].all())
        is_open_B &= ~is_eos_BL.any(-1)
        ours.encode(canvas_BL, cache)
    return tally


@functools.cache
def compared(kind: str, seed: int, name: str) -> Tally:
    run, theirs = RUNS[kind](seed)
    return compare(run, tiny.twin(theirs, name))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", RUNS)
def test_the_recorded_runs_show_what_they_should(kind: str, seed: int) -> None:
    run, _ = RUNS[kind](seed)
    length = run.canvases[0][0].canvas_BL.shape[1]
    assert run.rows in (2, 3)
    assert len(run.canvases) >= 4
    texts = [run.new(row) for row in range(run.rows)]
    ended = [row for row, text in enumerate(texts) if text[-1] == run.eos]
    assert len(ended) == 1
    assert len(texts[ended[0]]) % length, "eos is inside a canvas"
    assert all(len(text) == len(run.canvases) * length for row, text in enumerate(texts) if row not in ended)
    accepted = torch.cat([step.accepted_BL.flatten() for steps in run.canvases for step in steps])
    assert 0.05 < float(accepted.float().mean()) < 0.95
    assert run.prompt_BT.shape[1] > tiny.random_config(seed).window
    counts = [len(steps) for steps in run.canvases]
    if kind == "capped":
        assert counts == [run.options.max_steps] * len(counts)
    else:
        per_row = [[sum(int(~s.was_done_B[row]) for s in steps) for steps in run.canvases] for row in range(run.rows)]
        assert any(len(set(canvas)) > 1 for canvas in zip(*per_row, strict=True)), "rows stop at different steps"


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", RUNS)
def test_decisions_step_by_step(kind: str, seed: int, name: str) -> None:
    tally = compared(kind, seed, name)
    assert tally.wrong == []
    assert tally.furthest < CLOSE
    assert tally.decisions > 500


@pytest.mark.parametrize("name", OPS)
def test_exceptions_are_rare(name: str) -> None:
    tallies = [compared(kind, seed, name) for kind in RUNS for seed in SEEDS]
    decisions, excused = sum(t.decisions for t in tallies), sum(t.excused for t in tallies)
    print(f"{name}: {decisions} decisions, {sum(t.narrow for t in tallies)} narrow, {excused} excused")
    assert decisions > 20_000
    assert excused < 0.001 * decisions


def test_the_comparison_notices_a_changed_rule() -> None:
    """The teeth of the above: a slightly different rule or model is wrong, not excused."""
    run, theirs = adaptive_run(0)
    ours = tiny.twin(theirs)
    colder = dataclasses.replace(run, options=dataclasses.replace(run.options, t_min=0.39))
    assert compare(colder, ours).furthest > CLOSE
    tighter = dataclasses.replace(run, options=dataclasses.replace(run.options, entropy_bound=0.8))
    assert any("accepted" in wrong for wrong in compare(tighter, ours).wrong)
    surer = dataclasses.replace(run, options=dataclasses.replace(run.options, confidence=0.1))
    assert any("stop" in wrong for wrong in compare(surer, ours).wrong)
    steadier = dataclasses.replace(run, options=dataclasses.replace(run.options, stability=2))
    assert any("stop" in wrong for wrong in compare(steadier, ours).wrong)
    first: Any = ours.layers[0]
    first.denoise_scalar.mul_(1.05)
    assert compare(run, ours).furthest > CLOSE


# ---- text ---------------------------------------------------------------------------------------------------------


class Replay:
    """The noise of recorded runs, by (row, canvas, step): what lets our rows, each at its own pace, share the noise of
    an oracle whose rows march in step. `places` says for each of our rows the run and the row of it."""

    def __init__(self, places: Sequence[tuple[Record, int]]) -> None:
        self.places = places

    def _each(self, name: str, rows: Sequence[int], canvas: Sequence[int], step: Sequence[int]) -> Tensor:
        results = []
        for row, c, s in zip(rows, canvas, step, strict=True):
            run, place = self.places[row]
            steps = run.canvases[min(c, len(run.canvases) - 1)]  # a row that has left the oracle's path may need more
            results.append(getattr(steps[min(s, len(steps) - 1)], name)[place])
        return torch.stack(results)

    def canvas(self, rows: Sequence[int], canvas: Sequence[int]) -> Tensor:
        return self._each("canvas_BL", rows, canvas, [0] * len(rows))

    def sample(self, rows: Sequence[int], canvas: Sequence[int], step: Sequence[int]) -> dict[str, Tensor]:
        return {"gumbel_BLV": self._each("gumbel_BLV", rows, canvas, step)}

    def renoise(self, rows: Sequence[int], canvas: Sequence[int], step: Sequence[int]) -> Tensor:
        return self._each("noise_BL", rows, canvas, step)


def with_eos(theirs: Any, name: str, eos: int | None) -> Model:
    config = dataclasses.replace(
        ModelConfig.from_dict(theirs.config.to_dict()), eos_ids=() if eos is None else (eos,), pad_id=0
    )
    return tiny.twin(theirs, name, config)


def run_ours(ours: Model, places: Sequence[tuple[Record, int]], noise: NoiseSource) -> list[dict[str, Any]]:
    """Our engine on these rows; for each: its tokens, the steps of its canvases, and its drafts by (canvas, step)."""
    canvases = max(len(run.canvases) for run, _ in places)
    limit = canvases * ours.config.canvas_length
    options = dataclasses.replace(places[0][0].options, max_tokens=limit, drafts=True)
    prompts = [run.prompt_BT[row].tolist() for run, row in places]
    each: list[dict[str, Any]] = [{"steps": [], "drafts": {}} for _ in places]
    for event in generate(ours, prompts, options, settings=EngineSettings(noise=noise)):
        row = each[event.row]
        if isinstance(event, Draft):
            row["drafts"][event.canvas, event.step - 1] = (event.tokens, event.accepted)
        elif isinstance(event, Commit):
            row["steps"].append(event.steps)
        else:
            row["tokens"] = event.tokens
    return each


def parting(run: Record, row: int, ours: dict[str, Any]) -> bool:
    """False where our row is the oracle's, token for token and step for step. True where the two part at a step whose
    margin (or that of the step before, whose sample shows only now) is narrow. Anything else is an error."""
    if ours.get("tokens") == run.new(row) and ours["steps"] == run.steps(row):
        return False
    near = torch.tensor(torch.inf)
    for c, steps in enumerate(run.canvases):
        for s, step in enumerate(steps):
            if step.was_done_B[row]:
                break
            near = torch.stack([m[row].min() for m in margins(step, run.options).values()] + [near]).min()
            if min(step.routing_B[row], run.encode_routing[c][row]) < ROUTED:
                near = torch.tensor(0.0)
            expected = (step.argmax_BL[row].tolist(), step.accepted_BL[row].tolist())
            if ours["drafts"].get((c, s)) != expected:
                assert near < NARROW, f"row {row} leaves the oracle at canvas {c}, step {s}; its margin is {near}"
                return True
            near = torch.stack([m[row].min() for m in margins(step, run.options).values()]).min()
    assert near < NARROW, f"row {row} ends otherwise than the oracle: {ours.get('tokens')} for {run.new(row)}"
    return True


@functools.cache
def free_run(kind: str, seed: int) -> tuple[Record, Any]:
    """For text that runs free, the checkpoints whose canvases settle: where they do not, self-conditioning feeds each
    step's rounding to the next about tenfold, and after six steps two right engines are two texts."""
    run, theirs = adaptive_run(seed)
    if kind == "capped":
        options = dataclasses.replace(run.options, max_steps=6, confidence=0.0)
        run = record(theirs, run.prompt_BT, options, 4, 20 + seed, run.eos)
    return run, theirs


@functools.cache
def solo_run(kind: str, seed: int, length: int) -> tuple[Record, int]:
    """One row alone, five canvases."""
    batch, theirs = free_run(kind, seed)
    prompt = tokens(tiny.random_config(seed), 1, length, 700 + seed + length)
    return record(theirs, prompt, batch.options, 5, 50 + seed, batch.eos), 0


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("kind", RUNS)
def test_free_running_with_torchs_noise(kind: str, name: str) -> None:
    """The engine and generate from the same seed of torch's generator: the same text, in the same steps."""
    canvases = parted = 0
    for seed in SEEDS:
        run, row = solo_run(kind, seed, 17)
        ours = with_eos(free_run(kind, seed)[1], name, run.eos)
        torch.manual_seed(50 + seed)
        (got,) = run_ours(ours, [(run, row)], tiny.TorchNoise(ours.config))
        canvases += len(run.canvases)
        parted += parting(run, row, got)
    assert canvases >= 4 * len(SEEDS)
    assert parted <= 1


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("kind", RUNS)
def test_free_running_batches(kind: str, name: str) -> None:
    """The engine on a batch, every row at its own canvas and step, against the oracle's rows in lock-step."""
    rows = parted = 0
    for seed in SEEDS:
        run, theirs = free_run(kind, seed)
        places = [(run, row) for row in range(run.rows)]
        each = run_ours(with_eos(theirs, name, run.eos), places, Replay(places))
        rows += run.rows
        parted += sum(parting(run, row, ours) for row, ours in enumerate(each))
    assert rows >= 20
    assert parted <= 1


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("kind", RUNS)
def test_free_running_ragged_batches(kind: str, name: str) -> None:
    """Prompts of different length in one batch of ours: each row is the oracle's on that prompt alone."""
    parted = 0
    for seed in (0, 3, 6):
        window = tiny.random_config(seed).window
        places = [solo_run(kind, seed, length) for length in (17, 3, window + 1)]
        ours = with_eos(free_run(kind, seed)[1], name, places[0][0].eos)
        each = run_ours(ours, places, Replay(places))
        parted += sum(parting(run, row, got) for (run, row), got in zip(places, each, strict=True))
    assert parted <= 1


def test_the_context_of_sliding_layers_really_slides() -> None:
    """With all attention cut but the first, windowed layer's, denoise sees the window and not one token more."""
    config = tiny.random_config(2)
    ours = tiny.tiny_model(config, 2)
    assert config.layers[0].is_sliding
    blocks: Any = ours.layers[1:]
    for block in blocks:  # one windowed layer is left, so that nothing travels from window to window
        block.self_attn.o_proj.weight.zero_()
    prompt, canvas = tokens(config, 1, 20, 0), tokens(config, 1, config.canvas_length, 1)

    def read(text: Tensor) -> Tensor:
        cache = KVCache.allocate(config, 1, 20)
        ours.encode(text, cache)
        return ours.denoise(canvas, cache)

    base = read(prompt)
    for back in range(1, 20):
        other = prompt.clone()
        other[0, -back] = (other[0, -back] + 1) % config.vocab_size
        is_seen = furthest(read(other), base) > 1e-6
        assert is_seen is (back < config.window)


def test_done_events_carry_the_oracles_counts() -> None:
    run, theirs = adaptive_run(1)
    places = [(run, row) for row in range(run.rows)]
    options = dataclasses.replace(run.options, max_tokens=len(run.canvases) * theirs.config.canvas_length)
    ours = with_eos(theirs, "fused", run.eos)
    settings = EngineSettings(noise=Replay(places))
    done = {
        event.row: event
        for event in generate(ours, [run.prompt_BT[r].tolist() for _, r in places], options, settings=settings)
        if isinstance(event, Done)
    }
    for row in range(run.rows):
        assert done[row].usage.steps == sum(run.steps(row))
        assert done[row].usage.canvases == len(run.steps(row))
        assert done[row].usage.tokens == len(run.new(row))
        assert done[row].finish_reason == ("stop" if run.new(row)[-1] == run.eos else "length")
