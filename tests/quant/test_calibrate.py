"""quant/calibrate.py: statistics equal what is computed by hand, and rounding by them has smaller errors."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import one_thread, tiny_config, tiny_model
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import quantised
from sfumato.errors import InputError
from sfumato.model.cache import KVCache
from sfumato.model.network import Model, products
from sfumato.ops.contract import Matrix
from sfumato.ops.packed import Packed
from sfumato.quant import calibrate
from sfumato.quant.apply import quantize_
from sfumato.quant.formats import FORMATS, pack
from sfumato.quant.recipes import RECIPES, Recipe, named

WIDE = tiny_config(hidden_size=64, intermediate_size=64, expert_size=32)
"""Everything that a format packs together fits."""
BY_FORMAT = "int4", "int4-g32-asym", "nvfp4", "mxfp4", "int8", "fp8", "fp8-tensor", "fp8-block"


@pytest.fixture(autouse=True)
def single() -> Iterator[None]:
    with one_thread():
        yield


def texts(count: int, length: int, seed: int = 0, vocabulary: int = 61) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (count, length), generator=generator).tolist()


def correlated(rows: int, inputs: int, seed: int = 0) -> Tensor:
    """Inputs [N, I] that move together, of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    return x * torch.linspace(0.05, 2.0, inputs)


def error_of(x: Tensor, weight: Tensor, packed: Packed) -> float:
    """Of the product, relative."""
    exact = x @ weight.mT
    return float((x @ packed.dense().mT - exact).norm() / exact.norm())


# ---- what is heard ---------------------------------------------------------------------------------------------------


def names_of(model: Model) -> dict[str, tuple[int, ...]]:
    names = {module: name for name, module in model.named_modules()}
    return {f"{names[owner]}.{leaf}": tuple(getattr(owner, leaf).shape) for owner, leaf in products(model)}


def test_every_product_has_an_importance_of_its_shape() -> None:
    model = tiny_model(WIDE)
    results = calibrate.importance_of(model, texts(3, 20))
    for name, shape in names_of(model).items():
        assert tuple(results[name].shape) == (*shape[:-2], shape[-1]), name
        assert results[name].dtype == torch.float32 and bool((results[name] >= 0).all()), name
    assert results.keys() == names_of(model).keys()


