"""`sfumato info`: the released model's figures from its config alone, and the arithmetic held against the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import random_config

from sfumato import cli, ops
from sfumato.cache import KVCache
from sfumato.cli import info
from sfumato.config import ModelConfig
from sfumato.events import InputError
from sfumato.measure import work
from sfumato.model import Model

RELEASED: dict[str, Any] = {
    "model_type": "diffusion_gemma",
    "canvas_length": 256,
    "text_config": {
        "vocab_size": 262_144,
        "hidden_size": 2816,
        "intermediate_size": 2112,
        "num_hidden_layers": 30,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "global_head_dim": 512,
        "num_global_key_value_heads": 2,
        "sliding_window": 1024,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
        "max_position_embeddings": 262_144,
    },
}
"""FACTS section 1, in the release's spelling."""

BF16 = work.PRECISIONS[1]


@pytest.fixture
def released() -> ModelConfig:
    return ModelConfig.from_dict(RELEASED)


@pytest.fixture
def config_json(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(RELEASED))
    return path


def row(config: ModelConfig, precision: str, gpu: work.Gpu, context: int = 1024) -> dict[str, Any]:
    return next(r for r in info.report(config, context, gpu)["precisions"] if r["precision"] == precision)


def test_parameters_of_the_released_model(released: ModelConfig) -> None:
    found = work.Parameters.of(released)
    assert found.total == pytest.approx(25.2e9, abs=0.06e9)  # 25.23 without the self-conditioning
    assert found.active == pytest.approx(3.8e9, abs=0.05e9)
    assert found.experts == pytest.approx(22.8e9, abs=0.05e9)


@pytest.mark.parametrize("seed", range(8))
def test_parameters_are_the_models_own(seed: int) -> None:
    config = random_config(seed)
    with torch.device("meta"):
        model = Model(config, ops.load("reference"))
    assert work.Parameters.of(config).total == sum(p.numel() for p in model.parameters())


def test_parameters_of_the_released_model_are_the_models_own(released: ModelConfig) -> None:
    with torch.device("meta"):
        model = Model(released, ops.load("reference"))
    assert work.Parameters.of(released).total == sum(p.numel() for p in model.parameters())


def test_cache_of_the_released_model(released: ModelConfig) -> None:
    growth, whole = work.cache_bytes(released, 262_144)
    assert growth == 20 * 1024
    assert 262_144 * growth == pytest.approx(5.4e9, abs=0.05e9)
    assert whole - 262_145 * growth == pytest.approx(0.26e9, abs=0.005e9)
    assert work.logits_bytes(released) == pytest.approx(268e6, abs=1e6)


@pytest.mark.parametrize("context", [1, 7, 100, 512])
def test_cache_is_what_the_engine_allocates(context: int, released: ModelConfig) -> None:
    for config in (released, *map(random_config, range(4))):
        real = KVCache.allocate(config, 1, context, "meta", torch.bfloat16)
        assert work.cache_bytes(config, context)[1] == real.bytes


def test_memory_by_precision(released: ModelConfig) -> None:
    weights = work.Parameters.of(released)
    sizes = {p.name: p.weight_bytes(weights) / 1e9 for p in work.PRECISIONS}
    assert sizes["bf16"] == pytest.approx(50.5, abs=0.1)
    assert sizes["fp8"] == pytest.approx(25.25, abs=0.1)
    assert sizes["float32"] == pytest.approx(2 * sizes["bf16"])
    assert sizes["int4 experts"] < 18  # with cache and logits it stays inside what Google names
    assert row(released, "int4 experts", work.named_gpu("RTX 4090"), 262_144)["total_bytes"] < 24e9


def test_floors_at_the_measured_bandwidth_of_an_h200(released: ModelConfig) -> None:
    """FACTS section 5, with its 4.3 TB/s and 790 TFLOP/s; the published figures give a little less."""
    measured = work.Gpu("H200, measured", 141, 4300, 790, 1580)
    for precision, milliseconds in (("bf16", 11.7), ("fp8", 5.9), ("int4 experts", 3.4)):
        found = row(released, precision, measured, 64)
        assert found["floor_ms"] == found["memory_ms"]
        assert found["floor_ms"] == pytest.approx(milliseconds, rel=0.02)
        assert row(released, precision, work.named_gpu("h200"), 64)["floor_ms"] < milliseconds
    step = work.step_work(released, BF16, 64)
    assert step.flops == pytest.approx(2.3e12, rel=0.05)
    vocabulary = work.vocabulary_work(released, BF16, 256)
    assert 2 * vocabulary.flops / step.flops == pytest.approx(1 / 3, abs=0.02)


def test_arithmetic_takes_over_at_long_context(released: ModelConfig) -> None:
    found = row(released, "bf16", work.named_gpu("RTX 4090"), 262_144)
    assert found["floor_ms"] == found["arithmetic_ms"] > found["memory_ms"]
    assert not found["fits"]


