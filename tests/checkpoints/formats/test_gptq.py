"""checkpoints/formats/gptq.py: GPTQModel's and AutoRound's modules, held against their own dequantisation, written here
in plain torch from their sources; act order is held in another format, and said so.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_config, tiny_model
from torch import Tensor

from sfumato.checkpoints.checkpoint import Checkpoint
from sfumato.checkpoints.detect import open_checkpoint
from sfumato.checkpoints.load import load
from sfumato.checkpoints.names import released_name
from sfumato.errors import CheckpointError
from sfumato.model.network import Model
from sfumato.ops.packed import Packed
from sfumato.options import LoadOptions

CONFIG = tiny_config(hidden_size=64, expert_size=32, intermediate_size=96, num_experts=3)
LINEAR = "model.decoder.layers.0.mlp.down_proj"
EXPERTS = "model.decoder.layers.0.experts"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "checkpoint_format": "gptq"}
AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "data_type": "int", "sym": True}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def opened(folder: Path, tensors: dict[str, Tensor], settings: dict[str, Any]) -> Checkpoint:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**CONFIG.to_dict(), "quantization_config": settings}))
    return open_checkpoint(folder)


def packed_rows(codes: Tensor, bits: int) -> Tensor:
    """Codes [I, O] as GPTQ's words [I x bits / 32, O]: bit by bit, from the lowest on."""
    every = torch.stack([codes.long() >> place & 1 for place in range(bits)], 1).flatten(0, 1)
    every = torch.nn.functional.pad(every, (0, 0, 0, -len(every) % 32)).unflatten(0, (-1, 32))
    words = (every << torch.arange(32)[:, None]).sum(1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def module(
    inputs: int,
    outputs: int,
    bits: int,
    group: int,
    seed: int = 0,
    zeros: str | int = "any",
    index: Tensor | None = None,
) -> dict[str, Tensor]:
    """Any codes; zeros as the file has them, any or one number; scales of half precision."""
    groups, draw = math.ceil(inputs / group), generator(seed)
    codes = torch.randint(0, 1 << bits, (inputs, outputs), generator=draw)
    stored = torch.randint(0, 1 << bits, (outputs, groups), generator=draw)
    stored = stored if zeros == "any" else torch.full((outputs, groups), int(zeros))
    parts = {
        "qweight": packed_rows(codes, bits),
        "qzeros": packed_rows(stored, bits).T,
        "scales": (torch.randn(groups, outputs, generator=draw) * 0.01).half(),
    }
    return parts if index is None else {**parts, "g_idx": index.int()}


def named(prefix: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{part}": tensor for part, tensor in parts.items()}


def shifted(words: Tensor, bits: int) -> Tensor:
    """Codes of words along the first axis, as both tools take them out with shifts (2, 4 and 8 bits)."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes = torch.bitwise_right_shift(words.unsqueeze(1), shifts[:, None]) & (1 << bits) - 1
    return codes.flatten(0, 1)


def three_bits(words: Tensor) -> Tensor:
    """Codes of 3 bits along the first axis, word by word as both tools' sources have it."""
    shifts = torch.tensor([[*range(0, 33, 3), 0], [0, *range(1, 32, 3)], [0, *range(2, 30, 3), 0]])
    code = torch.bitwise_right_shift(
        words.reshape(-1, 3, 1, words.shape[1]).expand(-1, 3, 12, -1), shifts[:, :, None].int()
    )
    code[:, 0, 10] = code[:, 0, 10] & 0x3 | code[:, 1, 0] << 2 & 0x4
    code[:, 1, 11] = code[:, 1, 11] & 0x1 | code[:, 2, 0] << 1 & 0x6
    code = code & 7
    return torch.cat([code[:, 0, :11], code[:, 1, 1:12], code[:, 2, 1:11]], 1).flatten(0, 1)


def codes_of(words: Tensor, bits: int) -> Tensor:
    return three_bits(words) if bits == 3 else shifted(words, bits)


def gptqmodel(parts: dict[str, Tensor], bits: int, group: int, version: int) -> Tensor:
    """GPTQModel's `convert_gptq_v1_to_v2_format_module` and `dequantize_weight`: [I, O] in half precision."""
    qzeros = parts["qzeros"].contiguous()
    if version == 1 and bits != 3:
        ones = sum(1 << place for place in range(0, 32, bits))
        qzeros = qzeros + torch.tensor(ones, dtype=torch.int32)
    zeros = codes_of(qzeros.T.contiguous(), bits).T
    if version == 1 and bits == 3:
        zeros = (zeros + 1) & 7
    code = codes_of(parts["qweight"], bits)
    index = parts.get("g_idx", torch.arange(len(code)) // group).long()
    return parts["scales"][index] * (code.to(torch.int16) - zeros[:, : code.shape[1]].to(torch.int16)[index])


def auto_round(parts: dict[str, Tensor], bits: int, group: int, more: int) -> Tensor:
    """AutoRound's `QuantLinear.forward` of qlinear_torch_zp (`more` is 1) and qlinear_torch (0): [I, O]."""
    zeros = codes_of(parts["qzeros"].T.contiguous(), bits).T.to(torch.int16) + more
    code = codes_of(parts["qweight"], bits).to(torch.int16)
    scales, zeros = (part.repeat_interleave(group, 0)[: len(code)] for part in (parts["scales"], zeros))
    weight: Tensor = scales * (code - zeros)
    return weight


def same(ours: Tensor, theirs: Tensor) -> bool:
    """To the bit in the tool's half precision, but for the sign of zero."""
    return bool((ours.half() == theirs.T).all()) and ours.shape == theirs.T.shape


@pytest.mark.parametrize("index", ["none", "in order", "unset"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("bits", "inputs", "group"), [(4, 128, 32), (2, 128, 64), (8, 128, 128), (3, 96, 32), (4, 96, 64)]
)
def test_what_gptqmodel_makes_of_it(
    tmp_path: Path, bits: int, inputs: int, group: int, version: int, index: str
) -> None:
    order = {"none": None, "in order": torch.arange(inputs) // group, "unset": torch.full((inputs,), -1)}[index]
    parts = module(inputs, 64, bits, group, index=order)
    settings = {**GPTQ, "bits": bits, "group_size": group, "checkpoint_format": f"gptq{'_v2' * (version == 2)}"}
    entry = opened(tmp_path, named(LINEAR, parts), settings).entries[f"{LINEAR}.weight"]
    if index == "unset":
        del parts["g_idx"]
    theirs = gptqmodel(parts, bits, group, version)
    ours = entry.read(0, 64)
    assert entry.shape == (64, inputs) and same(ours, theirs) and ours.unique().numel() > 100
    assert torch.equal(entry.read(5, 40), ours[5:40])
    assert entry.packed is not None and entry.fallback is None
    packed = entry.packed(0, 64)
    assert packed.kind == ("int8" if bits == 8 else "int4") and torch.equal(packed.dense(), ours)
    assert packed.group == math.gcd(group, inputs)  # 64 does not divide 96
    assert torch.equal(entry.packed(5, 40).dense(), ours[5:40])


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 32), (2, 16), (3, 32)])
def test_symmetric_codes_need_no_bias(tmp_path: Path, bits: int, group: int) -> None:
    parts = module(96, 64, bits, group, zeros=(1 << bits - 1) - 1)
    settings = {**GPTQ, "bits": bits, "group_size": group}
    entry = opened(tmp_path, named(LINEAR, parts), settings).entries[f"{LINEAR}.weight"]
    assert entry.packed is not None and entry.packed(0, 64).bias is None
    assert torch.equal(entry.packed(0, 64).dense(), entry.read(0, 64))
    assert same(entry.read(0, 64), gptqmodel(parts, bits, group, 1))


@pytest.mark.parametrize(
    ("packing", "more"),
    [
        ("auto_round:auto_gptq", 1),
        ("auto_round:auto_gptq:exllamav2", 1),
        ("auto_round", 0),
        ("auto_round:exllamav2", 0),
        ("auto_round:gptqmodel", 0),
    ],
)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_what_auto_round_makes_of_it(tmp_path: Path, packing: str, more: int, bits: int) -> None:
    parts = module(96, 64, bits, 64)
    settings = {**AUTO_ROUND, "bits": bits, "group_size": 64, "packing_format": packing}
    entry = opened(tmp_path, named(LINEAR, parts), settings).entries[f"{LINEAR}.weight"]
    assert same(entry.read(0, 64), auto_round(parts, bits, 64, more)) and entry.packed is not None
    assert torch.equal(entry.packed(0, 64).dense(), entry.read(0, 64))


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_widths_that_auto_round_alone_packs_one_after_another(tmp_path: Path, bits: int) -> None:
    parts = module(96, 64, bits, 32, zeros=3)
    every = torch.randint(0, 1 << bits, (96, 64), generator=generator(1))
    parts["qweight"] = packed_rows(every, bits)
    settings = {**AUTO_ROUND, "bits": bits, "packing_format": "auto_round:auto_gptq"}
    entry = opened(tmp_path, named(LINEAR, parts), settings).entries[f"{LINEAR}.weight"]
    assert same(entry.read(0, 64), parts["scales"].repeat_interleave(32, 0) * (every - 4).to(torch.int16))
    assert entry.packed is not None and entry.packed(0, 64).kind == "int8"
    with pytest.raises(CheckpointError, match="in planes"):
        opened(tmp_path, named(LINEAR, parts), {**GPTQ, "bits": bits})


def test_awq_by_auto_round(tmp_path: Path) -> None:
    codes = torch.randint(0, 16, (32, 8), generator=generator(0))  # [I, O]
    words = sum(codes[:, output].long() << 4 * place for output, place in enumerate((0, 4, 1, 5, 2, 6, 3, 7)))
    assert isinstance(words, Tensor)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)[:, None]
    parts = {"qweight": words, "qzeros": torch.zeros(1, 1, dtype=torch.int32), "scales": torch.full((1, 8), 0.5).half()}
    settings = {**AUTO_ROUND, "packing_format": "auto_round:auto_awq"}
    entry = opened(tmp_path, named(LINEAR, parts), settings).entries[f"{LINEAR}.weight"]
    assert torch.equal(entry.read(0, 8), codes.T * 0.5)


@pytest.mark.parametrize("bits", [3, 4])
def test_act_order_is_held_in_another_format(tmp_path: Path, bits: int) -> None:
    order = (torch.arange(96) // 32)[torch.randperm(96, generator=generator(3))]
    parts = module(96, 64, bits, 32, index=order)
    settings = {**GPTQ, "bits": bits, "desc_act": True}
    entry = opened(tmp_path, named(LINEAR, parts), settings).entries[f"{LINEAR}.weight"]
    assert same(entry.read(0, 64), gptqmodel(parts, bits, 32, 1))
    assert entry.packed is None and entry.fallback == "int8" and "act order" in entry.stored


def whole(seed: int, order: Tensor | None, expert_order: Tensor | None) -> dict[str, Tensor]:
    """A checkpoint of which the experts and one dense matrix are quantised."""
    tensors: dict[str, Tensor] = {}
    for name, weight in tiny_model(CONFIG).state_dict().items():
        if ".experts." in name:
            inputs, outputs = weight.shape[-1], weight.shape[-2]
            kinds = ("gate_proj", "up_proj") if "gate_up" in name else ("down_proj",)
            for number in range(3):
                for kind in kinds:
                    index = expert_order if kind == "gate_proj" and number == 1 else None
                    # One expert is symmetric and the others are not: their stack has a bias.
                    parts = module(inputs, outputs // len(kinds), 4, 32, seed, 7 if number == 2 else "any", index)
                    stack = released_name(name).rpartition(".")[0]
                    tensors |= named(f"{stack}.{number}.{kind}", parts)
                    seed += 1
        elif released_name(name) == f"{LINEAR}.weight":
            tensors |= named(LINEAR, module(weight.shape[1], weight.shape[0], 4, 32, seed, index=order))
        else:
            tensors[released_name(name)] = weight.bfloat16()
    return tensors


def held_by(model: Model, released: str) -> Any:
    owner, _, leaf = released.removeprefix("model.decoder.").rpartition(".")
    return getattr(model.get_submodule(owner), leaf)


def test_a_whole_checkpoint(tmp_path: Path) -> None:
    mixed = torch.randperm(96, generator=generator(3)) // 32
    checkpoint = opened(tmp_path, whole(0, mixed, mixed[:64].clamp(max=1)), GPTQ)
    notices: list[str] = []
    model = load(checkpoint, LoadOptions(device="cpu", ops="reference"), notice=notices.append)
    held = [one for one in notices if "held as" in one]
    assert len(held) == 2 and all(one.endswith("held as int8") for one in held)
    assert any(one.startswith("1 weight is stored as GPTQ 4-bit, group 32, act order, ") for one in held)
    for released, kind in (
        (f"{LINEAR}.weight", "int8"),
        (f"{EXPERTS}.gate_up_proj", "int8"),
        (f"{EXPERTS}.down_proj", "int4"),
    ):
        own = held_by(model, released)
        assert isinstance(own, Packed) and own.kind == kind
        exact = checkpoint.entries[released].read(0, own.shape[0])
        peak = exact.abs().amax(-1, keepdim=True)
        assert ((own.dense() - exact).abs() <= (0 if kind == "int4" else peak / 254 * 1.001)).all()
    again = load(checkpoint, LoadOptions(device="cpu", ops="reference", quantize="int4"), notice=notices.append)
    own = held_by(again, f"{EXPERTS}.gate_up_proj")
    assert isinstance(own, Packed) and own.kind == "int4"


def test_settings_in_a_file_of_their_own(tmp_path: Path) -> None:
    save_file(
        named(LINEAR, {k: v.contiguous() for k, v in module(96, 64, 4, 32).items()}), tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "desc_act": False}))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.format == "GPTQ 4-bit" and f"{LINEAR}.weight" in checkpoint.entries


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({**GPTQ, "bits": 9}, "bits is 9"),
        ({**GPTQ, "bits": True}, "bits is True"),
        ({**GPTQ, "bits": {"a": 1}}, "bits is"),
        ({**GPTQ, "group_size": 0}, "group_size is 0"),
        ({**GPTQ, "group_size": 10**30}, "group_size is"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "marlin"),
        ({**GPTQ, "checkpoint_format": "gptq_p"}, "gptq_p"),
        ({**GPTQ, "checkpoint_format": ["gptq"]}, "checkpoint_format"),
        ({**GPTQ, "pack_dtype": "int64"}, "int64"),
        ({**GPTQ, "rotation": "hadamard"}, "rotation"),
        ({**AUTO_ROUND, "data_type": "mx_int"}, "mx_int"),
        ({**AUTO_ROUND, "data_type": 7}, "data_type"),
        ({**AUTO_ROUND, "packing_format": "auto_round:fake"}, "fake"),
        ({**AUTO_ROUND, "packing_format": "mlx"}, "mlx"),
        ({**AUTO_ROUND, "packing_format": 7}, "packing_format"),
        ({**AUTO_ROUND, "rotation_config": {"a": 1}}, "rotation_config"),
    ],
)
def test_settings_that_are_refused_by_name(tmp_path: Path, settings: dict[str, Any], match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        opened(tmp_path, named(LINEAR, module(96, 64, 4, 32)), settings)
    assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "value", "match"),
    [
        ("scales", None, "lacks .*scales"),
        ("qzeros", None, "lacks .*qzeros"),
        ("qweight", None, "scales"),
        ("qweight", torch.zeros(12, 64), "F32"),
        ("qweight", torch.zeros(0, 64, dtype=torch.int32), "matrix"),
        ("qweight", torch.zeros(12, 63, dtype=torch.int32), "go together"),
        ("qzeros", torch.zeros(3, 9, dtype=torch.int32), "go together"),
        ("qzeros", torch.zeros(2, 8, dtype=torch.int32), "go together"),
        ("scales", torch.ones(2, 64).half(), "go together"),
        ("scales", torch.ones(3, 64).double(), "F64"),
        ("g_idx", torch.zeros(95, dtype=torch.int32), "go together"),
        ("g_idx", torch.zeros(96), "I32"),
        ("g_idx", torch.zeros(96, 1, dtype=torch.int32), "I32"),
        ("g_idx", torch.full((96,), 3, dtype=torch.int32), "3 to 3"),
        ("g_idx", torch.tensor([-5] + [0] * 95, dtype=torch.int32), "-5 to 0"),
        ("g_idx", torch.full((96,), 2**31 - 1, dtype=torch.int32), "2147483647"),
        ("weight", torch.zeros(64, 96), "twice"),
    ],
)
def test_tensors_that_do_not_go_together(tmp_path: Path, part: str, value: Tensor | None, match: str) -> None:
    parts = module(96, 64, 4, 32, index=torch.arange(96) // 32)
    parts.pop(part, None)
    parts |= {} if value is None else {part: value}
    with pytest.raises(CheckpointError, match=match) as caught:
        opened(tmp_path, named(LINEAR, parts), GPTQ)
    assert LINEAR in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_scales(tmp_path: Path) -> None:
    parts = module(96, 64, 4, 32)
    parts["scales"][1, 3] = math.nan
    entry = opened(tmp_path, named(LINEAR, parts), GPTQ).entries[f"{LINEAR}.weight"]
    with pytest.raises(CheckpointError, match="not finite"):
        entry.read(0, 64)
