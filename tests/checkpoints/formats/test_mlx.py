"""checkpoints/formats/mlx.py: MLX checkpoints: our quantiser against mlx's own, both directions, and files that lie."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import oracle_name, randomise_
from torch import Tensor

from sfumato.checkpoints.checkpoint import Checkpoint, Entry
from sfumato.checkpoints.formats.mlx import open_mlx, plan_mlx, quantise
from sfumato.checkpoints.shards import PlannedFolder, write_shards
from sfumato.errors import CheckpointError, InputError
from sfumato.model.config import LayerConfig, ModelConfig, Rope
from sfumato.ops import load

FORMS = list(itertools.product((4, 6, 8), (32, 64, 128)))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def wide_config(expert_size: int = 64, hidden_size: int = 128) -> ModelConfig:
    """Small, but its inputs fill groups: 128 for most, 64 for what follows attention and the dense MLP."""
    return ModelConfig(
        vocab_size=96,
        hidden_size=hidden_size,
        intermediate_size=64,
        num_heads=4,
        num_experts=5,
        top_k_experts=2,
        expert_size=expert_size,
        layers=(LayerConfig(16, 2, 6, Rope(10_000.0)), LayerConfig(16, 1, None, Rope(1e6, 0.5, 1.0, True))),
        canvas_length=8,
        max_position=256,
        eos_ids=(1, 5),
    )


def random_weights(config: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A released checkpoint's tensors."""
    from sfumato.model.network import Model

    model = Model(config, load("reference"))
    tensors = [*model.named_parameters(), *model.named_buffers()]
    randomise_(tensors, 0, 1.5, 1.0)
    return {oracle_name(name): tensor.detach().to(dtype) for name, tensor in tensors}


def checkpoint_of(config: ModelConfig, tensors: dict[str, Tensor], stored: str = "F32") -> Checkpoint:
    def entry(name: str, tensor: Tensor) -> Entry:
        def read(first: int, last: int) -> Tensor:
            return tensor[first:last] if tensor.dim() else tensor

        return Entry(name, tuple(tensor.shape), tensor.nbytes, stored, read)

    entries = {name: entry(name, tensor) for name, tensor in tensors.items()}
    return Checkpoint(Path("somewhere"), "tensors", config.to_dict(), entries)


def write(folder: Path, checkpoint: Checkpoint, bits: int, group: int) -> dict[str, Any]:
    """The checkpoint as MLX, into a folder; its config.json."""
    planned, changes = plan_mlx(checkpoint, bits, group)
    config = checkpoint.config | changes
    write_shards(folder, PlannedFolder(planned))
    (folder / "config.json").write_text(json.dumps(config))
    return config


def groups_of_all_kinds(dtype: torch.dtype) -> Tensor:
    """Rows of 384: plain ones, and those on which a quantiser slips."""
    generator = torch.Generator().manual_seed(0)

    def rows(count: int) -> Tensor:
        return torch.randn(count, 384, generator=generator)

    one_off = torch.full((2, 384), 1.5)
    one_off[:, ::32] = -7.0
    kinds = [
        rows(24),
        rows(8) * 0.02,
        rows(4).abs(),
        -rows(4).abs() - 0.5,
        torch.zeros(2, 384),
        torch.full((1, 384), 3.0),
        torch.full((1, 384), -0.3),
        rows(4) * 1e-8,
        rows(4) * (1e4 if dtype == torch.float16 else 1e30),
        rows(4) * 1e-3 + 5,
        one_off,
    ]
    return torch.cat(kinds).to(dtype)


# ---- the quantiser --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group"), [form for form in FORMS if form[0] != 6])
def test_quantise_is_mlx_quantize_to_the_bit(bits: int, group: int, dtype: torch.dtype) -> None:
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    weight = groups_of_all_kinds(dtype)
    form = quantise(weight, bits, group, dtype)
    there = mx.array(weight.float().numpy()).astype(mlx_dtype(dtype))
    words, scales, biases = mx.quantize(there, group, bits)
    assert torch.equal(form.data, torch.from_numpy(numbers(words.view(mx.uint8))))
    assert torch.equal(form.scale.float(), torch.from_numpy(numbers(scales.astype(mx.float32))))
    assert torch.equal(form.parts["bias"].float(), torch.from_numpy(numbers(biases.astype(mx.float32))))
    assert (scales.dtype, form.kind) == (mlx_dtype(dtype), "int4" if bits == 4 else "int8")