def test_a_step_wakes_the_expected_share_of_experts(released: ModelConfig) -> None:
    assert work.distinct_experts(released, 1) == pytest.approx(8 / 128)
    assert work.distinct_experts(released, 256) == pytest.approx(1, abs=1e-6)
    one, many = (work.pass_work(released, BF16, tokens, 0, is_encode=True) for tokens in (1, 256))
    active = work.Parameters.of(released)
    assert one.bytes == pytest.approx(2 * (active.active - active.embedding - active.self_conditioning))
    assert many.flops > 256 * one.flops  # the same products for each token, and more to attend to


def test_what_a_query_sees_is_counted_as_the_mask_has_it() -> None:
    from sfumato.masks import Mask

    config = random_config(3)
    context, tokens = 20, config.canvas_length
    for is_encode in (True, False):
        expected = 0.0
        for layer in config.layers:
            zero, held, new = torch.tensor([0]), torch.tensor([context]), (tokens, 0) if is_encode else (0, tokens)
            mask = Mask([0], zero, held, torch.tensor(new[:1]), *new, layer.window, context, context)
            expected += 4.0 * config.num_heads * layer.head_dim * int(mask.dense_BTS().sum())
        with_it = work.pass_work(config, BF16, tokens, context, is_encode).flops
        weights = work.Parameters.of(config)
        other = weights.other - (weights.self_conditioning if is_encode else 0)
        assert with_it - 2.0 * tokens * (other + weights.experts * weights.chosen) == pytest.approx(expected)


def test_gpus_are_found_by_any_usual_spelling() -> None:
    for spelling in ("RTX 4090", "rtx4090", "4090", "Rtx-4090"):
        assert work.named_gpu(spelling).name == "RTX 4090"
    assert work.named_gpu("dgx spark").bandwidth == 273
    with pytest.raises(InputError) as told:
        work.named_gpu("GTX 970")
    for gpu in work.GPUS:
        assert gpu.name in str(told.value)


def test_a_context_beyond_the_model_is_refused(released: ModelConfig) -> None:
    with pytest.raises(InputError, match="300000 tokens is outside the model's 1 to 262144"):
        info.report(released, 300_000)


@pytest.mark.parametrize("is_folder", [True, False])
def test_json_holds_the_figures(config_json: Path, is_folder: bool, capsys: pytest.CaptureFixture[str]) -> None:
    given = config_json.parent if is_folder else config_json
    assert cli.main(["info", str(given), "--gpu", "H200", "--context", "4096", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"]["total"] == 25_250_986_752
    assert found["cache_bf16"]["bytes_per_token"] == 20_480
    assert found["context"] == 4096
    assert found["gpu"]["name"] == "H200"
    assert [r["fits"] for r in found["precisions"]] == [True] * 4


def test_the_screen_holds_the_figures(config_json: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", str(config_json), "--gpu", "RTX 4090"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in ("25.25 B, 3.84 B active", "20 KiB a token and 262 MB fixed", "50.5 GB", "yes", "no", "memory"):
        assert part in text


def test_without_a_gpu_the_names_are_offered(
    config_json: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(info, "detected_gpu", lambda: None)
    assert cli.main(["info", str(config_json)]) == 0
    assert "--gpu NAME" in capsys.readouterr().out


def test_an_unknown_gpu_of_this_machine_has_a_fit_and_no_floor(
    config_json: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(info, "detected_gpu", lambda: work.Gpu("Some Card", 30))
    assert cli.main(["info", str(config_json)]) == 0
    text = capsys.readouterr().out
    assert "No published figures for Some Card" in text
    assert "floor" not in text


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["nowhere/at/all"], "nowhere/at/all"),
        (["nano", "--gpu", "abacus"], "RTX 4090, RTX 5090"),
        (["nano", "--context", "999999999"], "999999999"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", *arguments]) == 2
    told = capsys.readouterr().err
    assert part in told
    assert told.count("\n") == 1


def test_nano_has_figures_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "nano", "--gpu", "H200", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 1e6 < found["parameters"]["total"] < 10e6


@pytest.mark.parametrize(
    ("value", "text"), [(25_250_986_752, "25.25 B"), (3_840_375_552, "3.84 B"), (1500, "1.50 k"), (0, "0.00")]
)
def test_numbers_for_people(value: float, text: str) -> None:
    assert work.number(value) == text


@pytest.mark.parametrize(
    ("count", "text"), [(50_501_973_504, "50.5 GB"), (262_144_000, "262 MB"), (9.99e9, "9.99 GB"), (12, "12.0 B")]
)
def test_sizes_for_people(count: float, text: str) -> None:
    assert work.size(count) == text
