"""`sfumato info`: the released model's figures from its config alone, and the arithmetic held against the model."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import random_config

from sfumato import cli, ops
from sfumato.cli import info
from sfumato.errors import InputError
from sfumato.measure import work
from sfumato.measure.parts import Counted
from sfumato.model.cache import KVCache
from sfumato.model.config import ModelConfig
from sfumato.model.network import Model, products
from sfumato.ops import cpu
from sfumato.ops.packed import Packed
from sfumato.quant.apply import quantize_, samples
from sfumato.quant.recipes import RECIPES

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


def bf16(config: ModelConfig) -> work.Precision:
    return work.Precision.of(config, "bf16")


@pytest.fixture
def released() -> ModelConfig:
    return ModelConfig.from_dict(RELEASED)


@pytest.fixture
def config_json(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(RELEASED))
    return path


def row(config: ModelConfig, recipe: str, gpu: work.Gpu | None = None, context: int = 1024) -> dict[str, Any]:
    return next(r for r in info.report(config, context, gpu)["recipes"] if r["recipe"] == recipe)


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
    assert work.logits_bytes(released) == 256 * 262_144 * 2


@pytest.mark.parametrize("context", [1, 7, 100, 512])
def test_cache_is_what_the_engine_allocates(context: int, released: ModelConfig) -> None:
    for config in (released, *map(random_config, range(4))):
        real = KVCache.allocate(config, 1, context, "meta", torch.bfloat16)
        assert work.cache_bytes(config, context)[1] == real.bytes


@pytest.mark.parametrize("recipe", RECIPES)
def test_weights_are_what_quantising_leaves(recipe: str) -> None:
    """Byte for byte: of every tensor of a model that is really quantised."""
    config = dataclasses.replace(random_config(1), hidden_size=64, intermediate_size=96, expert_size=48, num_heads=4)
    with torch.device("cpu"):
        model = Model(config, ops.load("reference")).to(torch.bfloat16).init_(0)
    plain = sum(t.nbytes for t in model.state_dict().values())
    assert work.needs(config, "bf16", 64)["weight_bytes"] == plain
    quantize_(model, recipe)
    held = [getattr(owner, leaf) for owner, leaf in products(model)]
    packed = sum(weight.nbytes for weight in held if isinstance(weight, Packed))
    left = sum(t.nbytes for t in model.state_dict().values())
    assert packed > 0
    assert work.needs(config, recipe, 64)["weight_bytes"] == packed + left < plain
    counted, kept = Counted.of(model), work.Precision.of(config, recipe)
    assert counted.weights.plain == kept.plain
    for part in ("experts", "dense", "conditioning"):  # beside the matrices, kept counts small norms
        assert getattr(counted.weights, part).bits == pytest.approx(getattr(kept, part).bits, rel=0.05)
        assert getattr(counted.weights, part).product == getattr(kept, part).product


def test_weights_of_the_released_model(released: ModelConfig) -> None:
    sizes = {name: work.needs(released, name, 8192)["file_bytes"] / 1e9 for name in work.PRECISIONS}
    assert sizes["bf16"] == pytest.approx(50.5, abs=0.01)
    assert sizes["float32"] == pytest.approx(2 * sizes["bf16"])
    assert sizes["int8"] == sizes["fp8"] == pytest.approx(26.07, abs=0.01)
    assert sizes["int4-small"] < sizes["int4"] < sizes["nvfp4"] < 18  # what Google names


def test_what_is_needed_is_a_sum(released: ModelConfig) -> None:
    found = work.needs(released, "int4", 32_768)
    parts = ("weight_bytes", "cache_bytes", "logits_bytes", "activation_bytes")
    assert found["total_bytes"] == sum(found[part] for part in parts)
    assert found["cache_bytes"] == KVCache.allocate(released, 1, 32_768, "meta", torch.bfloat16).bytes
    assert work.needs(released, "float32", 32_768)["cache_bytes"] == 2 * found["cache_bytes"]
    assert found["logits_bytes"] == 134_217_728
    assert found["activation_bytes"] == pytest.approx(0.2e9, rel=0.1)  # 193 MB were measured


def test_the_longest_context_is_the_longest(released: ModelConfig) -> None:
    card = work.named_gpu("RTX 5080")
    most = work.most_context(released, "int4-small", card.room)
    assert 8192 < most < released.max_position
    assert work.needs(released, "int4-small", most)["total_bytes"] <= card.room
    assert work.needs(released, "int4-small", most + 1)["total_bytes"] > card.room
    assert work.most_context(released, "bf16", card.room) == 0
    assert work.most_context(released, "int4", work.named_gpu("RTX 4090").room) == released.max_position
    found = row(released, "int4-small")
    assert found["longest_context"]["RTX 5080"] == most
    for one in found["needs"]:
        assert ("RTX 5080" in one["fits"]) == (one["context"] <= most)
        assert "H200" in one["fits"]


def test_contexts_go_as_far_as_the_model(released: ModelConfig) -> None:
    assert info.report(released, 8192)["contexts"] == [8192, 32_768, 262_144]
    assert info.report(released, 1000)["contexts"] == [1000, 8192, 32_768, 262_144]
    short = dataclasses.replace(released, max_position=20_000)
    assert info.report(short, 8192)["contexts"] == [8192, 20_000]
    assert info.report(dataclasses.replace(released, max_position=512), 512)["contexts"] == [512]


def test_a_recipe_that_does_not_fit_the_sizes_says_so(released: ModelConfig) -> None:
    odd = dataclasses.replace(released, expert_size=700)
    assert "nvfp4 packs 16 inputs together and this weight has 700" in row(odd, "nvfp4")["impossible"]
    assert "impossible" not in row(odd, "int8")
    with pytest.raises(InputError, match="700"):
        work.needs(odd, "nvfp4", 64)
    with pytest.raises(InputError, match="choose one of float32, bf16, int8"):
        work.needs(odd, "int3", 64)


def test_gemma_4_has_neither_canvas_nor_conditioning(released: ModelConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config = dataclasses.replace(released, is_diffusion=False)
    assert work.Parameters.of(config).self_conditioning == 0
    with torch.device("meta"):
        model = Model(config, ops.load("reference"))
    assert work.Parameters.of(config).total == sum(p.numel() for p in model.parameters())
    assert work.needs(config, "bf16", 8192)["logits_bytes"] == 2 * config.vocab_size
    info.show(info.report(config, 8192, work.named_gpu("H200")))
    assert "none: one token after another" in capsys.readouterr().out


def test_floors_at_the_measured_bandwidth_of_an_h200(released: ModelConfig) -> None:
    """FACTS section 5, with its 4.3 TB/s and 790 TFLOP/s; the published figures give a little less. The embedding stays
    in bf16, which costs 0.17 ms of FACTS' figures for fewer bits."""
    measured = work.Gpu("H200, measured", 141, 4300, 790, 1580)
    for recipe, milliseconds in (("bf16", 11.7), ("fp8", 6.07), ("int4", 3.57)):
        found = row(released, recipe, measured, 64)
        assert found["floor_ms"] == found["memory_ms"]
        assert found["floor_ms"] == pytest.approx(milliseconds, rel=0.02)
        assert row(released, recipe, work.named_gpu("h200"), 64)["floor_ms"] < milliseconds
    step = work.step_work(released, bf16(released), 64)
    assert step.all_flops == pytest.approx(2.3e12, rel=0.05)
    vocabulary = work.vocabulary_work(released, bf16(released), 256)
    assert 2 * vocabulary.all_flops / step.all_flops == pytest.approx(1 / 3, abs=0.02)


