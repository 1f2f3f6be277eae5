"""checkpoints/adapters.py and adapter_experts.py: an adapter comes back as it was written, every layout of experts is
read, and every file that is none is refused in one sentence.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from adapter_files import OPTIONS, are_same, random_adapter, write
from safetensors.torch import load_file
from torch import Tensor

from sfumato.checkpoints.adapters import describe_adapter, read_adapter, write_adapter
from sfumato.errors import CheckpointError, InputError, SfumatoError
from sfumato.model.adapters import Adapter, Factors
from sfumato.model.network import Model

DECODER, ENCODER = "base_model.model.model.decoder.", "base_model.model.model.encoder.language_model."
Q, GATE_UP, DOWN = "layers.0.self_attn.q_proj", "layers.0.experts.gate_up_proj", "layers.0.experts.down_proj"


@pytest.fixture(scope="module")
def model() -> Model:
    """Hidden 24, experts 5 of 12, q 32 wide in layer 0."""
    return tiny.tiny_model()


def pair(model: Model, name: str, seed: int = 0, rank: int = 2) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B of a linear layer."""
    generator = torch.Generator().manual_seed(seed)
    outputs, inputs = model.get_parameter(f"{name}.weight").shape
    return torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)


def linear(model: Model, begin: str, name: str = Q, seed: int = 0) -> dict[str, Tensor]:
    a, b = pair(model, name, seed)
    return {f"{begin}{name}.lora_A.weight": a, f"{begin}{name}.lora_B.weight": b}


# ---- written and read ------------------------------------------------------------------------------------------------


def test_what_is_written_comes_back(model: Model, tmp_path: Path) -> None:
    """Every target, ranks and scales that differ, whole weights, and more files beside."""
    adapter = random_adapter(model)
    other = random_adapter(model, ("attention",), rank=3, alpha=1.0, seed=1)
    whole = {"norm.weight": torch.rand(24), "layers.1.router.scale": torch.rand(24)}
    factors = {**adapter.factors, **{name: other.factors[name] for name in list(other.factors)[:3]}}
    mixed = Adapter(factors, whole=whole)
    (tmp_path / "card").write_text("a card")
    extra: dict[str, str | Path] = {"README.md": tmp_path / "card", "run.json": "{}"}
    write_adapter(mixed, tmp_path / "out", model, base="google/x", extra=extra)
    back = read_adapter(tmp_path / "out", model)
    assert are_same(back, mixed) and back.notices == ()
    assert back.whole.keys() == whole.keys() and all(torch.equal(back.whole[name], whole[name]) for name in whole)
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "run.json"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == names
    assert sorted(file.name for file in tmp_path.iterdir()) == ["card", "out"]
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert not any(name.startswith(f"{ENCODER}self_conditioning") for name in tensors)
    both = {name.removeprefix(DECODER) for name in tensors if "self_conditioning" not in name} - {*tensors}
    assert both == {name.removeprefix(ENCODER) for name in tensors if name.startswith(ENCODER)}


def test_each_pass_keeps_its_own(model: Model, tmp_path: Path) -> None:
    one, two = random_adapter(model), random_adapter(model, ("attention", "self_conditioning"), rank=3, seed=2)
    encode = {name: own for name, own in one.factors.items() if "self_conditioning" not in name}
    for number, adapter in enumerate(
        [Adapter(encode, two.factors), Adapter({}, two.factors), Adapter(encode, {})]
    ):  # fmt: skip
        write_adapter(adapter, tmp_path / str(number), model, base="x")
        assert are_same(read_adapter(tmp_path / str(number), model), adapter)


def test_a_model_of_one_stack_has_its_names(tmp_path: Path) -> None:
    """Gemma 4, which has no encoder and decoder."""
    model = tiny.tiny_model(tiny.tiny_config(is_diffusion=False))
    adapter = random_adapter(model, ("attention", "dense", "experts", "router"))
    write_adapter(adapter, tmp_path / "out", model, base="x")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in tensors)
    assert are_same(read_adapter(tmp_path / "out", model), adapter)


def test_it_is_read_for_a_model_without_numbers(model: Model, tmp_path: Path) -> None:
    with torch.device("meta"):
        blank = Model(model.config, model.ops)
    adapter = random_adapter(model)
    write_adapter(adapter, tmp_path / "out", blank, base="x")
    assert are_same(read_adapter(tmp_path / "out", blank), adapter)


