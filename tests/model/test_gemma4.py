"""model/network.py as Gemma 4, and checkpoints/formats/gemma4.py: its config and names read as ours.

And the same logits and greedy text as transformers 5.23, in float32."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from sfumato import ops
from sfumato.checkpoints import convert
from sfumato.checkpoints.checkpoint import Entry
from sfumato.checkpoints.formats import gemma4
from sfumato.checkpoints.load import PLAIN, load
from sfumato.checkpoints.names import released_spelling, released_spellings
from sfumato.engine.engine import EngineSettings
from sfumato.engine.request import Request
from sfumato.engine.run import Run
from sfumato.errors import CheckpointError, InputError
from sfumato.events import Commit, Done, Draft
from sfumato.model.cache import KVCache
from sfumato.model.config import FULL, SLIDING, LayerConfig, ModelConfig, Rope
from sfumato.model.network import Model
from sfumato.options import Options
from sfumato.templates.requests import Complete

SEEDS = range(4)
CLOSE = 1e-4
GREEDY = Options(mode="autoregressive", temperature=0.0, logprobs=True)

RELEASED: dict[str, Any] = {
    "architectures": ["Gemma4ForConditionalGeneration"],
    "audio_config": None,
    "audio_token_id": 258881,
    "boi_token_id": 255999,
    "eoi_token_id": 258882,
    "image_token_id": 258880,
    "model_type": "gemma4",
    "text_config": {
        "attention_bias": False,
        "attention_k_eq_v": True,
        "bos_token_id": 2,
        "enable_moe_block": True,
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "global_head_dim": 512,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2816,
        "hidden_size_per_layer_input": 0,
        "intermediate_size": 2112,
        "layer_types": ([SLIDING] * 5 + [FULL]) * 5,
        "max_position_embeddings": 262144,
        "model_type": "gemma4_text",
        "moe_intermediate_size": 704,
        "num_attention_heads": 16,
        "num_experts": 128,
        "num_global_key_value_heads": 2,
        "num_hidden_layers": 30,
        "num_key_value_heads": 8,
        "num_kv_shared_layers": 0,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            FULL: {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
            SLIDING: {"rope_theta": 1e4, "rope_type": "default"},
        },
        "sliding_window": 1024,
        "tie_word_embeddings": True,
        "top_k_experts": 8,
        "use_bidirectional_attention": "vision",
        "use_double_wide_mlp": False,
        "vocab_size": 262144,
    },
    "tie_word_embeddings": True,
    "vision_config": {"model_type": "gemma4_vision", "hidden_size": 1152, "num_hidden_layers": 27},
}
"""The numbers of 26B-A4B in the release's spelling, by hand; of the vision tower only two."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with tiny.one_thread():
        yield


def released(**changes: Any) -> dict[str, Any]:
    """The config with changes to its text_config; a value of ... takes the field away."""
    raw = copy.deepcopy(RELEASED)
    raw["text_config"] = {k: v for k, v in (raw["text_config"] | changes).items() if v is not ...}
    return raw


def random_config(seed: int, **changes: Any) -> ModelConfig:
    return tiny.random_config(seed, is_diffusion=False, canvas_length=256, vision={}, **changes)


def oracle_of(config: ModelConfig, seed: int, **more: Any) -> Any:
    """transformers' Gemma4ForConditionalGeneration of this config, all its text tensors randomised."""
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    whole: Any = Gemma4ForConditionalGeneration(Gemma4Config(**config.to_dict() | more))
    model = whole.float()
    scalars = [pair for pair in model.named_buffers() if pair[0].endswith("layer_scalar")]
    text = [pair for pair in model.named_parameters() if "vision" not in pair[0]]
    tiny.randomise_(text + scalars, seed, sharp=1.5, mix=1.0)
    return model.requires_grad_(False).eval()


@functools.cache
def oracle(seed: int) -> Any:
    return oracle_of(random_config(seed), seed)


def rows_of(tensor: Tensor, first: int, last: int) -> Tensor:
    return tensor[first:last]


def entries_of(tensors: Mapping[str, Tensor]) -> dict[str, Entry]:
    """Tensors as `open_checkpoint` spells them."""
    return {
        name: Entry(name, tuple(tensor.shape), tensor.nbytes, "F32", functools.partial(rows_of, tensor))
        for theirs, name in released_spellings(tensors).items()
        for tensor in [tensors[theirs]]
    }