def test_each_product_has_its_own_rate(released: ModelConfig) -> None:
    flops = {name: work.step_work(released, work.Precision.of(released, name), 64).flops for name in work.PRECISIONS}
    assert set(flops["float32"]) == {"float32"} and set(flops["bf16"]) == {"bf16"}
    assert set(flops["int4"]) == {"bf16", "int8"} and set(flops["nvfp4"]) == {"bf16", "fp8"}
    weights = work.Parameters.of(released)
    dense = 2.0 * 256 * (weights.attention + weights.dense + weights.self_conditioning)
    assert flops["int4"]["int8"] == flops["nvfp4"]["fp8"] == dense
    assert flops["fp8"]["fp8"] == dense + 2.0 * 256 * weights.experts * weights.chosen
    assert all(sum(one.values()) == pytest.approx(sum(flops["bf16"].values())) for one in flops.values())
    cost = work.Work(1e12, {"bf16": 1e12, "fp8": 2e12, "int8": 1e12})
    assert work.Gpu("a", 1, 1000, 1, 2).seconds(cost) == pytest.approx((1.0, 3.0))
    assert work.Gpu("a", 1, 1000, 1).seconds(cost) == pytest.approx((1.0, 4.0))  # fp8 is unpacked there
    assert work.Gpu("a", 1, 1000).seconds(cost) == (1.0, None)
    assert work.Gpu("a", 1).seconds(cost) == (None, None)