def test_names_of_one_pass_alone(model: Model, tmp_path: Path) -> None:
    """peft trains one of transformers' two stacks where it is asked to; other tools have but one, under either name."""
    for begin, options, is_split in (
        (DECODER, OPTIONS, True),
        (DECODER, {"peft_type": "LORA", "r": 2, "lora_alpha": 4}, False),
        ("base_model.model.model.", OPTIONS, False),
        ("base_model.model.model.language_model.", OPTIONS, False),
    ):
        back = read_adapter(write(tmp_path / "out", linear(model, begin), options), model)
        assert (back.denoise is not None) == is_split
        assert list(back.factors if not is_split else back.denoise or {}) == [f"{Q}.weight"]
        assert any("denoise alone" in sentence for sentence in back.notices) == is_split
    (tmp_path / "out" / "automodel_peft_config.json").write_text("{}")  # NeMo AutoModel has one stack
    back = read_adapter(write(tmp_path / "out", linear(model, DECODER)), model)
    assert back.denoise is None and "its tool trains one stack" in back.notices[0]
    back = read_adapter(write(tmp_path / "encode", linear(model, ENCODER)), model)
    assert back.denoise == {} and list(back.factors) == [f"{Q}.weight"]


def test_two_adapters_for_one_weight(model: Model, tmp_path: Path) -> None:
    """As Unsloth and peft train the tied stacks: equal numbers are one adapter, others are each pass's own."""
    same = linear(model, DECODER) | linear(model, ENCODER)
    assert read_adapter(write(tmp_path / "same", same), model).denoise is None
    other = read_adapter(write(tmp_path / "other", linear(model, DECODER) | linear(model, ENCODER, seed=1)), model)
    assert other.denoise is not None and not torch.equal(other.factors[f"{Q}.weight"].a, other.denoise[f"{Q}.weight"].a)
    pattern = {f"model.decoder.{Q}": 8}
    assert read_adapter(write(tmp_path / "scaled", same, alpha_pattern=pattern), model).denoise is not None


# ---- experts ---------------------------------------------------------------------------------------------------------


def delta(factors: Factors) -> Tensor:
    return factors.delta()


def folded(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """[E, R, I] and [E, R, O] as peft lays them: experts outermost in A, innermost in B."""
    return a.flatten(0, 1), b.permute(2, 1, 0).flatten(1)


def test_experts_of_every_layout(model: Model, tmp_path: Path) -> None:
    """peft's since 0.19.1 and before, with one wrapper or two, stacks, and expert by expert with gate and up apart."""
    own = random_adapter(model, ("experts",)).factors
    (gate_a, gate_b, _), (down_a, down_b, _) = own[GATE_UP], own[DOWN]
    begin = "base_model.model.model.layers.0.experts"
    named = {
        "turned": (
            dict(zip(("lora_A.weight", "lora_B.weight"), folded(down_a, down_b), strict=True))
            | dict(zip(("base_layer.lora_A.weight", "base_layer.lora_B.weight"), folded(gate_a, gate_b), strict=True))
        ),
        "straight": (
            dict(zip(("lora_A.weight", "lora_B.weight"), folded(down_b, down_a), strict=True))
            | dict(zip(("base_layer.lora_A.weight", "base_layer.lora_B.weight"), folded(gate_b, gate_a), strict=True))
        ),
        "swapped wrappers": (
            dict(zip(("lora_A.weight", "lora_B.weight"), folded(gate_a, gate_b), strict=True))
            | dict(zip(("base_layer.lora_A.weight", "base_layer.lora_B.weight"), folded(down_a, down_b), strict=True))
        ),
        "stacks": {
            "gate_up_proj.lora_A": gate_a,
            "gate_up_proj.lora_B": gate_b.mT,
            "down_proj.lora_A": down_a,
            "down_proj.lora_B": down_b.mT,
        },
        "apart": {
            f"{expert}.{part}.lora_{side}.weight": tensor
            for expert in range(5)
            for part, a, b in (
                ("gate_proj", gate_a[expert], gate_b[expert][:, :12]),
                ("up_proj", gate_a[expert], gate_b[expert][:, 12:]),
                ("down_proj", down_a[expert], down_b[expert]),
            )
            for side, tensor in (("A", a), ("B", b.mT))
        },
    }
    for layout, tensors in named.items():
        version = "0.18.0" if layout == "straight" else "0.21.2"  # gate and up of this model are square
        named_so = {f"{begin}.{name}": tensor for name, tensor in tensors.items()}
        folder = write(tmp_path / layout, named_so, peft_version=version)
        back = read_adapter(folder, model).factors
        for name in (GATE_UP, DOWN):
            assert back[name].rank == 2 and torch.allclose(delta(back[name]), delta(own[name])), (layout, name)


def test_gate_and_up_with_an_a_each(model: Model, tmp_path: Path) -> None:
    """They become one weight of twice the rank; an expert that is missing changes nothing; scales may differ."""
    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, Tensor] = {}
    expected = torch.zeros(5, 24, 24)
    for expert, part, first, scale in ((1, "gate", 0, 2.0), (1, "up", 12, 2.0), (4, "up", 12, 5.0)):
        a, b = torch.randn(2, 24, generator=generator), torch.randn(12, 2, generator=generator)
        begin = f"base_model.model.model.layers.0.mlp.experts.{expert}.{part}_proj.lora"
        tensors |= {f"{begin}_A.weight": a, f"{begin}_B.weight": b}
        expected[expert, first : first + 12] = scale * b @ a
    back = read_adapter(write(tmp_path / "out", tensors, alpha_pattern={"experts.4.up_proj": 10}), model)
    assert back.rank == 4 and torch.allclose(delta(back.factors[GATE_UP]), expected, atol=1e-5)


