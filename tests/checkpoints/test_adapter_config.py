"""checkpoints/adapter_config.py: peft's options give ranks and scales; what they ask for beyond LoRA is refused."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from adapter_files import OPTIONS

from sfumato.checkpoints.adapter_config import PeftOptions, read_options
from sfumato.errors import CheckpointError


def options(folder: Path, **changes: Any) -> PeftOptions:
    (folder / "adapter_config.json").write_text(json.dumps({**OPTIONS, **changes}))
    return read_options(folder)


def test_scales_are_pefts(tmp_path: Path) -> None:
    own = options(
        tmp_path,
        r=8,
        lora_alpha=16,
        rank_pattern={"model.decoder.layers.0.q_proj": 4, r"layers\.1\.k_proj": 2},
        alpha_pattern={"q_proj": 3, "^layers.1.k_proj": 5, r".*\.(up|down)_proj": 7},
    )
    assert own.ranks["model.decoder.layers.0.q_proj"] == 4 and own.ranks["x.model.decoder.layers.0.q_proj"] == 4
    assert own.ranks["model.decoder.layers.1.k_proj"] == 2 and own.ranks["layers.11.k_proj"] == 8
    assert own.scale("layers.9.q_proj", 8) == 3 / 8 and own.scale("layers.9.xq_proj", 8) == 2
    assert own.scale("layers.1.k_proj", 2) == 2.5 and own.scale("a.layers.1.k_proj", 2) == 8
    assert own.scale("layers.0.mlp.up_proj", 7) == 1
    assert options(tmp_path, r=4, lora_alpha=6, use_rslora=True).scale("x", 4) == 3


def test_who_wrote_it(tmp_path: Path) -> None:
    assert options(tmp_path).is_of_peft and options(tmp_path).is_turned is True
    assert options(tmp_path, peft_version="0.18.0").is_turned is False
    assert options(tmp_path, peft_version="0.19.0").is_turned is False
    assert options(tmp_path, peft_version="0.19.1.dev0").is_turned is True
    assert options(tmp_path, peft_version=None).is_turned is None
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    assert not read_options(tmp_path).is_of_peft


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type IA3; only LORA"),
        ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING; only LORA"),
        ({"peft_type": None}, "peft_type None"),
        ({"use_dora": True}, "DoRA; only LoRA without it"),
        ({"lora_bias": True}, "a bias in its factors"),
        ({"bias": "all"}, "bias 'all'; this model has no biases"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"layer_replication": [[0, 4]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "activated LoRA"),
        ({"trainable_token_indices": [1]}, "trainable tokens"),
        ({"use_qalora": True}, "QALoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "has changed the base too; save it with path_initial_model"),
        ({"init_lora_weights": "olora"}, "has changed the base too"),
        ({"r": 0}, "r is 0; it must be a number above 0"),
        ({"lora_alpha": 1e300}, "lora_alpha is 1e.300; it must be a number above 0 and below 2.31"),
        ({"rank_pattern": {f"m{n}.*x": 4 for n in range(100_000)}}, "more than 16 regular expressions"),
        ({"r": True}, "r is True; it must be"),
        ({"r": "8"}, "r is 8; it must be"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan; it must be"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000.*must be"),
        ({"rank_pattern": [1]}, r"rank_pattern is \[1\]; it must map"),
        ({"rank_pattern": {"q_proj": None}}, "q_proj.*is None; it must be a number"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "has the pattern .* not tried here; name the modules"),
        ({"alpha_pattern": {"(a*b*)": 1, "a+b*c*": 1}}, "not tried here"),
        ({"alpha_pattern": {"[": 1}}, "not tried here"),
        ({"alpha_pattern": {f"a{n}.*": 1 for n in range(17)}}, "more than 16 regular expressions; name the modules"),
    ],
)
def test_what_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        options(tmp_path, **changes)
    assert len(str(caught.value)) < 700 and re.match(re.escape(str(tmp_path)), str(caught.value))


def test_hostile_patterns_end_soon(tmp_path: Path) -> None:
    own = options(tmp_path, alpha_pattern={f".*a.*b{n}": 1 for n in range(16)} | {f"m{n}": 2 for n in range(20000)})
    began = time.perf_counter()
    for layer in range(400):
        assert own.alphas[f"model.encoder.language_model.layers.{layer}.aaaaaaaaaaaaaaaaaaaaaaaaaaaaa.q_proj"] == 4
    assert time.perf_counter() - began < 20
