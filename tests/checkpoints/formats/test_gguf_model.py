"""checkpoints/formats/gguf_model.py: models in the kinds of few bits run as their unpacked weights do; NVFP4's factors;
a file without a vocabulary, and what lies beside it.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import copied, whole, write_model
from tiny import tiny_config

from sfumato import LLM
from sfumato.checkpoints.checkpoint import Entry
from sfumato.checkpoints.convert import convert
from sfumato.checkpoints.detect import open_checkpoint
from sfumato.checkpoints.formats import gguf_blocks as blocks
from sfumato.checkpoints.formats.gguf import PlannedBlocks, write_file
from sfumato.checkpoints.formats.gguf_model import open_gguf
from sfumato.checkpoints.formats.gguf_writer import vocabulary_of, write_gguf
from sfumato.checkpoints.load import PLAIN, load
from sfumato.checkpoints.locate import NANO
from sfumato.errors import CheckpointError
from sfumato.model.cache import KVCache
from sfumato.model.config import LayerConfig, ModelConfig, Rope
from sfumato.model.network import Model

QUANTISED = [kind.name for kind in blocks.KINDS.values() if kind.name not in blocks.PLAIN]


def wide_config() -> ModelConfig:
    """A small configuration whose matrices all have rows of 256."""
    sliding, full = LayerConfig(64, 2, 6, Rope(10_000.0)), LayerConfig(128, 1, None, Rope(1e6, 0.25, 1.0, True))
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_heads": 4, "num_experts": 2, "expert_size": 256}
    return tiny_config(
        **{"vocab_size": 70, "top_k_experts": 1, **sizes, "layers": (sliding, replace(full, head_dim=64))}
    )


@torch.no_grad()
def hidden(model: Model) -> torch.Tensor:
    ids = torch.arange(12)[None] % 64
    return model.encode(ids, KVCache.allocate(model.config, 1, 12, "cpu", torch.float32)).float()


def unpacked(entry: Entry) -> Entry:
    """The same values, as if they were stored so."""
    return replace(entry, packed=None, stored="F32", read=lambda first, last: entry.read(first, last).float())


@pytest.mark.parametrize("kind", [kind for kind in QUANTISED if kind not in ("Q8_0", "Q5_0", "Q5_1", "Q4_1")])
def test_a_model_in_few_bits_runs_as_its_values_do(tmp_path: Path, kind: str) -> None:
    def kind_of(name: str, shape: tuple[int, ...]) -> str:
        return "F32" if len(shape) == 1 or "gate_inp" in name or "token_embd" in name else kind

    write_model(tmp_path / "it.gguf", wide_config(), kind_of)
    checkpoint = open_gguf(tmp_path / "it.gguf")
    plain = replace(checkpoint, entries={name: unpacked(entry) for name, entry in checkpoint.entries.items()})
    expected = hidden(load(plain, replace(PLAIN, dtype="float32", ops="reference")))
    assert expected.isfinite().all() and expected.std() > 0.1
    for ops in ("reference", "fused"):
        actual = hidden(load(checkpoint, replace(PLAIN, dtype="float32", ops=ops)))
        assert (actual - expected).abs().max() < 2e-4, ops


def factors(name: str, values: list[float]) -> PlannedBlocks:
    return PlannedBlocks(name, "F32", (len(values),), partial(whole, blocks.encode("F32", torch.tensor(values))))


def nvfp4(name: str, shape: tuple[int, ...]) -> str:
    return "F32" if len(shape) == 1 or "gate_inp" in name or "token_embd" in name else "NVFP4"


def test_factors_of_nvfp4(tmp_path: Path) -> None:
    """A matrix has one beside it, a stack one for each expert; that of the experts' output is the model's own."""
    more = [
        factors("blk.0.attn_q.scale", [0.5]),
        factors("blk.0.attn_q.input_scale", [3.0]),
        factors("blk.1.ffn_gate_up_exps.scale", [2.0, 0.25]),
    ]
    raws = write_model(tmp_path / "it.gguf", wide_config(), nvfp4, more=more)
    entries = open_gguf(tmp_path / "it.gguf").entries
    for name, factor in (
        ("model.decoder.layers.0.self_attn.q_proj.weight", torch.tensor(0.5)),
        ("model.decoder.layers.1.experts.gate_up_proj", torch.tensor([2.0, 0.25])[:, None, None]),
        ("model.decoder.layers.0.experts.down_proj", torch.tensor(1.0)),
    ):
        entry = entries[name]
        expected = blocks.decode("NVFP4", raws[name]) * factor
        assert torch.equal(entry.read(0, entry.shape[0]), expected)
        assert torch.equal(entry.read(1, 2), expected[1:2])
        assert entry.packed is not None and torch.equal(entry.packed(1, 2).dense(), expected[1:2])
    write_model(tmp_path / "it.gguf", wide_config(), nvfp4, more=[factors("blk.0.attn_q.scale", [1.0] * 3)])
    with pytest.raises(CheckpointError, match=r"attn_q.scale is F32 of the shape \[3\]; it must be F32 of one factor"):
        open_gguf(tmp_path / "it.gguf")
    write_model(tmp_path / "it.gguf", wide_config(), lambda *_: "F32", more=more)
    with pytest.raises(CheckpointError, match=r"unexpected tensor 'blk.0.attn_q.scale'"):
        open_gguf(tmp_path / "it.gguf")


@pytest.mark.parametrize("kind", ["NVFP4", "Q4_K", "IQ2_XS", "F32"])
def test_gate_and_up_in_two_tensors(tmp_path: Path, kind: str) -> None:
    """As a converter leaves them that found them apart; NVFP4's factors may lie beside one of them alone."""
    whole_file, apart = tmp_path / "whole.gguf", tmp_path / "apart.gguf"
    write_model(whole_file, wide_config(), lambda name, shape: kind if len(shape) > 1 else "F32")
    metadata, plan = copied(whole_file)
    split: list[PlannedBlocks] = []
    for tensor in plan:
        if "gate_up" in tensor.name:
            (raw,), (count, outputs, inputs) = tensor.parts(), tensor.shape
            for name, part in zip(("ffn_gate_exps", "ffn_up_exps"), raw.chunk(2, dim=1), strict=True):
                name = tensor.name.replace("ffn_gate_up_exps", name)
                split.append(
                    PlannedBlocks(name, kind, (count, outputs // 2, inputs), partial(whole, part.contiguous()))
                )
        else:
            split.append(tensor)
    if kind == "NVFP4":
        split.append(factors("blk.0.ffn_up_exps.scale", [2.0, 4.0]))
    write_file(apart, metadata, split)
    one, two = open_gguf(whole_file).entries, open_gguf(apart).entries
    assert one.keys() == two.keys()
    for layer in (0, 1):
        name = f"model.decoder.layers.{layer}.experts.gate_up_proj"
        expected = one[name].read(0, 2)
        if kind == "NVFP4" and layer == 0:
            expected[:, 256:] *= torch.tensor([2.0, 4.0])[:, None, None]
        assert torch.equal(two[name].read(0, 2), expected)
        packed = two[name].packed
        assert (packed is None) == (kind == "F32")
        assert packed is None or torch.equal(packed(1, 2).dense(), expected[1:])
    write_file(apart, metadata, [tensor for tensor in split if tensor.name != "blk.1.ffn_up_exps.weight"])
    with pytest.raises(CheckpointError, match=r"it lacks the tensor blk\.1\.ffn_up_exps\.weight"):
        open_gguf(apart)


# ---- text -----------------------------------------------------------------------------------------------------------


MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "Solve this Sudoku: 53"}]


