"""checkpoints/adapters.py beside peft on transformers' model: what either writes the other reads, with the same logits,
beside the weights, merged into them, and taken out again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from adapter_files import OPTIONS, are_same, random_adapter
from reference_passes import furthest, passes_of
from torch import Tensor

from sfumato.checkpoints.adapter_config import Pattern
from sfumato.checkpoints.adapters import read_adapter, write_adapter
from sfumato.errors import InputError
from sfumato.model.adapters import Adapter, Adapters, merge_
from sfumato.model.network import Model

peft = pytest.importorskip("peft", reason="peft is not installed")

CLOSE = 1e-5
SHARP, MIX = 0.3, 0.5
TEXT = r".*(encoder\.language_model|decoder)\..*\b([qkvo]_proj|(gate|up|down)_proj|router\.proj)"
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def oracle() -> Any:
    return tiny.oracle(tiny.tiny_config(), 0, SHARP, MIX)


def twin(name: str = "reference") -> Model:
    return tiny.twin(oracle(), name)


def in_peft(folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(oracle(), folder)


def passes(model: Any) -> dict[str, Tensor]:
    return passes_of(model.base_model.model)


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def run(ours: Model, expected: dict[str, Tensor], adapter: Adapter | None = None) -> float:
    """How far our passes are from the expected ones, with the adapter beside the weights."""
    if adapter is None:
        return furthest(ours, oracle(), expected)
    bank = Adapters(ours)
    lanes = bank.load("it", adapter)
    far = furthest(ours, oracle(), expected, lanes)
    bank.unload("it")
    return far


@pytest.fixture(scope="module")
def base() -> dict[str, Tensor]:
    return passes_of(oracle())


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of everything, written here."""
    folder = tmp_path_factory.mktemp("ours") / "adapter"
    model = twin()
    write_adapter(random_adapter(model, rank=3), folder, model, base="x")
    return folder


# ---- written here ----------------------------------------------------------------------------------------------------


def test_written_here_run_there(ours: Path, base: dict[str, Tensor]) -> None:
    """Loaded by peft without a missing or unexpected name: beside the weights, and as our models run it, in each op."""
    theirs = in_peft(ours)
    names = set(peft.get_peft_model_state_dict(theirs))
    expected = passes(theirs)
    assert len(names) == 2 * (2 * (14 + 12 + 8 + 4) + 3) and apart(expected, base) > 1
    adapter = read_adapter(ours, twin())
    for name in ("reference", "fused"):
        assert run(twin(name), expected, adapter) < CLOSE
    again = ours.with_name("again")
    theirs.save_pretrained(again)
    assert are_same(read_adapter(again, twin()), adapter)


def test_each_pass_its_own_run_there(tmp_path: Path) -> None:
    """Different targets and ranks for encode and denoise."""
    model = twin()
    one, two = random_adapter(model, ("attention", "experts"), seed=2), random_adapter(model, rank=3, seed=3)
    adapter = Adapter(one.factors, two.factors)
    write_adapter(adapter, tmp_path / "out", model, base="x")
    assert run(model, passes(in_peft(tmp_path / "out")), adapter) < CLOSE


def merged_once(theirs: Any) -> Any:
    """Merge as docs/adapters.md says: peft adds both stacks' deltas to what they share, so one must count nothing."""
    from peft.tuners.lora import LoraLayer

    for name, module in theirs.named_modules():
        if ".encoder." in name and isinstance(module, LoraLayer):
            module.set_scale("default", 0)
    return theirs.merge_and_unload()


def test_merged_and_taken_out_there(ours: Path, base: dict[str, Tensor]) -> None:
    """peft merges a file of both stacks twice into what they share; once is what the adapter means."""
    theirs = in_peft(ours)
    expected = passes(theirs)
    theirs.merge_adapter()
    assert apart(passes(theirs), expected) > 0.1
    theirs.unmerge_adapter()
    assert apart(passes(theirs), expected) < CLOSE
    with theirs.disable_adapter():
        assert apart(passes(theirs), base) < CLOSE
    assert apart(passes_of(merged_once(theirs)), expected) < CLOSE


def test_merged_and_taken_out_here(ours: Path, base: dict[str, Tensor]) -> None:
    expected, model = passes(in_peft(ours)), twin("fused")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    unmerge = merge_(model, read_adapter(ours, model))
    assert run(model, expected) < CLOSE
    unmerge()
    assert run(model, base) < CLOSE
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# ---- written there ---------------------------------------------------------------------------------------------------


