"""measure/work.py: the released model's figures from its config alone, and the arithmetic held against the model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny import random_config

from sfumato import ops
from sfumato.errors import InputError
from sfumato.measure import work
from sfumato.measure.parts import Counted
from sfumato.measure.released import RELEASED
from sfumato.model.cache import KVCache
from sfumato.model.config import ModelConfig
from sfumato.model.network import Model, products
from sfumato.ops.packed import Packed
from sfumato.quant.apply import quantize_
from sfumato.quant.recipes import RECIPES


def bf16(config: ModelConfig) -> work.Precision:
    return work.Precision.of(config, "bf16")


@pytest.fixture
def released() -> ModelConfig:
    return ModelConfig.from_dict(RELEASED)


def test_parameters_of_the_released_model(released: ModelConfig) -> None:
    parameters = work.Parameters.of(released)
    assert parameters.total == pytest.approx(25.2e9, abs=0.06e9)  # 25.23 without the self-conditioning
    assert parameters.active == pytest.approx(3.8e9, abs=0.05e9)
    assert parameters.experts == pytest.approx(22.8e9, abs=0.05e9)


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
    weights = [getattr(owner, leaf) for owner, leaf in products(model)]
    packed = sum(weight.nbytes for weight in weights if isinstance(weight, Packed))
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
    needed = work.needs(released, "int4", 32_768)
    parts = ("weight_bytes", "cache_bytes", "logits_bytes", "activation_bytes")
    assert needed["total_bytes"] == sum(needed[part] for part in parts)
    assert needed["cache_bytes"] == KVCache.allocate(released, 1, 32_768, "meta", torch.bfloat16).bytes
    assert work.needs(released, "float32", 32_768)["cache_bytes"] == 2 * needed["cache_bytes"]
    assert needed["logits_bytes"] == 134_217_728
    assert needed["activation_bytes"] == pytest.approx(0.2e9, rel=0.1)  # 193 MB were measured


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
            zero, cached, new = torch.tensor([0]), torch.tensor([context]), (tokens, 0) if is_encode else (0, tokens)
            mask = Mask([0], zero, cached, torch.tensor(new[:1]), *new, layer.window, context, context)
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
    with pytest.raises(InputError) as error:
        work.named_gpu("GTX 970")
    for gpu in work.GPUS:
        assert gpu.name in str(error.value)


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


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.239, "1.24 s"), (0.0831, "83.1 ms"), (4.12e-4, "412 µs"), (None, "–")]
)
def test_durations_for_people(seconds: float | None, text: str) -> None:
    assert work.duration(seconds) == text