def test_square_experts_lie_as_their_writer_says(tmp_path: Path) -> None:
    square = tiny.tiny_model(tiny.tiny_config(expert_size=24))
    own = random_adapter(square, ("experts",)).factors[DOWN]
    a, b = folded(own.a, own.b)
    name = "base_model.model.model.layers.0.experts.lora"
    tensors = {f"{name}_A.weight": a, f"{name}_B.weight": b}
    new = read_adapter(write(tmp_path / "new", tensors), square).factors[DOWN]
    old = read_adapter(write(tmp_path / "old", tensors, peft_version="0.18.1"), square).factors[DOWN]
    assert torch.allclose(delta(new), delta(own)) and torch.allclose(delta(old), delta(own).mT)
    with pytest.raises(CheckpointError, match=r"square experts.*which way they lie; put peft_version"):
        read_adapter(write(tmp_path / "which", tensors, peft_version=None), square)


# ---- whole weights ---------------------------------------------------------------------------------------------------


def test_whole_weights(model: Model, tmp_path: Path) -> None:
    norm, head, table = torch.rand(24), torch.rand(61, 24), torch.rand(61, 24)
    norms = {f"{begin}norm.weight": norm for begin in (DECODER, ENCODER)}
    tables = {f"{begin}embed_tokens.weight": table for begin in (DECODER, ENCODER)}
    lora = linear(model, "base_model.model.model.")

    def whole(tensors: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
        return dict(read_adapter(write(tmp_path / "out", lora | tensors, **options), model).whole)

    assert list(whole(norms)) == ["norm.weight"]
    assert list(whole(tables, ensure_weight_tying=True)) == ["embed_tokens.weight"]
    assert list(whole({"base_model.model.lm_head.weight": head})) == ["lm_head.weight"]
    assert list(whole({**tables, "base_model.model.lm_head.weight": table})) == ["embed_tokens.weight"]
    assert len(whole({**tables, "base_model.model.lm_head.weight": head})) == 2
    with pytest.raises(CheckpointError, match="embed_tokens without lm_head, which this model ties to it; save both"):
        whole(tables)
    with pytest.raises(CheckpointError, match=r"replaces norm.weight differently for encode and denoise"):
        whole({**norms, f"{ENCODER}norm.weight": norm + 1})
    with pytest.raises(CheckpointError, match=r"replaces norm.weight differently for encode and denoise"):
        whole({f"{DECODER}norm.weight": norm})
    assert list(whole({f"{DECODER}self_conditioning.pre_norm.weight": norm})) == ["self_conditioning.pre_norm.weight"]


# ---- refused ---------------------------------------------------------------------------------------------------------


def with_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        write(folder, tensors)

    return damage


def renamed(before: str, after: str) -> Callable[[Path], Any]:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace(before, after)] = tensors.pop(name)

    return with_tensors(change)


def halved(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:300])


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