def test_quantise_gives_what_mlx_gave() -> None:
    """mlx.core.quantize, 0.32.4, for where mlx is not installed."""
    weight = torch.tensor([[(i * i * 7 % 31 - 13) * 0.25 + (0.1 if i % 3 == 0 else 0) for i in range(32)]])
    four, eight = (quantise(weight, bits, 32, torch.float32) for bits in (4, 8))
    assert four.data.view(torch.int32).tolist() == [[-0x12BA1F41, 0x1BC6A5A7, 0x7A5A6CB2, -0x04F1AB22]]
    assert eight.data[0, :8].tolist() == [0xFC, 0xC0, 0, 0xF3, 0x52, 0x49, 0xD8, 0xED]
    actual = [form.parts[part].item() for form in (four, eight) for part in ("scale", "bias")]
    assert actual == [-0.46875, 3.75, -0.027372263371944427, 3.75]


@pytest.mark.parametrize(("bits", "group"), [form for form in FORMS if form[0] != 6])
def test_quantise_keeps_the_far_end_exact(bits: int, group: int) -> None:
    weight = torch.randn(16, 384, generator=torch.Generator().manual_seed(1))
    form = quantise(weight, bits, group, torch.float32)
    error = (form.dense() - weight).abs().unflatten(-1, (-1, group))
    rows = weight.unflatten(-1, (-1, group))
    far = rows.abs().argmax(-1, keepdim=True)
    assert (error.gather(-1, far) <= 1e-6).all()
    step = (rows.amax(-1) - rows.amin(-1)) / (2**bits - 1)
    # Half a step anywhere, but at the near end, which the snapped bias may cut off by half a step more.
    assert (error.amax(-1) <= step * 1.05).all() and (error.mean(-1) <= step * 0.35).all()
    zero = quantise(torch.cat([weight, torch.zeros(16, 384)], -1), bits, group, torch.float32).dense()
    assert (zero[:, 384:] == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38])
def test_quantise_refuses_what_has_no_scale(bad: float) -> None:
    weight = torch.ones(1, 64)
    weight[0, 3], weight[0, 4] = bad, -bad
    with pytest.raises(InputError, match="not finite, or too far apart"):
        quantise(weight, 4, 64, torch.float32)


# ---- reading what mlx writes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group"), FORMS)
def test_reads_as_mlx_dequantizes(tmp_path: Path, bits: int, group: int, dtype: torch.dtype) -> None:
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    weight = groups_of_all_kinds(dtype)
    stack = weight[:12].reshape(3, 4, 384)
    tensors: dict[str, Any] = {}
    values, rounded = {}, {}
    for name, tensor in (("model.decoder.some_proj", weight), ("model.decoder.layers.0.experts.down_proj", stack)):
        there = mx.array(tensor.float().numpy()).astype(mlx_dtype(dtype))
        words, scales, biases = mx.quantize(there, group, bits)
        tensors |= {f"{name}.weight": words, f"{name}.scales": scales, f"{name}.biases": biases}
        exact = (part.astype(mx.float32) for part in (scales, biases))
        values[name] = torch.from_numpy(numbers(mx.dequantize(words, *exact, group, bits)))
        rounded[name] = mx.dequantize(words, scales, biases, group, bits)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), tensors)
    checkpoint = open_mlx(tmp_path, wide_config().to_dict() | {"quantization": {"bits": bits, "group_size": group}})
    assert checkpoint.format == f"MLX affine {bits}-bit" and "quantization" not in checkpoint.config
    for name, value in values.items():
        entry = checkpoint.entries[name if "experts" in name else f"{name}.weight"]
        assert entry.shape == tuple(value.shape) and entry.packed
        form = entry.packed(0, len(value))
        assert (form.kind, form.group, form.shape) == ("int4" if bits == 4 else "int8", group, entry.shape)
        assert form.scale.dtype == (dtype if bits == 4 else torch.float32)
        assert torch.equal(form.dense(), value) and torch.equal(entry.read(0, len(value)), value)
        assert torch.equal(entry.read(1, 3), value[1:3]) and torch.equal(entry.packed(1, 3).dense(), value[1:3])
        # In its own dtype mlx rounds twice: the product, then the sum.
        scale, bias = (form.parts[part].to(dtype)[..., None] for part in ("scale", "bias"))
        code = ((value.unflatten(-1, (-1, group)) - bias.float()) / scale.float()).round().to(dtype)
        twice = (code * scale + bias).flatten(-2)
        assert torch.equal(twice.float(), torch.from_numpy(numbers(rounded[name].astype(mx.float32))))