def test_a_vocabulary_beside_the_file(tmp_path: Path) -> None:
    path = tmp_path / "nano.gguf"
    write_gguf(open_checkpoint(NANO), path, "BF16")
    assert len(load(path, PLAIN).state_dict()) > 10
    with pytest.raises(CheckpointError, match=r"nano\.gguf has no vocabulary, so .* put the model's tokenizer\.json, "):
        LLM.load(path)
    with pytest.raises(CheckpointError, match="has no vocabulary"):
        convert(path, "gguf-bf16", tmp_path / "other.gguf")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (NANO / name).exists():
            shutil.copy(NANO / name, tmp_path)
    known = LLM.load("nano", ops="fused")
    assert LLM.load(path, ops="fused").encode(MESSAGES) == known.encode(MESSAGES)
    convert(path, "bf16", tmp_path / "folder")
    convert(path, "gguf-bf16", tmp_path / "other.gguf")
    for other in (tmp_path / "folder", tmp_path / "other.gguf"):
        llm = LLM.load(other, ops="fused")
        assert llm.encode(MESSAGES) == known.encode(MESSAGES)
        assert llm.defaults == LLM.load(path, ops="fused").defaults


def test_a_template_beside_a_file_that_has_none(tmp_path: Path) -> None:
    llm = LLM.load("nano", ops="fused")
    write_gguf(open_checkpoint(NANO), tmp_path / "nano.gguf", "BF16", vocabulary_of(llm.tokenizer))
    assert LLM.load(tmp_path / "nano.gguf", ops="fused").template is None
    shutil.copy(NANO / "chat_template.jinja", tmp_path)
    assert LLM.load(tmp_path / "nano.gguf", ops="fused").encode(MESSAGES) == llm.encode(MESSAGES)