def twin(theirs: Any, name: str = "reference") -> Model:
    """Our model with the oracle's weights, by our table of names."""
    model = Model(ModelConfig.from_dict(theirs.config.to_dict()), ops.load(name))
    results = gemma4.released(entries_of(theirs.state_dict()))
    expected = {own: results[tiny.oracle_name(own)] for own in model.state_dict()}
    model.load_state_dict({own: entry.read(0, entry.shape[0]) for own, entry in expected.items()})
    return model.requires_grad_(False).eval().pack_()


def tokens(config: ModelConfig, rows: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(0, config.vocab_size, (rows, length), generator=generator)


def furthest(one: Tensor, two: Tensor) -> float:
    assert one.shape == two.shape
    assert bool(one.isfinite().all())
    return float((one - two).abs().max())


# ---- config.json ----------------------------------------------------------------------------------------------------


def test_the_release() -> None:
    config = ModelConfig.from_dict(RELEASED)
    sliding = LayerConfig(256, 8, 1024, Rope(1e4))
    full = LayerConfig(512, 2, None, Rope(1e6, partial=0.25, proportional=True))
    assert config.layers == ((sliding,) * 5 + (full,)) * 5
    assert not config.is_diffusion
    assert (config.hidden_size, config.intermediate_size, config.expert_size) == (2816, 2112, 704)
    assert (config.num_experts, config.top_k_experts, config.softcap) == (128, 8, 30.0)
    assert (config.vocab_size, config.max_position, config.eos_ids) == (262144, 262144, (1,))
    assert ModelConfig.from_dict(released(layer_types=None)) == config
    assert ModelConfig.from_dict(released(num_kv_shared_layers=..., use_double_wide_mlp=None)) == config


def test_a_round_trip_keeps_what_was_there() -> None:
    config = ModelConfig.from_dict(RELEASED)
    again = json.loads(json.dumps(config.to_dict()))
    assert again == RELEASED
    assert ModelConfig.from_dict(again) == config
    bare = dataclasses.replace(config, vision={}).to_dict()
    assert bare["vision_config"] is None and bare["audio_config"] is None
    # The same numbers are another model with a canvas.
    twin = dataclasses.replace(config, is_diffusion=True)
    assert twin.to_dict()["model_type"] == "diffusion_gemma"
    assert ModelConfig.from_dict(twin.to_dict()) == twin != config


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_size_per_layer_input": 256}, r"hidden_size_per_layer_input is 256 \(per-layer embeddings\)"),
        ({"hidden_size_per_layer_input": ...}, "hidden_size_per_layer_input is 256"),
        ({"num_kv_shared_layers": 10}, "num_kv_shared_layers is 10"),
        ({"num_kv_shared_layers": "many"}, "num_kv_shared_layers is 'many'"),
        ({"enable_moe_block": False}, "enable_moe_block is False .*26B-A4B.* have True"),
        ({"enable_moe_block": ...}, "enable_moe_block is False"),
        ({"attention_k_eq_v": False}, "attention_k_eq_v is False"),
        ({"attention_k_eq_v": ...}, "attention_k_eq_v is False"),
        ({"attention_k_eq_v": "yes"}, "attention_k_eq_v is 'yes'"),
        ({"use_double_wide_mlp": True}, "use_double_wide_mlp is True"),
        ({"final_logit_softcapping": ...}, "final_logit_softcapping is None"),
        ({"final_logit_softcapping": None}, "final_logit_softcapping is None"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention is 'all'"),
        ({"num_experts": None}, "num_experts is None"),
    ],
)
def test_what_the_engine_cannot_run_is_refused_by_name(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CheckpointError, match=f"config.json: {sentence}"):
        ModelConfig.from_dict(released(**changes))


def test_audio_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"audio_config is .*without audio"):
        ModelConfig.from_dict({**RELEASED, "audio_config": {"model_type": "gemma4_audio"}})


# ---- names ----------------------------------------------------------------------------------------------------------