def trained_there(stir: Callable[[str, Tensor], None], **options: Any) -> Any:
    """A model of peft's whose factors are filled by name."""
    model = peft.get_peft_model(oracle(), peft.LoraConfig(r=2, lora_alpha=3, **options))
    with torch.no_grad():
        for name, tensor in sorted(model.named_parameters(remove_duplicate=False)):
            if "lora_" in name or "modules_to_save" in name:
                stir(name, tensor)
    return model


def by_weight(name: str, tensor: Tensor) -> None:
    """The same numbers for both stacks."""
    neutral = name.replace("encoder.language_model.", "").replace("decoder.", "")
    filled(neutral, tensor)


def filled(name: str, tensor: Tensor) -> None:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    size, middle = (0.3, 0) if tensor.dim() > 1 else (0.1, 1)
    tensor.copy_(torch.randn(tensor.shape, generator=generator) * size + middle)


WAYS: dict[str, tuple[Callable[[str, Tensor], None], dict[str, Any], bool]] = {
    "attention, dense, router, conditioning, of both alike": (by_weight, {"target_modules": TEXT}, True),
    "experts of both alike": (by_weight, {"target_modules": [], "target_parameters": EXPERTS}, True),
    "one kind of experts": (by_weight, {"target_modules": [], "target_parameters": EXPERTS[:1]}, True),
    "all of it, as Unsloth asks, each stack its own": (
        filled,
        {"target_modules": ["q_proj", "o_proj", "up_proj"], "exclude_modules": ".*vision.*", "use_rslora": True},
        False,
    ),
    "all-linear, vision too": (by_weight, {"target_modules": "all-linear"}, True),
    "the decoder alone": (by_weight, {"target_modules": r"model\.decoder\..*\.(q|k)_proj"}, False),
    "the encoder alone, by layers": (
        by_weight,
        {
            "target_modules": r"model\.encoder\.language_model\..*\.(q|up)_proj",
            "rank_pattern": {"q_proj": 3},
            "alpha_pattern": {r"layers\.[01]\.mlp\.up_proj": 11},
        },
        False,
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_written_there_run_here(way: str, tmp_path: Path, base: dict[str, Tensor]) -> None:
    """Beside the weights as peft runs it; merged where encode and denoise are alike, and refused where not."""
    stir, options, is_shared = WAYS[way]
    theirs = trained_there(stir, **options)
    theirs.save_pretrained(tmp_path)
    expected, model = passes(theirs), twin("fused")
    adapter = read_adapter(tmp_path, model)
    assert apart(expected, base) > 0.05
    assert (adapter.denoise is None) == is_shared
    assert run(model, expected, adapter) < CLOSE
    if is_shared:
        merge_(model, adapter)
        assert run(model, expected) < CLOSE
    else:
        with pytest.raises(InputError, match="changes encode and denoise differently"):
            merge_(model, adapter)


def test_whole_modules_of_theirs(tmp_path: Path) -> None:
    """modules_to_save: norms, routers and what reads logits out, merged here as transformers runs them."""
    saved = ["norm", "router", "input_layernorm", "q_norm"]
    theirs = trained_there(by_weight, target_modules=TEXT.replace("|router\\.proj", ""), modules_to_save=saved)
    theirs.save_pretrained(tmp_path)
    model = twin("fused")
    adapter = read_adapter(tmp_path, model)
    assert {"norm.weight", "layers.0.router.scale", "layers.0.router.proj.weight"} <= adapter.whole.keys()
    with pytest.raises(InputError, match="replaces whole weights"):
        Adapters(model).load("it", adapter)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    unmerge = merge_(model, adapter)
    assert run(model, passes(theirs)) < CLOSE
    unmerge()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_patterns_are_looked_up_as_peft_does() -> None:
    from peft.utils.other import get_pattern_key

    patterns = {
        "k_proj": 1,
        "layers.0.q_proj": 2,
        r"layers\.1\.q_proj": 3,
        "^a.o_proj": 4,
        "q_proj": 5,
        r"mlp\.\w*_proj": 6,
        "proj|x": 7,
    }
    own = Pattern.of(patterns, OPTIONS["r"], "alpha_pattern")
    names = ["layers.0.q_proj", "a.layers.1.q_proj", "a.o_proj", "b.a.o_proj", "z.mlp.up_proj", "k_proj", "a.b", "c.x"]
    for name in names:
        assert own[name] == patterns.get(get_pattern_key(list(patterns), name), OPTIONS["r"]), name