A = f"{DECODER}{Q}.lora_A.weight"
EXPERTS = [f"{DECODER}layers.0.experts.lora_{side}.weight" for side in "AB"]
NORM = "model.norm.weight"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a pickle": (pickled, r"pickled factors \(adapter_model.bin\), which can run code .* never read; save it anew"),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "no tensors": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "cut off": (halved, "truncated or damaged"),
    "a page": (lambda folder: (folder / "adapter_config.json").write_text("<html>"), "is not valid JSON"),
    "NaN": (with_tensors(lambda tensors: tensors[A].fill_(float("nan"))), "not finite"),
    "infinite": (with_tensors(lambda tensors: tensors[A].view(-1)[:1].fill_(float("inf"))), "not finite"),
    "A alone": (with_tensors(lambda tensors: tensors.pop(A)), "has lora_B of .*q_proj without its lora_A"),
    "whole numbers": (
        with_tensors(lambda tensors: tensors.update({A: tensors[A].to(torch.int32)})),
        "stored as I32; factors must be F32",
    ),
    "a target that is none": (
        renamed("self_attn.q_proj", "self_attn.qkv"),
        r"\(made for google/some-model\) changes layers.0.self_attn.qkv, which this model does not have",
    ),
    "a layer too many": (renamed("layers.0.", "layers.40."), "changes layers.40.* for another model"),
    "an embedding": (renamed("layers.0.self_attn.q_proj", "embed_tokens"), "factors for embed_tokens, which is run as"),
    "another width": (
        with_tensors(lambda tensors: tensors.update({A: torch.ones(2, 25)})),
        r"has factors \[2, 25\] and \[32, 2\] for .*q_proj, where this model needs \[rank, 24\] and \[32, rank\]",
    ),
    "another rank": (
        lambda folder: (folder / "adapter_config.json").write_text(json.dumps({**OPTIONS, "r": 8})),
        "factors of rank 2 for .*q_proj, and adapter_config.json says 8",
    ),
    "a rank beyond all use": (
        lambda folder: write(
            folder,
            {A: torch.ones(5000, 24), A.replace("lora_A", "lora_B"): torch.ones(32, 5000)},
            {**OPTIONS, "r": 5000},
        ),
        "factors of rank 5000 for .*q_proj; at most 4096 is run here: merge it",
    ),
    "a norm larger than memory": (
        lambda folder: promised(folder, f"base_model.model.{NORM}", 1 << 40),
        "another model",
    ),
    "a name that draws on terminals": (renamed("self_attn.q_proj", "\x1b[31m"), r"changes .*\\x1b\[31m"),
    "experts of another size": (
        with_tensors(lambda tensors: tensors.update(dict.fromkeys(EXPERTS, torch.ones(10, 10)))),
        r"has factors \[10, 10\] and \[10, 10\] for layers.0.experts, which fit none .* for another model",
    ),
    "an expert too many": (
        with_tensors(lambda tensors: tensors.update(expert(9))),
        "which fit none of this model's .* for another model",
    ),
    "two for one weight": (
        with_tensors(lambda tensors: tensors.update({A.replace("base_model.model.", ""): tensors[A]})),
        "which are the same tensor",
    ),
    "images alone": (renamed("model.decoder", "model.encoder.vision_tower"), "changes nothing of the text model"),
    "DoRA": (
        with_tensors(lambda tensors: tensors.update({A.replace("lora_A", "lora_magnitude_vector"): torch.ones(32)})),
        "which is DoRA",
    ),
    "a norm of another size": (
        with_tensors(lambda tensors: tensors.update({f"base_model.model.{NORM}": torch.ones(25)})),
        r"replaces norm.weight by \[25\], where this model has \[24\]",
    ),
    "a weight replaced and adapted": (
        with_tensors(lambda tensors: tensors.update({f"base_model.model.model.{Q}.weight": torch.ones(32, 24)})),
        "has factors for .* and replaces it too",
    ),
}


def promised(folder: Path, name: str, count: int) -> None:
    """A file whose header promises so many numbers, which lie in a hole."""
    head = json.dumps({name: {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}}).encode()
    path = folder / "adapter_model.safetensors"
    path.write_bytes(len(head).to_bytes(8, "little") + head)
    os.truncate(path, 8 + len(head) + 4 * count)


