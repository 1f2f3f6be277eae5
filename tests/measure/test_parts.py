"""measure/parts.py: every part of a tiny model is timed, bounded, and stands beside a ceiling. No figure is checked."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest
import torch

from sfumato.errors import InputError
from sfumato.measure import parts, work
from sfumato.measure.plan import BenchPlan
from sfumato.model.network import Model
from sfumato.ops import cpu, load
from sfumato.quant.apply import samples

PLAN = BenchPlan(prompt=48, tokens=64, steps=2, seconds=0.05, streamed=2**22)
PARTS = (
    "prefill", "denoise pass", "read-out", "soft embedding", "accept, renoise, stop", "commit", "commit and first pass",
    "whole step",
)  # fmt: skip


@pytest.fixture
def model() -> Model:
    return parts.random_model(parts.random_config("tiny"), torch.float32, "cpu", "auto")


def test_mid_is_the_model_of_the_first_reading() -> None:
    config = parts.random_config("mid")
    assert work.Parameters.of(config).total == pytest.approx(0.5e9, rel=0.15)
    assert len(config.layers) == 12
    assert [layer.is_sliding for layer in config.layers] == ([True] * 5 + [False]) * 2
    assert (config.hidden_size, config.num_experts, config.top_k_experts, config.expert_size) == (1024, 32, 4, 384)
    assert (config.window, config.vocab_size, config.canvas_length) == (512, 32768, 256)
    with pytest.raises(InputError, match="choose mid or tiny"):
        parts.random_config("large")


def test_the_record_has_everything_in_a_few_seconds(model: Model) -> None:
    names: list[str] = []
    began = time.perf_counter()
    record = parts.record(model, PLAN, "tiny", names.append)
    assert time.perf_counter() - began < 10
    assert json.loads(json.dumps(record)) == record
    assert tuple(record["parts"]) == PARTS
    assert [name for name in names if name in PARTS] == list(PARTS)
    for name, row in record["parts"].items():
        assert 0 < row["fastest"] <= row["seconds"] <= row["slowest"], name
        assert row["repeats"] >= 1
        assert (row["share_of_ceiling"] is None) == (name == "accept, renoise, stop")
    diffusion, autoregressive = record["requests"]["diffusion"], record["requests"]["autoregressive"]
    canvases = diffusion["tokens"] // 32
    assert diffusion["passes"] == canvases * diffusion["steps_per_canvas"]  # committing takes no pass of its own
    assert diffusion["passes_per_canvas"] == diffusion["steps_per_canvas"]
    assert 1 <= autoregressive["tokens"] <= 64
    for request in (diffusion, autoregressive):
        assert 0 < request["first_tokens_seconds"] <= request["seconds"]
        assert request["tokens_per_second"] == pytest.approx(request["tokens"] / request["seconds"])
    rates = record["ceilings"]["flops_per_second"]
    for kind in ("float32", "bf16"):
        means = {name: rate for name, rate in rates[kind].items() if isinstance(rate, dict)}
        assert "F.linear" in means and all(set(each) == set(parts.shapes(model.config)) for each in means.values())
        assert rates[kind]["best"] == max(max(each.values()) for each in means.values())
        assert rates[kind]["by"] in means and rates[kind]["library"] <= rates[kind]["best"]
    assert record["ceilings"]["bytes_per_second"]["best"] > 0
    assert record["dtype"] == "float32"
    with torch.device("meta"):  # packed weights are no parameters
        plain = Model(model.config, load("reference"))
    assert record["model"]["parameters"] == sum(p.numel() for p in plain.parameters())
    environment = record["environment"]
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["hardware"]["threads"] == torch.get_num_threads()
    assert {"commit", "command", "date"} < set(environment)


def test_an_answer_without_hurry_is_done_in_full(model: Model) -> None:
    plan = BenchPlan(prompt=8, tokens=40, steps=3, seconds=20)
    model.config = dataclasses.replace(model.config, eos_ids=())
    with torch.inference_mode():
        answers = parts.requests(model, plan, step=1e-6)
    assert answers["diffusion"]["tokens"] == 64  # whole canvases
    assert answers["diffusion"]["passes"] == 2 * 3
    assert answers["autoregressive"]["tokens"] == 40


def test_an_answer_in_a_hurry_is_cut_and_says_so(model: Model) -> None:
    plan = BenchPlan(prompt=8, tokens=320, steps=10, seconds=0.001)
    model.config = dataclasses.replace(model.config, eos_ids=())
    with torch.inference_mode():
        answers = parts.requests(model, plan, step=0.002)
    assert answers["diffusion"]["tokens"] == 32
    assert answers["diffusion"]["steps_per_canvas"] == 1
    assert answers["autoregressive"]["tokens"] < 320


def test_more_than_the_context_holds_is_refused(model: Model) -> None:
    with pytest.raises(InputError, match="need 5008 tokens of context; the model has 4096"):
        parts.record(model, BenchPlan(prompt=4976, tokens=1), "tiny")


WIDE = dataclasses.replace(
    parts.random_config("tiny"), hidden_size=128, expert_size=64, intermediate_size=128, num_heads=4
)
"""tiny with widths that groups of 64 divide."""


def test_quantised_weights_cost_fewer_bytes_and_their_own_rate() -> None:
    if cpu.obstacle(torch.bfloat16):
        pytest.skip(str(cpu.obstacle(torch.bfloat16)))
    plain, packed = (parts.random_model(WIDE, torch.bfloat16, "cpu", "cpu", quantize=kind) for kind in (None, "int8"))
    one, other = (parts.Counted.of(model) for model in (plain, packed))
    assert one.weights.experts.bits == 16 and 8 <= other.weights.experts.bits < 9
    assert (one.weights.name, other.weights.name) == ("bf16", "int8")
    wide, narrow = one.step(16), other.step(16)
    assert set(wide.flops) == {"bf16"} and set(narrow.flops) == {"bf16", "int8"}
    assert wide.all_flops == pytest.approx(narrow.all_flops) and narrow.bytes < wide.bytes
    most = {"bytes_per_second": {"best": 1e30}, "flops_per_second": {"bf16": {"best": 1.0}, "int8": {"best": 2.0}}}
    assert narrow.seconds(most) < wide.seconds(most)


@pytest.mark.parametrize("name", ["fused", "cpu"])
def test_experts_and_the_rest_are_counted_with_their_own_bits_and_rates(name: str) -> None:
    if name == "cpu" and cpu.obstacle(torch.bfloat16, samples("int4")):
        pytest.skip(str(cpu.obstacle(torch.bfloat16, samples("int4"))))
    model = parts.random_model(WIDE, torch.bfloat16, "cpu", name, quantize="int4")
    weights = parts.Counted.of(model).weights
    assert weights.experts == work.Kept(4.25, "bf16")
    assert weights.dense.product == weights.conditioning.product == "int8" and 8 < weights.dense.bits < 9
    assert weights.plain == work.Kept(16, "bf16") and weights.width == 2
    assert weights.name == "int4 and int8"
    step, counted = parts.Counted.of(model).step(16), work.step_work(WIDE, work.Precision.of(WIDE, "int4"), 16)
    assert step.flops == counted.flops and step.bytes == pytest.approx(counted.bytes, rel=0.02)
