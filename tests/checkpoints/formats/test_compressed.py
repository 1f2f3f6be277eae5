"""checkpoints/formats/compressed.py: compressed-tensors: read to the bit as the library decompresses, written so that
the library reads the same weights; what cannot be read is refused by name.
"""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_model
from torch import Tensor

from sfumato.checkpoints.checkpoint import Checkpoint, Entry
from sfumato.checkpoints.formats.compressed import FORMATS, open_compressed, plan_compressed
from sfumato.checkpoints.names import released_name
from sfumato.checkpoints.shards import PlannedFolder, stored_tensors, write_shards
from sfumato.errors import CheckpointError, InputError
from sfumato.model.config import ModelConfig
from sfumato.ops.packed import E2M1

CONFIG = tiny_config(hidden_size=64, expert_size=32, intermediate_size=96, num_experts=3)
LINEAR = "model.decoder.layers.0.self_attn.q_proj"
EXPERTS = "model.decoder.layers.0.experts"


@pytest.fixture
def library() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("compressed_tensors", reason="needs the library that the format is of")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def quantization(label: str, **weights: Any) -> dict[str, Any]:
    kind, bits = FORMATS.get(label, ("float", (8,)))
    scheme = {"targets": ["Linear"], "weights": {"type": kind, "num_bits": bits[0], **weights}}
    return {"quant_method": "compressed-tensors", "format": label, "config_groups": {"group_0": scheme}}


def opened(
    folder: Path, tensors: dict[str, Tensor], settings: dict[str, Any], config: ModelConfig = CONFIG
) -> Checkpoint:
    save_file(tensors, folder / "model.safetensors")
    return open_compressed(folder, {**config.to_dict(), "quantization_config": settings})


def e4m3(*shape: int, seed: int) -> Tensor:
    """Any finite e4m3 number: both zeros, subnormal ones, the largest."""
    codes = torch.randint(0, 254, shape, generator=generator(seed), dtype=torch.uint8)
    return torch.where(codes >= 127, codes + 1, codes).view(torch.float8_e4m3fn)


def any_bytes(*shape: int, seed: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=generator(seed), dtype=torch.uint8)


def scales(*shape: int, seed: int) -> Tensor:
    """Of very different sizes, and of either sign."""
    size = torch.randn(shape, generator=generator(seed)) * 12
    return torch.randn(shape, generator=generator(seed + 1)) * size.exp2()


def words(*shape: int, seed: int) -> Tensor:
    return any_bytes(*shape[:-1], shape[-1] * 4, seed=seed).view(torch.int32)