def test_correlations_have_the_importance_on_their_diagonal() -> None:
    model, some = tiny_model(WIDE), texts(3, 20)
    squares, pairs = calibrate.importance_of(model, some), calibrate.correlation_of(model, some)
    assert squares.keys() == pairs.keys()
    for name, square in squares.items():
        pair = pairs[name]
        assert pair.shape == (*square.shape, square.shape[-1])
        torch.testing.assert_close(pair.diagonal(dim1=-2, dim2=-1), square, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(pair, pair.mT, rtol=1e-4, atol=1e-5)


def test_the_inputs_of_encode_count() -> None:
    """The inputs of the first layer can be computed by hand."""
    model, ids = tiny_model(WIDE), texts(1, 1)
    results = calibrate.importance_of(model, ids)  # one token leaves nothing for a canvas
    first: Any = model.layers[0]
    x = first.input_layernorm(model.embed_tokens(torch.tensor(ids)) * model.embed_scale)
    torch.testing.assert_close(results["layers.0.self_attn.q_proj.weight"], x[0, 0].detach().square())
    assert "self_conditioning.gate_proj.weight" not in results


def test_experts_are_kept_apart_and_count_by_their_share() -> None:
    model, ids = tiny_model(WIDE), texts(1, 1, seed=3)
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    before, block = model.ops, model.layers[0]

    def experts(x_ND: Tensor, index_NJ: Tensor, weight_NJ: Tensor, gate_up: Matrix, down: Matrix) -> Tensor:
        calls.append((x_ND, index_NJ, weight_NJ))
        return before.experts(x_ND, index_NJ, weight_NJ, gate_up, down)

    model.use_(replace(before, experts=experts))
    model.encode(torch.tensor(ids), KVCache.allocate(model.config, 1, 8))
    model.use_(before)
    results = calibrate.importance_of(model, ids)["layers.0.experts.gate_up_proj"]
    x_1D, index_1J, weight_1J = calls[0]
    squares_ED = torch.zeros(model.config.num_experts, model.config.hidden_size)
    count_E1 = torch.zeros(model.config.num_experts, 1)
    for expert, share in zip(index_1J[0], weight_1J[0], strict=True):
        squares_ED[expert], count_E1[expert] = (x_1D[0] * share).square(), 1
    prior_D = squares_ED.sum(0) / count_E1.sum() * calibrate.PRIOR
    torch.testing.assert_close(results, (squares_ED + prior_D) / (count_E1 + calibrate.PRIOR))
    assert block is model.layers[0] and len(torch.unique(results, dim=0)) > 1


def test_a_canvas_counts_with_and_without_a_soft_embedding() -> None:
    model, some = tiny_model(WIDE), texts(2, 20)
    assert "self_conditioning.gate_proj.weight" in calibrate.importance_of(model, some)
    calls = []
    calibrate.importance_of(model, some, progress=lambda done, all_: calls.append((done, all_)))
    assert calls == [(1, 2), (2, 2)]


def test_noise_follows_the_seed() -> None:
    model, some, name = tiny_model(WIDE), texts(2, 20), "layers.1.mlp.down_proj.weight"
    one, again, other = (calibrate.importance_of(model, some, seed)[name] for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_patterns_choose_and_inputs_that_are_the_same_are_kept_once() -> None:
    results = calibrate.correlation_of(tiny_model(WIDE), texts(2, 12), ("layers.*.self_attn.*",))
    assert results and all(".self_attn." in name for name in results)
    assert results["layers.0.self_attn.q_proj.weight"] is results["layers.0.self_attn.k_proj.weight"]
    assert results["layers.0.self_attn.q_proj.weight"] is not results["layers.0.self_attn.o_proj.weight"]


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model(WIDE)
    ids, before = torch.tensor(texts(1, 10)), model.ops
    exact = model.encode(ids, KVCache.allocate(model.config, 1, 16))
    calibrate.importance_of(model, texts(1, 20))
    first: Any = model.layers[0]
    assert model.ops is before and first.ops is before
    assert torch.equal(exact, model.encode(ids, KVCache.allocate(model.config, 1, 16)))


def test_what_cannot_be_calibrated_is_refused() -> None:
    with pytest.raises(InputError, match="no text"):
        calibrate.importance_of(tiny_model(WIDE), [])
    with pytest.raises(InputError, match=r"layers\.0\.\S+ is packed; calibrate the checkpoint `in_full`"):
        calibrate.importance_of(quantize_(tiny_model(WIDE), "int8"), texts(1, 12))
    model = quantize_(tiny_model(WIDE), "int8")
    with pytest.raises(InputError, match="packed already"):
        quantize_(model, "int8", {})


# ---- rounding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", BY_FORMAT)
def test_rounding_by_correlations_loses_less(form: str) -> None:
    """Less than plain packing, and than the search for scales alone, on inputs of the same kind not seen before."""
    assert form in FORMATS
    x = correlated(4096, 192)
    sample, fresh = x[:2048], x[2048:]
    weight = torch.randn(160, 192, generator=torch.Generator().manual_seed(5)) * 0.02
    square = sample.square().mean(0)
    results = calibrate.rounded(weight, form, sample.mT @ sample / len(sample))
    plain, searched = pack(weight, form), pack(weight, form, square)
    assert (results.kind, results.shape, results.group) == (plain.kind, plain.shape, plain.group)
    assert {n: (p.shape, p.dtype) for n, p in results.parts.items()} == {
        n: (p.shape, p.dtype) for n, p in plain.parts.items()
    }
    assert error_of(fresh, weight, results) < 0.8 * error_of(fresh, weight, plain)
    assert error_of(fresh, weight, results) < 0.85 * error_of(fresh, weight, searched)


@pytest.mark.parametrize("form", BY_FORMAT)
def test_without_correlations_it_rounds_to_the_nearest(form: str) -> None:
    """Inputs that do not move together have nothing to hand on: the codes are those of `pack`, but for ties."""
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
    results, plain = calibrate.rounded(weight, form, torch.eye(64)), pack(weight, form)
    same = results.dense() == plain.dense()
    assert float(same.float().mean()) > 0.999
    assert torch.allclose(results.dense(), plain.dense(), atol=float(weight.abs().max()) / 4)


def test_blocks_hand_on_what_one_input_at_a_time_does(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = correlated(512, 96), torch.randn(24, 96, generator=torch.Generator().manual_seed(2))
    whole = calibrate.rounded(weight, "int4", x.mT @ x)
    monkeypatch.setattr(calibrate, "_BLOCK", 7)
    parts = calibrate.rounded(weight, "int4", x.mT @ x)
    assert float((whole.dense() == parts.dense()).float().mean()) > 0.98
    assert math.isclose(error_of(x, weight, whole), error_of(x, weight, parts), rel_tol=0.05)


def test_a_stack_is_rounded_expert_by_expert() -> None:
    xs = [correlated(256, 64, seed) for seed in range(3)]
    weight = torch.randn(3, 32, 64, generator=torch.Generator().manual_seed(3))
    pairs = torch.stack([x.mT @ x for x in xs])
    for form in ("int4", "nvfp4", "int8", "fp8"):
        results = calibrate.rounded(weight, form, pairs)
        assert results.shape == (3, 32, 64)
        for expert in range(3):
            one = calibrate.rounded(weight[expert], form, pairs[expert])
            assert torch.equal(results[expert].dense(), one.dense())


def test_inputs_that_were_never_seen_do_no_harm() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(4))
    weight[3] = 0
    half = torch.zeros(64, 64)
    half[:32, :32] = torch.eye(32)
    for statistics in (torch.zeros(64, 64), half, torch.ones(64, 64)):
        for form in ("int4", "nvfp4", "fp8"):
            value = calibrate.rounded(weight, form, statistics).dense()
            assert bool(value.isfinite().all()) and bool((value[3] == 0).all())
    assert torch.equal(calibrate.rounded(weight, "int4", torch.zeros(64, 64)).dense(), pack(weight, "int4").dense())


# ---- a whole model ---------------------------------------------------------------------------------------------------


def test_a_fitted_model_is_nearer_to_its_original() -> None:
    """On text that was not seen; products whose inputs are almost one direction gain most, random ones still do."""
    config = tiny_config(hidden_size=64, intermediate_size=64, expert_size=32, vocab_size=24)
    exact = tiny_model(config)
    statistics = calibrate.correlation_of(exact, texts(24, 24, vocabulary=24))
    recipe = Recipe("all in 4 bits", (("layers.*.*proj*", "int4"),))
    fitted, plain = quantize_(tiny_model(config), recipe, statistics), quantize_(tiny_model(config), recipe)
    assert all(isinstance(getattr(*place), Packed) for place in products(fitted.layers))
    fresh = torch.tensor(texts(8, 24, seed=9, vocabulary=24))

    def miss(model: Model) -> float:
        logits = [one.logits(one.encode(fresh, KVCache.allocate(config, 8, 32))) for one in (exact, model)]
        return float((logits[1] - logits[0]).norm() / logits[0].norm())

    assert miss(fitted) < 0.9 * miss(plain)


def test_importance_reaches_the_search_for_scales() -> None:
    model = tiny_model(WIDE)
    statistics = calibrate.importance_of(model, texts(4, 20))
    plain, weighed = quantize_(tiny_model(WIDE), "int4"), quantize_(tiny_model(WIDE), "int4", statistics)
    pairs = zip(products(plain), products(weighed), strict=True)
    equal = [torch.equal(getattr(one, leaf).data, getattr(other, leaf).data) for (one, leaf), (other, _) in pairs]
    assert any(equal) and not all(equal)  # int8 has no search


def test_what_fits_is_correlated_and_the_rest_weighed() -> None:
    model, recipe = tiny_model(WIDE), named("int4")
    sample = texts(4, 20)
    everything = calibrate.calibration_of(model, recipe, sample)
    pairs, squares = calibrate.correlation_of(model, sample), calibrate.importance_of(model, sample)
    assert everything.keys() == pairs.keys()
    assert all(torch.equal(statistics, pairs[name]) for name, statistics in everything.items())
    calls: list[tuple[int, int]] = []
    some = calibrate.calibration_of(model, recipe, sample, 100_000, lambda done, total: calls.append((done, total)))
    assert calls == [(n, 8) for n in range(1, 9)]
    kinds = {name: statistics.dim() - (2 if "experts" in name else 1) for name, statistics in some.items()}
    assert set(kinds.values()) == {0, 1}  # mean squares, correlations
    assert sum(some[name].nbytes for name, kind in kinds.items() if kind) <= 100_000
    for name, statistics in some.items():
        assert torch.equal(statistics, (pairs if kinds[name] else squares)[name])
    none = calibrate.calibration_of(model, recipe, sample, 0)
    assert all(torch.equal(statistics, squares[name]) for name, statistics in none.items())
    quantize_(tiny_model(WIDE), recipe, some)  # takes both


def test_what_was_not_seen_is_packed_plainly() -> None:
    fitted, plain = quantize_(tiny_model(WIDE), "int8", {}), quantize_(tiny_model(WIDE), "int8")
    for (one, leaf), (other, _) in zip(products(fitted), products(plain), strict=True):
        assert torch.equal(getattr(one, leaf).data, getattr(other, leaf).data)


# ---- the page and the benchmark --------------------------------------------------------------------------------------


def test_the_pages_code_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "quantisation.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), names)
    assert isinstance(names["model"], Model)
    assert all(f"`{name}`" in page for name in RECIPES)


def test_the_benchmark_runs_goes_on_and_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "quantised.json"

    def run(*more: str) -> dict[str, Any]:
        arguments = ["--count", "2", "--bands", "easy", "--size", "tiny", "--seconds", "0.01", *more, "-o", str(path)]
        monkeypatch.setattr(sys, "argv", [str(quantised.__file__), *arguments])
        quantised.main()
        results: dict[str, Any] = json.loads(path.read_text())
        return results

    first = run("--rows", "float32;int4")
    assert first["nano"]["float32"]["divergence"] == 0 < first["nano"]["int4"]["divergence"] < 0.1
    assert first["nano"]["int4"]["bytes"] < first["nano"]["float32"]["bytes"] / 2
    assert first["mid"]["int4"]["logit_error"] > 0 and set(first["mid"]) == {"int4"}
    assert len(first["nano"]["int4"]["bands"]["easy"]["outcomes"]) == 2

    def again(*_: object) -> None:
        raise AssertionError("what is on record was measured again")

    monkeypatch.setattr(quantised, "compare", again)
    assert run("--rows", "float32;int4")["nano"] == first["nano"]
    timed = run("--rows", "float32;int4", "--time")
    assert timed["nano"]["int4"]["step"]["median"] > 0 and timed["mid"]["int4"]["step"]["median"] > 0
    assert "| int4 |" in quantised.page(timed)


def test_flips_are_counted_both_ways() -> None:
    assert quantised.flips("1100", "1011")[:2] == (1, 2)
    assert quantised.flips("1111", "1111") == (0, 0, 1.0)
    losses, won, chance = quantised.flips("1" * 10, "0" * 10)
    assert (losses, won) == (10, 0) and math.isclose(chance, 2 / 2**10)
    base = {"bands": {"easy": {"solved": 1.0, "mean_steps": 4.0, "outcomes": "1" * 10}}}
    worse = {"bands": {"easy": {"solved": 0.9, "mean_steps": 4.4, "outcomes": "1" * 9 + "0"}}}
    assert quantised.verdict(worse, base, "int4") == "easy: 10.0% fewer (p = 1.00); easy: 10.0% more steps"
    assert quantised.verdict(base, base, "int4") == "reached"
