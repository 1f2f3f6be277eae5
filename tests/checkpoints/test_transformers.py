"""checkpoints/load.py and save.py beside transformers: each reads what the other writes, with the same logits."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_checkpoints import edit, stir_

from sfumato.checkpoints.load import PLAIN, load
from sfumato.checkpoints.locate import NANO
from sfumato.checkpoints.save import save
from sfumato.model.cache import KVCache
from sfumato.model.config import FULL, SLIDING
from sfumato.model.network import Model


@pytest.fixture(scope="module")
def theirs() -> Any:
    """A tiny model of transformers' with vision, its layer scalars different in encode and denoise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    text = transformers.DiffusionGemmaTextConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=16,
        sliding_window=8,
        layer_types=[SLIDING, SLIDING, FULL],
        use_bidirectional_attention="vision",
        **RELEASED_SPELLING,
    )
    size = dict.fromkeys(("hidden_size", "intermediate_size", "head_dim", "position_embedding_size"), 16)
    count = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1)
    config = transformers.DiffusionGemmaConfig(
        text_config=text, vision_config={"model_type": "gemma4_vision", **size, **count}, canvas_length=8
    )
    model = transformers.DiffusionGemmaForBlockDiffusion(config).eval()
    with torch.no_grad():
        stir_(dict(model.named_parameters()), seed=3)
        stir_({name: buffer for name, buffer in model.named_buffers() if "layer_scalar" in name}, seed=4)
    return model


@torch.no_grad()
def difference(ours: Model, theirs: Any) -> float:
    """The largest between the hidden states of encode, and logits of denoise with and without soft embedding."""
    from transformers import DynamicCache

    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 97, (2, 21), generator=generator)
    canvas = torch.randint(0, 97, (2, 8), generator=generator)
    past = DynamicCache(config=theirs.config.text_config)
    out = theirs(input_ids=tokens, past_key_values=past, decoder_input_ids=canvas)
    again = theirs(past_key_values=past, decoder_input_ids=canvas, self_conditioning_logits=out.logits)
    cache = KVCache.allocate(ours.config, 2, 64)
    hidden = ours.encode(tokens, cache)
    logits = ours.logits(ours.denoise(canvas, cache))
    soft = ours.ops.soft_embedding(out.logits, ours.embed_tokens.weight, ours.embed_scale)
    pairs = (
        (hidden, out.encoder_last_hidden_state),
        (logits, out.logits),
        (ours.logits(ours.denoise(canvas, cache, soft)), again.logits),
    )
    return max(float((one - two).abs().max()) for one, two in pairs)


RELEASED_SPELLING: dict[str, Any] = {"global_head_dim": 32, "num_global_key_value_heads": 1}


def respell(folder: Path) -> None:
    """transformers' config.json in the release's spelling."""

    def change(raw: dict[str, Any]) -> None:
        del raw["text_config"]["per_layer_config"]
        raw["text_config"] |= RELEASED_SPELLING

    edit(folder / "config.json", change)


@pytest.mark.parametrize(("spelling", "shard"), [("released", "30KB"), ("per_layer_config", "5GB")])
def test_theirs_loads_here(theirs: Any, tmp_path: Path, spelling: str, shard: str) -> None:
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors").exists() == (shard == "5GB")
    if spelling == "released":
        respell(tmp_path)
    notices: list[str] = []
    ours = load(tmp_path, replace(PLAIN, ops="reference"), notice=notices.append)
    assert len(notices) == 1
    assert "vision" in notices[0] and "\n" not in notices[0]
    assert difference(ours, theirs) < 1e-4
    scalars = ours.state_dict()
    assert not torch.equal(scalars["layers.0.encode_scalar"], scalars["layers.0.denoise_scalar"])


@pytest.mark.parametrize(("dtype", "shard_bytes"), [(torch.float32, 20_000), (torch.bfloat16, 1 << 30)])
def test_ours_loads_in_theirs(tmp_path: Path, model: Model, shard_bytes: int, dtype: torch.dtype) -> None:
    """No vision config of its own: what is written makes transformers build a small tower."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
    of_theirs: Any = transformers.DiffusionGemmaForBlockDiffusion
    save(model.to(dtype), tmp_path, shard_bytes=shard_bytes, generation={"max_denoising_steps": 9})
    theirs, report = of_theirs.from_pretrained(tmp_path, output_loading_info=True)
    assert theirs.dtype == dtype
    assert report["unexpected_keys"] == set() and report["mismatched_keys"] == set()
    assert all(".vision_tower." in name or ".embed_vision." in name for name in report["missing_keys"])
    assert sum(p.numel() for p in theirs.model.encoder.vision_tower.parameters()) < 30_000
    assert theirs.generation_config.max_denoising_steps == 9
    assert theirs.generation_config.eos_token_id == [1, 5]
    theirs = of_theirs.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert difference(load(tmp_path, replace(PLAIN, dtype="float32", ops="reference")), theirs) < 1e-4


def test_nano_loads_in_theirs() -> None:
    from transformers import DiffusionGemmaForBlockDiffusion

    theirs = DiffusionGemmaForBlockDiffusion.from_pretrained(NANO, dtype=torch.float32).eval()
    ours = load("nano", replace(PLAIN, dtype="float32", ops="reference"))
    assert difference(ours, theirs) < 1e-4
    assert list(ours.config.eos_ids) == theirs.generation_config.eos_token_id
    assert sum(p.numel() for p in theirs.model.encoder.vision_tower.parameters()) < 30_000


def test_vision_config_survives(theirs: Any, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path / "a")
    save(load(tmp_path / "a", PLAIN), tmp_path / "b")
    a, b = (json.loads((tmp_path / name / "config.json").read_text()) for name in "ab")
    assert b["vision_config"] == a["vision_config"]
    assert {b[name] == a[name] for name in ("image_token_id", "boi_token_id", "eoi_token_id")} == {True}