@pytest.mark.parametrize(("bits", "bytes_", "codes"), [(4, [0x21, 0x43], [1, 2, 3, 4]), (8, [200, 7], [200, 7])])
def test_layout(tmp_path: Path, bits: int, bytes_: list[int], codes: list[int]) -> None:
    form = _by_hand(tmp_path, bits, bytes_)
    assert form.dense()[0, : len(codes)].tolist() == [code * 0.5 - 3 for code in codes]


def test_layout_of_6_bits(tmp_path: Path) -> None:
    word = 1 | 62 << 6 | 33 << 12 | 20 << 18
    form = _by_hand(tmp_path, 6, list(word.to_bytes(3, "little")))
    assert form.data[0, :4].tolist() == [1, 62, 33, 20] and form.data.dtype == torch.uint8
    assert form.dense()[0, :4].tolist() == [-2.5, 28, 13.5, 7]


def _by_hand(folder: Path, bits: int, start: list[int]) -> Any:
    words = torch.zeros(1, 32 * bits // 8, dtype=torch.uint8)
    words[0, : len(start)] = torch.tensor(start, dtype=torch.uint8)
    tensors = {"a.weight": words.view(torch.uint32), "a.scales": torch.tensor([[0.5]]), "a.biases": -torch.ones(1, 1)}
    tensors["a.biases"] *= 3
    config = wide_config().to_dict() | {"quantization": {"bits": bits, "group_size": 32}}
    entry = put(folder, tensors, config).entries["a.weight"]
    assert entry.packed
    return entry.packed(0, 1)


def put(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Checkpoint:
    save_file(tensors, folder / "model.safetensors")
    return open_mlx(folder, config)


@pytest.mark.parametrize("way", ["stacks of gate and up", "an expert each"])
def test_experts_that_lie_apart(tmp_path: Path, way: str) -> None:
    weights = torch.randn(5, 128, 64, generator=torch.Generator().manual_seed(2))
    form = quantise(weights, 4, 64, torch.float32)
    parts = {"weight": form.data.view(torch.uint32), "scales": form.scale, "biases": form.parts["bias"]}
    tensors: dict[str, Tensor] = {}
    for half, which in enumerate(("gate_proj", "up_proj")):
        for part, tensor in parts.items():
            mine = tensor.chunk(2, 1)[half].contiguous()
            if way == "an expert each":
                tensors |= {f"l.experts.{number}.{which}.{part}": mine[number].contiguous() for number in range(5)}
            else:
                tensors[f"l.experts.{which}.{part}"] = mine
    config = wide_config().to_dict() | {"quantization": {"bits": 4, "group_size": 64}}
    (entry,) = put(tmp_path, tensors, config).entries.values()
    assert (entry.name, entry.shape) == ("l.experts.gate_up_proj", (5, 128, 64)) and entry.packed
    assert torch.equal(entry.read(0, 5), form.dense()) and torch.equal(entry.packed(2, 4).dense(), form.dense()[2:4])
    assert entry.nbytes == form.nbytes


# ---- writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "group", "expert_size", "dtype"), [
    (4, 64, 64, torch.bfloat16),
    (4, 32, 64, torch.float32),
    (4, 128, 96, torch.float16),
    (8, 64, 40, torch.bfloat16),
])  # fmt: skip
def test_what_is_written_reads_the_same(
    tmp_path: Path, bits: int, group: int, expert_size: int, dtype: torch.dtype
) -> None:
    config = wide_config(expert_size)
    weights = random_weights(config, dtype)
    stored = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    written = write(tmp_path, checkpoint_of(config, weights, stored), bits, group)
    assert written["quantization"] == written["quantization_config"]
    assert written["dtype"] == str(dtype).removeprefix("torch.") and written["vision_config"] is None
    back = open_mlx(tmp_path, json.loads((tmp_path / "config.json").read_text()))
    assert back.entries.keys() == weights.keys()
    assert ModelConfig.from_dict(back.config) == config
    names = set()
    for name, entry in back.entries.items():
        weight = weights[name]
        assert entry.shape == tuple(weight.shape)
        if weight.dim() == 1:
            assert torch.equal(entry.read(0, len(weight)), weight) and not entry.packed
            continue
        own_bits = bits if "experts" in name or "self_conditioning" in name else 8
        own_group = next((size for size in (128, 64, 32) if size <= group and weight.shape[-1] % size == 0), 0)
        names.add((own_bits, own_group))
        expected = quantise(weight, own_bits, own_group, dtype).dense() if own_group else weight
        assert torch.equal(entry.read(0, len(weight)).float(), expected.float()), name
    assert (bits, min(group, 128)) in names and (8, 64 if group > 32 else 32) in names
    assert ((bits, 0) in names) == (expert_size == 40) and ((bits, 32) in names) == (expert_size == 96 or group == 32)