def test_arithmetic_takes_over_at_long_context(released: ModelConfig) -> None:
    found = row(released, "bf16", work.named_gpu("RTX 4090"), 262_144)
    assert found["floor_ms"] == found["arithmetic_ms"] > found["memory_ms"]
    assert not found["fits"]


def test_a_step_wakes_the_expected_share_of_experts(released: ModelConfig) -> None:
    assert work.distinct_experts(released, 1) == pytest.approx(8 / 128)
    assert work.distinct_experts(released, 256) == pytest.approx(1, abs=1e-6)
    one, many = (work.pass_work(released, bf16(released), tokens, 0, is_encode=True) for tokens in (1, 256))
    active = work.Parameters.of(released)
    assert one.bytes == pytest.approx(2 * (active.active - active.embedding - active.self_conditioning))
    assert many.all_flops > 256 * one.all_flops  # the same products for each token, and more to attend to


def test_what_a_query_sees_is_counted_as_the_mask_has_it() -> None:
    from sfumato.ops.masks import Mask

    config = random_config(3)
    context, tokens = 20, config.canvas_length
    for is_encode in (True, False):
        expected = 0.0
        for layer in config.layers:
            zero, held, new = torch.tensor([0]), torch.tensor([context]), (tokens, 0) if is_encode else (0, tokens)
            mask = Mask([0], zero, held, torch.tensor(new[:1]), *new, layer.window, context, context)
            expected += 4.0 * config.num_heads * layer.head_dim * int(mask.dense_BTS().sum())
        with_it = work.pass_work(config, bf16(config), tokens, context, is_encode).all_flops
        weights = work.Parameters.of(config)
        other = weights.other - (weights.self_conditioning if is_encode else 0)
        assert with_it - 2.0 * tokens * (other + weights.experts * weights.chosen) == pytest.approx(expected)


def test_gpus_are_found_by_any_usual_spelling() -> None:
    for spelling in ("RTX 4090", "rtx4090", "4090", "Rtx-4090"):
        assert work.named_gpu(spelling).name == "RTX 4090"
    assert work.named_gpu("dgx spark").bandwidth == 273
    for spelling in ("4060 Ti", "RTX 4060 Ti", "4060ti 16gb"):
        assert work.named_gpu(spelling).name == "RTX 4060 Ti 16 GB"
    assert work.named_gpu("A100 40GB").memory == 40
    with pytest.raises(InputError, match="A100 40 GB, A100 80 GB"):
        work.named_gpu("A100")
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
    assert [r["recipe"] for r in found["recipes"]] == ["float32", "bf16", *RECIPES]
    assert [r["fits"] for r in found["recipes"]] == [True] * (2 + len(RECIPES))
    for one in found["recipes"]:
        assert [n["context"] for n in one["needs"]] == [4096, 8192, 32_768, 262_144]
        assert set(one["needs"][0]) == {"context", "fits", *work.needs(ModelConfig.from_dict(RELEASED), "bf16", 1)}