def adversarial(case: str, rows: int, columns: int) -> dict[str, Tensor]:
    """A module's tensors, each code and scale anything that its format allows."""
    match case.split("/"):
        case ["float-quantized" | "naive-quantized", kind, dtype]:
            shape = {
                "channel": (rows, 1),
                "tensor": (1,),
                "block": (math.ceil(rows / 128), math.ceil(columns / 128)),
            }[kind]
            as_stored = torch.float32 if dtype == "F32" else torch.bfloat16
            return {"weight": e4m3(rows, columns, seed=1), "weight_scale": scales(*shape, seed=2).to(as_stored)}
        case ["int-quantized", *_]:
            codes = any_bytes(rows, columns, seed=1).view(torch.int8)
            return {"weight": codes, "weight_scale": scales(rows, 1, seed=2).bfloat16()}
        case ["nvfp4-pack-quantized", size]:
            return {
                "weight_packed": any_bytes(rows, columns // 2, seed=1),
                "weight_scale": e4m3(rows, columns // 16, seed=2),
                "weight_global_scale": torch.tensor([float(size)]),
            }
        case ["mxfp4-pack-quantized", *_]:
            exponents = torch.randint(1, 250, (rows, columns // 32), generator=generator(2), dtype=torch.uint8)
            return {"weight_packed": any_bytes(rows, columns // 2, seed=1), "weight_scale": exponents}
        case ["mxfp8-quantized", *_]:
            exponents = torch.randint(1, 240, (rows, columns // 32), generator=generator(2), dtype=torch.uint8)
            return {"weight": e4m3(rows, columns, seed=1), "weight_scale": exponents}
        case ["pack-quantized", group, *options]:
            groups, bits = columns // min(int(group), columns), bits_of(case)
            module = {
                "weight_packed": words(rows, columns * bits // 32, seed=1),
                "weight_scale": scales(rows, groups, seed=2).bfloat16(),
                "weight_shape": torch.tensor([rows, columns]),
            }
            if "asym" in options:
                module["weight_zero_point"] = words(groups, math.ceil(rows * bits / 32), seed=3).T.contiguous()
            return module
    raise AssertionError(case)


def bits_of(case: str) -> int:
    """Of a code in pack-quantized: 4, unless the case says otherwise."""
    return next((int(option[:-5]) for option in case.split("/") if option.endswith("-bits")), 4)


CASES = (
    *(f"float-quantized/{kind}/{dtype}" for kind in ("channel", "tensor", "block") for dtype in ("BF16", "F32")),
    "naive-quantized/channel/BF16",
    "int-quantized",
    *(f"nvfp4-pack-quantized/{size}" for size in (1.0, 2048.0, 1234.567, 3e-3, 7e9)),
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    *(f"pack-quantized/{group}/{bits}-bits" for bits, group in ((8, 32), (8, 512), (3, 64), (7, 128))),
    *(f"pack-quantized/{group}/asym/{bits}-bits" for bits, group in ((8, 128), (2, 32), (5, 16))),
    *(f"pack-quantized/{group}{asymmetric}" for group in (16, 32, 128, 256) for asymmetric in ("", "/asym")),
)


def scheme_of(case: str) -> dict[str, Any]:
    label, *rest = case.split("/")
    weights: dict[str, Any] = {"dynamic": False}
    if label in ("float-quantized", "naive-quantized"):
        weights |= {"strategy": rest[0], **({"block_structure": [128, 128]} if rest[0] == "block" else {})}
    elif label == "int-quantized":
        weights |= {"strategy": "channel"}
    elif label == "pack-quantized":
        strategy = {"strategy": "channel"} if rest[0] == "512" else {"strategy": "group", "group_size": int(rest[0])}
        weights |= {**strategy, "symmetric": "asym" not in rest, "num_bits": bits_of(case)}
    else:
        group = ("tensor_group", 16) if label == "nvfp4-pack-quantized" else ("group", 32)
        weights |= {"strategy": group[0], "group_size": group[1]}
    return weights


def decompressed(case: str, module: dict[str, Tensor]) -> Tensor:
    """By the library itself; in float32 where it would round to bfloat16 at the end (nvfp4)."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    label = case.split("/")[0]
    scheme = QuantizationScheme.model_validate(quantization(label, **scheme_of(case))["config_groups"]["group_0"])
    if label == "nvfp4-pack-quantized":
        rows, columns = module["weight_packed"].shape
        codes = unpack_fp4_from_uint8(module["weight_packed"], rows, columns * 2, torch.float32)
        values: Tensor = dequantize(
            codes,
            module["weight_scale"].float(),
            args=scheme.weights,
            dtype=torch.float32,
            global_scale=module["weight_global_scale"],
        )
    else:
        values = BaseCompressor.get_value_from_registry(label).decompress(dict(module), scheme)["weight"]
    return values


def same(ours: Tensor, theirs: Tensor) -> bool:
    """To the bit, but for the sign of zero, in the dtype of the second."""
    return bool((ours.to(theirs.dtype) == theirs).all()) and ours.shape == theirs.shape


@pytest.mark.parametrize("shape", [(24, 256), (300, 512)], ids=["small", "ragged blocks"])
@pytest.mark.parametrize("case", CASES)
def test_reads_what_the_library_decompresses(tmp_path: Path, library: Any, case: str, shape: tuple[int, int]) -> None:
    module = adversarial(case, *shape)
    theirs = decompressed(case, module)
    label = case.split("/")[0]
    tensors = {f"{LINEAR}.{part}": tensor for part, tensor in module.items()}
    entry = opened(tmp_path, tensors, quantization(label, **scheme_of(case))).entries[f"{LINEAR}.weight"]
    assert entry.shape == shape and entry.packed is not None
    ours = entry.read(0, shape[0])
    assert ours.isfinite().all() and ours.count_nonzero() > ours.numel() / 2
    assert same(ours, theirs)
    packed = entry.packed(0, shape[0]).dense()
    if label == "nvfp4-pack-quantized":
        # Our order is ((code x scale) x 1/global), the library's code x (scale / global): two roundings each.
        assert ((packed - ours).abs() <= ours.abs() * 2.0**-22).all()
        if math.log2(float(module["weight_global_scale"])) % 1 == 0:
            assert torch.equal(packed, ours)
    else:
        assert torch.equal(packed, ours)
    for first, last in ((3, 13), (0, 1), (shape[0] - 20, shape[0])):
        assert torch.equal(entry.read(first, last), ours[first:last])
    if "/block" in case:
        with pytest.raises(InputError, match="row 3 begins none"):
            entry.packed(3, 13)
    first, last = (128, 300) if "/block" in case and shape[0] > 128 else (0, 13) if "block" in case else (3, 13)
    assert torch.equal(entry.packed(first, last).dense(), packed[first:last])


@pytest.mark.parametrize(
    "preset", ["FP8_DYNAMIC", "FP8", "FP8_BLOCK", "NVFP4", "NVFP4A16", "MXFP4", "W4A16", "W8A8", "W8A16", "MXFP8"]
)
def test_reads_what_the_library_compresses(tmp_path: Path, library: Any, preset: str) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    rows, columns = 64, 256
    weight = torch.randn(rows, columns, generator=generator(0)) * 0.05
    weight[3] = 0
    weight[5, 7], weight[9] = 40.0, weight[9] * 1e-5
    weight = weight.bfloat16()
    scheme = preset_name_to_scheme(preset, ["Linear"])
    args = scheme.weights
    parts = {
        "channel": weight.view(rows, 1, columns),
        "tensor": weight.view(1, 1, -1),
        "block": weight.view(1, rows, 2, 128).transpose(1, 2).reshape(1, 2, -1),
    }.get(args.strategy, weight.view(rows, -1, args.group_size or 1))
    whole = generate_gparam(weight.min(), weight.max()) if args.strategy == "tensor_group" else None
    scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), args, whole)
    scale = scale.reshape(1) if args.strategy == "tensor" else scale
    module = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    module |= {} if whole is None else {"weight_global_scale": whole}
    label = infer_module_format(torch.nn.Linear, scheme).value
    compressor = BaseCompressor.get_value_from_registry(label)
    stored = compressor.compress(module, scheme)
    tensors = {f"{LINEAR}.{part}": tensor for part, tensor in stored.items()}
    tensors[f"{LINEAR}.input_global_scale"] = torch.ones(1)
    settings = {
        "quant_method": "compressed-tensors",
        "format": label,
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme.model_dump(mode="json")},
    }
    checkpoint = opened(tmp_path, tensors, settings)
    ours = checkpoint.entries[f"{LINEAR}.weight"].read(0, rows)
    assert same(ours, compressor.decompress(stored, scheme)["weight"])
    # The outlier rules: between 4 and 6, the largest codes of four bits, half a step is a fifth.
    assert ((ours - weight.float()).norm() / weight.float().norm()) < 0.21
    assert any("input_global_scale" in notice for notice in checkpoint.notices)


@pytest.mark.parametrize("asymmetric", ["", "/asym"])
def test_reordered_inputs_are_held_in_another_format(tmp_path: Path, asymmetric: str) -> None:
    """`actorder` "group": a weight has the scale of the group that its input belongs to."""
    module = adversarial(f"pack-quantized/32{asymmetric}", 24, 256)
    settings = quantization("pack-quantized", group_size=32, actorder="group")
    order = (torch.arange(256) // 32)[torch.randperm(256, generator=generator(5))].int()

    def entry_with(parts: dict[str, Tensor]) -> Entry:
        return opened(tmp_path, {f"{LINEAR}.{k}": v for k, v in parts.items()}, settings).entries[f"{LINEAR}.weight"]

    in_order = entry_with({**module, "weight_g_idx": (torch.arange(256) // 32).int()})
    assert in_order.packed is not None and in_order.fallback is None
    entry = entry_with({**module, "weight_g_idx": order})
    assert entry.packed is None and entry.fallback == "int8" and entry.stored == "int4 in groups of 32, act order"
    # The same codes with every scale its own column: what the library gives for groups of one input.
    codes = entry_with({**module, "weight_g_idx": (torch.arange(256) // 32).int()}).read(0, 24)
    scale = module["weight_scale"].float()
    less = codes / scale.repeat_interleave(32, 1)
    if asymmetric:
        points = torch.stack([module["weight_zero_point"].int() >> 4 * n & 15 for n in range(8)], 1).flatten(0, 1)[:24]
        less = (less + points.repeat_interleave(32, 1)).round() - points[:, order.long()]
    assert torch.allclose(entry.read(0, 24), less.round() * scale[:, order.long()], rtol=1e-6, atol=0)
    with pytest.raises(CheckpointError, match="lacks weight_g_idx"):
        entry_with(module)


def test_nvfp4_is_code_times_scale_over_global_scale(tmp_path: Path) -> None:
    packed = torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], [0x21, 0x43, 0x65, 0x87] * 2]).byte()
    scale = torch.tensor([[3.5], [-0.001953125]]).to(torch.float8_e4m3fn)
    whole = torch.tensor([300.7])
    tensors = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": whole}
    checkpoint = opened(
        tmp_path, {f"{LINEAR}.{k}": v for k, v in tensors.items()}, quantization("nvfp4-pack-quantized")
    )
    ours = checkpoint.entries[f"{LINEAR}.weight"].read(0, 2)
    for row in range(2):
        for column in range(16):
            code = int(packed[row, column // 2]) >> 4 * (column % 2) & 15  # the even input is the low half
            value = E2M1[code & 7] * (-1) ** (code >> 3)
            exact = value * float(scale[row, 0]) / float(whole)
            assert abs(float(ours[row, column]) - exact) <= abs(exact) * 2.0**-23
    assert float(ours[0, 1]) > 0 > float(ours[0, 9])


# ---- a whole checkpoint ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", [None, {"type": "float", "num_bits": 8, "dynamic": True}])
def test_activations_that_are_rounded_though_nobody_says_so(tmp_path: Path, activations: dict[str, Any] | None) -> None:
    settings = quantization("float-quantized")
    settings["config_groups"]["group_0"]["input_activations"] = activations
    parts = adversarial("float-quantized/channel/F32", 24, 256)
    tensors = {f"model.decoder.layers.0.mlp.gate_proj.{part}": tensor for part, tensor in parts.items()}
    notices = opened(tmp_path, tensors, settings).notices
    assert [n for n in notices if "rounds both of its sides" in n] == list(notices) and bool(notices) == (
        not activations
    )


def plain_checkpoint(path: Path, config: ModelConfig = CONFIG, dtype: torch.dtype = torch.bfloat16) -> Checkpoint:
    tensors = {released_name(name): t.to(dtype) for name, t in tiny_model(config).state_dict().items()}
    tensors["model.encoder.vision_tower.layers.0.self_attn.q_proj.weight"] = torch.ones(4, 4, dtype=dtype)
    stored = {torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]

    def entry(name: str, tensor: Tensor) -> Entry:
        return Entry(name, tuple(tensor.shape), tensor.nbytes, stored, lambda first, last: tensor[first:last])

    entries = {name: entry(name, tensor) for name, tensor in tensors.items()}
    return Checkpoint(path, "test", config.to_dict(), entries)


def written(folder: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """The folder, and what its config.json says."""
    planned, changes = plan_compressed(checkpoint)
    write_shards(folder, PlannedFolder(planned))
    config: dict[str, Any] = json.loads(json.dumps({**checkpoint.config, **changes}))
    (folder / "config.json").write_text(json.dumps(config))
    return config


def is_quantised(name: str) -> bool:
    return "experts." in name or (
        name.startswith("model.decoder.layers.")
        and name.endswith("_proj.weight")
        and (".self_attn." in name or ".mlp." in name)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_written_and_read_again(tmp_path: Path, dtype: torch.dtype) -> None:
    source = plain_checkpoint(tmp_path, dtype=dtype)
    config = written(tmp_path, source)
    back = open_compressed(tmp_path, config)
    assert ModelConfig.from_dict(back.config) == CONFIG and "quantization_config" not in back.config
    assert back.config["dtype"] == "bfloat16"
    assert set(back.entries) == set(source.entries)
    quantised = 0
    for name, entry in back.entries.items():
        before, after = (one.read(0, one.shape[0]) for one in (source.entries[name], entry))
        assert after.shape == before.shape == entry.shape
        if is_quantised(name):
            quantised += 1
            assert entry.stored == "fp8" and entry.packed is not None
            packed = entry.packed(1, 3)
            assert packed.kind == "fp8" and packed.scale.shape == (2, *entry.shape[1:-1])
            assert torch.equal(packed.dense(), after[1:3])
            # Three bits of mantissa, or half a step of the subnormal codes; the scale is what bfloat16 makes of it.
            peak = before.float().abs().amax(-1, keepdim=True)
            error = (after - before.float()).abs()
            assert (error <= torch.maximum(before.float().abs() * 2**-4, peak / 448 * 2**-9)).all()
            assert (error > 0).any()
        else:
            assert after.dtype == dtype and torch.equal(after, before)
            assert entry.packed is None
    assert quantised == 4 * (4 + 3 + 2) - 2  # full layers have no v_proj
    names = set(stored_tensors(tmp_path))
    assert f"{EXPERTS}.2.gate_proj.weight_scale" in names and f"{EXPERTS}.gate_up_proj" not in names


def test_gate_lies_above_up(tmp_path: Path) -> None:
    source = plain_checkpoint(tmp_path)
    written(tmp_path, source)
    stored = load_file(tmp_path / "model.safetensors")
    fused = source.entries[f"{EXPERTS}.gate_up_proj"].read(0, 3).float()
    for expert in range(3):
        for kind, part in (("gate", fused[expert, :32]), ("up", fused[expert, 32:])):
            codes, scale = (stored[f"{EXPERTS}.{expert}.{kind}_proj.weight{end}"].float() for end in ("", "_scale"))
            assert ((codes * scale - part).norm() / part.norm()) < 0.04


def test_written_from_its_own_reading_is_the_same(tmp_path: Path) -> None:
    config = written(tmp_path / "one", plain_checkpoint(tmp_path))
    written(tmp_path / "two", open_compressed(tmp_path / "one", config))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert set(one) == set(two)
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype and torch.equal(tensor, two[name]), name


def test_rows_of_nothing_and_of_everything(tmp_path: Path) -> None:
    weight = torch.zeros(5, 8)
    weight[1, 0], weight[2, 3], weight[3] = torch.finfo(torch.float32).max, 1e-44, -7.0
    weight[4, :2] = torch.tensor([1e-30, -1e-38])
    name = f"{LINEAR}.weight"
    source = Checkpoint(
        tmp_path,
        "test",
        CONFIG.to_dict(),
        {name: Entry(name, (5, 8), 160, "F32", lambda first, last: weight[first:last])},
    )
    back = open_compressed(tmp_path, written(tmp_path, source)).entries[name].read(0, 5)
    assert back.isfinite().all()
    assert (back[0] == 0).all() and (back[2] == 0).all()
    assert torch.allclose(back[[1, 3]], weight[[1, 3]], rtol=0.01)
    assert abs(float(back[4, 0]) / 1e-30 - 1) < 0.01
    weight[3, 3] = math.nan
    with pytest.raises(CheckpointError, match="not finite"):
        written(tmp_path / "nan", source)


def test_the_library_reads_what_is_written(tmp_path: Path, library: Any) -> None:
    """Its own way: modules of the checkpoint's names, quantised by its config, filled, decompressed."""
    from transformers.utils.quantization_config import CompressedTensorsConfig

    config = written(tmp_path, plain_checkpoint(tmp_path))
    stored = load_file(tmp_path / "model.safetensors")
    model = torch.nn.Module()
    for name, tensor in stored.items():
        if name.endswith(".weight") and tensor.dim() == 2 and "embed_tokens" not in name:
            parent = model
            *path, leaf = name.removesuffix(".weight").split(".")
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, torch.nn.Module())
                parent = getattr(parent, part)
            rows, columns = tensor.shape
            parent.add_module(leaf, torch.nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization import apply_quantization_config
        from compressed_tensors.quantization.utils import is_module_quantized

        settings = CompressedTensorsConfig(**config["quantization_config"])
        apply_quantization_config(model, settings.quantization_config, show_progress=False)
        chosen = {name for name, module in model.named_modules() if is_module_quantized(module)}
        assert chosen == {name.removesuffix(".weight_scale") for name in stored if name.endswith(".weight_scale")}
        compressor = ModelCompressor.from_compression_config(settings)
        compressor.compress_model(model)
        expected = model.state_dict()
        for name, tensor in expected.items():
            assert (tensor.dtype, tensor.shape) == (stored[name].dtype, stored[name].shape), name
        model.load_state_dict({name: stored[name] for name in expected})
        compressor.decompress_model(model)
    back = open_compressed(tmp_path, config).entries
    for name in chosen:
        theirs = model.get_parameter(f"{name}.weight").detach()
        if "experts" in name:
            prefix, number, kind = name.rsplit(".", 2)
            half = {"gate_proj": slice(0, 32), "up_proj": slice(32, 64), "down_proj": slice(None)}[kind]
            stack = "down_proj" if kind == "down_proj" else "gate_up_proj"
            read = back[f"{prefix}.{stack}"].read(int(number), int(number) + 1)[0, half]
        else:
            read = back[f"{name}.weight"].read(0, theirs.shape[0])
        assert same(read, theirs), name


def test_the_released_model_as_others_have_written_it(tmp_path: Path) -> None:
    """The modules that the published FP8-dynamic checkpoints quantise: 11,725 of them, in 26 to 27 GB."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.decoder.embed_tokens.weight": (262144, 2816),
        "model.decoder.self_conditioning.gate_proj.weight": (2112, 2816),
        "model.encoder.vision_tower.encoder.layers.0.self_attn.q_proj.linear.weight": (1152, 1152),
    }
    for layer in range(30):
        prefix, head, kv = f"model.decoder.layers.{layer}", *((512, 2) if layer % 6 == 5 else (256, 8))
        shapes |= {
            f"{prefix}.self_attn.q_proj.weight": (16 * head, 2816),
            f"{prefix}.self_attn.k_proj.weight": (kv * head, 2816),
            **({f"{prefix}.self_attn.v_proj.weight": (kv * head, 2816)} if head == 256 else {}),
            f"{prefix}.self_attn.o_proj.weight": (2816, 16 * head),
            f"{prefix}.self_attn.q_norm.weight": (head,),
            f"{prefix}.mlp.gate_proj.weight": (2112, 2816),
            f"{prefix}.mlp.up_proj.weight": (2112, 2816),
            f"{prefix}.mlp.down_proj.weight": (2816, 2112),
            f"{prefix}.router.proj.weight": (128, 2816),
            f"{prefix}.experts.gate_up_proj": (128, 1408, 2816),
            f"{prefix}.experts.down_proj": (128, 2816, 704),
        }

    def read(first: int, last: int) -> Tensor:
        raise AssertionError("a plan reads nothing")

    entries = {name: Entry(name, shape, 2 * math.prod(shape), "BF16", read) for name, shape in shapes.items()}
    planned, _ = plan_compressed(Checkpoint(tmp_path, "test", {"dtype": "bfloat16"}, entries))
    assert sum(tensor.dtype == "F8_E4M3" for tensor in planned) == 11_725
    assert 26e9 < sum(tensor.nbytes for tensor in planned) < 27e9
    assert len({tensor.name for tensor in planned}) == len(planned)


def test_stays_in_one_matrix(tmp_path: Path) -> None:
    """A stack is asked for one expert at a time, and each expert once, though four tensors are made of it."""
    reads: list[tuple[str, int, int]] = []
    source = plain_checkpoint(tmp_path)
    entries = {}
    for name, entry in source.entries.items():

        def read(first: int, last: int, entry: Entry = entry) -> Tensor:
            reads.append((entry.name, first, last))
            return entry.read(first, last)

        entries[name] = Entry(name, entry.shape, entry.nbytes, entry.stored, read)
    written(tmp_path, Checkpoint(tmp_path, "test", source.config, entries))
    assert [a for a in reads if a[0] == f"{EXPERTS}.gate_up_proj"] == [
        (f"{EXPERTS}.gate_up_proj", e, e + 1) for e in range(3)
    ]
    assert len(reads) == len(set(reads))


# ---- experts --------------------------------------------------------------------------------------------------------


def experts(count: int = 3, outputs: int = 32, inputs: int = 64) -> dict[str, Tensor]:
    tensors = {}
    for number in range(count):
        for place, kind in enumerate(("gate", "up", "down")):
            rows, columns = (inputs, outputs) if kind == "down" else (outputs, inputs)
            prefix = f"{EXPERTS}.{number}.{kind}_proj"
            tensors[f"{prefix}.weight_packed"] = any_bytes(rows, columns // 2, seed=10 * number + place)
            tensors[f"{prefix}.weight_scale"] = e4m3(rows, columns // 16, seed=100 + 10 * number + place)
            tensors[f"{prefix}.weight_global_scale"] = torch.tensor([2.0 ** (number + place)])
            tensors[f"{prefix}.input_global_scale"] = torch.ones(1)
    return tensors


def test_experts_become_stacks(tmp_path: Path) -> None:
    tensors = experts()
    (tmp_path / "alone").mkdir()
    alone = opened(
        tmp_path / "alone", {f"{LINEAR}{n.removeprefix(EXPERTS)}": t for n, t in tensors.items()}, NVFP4
    ).entries
    checkpoint = opened(tmp_path, tensors, NVFP4)
    assert set(checkpoint.entries) == {f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"}
    for stack, kinds in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
        entry = checkpoint.entries[f"{EXPERTS}.{stack}"]
        one = {
            (e, kind): alone[f"{LINEAR}.{e}.{kind}_proj.weight"].read(0, 64 if kind == "down" else 32)
            for e in range(3)
            for kind in kinds
        }
        whole = torch.stack([torch.cat([one[e, kind] for kind in kinds]) for e in range(3)])
        assert entry.shape == whole.shape and entry.packed is not None and entry.stored == "nvfp4"
        assert torch.equal(entry.read(0, 3), whole) and torch.equal(entry.read(1, 2), whole[1:2])
        packed = entry.packed(0, 3)
        assert packed.shape == whole.shape and torch.equal(packed.dense(), whole)
        assert torch.equal(entry.packed(2, 3).dense(), whole[2:]) and torch.equal(packed[1].dense(), whole[1])
    nbytes = sum(t.nbytes for name, t in tensors.items() if "input" not in name)
    assert sum(entry.nbytes for entry in checkpoint.entries.values()) == nbytes
    assert [n for n in checkpoint.notices if "input_global_scale, in 9 places" in n]


NVFP4 = quantization("nvfp4-pack-quantized")


def test_experts_may_be_plain_stacks_or_partly_plain(tmp_path: Path) -> None:
    fused = {f"{EXPERTS}.gate_up_proj": torch.randn(3, 64, 64).bfloat16()}
    entry = opened(tmp_path, fused, NVFP4).entries[f"{EXPERTS}.gate_up_proj"]
    assert entry.packed is None and torch.equal(entry.read(0, 3), fused[entry.name])
    tensors = experts()
    for part in ("packed", "scale", "global_scale"):
        del tensors[f"{EXPERTS}.1.up_proj.weight_{part}"]
    tensors[f"{EXPERTS}.1.up_proj.weight"] = torch.randn(32, 64).bfloat16()
    entry = opened(tmp_path, tensors, NVFP4).entries[f"{EXPERTS}.gate_up_proj"]
    assert entry.packed is None
    assert torch.equal(entry.read(0, 3)[1, 32:], tensors[f"{EXPERTS}.1.up_proj.weight"].float())


# ---- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": "marlin-24"}, "marlin-24"),
        ({"format": "sparse-24-bitmask"}, "sparse-24-bitmask"),
        ({"format": "mxfp6-pack-quantized"}, "mxfp6"),
        ({"format": None}, "format"),
        ({"format": ["float-quantized"]}, "format"),
        ({"format": {"a": 1}}, "format"),
        ({"quantization_status": "frozen"}, "quantization_status"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
        ({"sparsity_config": {"format": "sparse-bitmask"}}, "sparsity_config"),
        ({"config_groups": None}, "config_groups"),
        ({"config_groups": {"group_0": {"weights": None}}}, "group_0"),
        ({"config_groups": {"group_0": 7}}, "group_0"),
        ({"config_groups": {"group_0": {"weights": {"type": "int", "num_bits": 8}}}}, "8 bits"),
        ({"config_groups": {"group_0": {"weights": {"type": [], "num_bits": {}}}}}, "bits"),
        ({"config_groups": {"a": {"format": "marlin-24", "weights": {"type": "float", "num_bits": 8}}}}, "marlin-24"),
        (quantization("float-quantized", block_structure=[0, 128]), "block_structure"),
        (quantization("float-quantized", block_structure=[10**9, 128]), "block_structure"),
        (quantization("float-quantized", block_structure="128"), "block_structure"),
        (quantization("pack-quantized", actorder="group"), "actorder"),
        (quantization("pack-quantized", num_bits=9), "9 bits"),
    ],
)
def test_other_formats_are_refused_by_name(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    tensors = {f"{LINEAR}.weight": e4m3(4, 8, seed=0), f"{LINEAR}.weight_scale": torch.ones(4, 1)}
    opened(tmp_path, tensors, quantization("float-quantized"))
    with pytest.raises(CheckpointError, match=match) as caught:
        opened(tmp_path, tensors, {**quantization("float-quantized"), **change})
    assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("case", "part", "value", "match"),
    [
        ("float-quantized/channel/BF16", "weight_scale", None, "no scales beside it"),
        ("float-quantized/channel/BF16", "weight", None, "without the weight"),
        ("float-quantized/channel/BF16", "weight_scale", torch.ones(23, 1), "shape"),
        ("float-quantized/channel/BF16", "weight_scale", torch.ones(1, 256), "shape"),
        ("float-quantized/channel/BF16", "weight_scale", torch.ones(24, 1).byte(), "U8"),
        ("float-quantized/channel/BF16", "weight_scale", torch.ones(24, 1).double(), "F64"),
        ("float-quantized/channel/BF16", "weight", torch.ones(24, 256).to(torch.float8_e5m2), "F8_E5M2"),
        ("float-quantized/channel/BF16", "weight", torch.ones(2, 12, 256).to(torch.float8_e4m3fn), "shape"),
        ("float-quantized/channel/BF16", "weight", torch.ones(0, 256).to(torch.float8_e4m3fn), "shape"),
        ("float-quantized/channel/BF16", "weight_zero_point", torch.ones(24, 1).byte(), "layouts"),
        ("float-quantized/channel/BF16", "weight_packed", torch.ones(24, 128).byte(), "both"),
        ("float-quantized/channel/BF16", "weight_scale_inv", torch.ones(24, 1), "both"),
        ("int-quantized", "weight_scale", torch.ones(1, 2), "shape"),
        ("nvfp4-pack-quantized/2048", "weight_scale", None, "weight_scale"),
        ("nvfp4-pack-quantized/2048", "weight_global_scale", None, "shape"),
        ("nvfp4-pack-quantized/2048", "weight_global_scale", torch.ones(2), "shape"),
        ("nvfp4-pack-quantized/2048", "weight_global_scale", torch.ones(1).half(), "F16"),
        ("nvfp4-pack-quantized/2048", "weight_scale_2", torch.ones(1), "both"),
        ("nvfp4-pack-quantized/2048", "weight_scale", torch.ones(24, 15).to(torch.float8_e4m3fn), "shape"),
        ("nvfp4-pack-quantized/2048", "weight_scale", torch.ones(24, 16), "F32"),
        ("nvfp4-pack-quantized/2048", "weight_packed", torch.ones(24, 127).byte(), "weight_scale"),
        ("pack-quantized/16", "weight_scale", torch.ones(24, 15).bfloat16(), "weight_scale"),
        ("pack-quantized/16", "weight_scale", torch.ones(24, 256).bfloat16(), "weight_scale"),
        ("pack-quantized/16", "weight_scale", torch.ones(24, 0).bfloat16(), "weight_scale"),
        ("pack-quantized/16", "weight_g_idx", torch.zeros(255).int(), "weight_g_idx"),
        ("pack-quantized/16", "weight_g_idx", torch.full((256,), 16).int(), "16 to 16"),
        ("pack-quantized/16", "weight_g_idx", torch.tensor([-2] + [0] * 255).int(), "-2 to 0"),
        ("pack-quantized/16", "weight_shape", torch.tensor([24, 4096]), "in no width"),
        ("pack-quantized/16", "weight_shape", torch.tensor([24, -1]), "in no width"),
        ("pack-quantized/16", "weight_shape", torch.tensor([23, 256]), "in no width"),
        ("pack-quantized/16", "weight_shape", torch.tensor([24, 256, 1]), "shape"),
        ("pack-quantized/16/asym", "weight_zero_point", torch.zeros(2, 16).int(), "weight_zero_point"),
        ("mxfp4-pack-quantized", "weight_scale", torch.ones(24, 8).to(torch.float8_e4m3fn), "F8_E4M3"),
    ],
)
def test_tensors_that_do_not_go_together(
    tmp_path: Path, case: str, part: str, value: Tensor | None, match: str
) -> None:
    module = adversarial(case, 24, 256)
    module.pop(part, None)
    module |= {} if value is None else {part: value}
    with pytest.raises(CheckpointError, match=match) as caught:
        opened(tmp_path, {f"{LINEAR}.{k}": v for k, v in module.items()}, quantization(case.split("/")[0]))
    assert LINEAR in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("case", "part", "bad", "match"),
    [
        ("float-quantized/channel/BF16", "weight_scale", math.nan, "not finite"),
        ("float-quantized/block/F32", "weight_scale", math.inf, "not finite"),
        ("float-quantized/tensor/F32", "weight_scale", -math.inf, "not finite"),
        ("nvfp4-pack-quantized/2048", "weight_scale", math.nan, "not finite"),
        ("nvfp4-pack-quantized/2048", "weight_global_scale", math.nan, "not finite"),
        ("nvfp4-pack-quantized/2048", "weight_global_scale", 0.0, "must be above 0"),
        ("nvfp4-pack-quantized/2048", "weight_global_scale", 1e-40, "must be above 0"),
        ("nvfp4-pack-quantized/2048", "weight_global_scale", -1.0, "must be above 0"),
        ("mxfp4-pack-quantized", "weight_scale", 255, "not finite"),
        ("pack-quantized/16/asym", "weight_scale", math.nan, "not finite"),
    ],
)
def test_damaged_scales(tmp_path: Path, case: str, part: str, bad: float, match: str) -> None:
    module = adversarial(case, 24, 256)
    flat = module[part].float().reshape(-1)
    flat[-1] = bad
    module[part] = flat.reshape(module[part].shape).to(module[part].dtype)
    entry = opened(
        tmp_path,
        {f"{LINEAR}.{k}": v for k, v in module.items()},
        quantization(case.split("/")[0]),
    ).entries[f"{LINEAR}.weight"]
    assert entry.packed is not None
    for read in (entry.read, entry.packed):
        with pytest.raises(CheckpointError, match=match):
            read(0, 24)


@pytest.mark.parametrize(
    ("drop", "add", "match"),
    [
        ([f"{EXPERTS}.1.up_proj.{p}" for p in ("weight_packed", "weight_scale", "weight_global_scale")], {}, "expert"),
        ([f"{EXPERTS}.2.down_proj.weight_scale"], {}, "lacks the weight_scale"),
        ([], {f"{EXPERTS}.3.up_proj.weight": torch.ones(32, 64)}, "3"),
        ([], {f"{EXPERTS}.99999999999.up_proj.weight": torch.ones(32, 64)}, "999"),
        ([], {f"{EXPERTS}.gate_up_proj": torch.ones(3, 64, 64)}, "twice"),
    ],
)
def test_experts_that_are_missing_or_too_many(
    tmp_path: Path, drop: list[str], add: dict[str, Tensor], match: str
) -> None:
    tensors = {name: tensor for name, tensor in experts().items() if name not in drop} | add
    if "99999999999" in "".join(add):  # no number of an expert: passed on, and then nobody's tensor
        assert f"{EXPERTS}.99999999999.up_proj.weight" in opened(tmp_path, tensors, NVFP4).entries
    else:
        with pytest.raises(CheckpointError, match=match):
            opened(tmp_path, tensors, NVFP4)


def test_experts_of_other_shapes(tmp_path: Path) -> None:
    tensors = experts()
    small = experts(outputs=16)
    tensors |= {name: small[name] for name in small if ".1.up_proj" in name}
    with pytest.raises(CheckpointError, match="shape"):
        opened(tmp_path, tensors, NVFP4)


@pytest.mark.parametrize("name", ["x" * 201, "a\nb", "a\x1b[31m"])
def test_names_that_no_sentence_could_quote(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="called so") as caught:
        opened(tmp_path, {name: torch.ones(1)}, NVFP4)
    assert len(str(caught.value)) < 500 and str(caught.value).isprintable()


def test_needs_a_quantization_config(tmp_path: Path) -> None:
    wrong: list[Any] = [None, 7, []]
    for settings in wrong:
        with pytest.raises(CheckpointError, match="quantization_config"):
            open_compressed(tmp_path, {**CONFIG.to_dict(), "quantization_config": settings})