def test_a_weight_is_read_once_and_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sfumato.checkpoints.formats.mlx.PART_BYTES", 2 * 4 * 128 * 64)
    monkeypatch.setattr("sfumato.checkpoints.formats.mlx.CACHED", 100 * 64)
    weight = torch.randn(5, 128, 64)
    reads: list[tuple[int, int]] = []

    def read(first: int, last: int) -> Tensor:
        reads.append((first, last))
        return weight[first:last]

    name = "model.decoder.layers.0.experts.gate_up_proj"
    entry = Entry(name, (5, 128, 64), weight.nbytes, "F32", read)
    source = Checkpoint(Path("x"), "tensors", wide_config().to_dict(), {name: entry})
    # The embedding's dtype is that of the file; there is none here, as where it is quantised itself.
    expected = quantise(weight.flatten(0, 1), 4, 64, torch.bfloat16)
    planned, _ = plan_mlx(source)
    codes, scales, biases = (torch.cat(list(tensor.parts())) for tensor in planned)
    assert reads == [(0, 2), (2, 4), (4, 5)]
    assert torch.equal(codes, expected.data) and torch.equal(scales, expected.scale) and scales.dtype == torch.bfloat16
    assert torch.equal(biases, expected.parts["bias"])
    again = torch.cat(list(plan_mlx(source)[0][2].parts()))  # as a run that takes up another asks for it: alone
    assert torch.equal(again, biases)


def test_settings_name_what_mlx_vlm_would_leave_out() -> None:
    """A weight of 5 x 96 numbers: they do not fill 64s."""
    config = wide_config(hidden_size=96)
    _, changes = plan_mlx(checkpoint_of(config, random_weights(config)), 8, 32)
    named = [name for name, own in changes["quantization"].items() if isinstance(own, dict)]
    assert named == [f"model.decoder.layers.{layer}.router.proj" for layer in (0, 1)]
    assert changes["quantization"][named[0]] == {"group_size": 32, "bits": 8}


def test_what_repeats_and_what_shows_images() -> None:
    config = wide_config()
    tensors = random_weights(config, torch.bfloat16)
    tensors["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"]
    tensors["model.encoder.language_model.norm.weight"] = tensors["model.decoder.norm.weight"]
    tensors["model.encoder.vision_tower.patch.weight"] = torch.ones(64, 64, dtype=torch.bfloat16)
    tensors["model.encoder.vision_tower.input_max"] = torch.tensor(7.0)
    planned, changes = plan_mlx(checkpoint_of(config, tensors, "BF16"))
    clip = next(tensor for tensor in planned if tensor.name.endswith("input_max"))
    assert clip.shape == () and [part.item() for part in clip.parts()] == [7.0]
    names = {tensor.name: tensor.dtype for tensor in planned}
    assert "lm_head.weight" not in names and "model.encoder.language_model.norm.weight" not in names
    assert names["model.encoder.vision_tower.patch.weight"] == "BF16" and "vision_config" not in changes
    assert names["model.encoder.language_model.layers.1.layer_scalar"] == "BF16"