def test_the_screen_holds_the_figures(config_json: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", str(config_json), "--gpu", "RTX 4090"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "25.25 B, 3.84 B active",
        "20 KiB a token and 262 MB fixed",
        "50.5 GB",
        "16.1 GB",
        "yes",
        "no",
        "memory",
    ):
        assert part in text


def test_without_a_gpu_the_names_are_offered(
    config_json: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(info, "detected_gpu", lambda: None)
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main(["info", str(config_json)]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    for part in ("--gpu NAME", "24 GB: RTX 3090, RTX 4090, L4", "80 GB and more: A100 80 GB, H100"):
        assert part in text
    for recipe in RECIPES.values():
        assert f" {recipe.name} " in text and recipe.summary in " ".join(text.split())
    assert "float32" not in text


def test_an_unknown_gpu_of_this_machine_has_a_fit_and_no_floor(
    config_json: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(info, "detected_gpu", lambda: work.Gpu("Some Card", 30))
    assert cli.main(["info", str(config_json)]) == 0
    text = capsys.readouterr().out
    assert "No published figures for Some Card" in text
    assert "floor" not in text


def test_operations_are_told_by_kind_of_weights() -> None:
    found = info.operations("cpu")
    assert list(found["obstacles"]) == list(ops.NAMES) and set(found["auto"]) == set(info.KINDS)
    for kind in info.KINDS:
        assert found["obstacles"]["reference"][kind] is None and found["obstacles"]["fused"][kind] is None
        assert "CUDA" in found["obstacles"]["triton"][kind] or "installed" in found["obstacles"]["triton"][kind]
        assert found["obstacles"][found["auto"][kind]][kind] is None
    assert "fp8" in found["obstacles"]["cpu"]["fp8"]
    if cpu.obstacle(torch.bfloat16, samples("int8")) is None:
        assert found["auto"]["int8"] == "cpu" and found["obstacles"]["cpu"]["int8"] is None


def test_auto_takes_triton_where_nothing_is_in_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU that has no FP8 but everything else."""
    refusal = lambda device, packed=(): "no FP8 here" if any(w.kind == "fp8" for w in packed) else None  # noqa: E731
    monkeypatch.setattr("sfumato.ops.triton.obstacle", refusal)
    found = info.operations("cuda")
    assert found["auto"] == {"bf16": "triton", "int8": "triton", "fp8": "fused", "int4": "triton"}
    assert found["obstacles"]["triton"] == {"bf16": None, "int8": None, "fp8": "no FP8 here", "int4": None}
    assert "processor" in found["obstacles"]["cpu"]["bf16"]
    assert info._reasons(found["obstacles"]["triton"]) == "fp8: no FP8 here"


def test_a_survey_says_what_load_does_and_warns_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def obstacle(dtype: torch.dtype | None, packed: Any = ()) -> str:
        warnings.warn("the compiler failed", stacklevel=2)
        return "the compiler failed"

    monkeypatch.setattr("sfumato.ops.cpu.obstacle", obstacle)
    found = {one.name: one for one in ops.survey("cpu", torch.bfloat16)}
    assert found["cpu"] == ("cpu", "the compiler failed", False)
    assert [name for name, one in found.items() if one.is_auto] == ["fused"]


def test_json_and_screen_tell_of_the_operations(config_json: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", str(config_json), "--gpu", "H200", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["operations"]
    assert found == info.operations()
    assert cli.main(["info", str(config_json), "--gpu", "H200"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Operations on this machine, device" in text
    for name in ops.NAMES:
        assert f"{name} " in text
    assert "auto" in text


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["nowhere/at/all"], "nowhere/at/all"),
        (["nano", "--gpu", "abacus"], "RTX 4090, L4, RTX 5090"),
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


@pytest.mark.parametrize(("count", "text"), [(262_144, "256K"), (25_599, "24K"), (2047, "1.9K"), (640, "640")])
def test_tokens_for_people(count: int, text: str) -> None:
    assert work.tokens(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(50_501_973_504, "50.5 GB"), (262_144_000, "262 MB"), (9.99e9, "9.99 GB"), (12, "12.0 B")]
)
def test_sizes_for_people(count: float, text: str) -> None:
    assert work.size(count) == text