def test_the_names_that_transformers_saves(tmp_path: Path) -> None:
    """A vision tower and all: every name has a place, every tensor of ours has one name, and back."""
    from safetensors import safe_open

    config = tiny.tiny_config(is_diffusion=False, canvas_length=256, vision={})
    vision: Any = tiny.VISION["vision_config"]
    theirs = oracle_of(config, 0, vision_config=vision | {"position_embedding_size": 16})
    theirs.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "per_layer_config" in saved["text_config"]
    assert ModelConfig.from_dict(saved) == config
    with safe_open(str(tmp_path / "model.safetensors"), "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    results = gemma4.released(entries_of(stored))
    assert all(entry.name == name for name, entry in results.items())

    ours = Model(config, ops.load("reference")).state_dict()
    of_ours = {tiny.oracle_name(own): tuple(tensor.shape) for own, tensor in ours.items()}
    others = {name: entry.shape for name, entry in results.items() if name not in of_ours}
    assert {name: results[name].shape for name in of_ours} == of_ours
    assert others and all(
        name.startswith(("model.encoder.vision_tower.", "model.encoder.embed_vision.")) for name in others
    )
    assert not any("self_conditioning" in name for name in ours)
    back = [gemma4.name_of(name) for name in results]
    assert sorted(name for name in back if name is not None) == sorted(stored)
    assert len(results) == len(stored) + len(config.layers)


def test_a_layer_scalar_goes_to_both_directions() -> None:
    theirs = oracle(0)
    ours, layers = twin(theirs), theirs.model.language_model.layers
    assert len({float(layer.layer_scalar) for layer in layers}) == len(layers)
    results = ours.state_dict()
    for index, layer in enumerate(layers):
        both = [float(results[f"layers.{index}.{kind}_scalar"]) for kind in ("encode", "denoise")]
        assert both == [float(layer.layer_scalar)] * 2
    assert gemma4.name_of("model.decoder.layers.3.layer_scalar") is None
    assert gemma4.name_of("model.encoder.language_model.layers.3.layer_scalar") == (
        "model.language_model.layers.3.layer_scalar"
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.language_model.layers.11.experts.gate_up_proj", "model.decoder.layers.11.experts.gate_up_proj"),
        ("model.language_model.layers.0.mlp.up_proj.weight_scale", "model.decoder.layers.0.mlp.up_proj.weight_scale"),
        ("model.language_model.norm.weight", "model.decoder.norm.weight"),
        ("model.vision_tower.encoder.x", "model.encoder.vision_tower.encoder.x"),
        ("model.embed_vision.embedding_projection.weight", "model.encoder.embed_vision.embedding_projection.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_names(name: str, expected: str) -> None:
    assert released_spelling(name) == expected
    assert gemma4.name_of(expected) == name


@pytest.mark.parametrize(
    "name",
    ["model.decoder.self_conditioning.pre_norm.weight", "model.encoder.language_model.norm.weight", "model.x", "x"],
)
def test_names_that_gemma4_lacks(name: str) -> None:
    assert gemma4.name_of(name) is None


def test_a_tensor_without_a_place_is_named() -> None:
    for name in ("model.audio_tower.x", "model.embed_audio.x", ""):
        with pytest.raises(CheckpointError, match=f"unexpected tensor {name!r}"):
            gemma4.released(entries_of({name: torch.zeros(1)}))


def test_names_that_are_released_already_stay() -> None:
    """As files of our own have them; a scalar for encode is only made where there is none."""
    scalars = [f"model.{side}.layers.0.layer_scalar" for side in ("decoder", "encoder.language_model")]
    results = gemma4.released(entries_of({name: torch.tensor([float(n)]) for n, name in enumerate(scalars)}))
    assert [float(results[name].read(0, 1)) for name in scalars] == [0.0, 1.0]
    assert gemma4.released(results) == results
    alone = gemma4.released(entries_of({scalars[0]: torch.ones(1)}))
    assert sorted(alone) == sorted(scalars) and all(entry.name == name for name, entry in alone.items())


# ---- the same numbers -----------------------------------------------------------------------------------------------


@torch.no_grad()
def their_logits(theirs: Any, parts: Iterable[Tensor]) -> list[Tensor]:
    """The oracle's logits of consecutive parts of a text, through its own cache."""
    from transformers import DynamicCache

    cache = DynamicCache(config=theirs.config.text_config)
    return [theirs(input_ids=part, past_key_values=cache).logits for part in parts]


@pytest.mark.parametrize("name", tiny.OPS)
@pytest.mark.parametrize("seed", SEEDS)
def test_logits(seed: int, name: str) -> None:
    """Prompts longer than the window, in one pass, a token at a time, and in chunks."""
    theirs = oracle(seed)
    ours = twin(theirs, name)
    window = ours.config.window
    length = 3 * window + seed
    prompt_BT = tokens(ours.config, 2, length, seed)
    expected = their_logits(theirs, [prompt_BT])[0]
    assert float(expected.std()) > 0.5
    # The window has a say here, or nothing was compared.
    assert furthest(their_logits(theirs, [prompt_BT[:, -window:]])[0][:, -1], expected[:, -1]) > 0.01
    for chunks in ([length], [1] * length, [window + 1, 1, length - window - 2]):
        cache = KVCache.allocate(ours.config, 2, length)
        results = [ours.logits(ours.encode(part, cache)) for part in torch.split(prompt_BT, chunks, dim=1)]
        assert furthest(torch.cat(results, dim=1), expected) < CLOSE


@pytest.mark.parametrize("seed", SEEDS)
def test_greedy_continuation_step_by_step(seed: int) -> None:
    """Both continue the oracle's own text, token by token; then the engine writes it alone."""
    theirs, count = oracle(seed), 12
    ours = twin(theirs)
    prompt_BT = tokens(ours.config, 1, 2 * ours.config.window + 1, 50 + seed)
    text_BT = prompt_BT
    cache = KVCache.allocate(ours.config, 1, prompt_BT.shape[1] + count)
    part_BT, expected, log_p, margins = prompt_BT, [], [], []
    for _ in range(count):
        logits_BV = their_logits(theirs, [text_BT])[0][:, -1]
        assert furthest(ours.logits(ours.encode(part_BT, cache))[:, -1], logits_BV) < CLOSE
        best = logits_BV.topk(2).values[0]
        margins.append(float(best[0] - best[1]))
        part_BT = logits_BV.argmax(-1, keepdim=True)
        expected.append(int(part_BT))
        log_p.append(float(torch.log_softmax(logits_BV, -1).max()))
        text_BT = torch.cat([text_BT, part_BT], dim=1)
    assert min(margins) > 10 * CLOSE, "two tokens tie: choose another seed"
    ours.config = dataclasses.replace(ours.config, eos_ids=())
    events = list(Run(ours, [prompt_BT[0].tolist()], dataclasses.replace(GREEDY, max_tokens=count)))
    done = events[-1]
    assert isinstance(done, Done) and done.tokens == expected
    assert done.logprobs == pytest.approx(log_p, abs=CLOSE)
    assert (done.usage.canvases, done.usage.passes, done.finish_reason) == (0, count, "length")
    assert [event.tokens for event in events if isinstance(event, Commit)] == [[token] for token in expected]


def test_the_engine_and_the_oracles_own_generate() -> None:
    theirs = oracle(1)
    ours = twin(theirs)
    prompts = [tokens(ours.config, 1, n * ours.config.window + 2, 80 + n) for n in (1, 3)]
    ours.config = dataclasses.replace(ours.config, eos_ids=())
    # A mask, as a token of the prompt is the padding too; eos is None, so that none ends the text.
    how: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = [theirs.generate(p, attention_mask=torch.ones_like(p), **how)[0, p.shape[1] :].tolist() for p in prompts]
    options = dataclasses.replace(GREEDY, max_tokens=9)
    run = Run(ours, [p[0].tolist() for p in prompts], options, settings=EngineSettings(chunk=5))
    results = {event.row: event.tokens for event in run if isinstance(event, Done)}
    assert [results[0], results[1]] == expected
    assert expected[0] != expected[1]


# ---- what needs a canvas is refused ---------------------------------------------------------------------------------


@functools.cache
def bare() -> Model:
    return tiny.tiny_model(tiny.tiny_config(is_diffusion=False, vision={}))


def test_the_model_cannot_denoise() -> None:
    model, canvas_BL = bare(), torch.zeros(1, 4, dtype=torch.long)
    assert model.self_conditioning is None
    cache = KVCache.allocate(model.config, 1, 8)
    with pytest.raises(InputError, match="denoise needs a canvas, and Gemma 4 has none"):
        model.denoise(canvas_BL, cache)
    with pytest.raises(InputError, match="denoise needs a canvas, and Gemma 4 has none"):
        model.encode_and_denoise(canvas_BL, [4], canvas_BL, cache)
    assert cache.lengths == [0]


@pytest.mark.parametrize(
    ("options", "more", "what"),
    [
        (Options(mode="diffusion"), {}, "mode 'diffusion'"),
        (dataclasses.replace(GREEDY, drafts=True), {}, "a draft"),
        (GREEDY, {"pins": {0: 3}}, "a pin"),
        (GREEDY, {"warm": {0: 3}}, "a warm token"),
    ],
)
def test_the_engine_refuses_before_any_work(options: Options, more: dict[str, Any], what: str) -> None:
    with pytest.raises(InputError, match=f"^{what} needs a canvas, and Gemma 4 has none; .*'autoregressive'"):
        Run(bare(), [Request([2, 3], options, **more)])


class Letters:
    """A tokenizer of single letters: what `LLM` asks of one, without a file."""

    special_ids: Sequence[int] = ()

    def least(self, text: str) -> int:
        return len(text)

    def encode(self, text: str, bos: bool = False) -> list[int]:
        return [2, *(ord(letter) % 50 + 10 for letter in text)] if bos else [ord(letter) % 50 + 10 for letter in text]

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "".join(chr(97 + i % 26) for i in ids)


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> Any:
    from sfumato import llm as module
    from sfumato.text import reader

    class Detokeniser:
        def __init__(self, tokenizer: Letters) -> None:
            self.tokenizer = tokenizer

        def push(self, ids: list[int]) -> str:
            return self.tokenizer.decode(ids)

        def flush(self) -> str:
            return ""

    monkeypatch.setattr(reader, "Detokeniser", Detokeniser)
    return module.LLM(bare(), Letters())  # type: ignore[arg-type]


def test_text_is_written_one_token_after_another(llm: Any) -> None:
    """Options as they are by default; and a second prompt goes on where the first ended."""
    options = Options(max_tokens=7, min_tokens=7, temperature=0.0)
    done = llm.complete("Gemma", options=options)
    assert len(done.text) == 7 and done.usage.canvases == 0 and done.usage.passes == 7
    commits = [event for event in llm.stream(Complete("Gemma", options)) if isinstance(event, Commit)]
    assert [len(event.tokens) for event in commits] == [1] * 7
    assert "".join(event.text for event in commits) == done.text
    again = next(event for event in llm.stream(Complete("Gemma, again", options)) if isinstance(event, Done))
    assert again.usage.reused_tokens == 6
    assert not any(isinstance(event, Draft) for event in llm.stream(Complete("Gemma", options)))


def test_what_a_template_needs_is_refused_in_one_sentence(llm: Any) -> None:
    from sfumato.templates.slots import Slot

    requests: dict[str, Callable[[], object]] = {
        "a template": lambda: [llm.fill(["a", Slot("b", length=1)]), llm.infill("a", "b")],
        "edit": lambda: llm.edit("abc", "louder"),
        "decide": lambda: llm.decide("x", {"a": ["b", "c"]}),
        "a draft": lambda: list(llm.stream(Complete("x", Options(drafts=True)))),
        "mode 'diffusion'": lambda: llm.complete("x", options=Options(mode="diffusion")),
        "regex": lambda: llm.complete("x", options=Options(regex="a")),
        "schema": lambda: llm.complete("x", options=Options(schema={})),
    }
    for what, call in requests.items():
        with pytest.raises(InputError, match=f"^{what} needs a canvas, and Gemma 4 has none; .* DiffusionGemma"):
            call()
    with pytest.raises(InputError, match="a template needs a canvas"):
        llm.infill("a", "b")


# ---- files ----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_converted_and_read_by_both(tmp_path: Path) -> None:
    """transformers' files into bf16 under the same names, which it reads, and into 4 bits, which we do."""
    from transformers import Gemma4ForConditionalGeneration

    theirs = oracle(0)
    theirs.save_pretrained(tmp_path / "theirs")
    convert.convert(tmp_path / "theirs", "bf16", tmp_path / "bf16")
    loader: Any = Gemma4ForConditionalGeneration
    back, report = loader.from_pretrained(tmp_path / "bf16", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ours, stored = twin(theirs).state_dict(), twin(back).state_dict()
    assert all(torch.equal(stored[name].float(), tensor.bfloat16().float()) for name, tensor in ours.items())
    convert.convert(tmp_path / "theirs", "int8", tmp_path / "int8")
    model = load(tmp_path / "int8", PLAIN)
    prompt = tokens(model.config, 1, 20, 0)
    exact, got = (m.logits(m.encode(prompt, KVCache.allocate(m.config, 1, 32))) for m in (twin(theirs), model))
    assert 0 < (got - exact).norm() / exact.norm() < 0.1
    with pytest.raises(InputError, match="is written of DiffusionGemma alone"):
        convert.convert(tmp_path / "theirs", "compressed-fp8", tmp_path / "other")