@pytest.mark.parametrize(
    ("bits", "group", "words"), [(6, 64, "bits is 6; .* 4 or 8"), (4, 16, "group is 16; .* 32 or")]
)
def test_the_writer_says_what_it_writes(bits: int, group: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        plan_mlx(checkpoint_of(wide_config(), {}), bits, group)


def test_the_writer_names_a_weight_that_is_broken() -> None:
    name = "model.decoder.layers.0.experts.down_proj"
    planned, _ = plan_mlx(checkpoint_of(wide_config(), {name: torch.full((5, 128, 64), math.nan)}))
    with pytest.raises(InputError, match=r"layers\.0\.experts\.down_proj: .* not finite"):
        list(planned[0].parts())


# ---- files that lie -------------------------------------------------------------------------------------------------


def good() -> dict[str, Tensor]:
    form = quantise(torch.randn(4, 128, generator=torch.Generator().manual_seed(3)), 4, 64, torch.float32)
    return {"a.weight": form.data.view(torch.uint32), "a.scales": form.scale, "a.biases": form.parts["bias"]}


@pytest.mark.parametrize(("change", "words"), [
    ({"a.scales": torch.ones(4, 3)}, r"a\.weight has 16 words a row|does not go with"),
    ({"a.scales": torch.ones(4, 3), "a.biases": torch.ones(4, 3)}, "has 16 words a row and 3 scales; .* must be 24"),
    ({"a.scales": torch.ones(5, 2), "a.biases": torch.ones(5, 2)}, r"the shape \[5, 2\], which does not go with"),
    ({"a.biases": torch.ones(4, 1)}, r"a\.biases has the shape \[4, 1\]"),
    ({"a.biases": torch.ones(4, 2).half()}, "a.biases is stored as F16; .* must both be"),
    ({"a.scales": torch.ones(4, 2, dtype=torch.int32)}, "a.scales is stored as I32"),
    ({"a.weight": torch.ones(4, 16, dtype=torch.int32)}, "stored as I32; codes must be U32"),
    ({"a.weight": torch.tensor(1.0)}, "does not go with"),
    ({"a.scales": None}, "a.weight in .* is stored as U32 and has no scales"),
    ({"a.biases": None}, "a.biases is missing"),
    ({"a.weight": None}, None),
    ({"l.experts.0.up_proj.weight": torch.ones(4, 4)}, "l.experts.up_proj lacks expert 1 of 5"),
    ({"l.experts.5.up_proj.weight": torch.ones(4, 4)}, "experts.5.up_proj.weight is one expert too many"),
    ({f"l.experts.{n}.up_proj.weight": torch.ones(4, 4 + n // 4) for n in range(5)}, r"4\.up_proj.* \[4, 5\], ex"),
    ({f"l.experts.{n}.up_proj.weight": torch.ones(4) for n in range(5)}, "must be matrices of one shape"),
    ({f"l.experts.{n}_proj.weight": torch.ones(5, 4, 4 + len(n)) for n in ("up", "gate")}, "they must be stacks"),
    ({f"l.experts.down_proj{end}": torch.ones(5, 4, 4) for end in ("", ".weight")}, "there twice"),
    ({"l.experts.gate_proj.weight": torch.ones(5, 4, 4)}, "gate_proj is there without its up_proj"),
])  # fmt: skip
def test_tensors_that_do_not_go_together(tmp_path: Path, change: dict[str, Any], words: str | None) -> None:
    tensors = {name: tensor for name, tensor in (good() | change).items() if tensor is not None}
    config = wide_config().to_dict() | {"quantization": {"bits": 4, "group_size": 64}}
    if words is None:  # scales that belong to nothing go on under their own name, which no model has
        assert set(put(tmp_path, tensors, config).entries) == {"a.scales", "a.biases"}
        return
    with pytest.raises(CheckpointError, match=words) as caught:
        put(tmp_path, tensors, config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("settings", "words"), [
    ({"bits": 3, "group_size": 64}, "bits 3 for all; .* 4 or 6 or 8"),
    ({"bits": 4, "group_size": 17}, "group_size 17 for all; .* 32 or 64 or 128"),
    ({"bits": 4, "group_size": 10**30}, "group_size 1000.* for all"),
    ({"bits": True, "group_size": 64}, "bits True"),
    ({"bits": 4, "group_size": [64]}, r"group_size \[64\]"),
    ({"bits": 4, "group_size": 32, "mode": "mxfp4"}, "mode mxfp4 for all; .* affine"),
    ({"bits": 4, "group_size": 64, "a": {"bits": 2, "group_size": 64}}, "bits 2 for a;"),
    ({"bits": 4, "group_size": 64, "a": {"bits": 8, "group_size": 64}}, "with 8 bits in groups of 64"),
    ({"bits": 6, "group_size": 64}, "with 6 bits in groups of 64 there must be 24 words"),
    ("4 bits", "no quantization with bits"),
])  # fmt: skip
def test_settings_that_are_not_mlx(tmp_path: Path, settings: Any, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        put(tmp_path, good(), wide_config().to_dict() | {"quantization": settings})


@pytest.mark.parametrize("part", ["a.scales", "a.biases"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scales_that_are_no_numbers(tmp_path: Path, part: str, bad: float) -> None:
    tensors = good()
    tensors[part][1, 1] = bad
    config = wide_config().to_dict() | {"quantization": {"bits": 4, "group_size": 64}}
    entry = put(tmp_path, tensors, config).entries["a.weight"]
    assert entry.packed and entry.read(2, 4).isfinite().all()
    for read in (entry.read, entry.packed):
        with pytest.raises(CheckpointError, match=rf"{part} in .* not finite; it is damaged"):
            read(0, 4)


# ---- mlx-vlm --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "group", "hidden"), [(4, 64, 128), (8, 64, 128), (4, 32, 128), (4, 128, 128), (8, 32, 96)]
)
def test_mlx_vlm_loads_it_and_gives_our_logits(tmp_path: Path, bits: int, group: int, hidden: int) -> None:
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    utils = pytest.importorskip("mlx_vlm.utils", reason="mlx-vlm is not installed")
    from sfumato.model.cache import KVCache
    from sfumato.model.network import Model

    config = wide_config(hidden_size=hidden)
    written = write(tmp_path, checkpoint_of(config, random_weights(config)), bits, group)
    there = utils.load_model(tmp_path)  # strict: a weight without a value, or a value without a weight, is an error
    back = open_mlx(tmp_path, written)
    model = Model(config, load("reference"))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        entry = back.entries[oracle_name(name)]
        tensor.data.copy_(entry.read(0, entry.shape[0]))
        module: Any = there
        *path, leaf = oracle_name(name).split(".")
        for step in path:
            module = module[int(step)] if step.isdigit() else getattr(module, step)
        if path[-1] == "experts":
            module, leaf = getattr(module, leaf), "weight"
        value = getattr(module, leaf)
        if value.dtype == mx.uint32:
            value = mx.dequantize(value, module.scales, module.biases, module.group_size, module.bits)
        assert torch.equal(torch.from_numpy(numbers(value)), tensor.data), name
    generator = torch.Generator().manual_seed(4)
    prompt = torch.randint(0, 96, (1, 11), generator=generator)
    canvas = torch.randint(0, 96, (1, 8), generator=generator)
    previous = torch.randn(1, 8, 96, generator=generator) * 3
    with torch.no_grad():
        cache = KVCache.allocate(config, 1, 32)
        model.encode(prompt, cache)
        soft = previous.softmax(-1) @ model.embed_tokens.weight * math.sqrt(config.hidden_size)
        ours = [model.logits(model.denoise(canvas, cache, conditioning)) for conditioning in (None, soft)]
    held = there.diffusion_prefill_cache(mx.array(prompt.numpy()), cache=there.make_cache())
    tokens = mx.array(canvas.numpy())
    for mine, conditioning in zip(ours, (None, mx.array(previous.numpy())), strict=True):
        logits = torch.from_numpy(numbers(there.diffusion_decoder_logits(tokens, held, conditioning)))
        assert (logits - mine).abs().max() < 1e-4 and mine.std() > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_writes_what_mlx_vlm_converts(tmp_path: Path, bits: int, dtype: torch.dtype) -> None:
    """The same tensors, byte for byte, and the same settings."""
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    utils = pytest.importorskip("mlx_vlm.utils", reason="mlx-vlm is not installed")
    quantize_model = pytest.importorskip("mlx_vlm.quant_utils").quantize_model
    tree_flatten = pytest.importorskip("mlx.utils").tree_flatten
    weights, config = random_weights(wide_config(), dtype), wide_config().to_dict() | {"vision_config": None}
    (plain := tmp_path / "plain").mkdir()
    save_file(weights, plain / "model.safetensors")
    (plain / "config.json").write_text(json.dumps(config))
    model = utils.load_model(plain)
    model, theirs = quantize_model(model, config, 64, bits, quant_predicate=model.quant_predicate)
    expected = dict(tree_flatten(model.parameters()))
    source = checkpoint_of(wide_config(), weights, "F32" if dtype == torch.float32 else "BF16")
    ours = write(tmp_path / "ours", source, bits, 64)
    actual = mx.load(str(tmp_path / "ours" / "model.safetensors"))
    assert actual.keys() == expected.keys()
    for name, array in actual.items():
        other = expected[name]
        assert (array.dtype, array.shape) == (other.dtype, other.shape), name
        assert numbers(array.view(mx.uint8)).tobytes() == numbers(other.view(mx.uint8)).tobytes(), name
    default = {"group_size": 64, "bits": bits}
    changed = {name: own for name, own in theirs["quantization"].items() if own != default}
    assert ours["quantization"] == changed


def mlx_dtype(dtype: torch.dtype) -> Any:
    import mlx.core as mx

    return {torch.float32: mx.float32, torch.bfloat16: mx.bfloat16, torch.float16: mx.float16}[dtype]


def numbers(array: Any) -> Any:
    """An mlx array as numpy's, its own to keep."""
    import numpy as np

    return np.array(array)