def expert(number: int) -> dict[str, Tensor]:
    name = f"{DECODER}layers.0.experts.{number}.down_proj.lora"
    return {f"{name}_A.weight": torch.ones(2, 12), f"{name}_B.weight": torch.ones(24, 2)}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_is_one_sentence(model: Model, tmp_path: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    change(write(tmp_path / "adapter", linear(model, DECODER)))
    with pytest.raises(InputError, match=message) as caught:
        read_adapter(tmp_path / "adapter", model)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_adapter_folder(model: Model, tmp_path: Path) -> None:
    write(tmp_path / "inner", linear(model, DECODER))
    for name, files_there, message in (
        ("model", ["config.json", "model.safetensors"], "is a whole model and no adapter"),
        ("mlx", ["adapter_config.json", "adapters.safetensors"], "an adapter of mlx; fuse it there"),
        ("empty", [], "has no adapter_config.json"),
    ):
        (tmp_path / name).mkdir()
        for file in files_there:
            (tmp_path / name / file).touch()
        with pytest.raises(CheckpointError, match=message):
            read_adapter(tmp_path / name, model)
    with pytest.raises(CheckpointError, match=r"is no adapter itself, but has one in inner; give one of these"):
        read_adapter(tmp_path, model)
    with pytest.raises(CheckpointError, match=r"is no folder; give the one with adapter_config.json"):
        read_adapter(tmp_path / "inner" / "adapter_config.json", model)


def test_vision_is_left_aside_with_a_sentence(model: Model, tmp_path: Path) -> None:
    vision = {
        f"base_model.model.model.encoder.vision_tower.x.{side}": torch.ones(2, 2) for side in ("lora_A", "lora_B")
    }
    back = read_adapter(write(tmp_path / "out", linear(model, "base_model.model.model.") | vision), model)
    assert len(back.factors) == 1 and "has 2 tensors for vision; they are left aside" in back.notices[0]


def test_damaged_files_are_refused_or_read(model: Model, tmp_path: Path) -> None:
    """Nothing but a sentence, whatever byte is another; `CheckpointError` is an InputError."""
    write_adapter(random_adapter(model), tmp_path, model, base="x")
    draw = random.Random(1)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        path = tmp_path / name
        whole = path.read_bytes()
        end = len(whole) if name.endswith("json") else int.from_bytes(whole[:8], "little") + 8
        for _ in range(100):
            damaged = bytearray(whole)
            for _ in range(draw.randint(1, 4)):
                damaged[draw.randrange(end)] = draw.randrange(256)
            path.write_bytes(damaged)
            with contextlib.suppress(InputError):
                read_adapter(tmp_path, model)
            with contextlib.suppress(InputError):
                describe_adapter(tmp_path)
        path.write_bytes(whole)


# ---- the disk --------------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_what_was_there(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = random_adapter(model, ("attention",)), random_adapter(model, ("attention",), seed=1)
    write_adapter(old, tmp_path / "out", model, base="x")
    (tmp_path / "out" / "log.jsonl").write_text("kept")

    def full(*rest: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SfumatoError, match=r"cannot write .*No space left"):
        write_adapter(new, tmp_path / "out", model, base="x")
    monkeypatch.undo()
    assert are_same(read_adapter(tmp_path / "out", model), old)
    write_adapter(new, tmp_path / "out", model, base="x")
    assert are_same(read_adapter(tmp_path / "out", model), new)
    assert (tmp_path / "out" / "log.jsonl").read_text() == "kept"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_options_that_change_never_stand_beside_old_tensors(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off between the two files: the same options fit either tensors; others are not there."""
    old = random_adapter(model, ("attention",))
    scaled = Adapter({name: own._replace(scale=9.0) for name, own in old.factors.items()})
    write_adapter(old, tmp_path / "out", model, base="x")
    real = os.replace

    def cut_off(source: Path, target: Path) -> None:
        if Path(target).name == "adapter_model.safetensors" and Path(target).parent.name == "out":
            raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "replace", cut_off)
    for adapter, is_there in ((replace(old), True), (scaled, False)):
        with pytest.raises(SfumatoError, match="cannot write"):
            write_adapter(adapter, tmp_path / "out", model, base="x")
        assert (tmp_path / "out" / "adapter_config.json").exists() == is_there


# ---- what it is ------------------------------------------------------------------------------------------------------


def test_a_description_without_its_model(model: Model, tmp_path: Path) -> None:
    adapter = random_adapter(model)
    write_adapter(adapter, tmp_path / "out", model, base="google/x")
    facts = describe_adapter(tmp_path / "out")
    assert (facts.base, facts.ranks, facts.passes) == ("google/x", (2,), "encode and denoise")
    assert facts.targets == {"attention": 14, "dense": 12, "experts": 8, "router": 4, "self_conditioning": 3}
    assert (
        facts.nbytes
        == 4 * facts.parameters
        == sum(
            (own.a.nbytes + own.b.nbytes) * (1 if "self_conditioning" in name else 2)
            for name, own in adapter.factors.items()
        )
    )
