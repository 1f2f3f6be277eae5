"""`sfumato bench` on a tiny model: every part is timed, bounded, and stands beside a ceiling. No figure is checked."""

from __future__ import annotations

import dataclasses
import json
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from sfumato import cli
from sfumato.cli import bench
from sfumato.errors import InputError
from sfumato.measure import machine, parts, work
from sfumato.measure.parts import BenchPlan
from sfumato.model.network import Model
from sfumato.ops import cpu, load
from sfumato.ops.packed import unpack
from sfumato.quant.apply import samples

PLAN = BenchPlan(prompt=48, tokens=64, steps=2, seconds=0.05, streamed=2**22)
PARTS = (
    "prefill", "denoise pass", "read-out", "soft embedding", "accept, renoise, stop", "commit", "commit and first pass",
    "whole step",
)  # fmt: skip


@pytest.fixture
def model() -> Model:
    return parts.random_model(parts.random_config("tiny"), torch.float32, "cpu", "auto")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command with a small bandwidth buffer."""
    monkeypatch.setattr(bench, "BenchPlan", partial(BenchPlan, streamed=2**22))


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
    heard: list[str] = []
    began = time.perf_counter()
    found = parts.record(model, PLAN, "tiny", heard.append)
    assert time.perf_counter() - began < 10
    assert json.loads(json.dumps(found)) == found
    assert tuple(found["parts"]) == PARTS
    assert [name for name in heard if name in PARTS] == list(PARTS)
    for name, row in found["parts"].items():
        assert 0 < row["fastest"] <= row["seconds"] <= row["slowest"], name
        assert row["repeats"] >= 1
        assert (row["share_of_ceiling"] is None) == (name == "accept, renoise, stop")
    diffusion, autoregressive = found["requests"]["diffusion"], found["requests"]["autoregressive"]
    canvases = diffusion["tokens"] // 32
    assert diffusion["passes"] == canvases * diffusion["steps_per_canvas"]  # committing takes no pass of its own
    assert diffusion["passes_per_canvas"] == diffusion["steps_per_canvas"]
    assert 1 <= autoregressive["tokens"] <= 64
    for request in (diffusion, autoregressive):
        assert 0 < request["first_tokens_seconds"] <= request["seconds"]
        assert request["tokens_per_second"] == pytest.approx(request["tokens"] / request["seconds"])
    rates = found["ceilings"]["flops_per_second"]
    for kind in ("float32", "bf16"):
        means = {name: rate for name, rate in rates[kind].items() if isinstance(rate, dict)}
        assert "F.linear" in means and all(set(each) == set(parts.shapes(model.config)) for each in means.values())
        assert rates[kind]["best"] == max(max(each.values()) for each in means.values())
        assert rates[kind]["by"] in means and rates[kind]["library"] <= rates[kind]["best"]
    assert found["ceilings"]["bytes_per_second"]["best"] > 0
    assert found["dtype"] == "float32"
    with torch.device("meta"):  # packed weights are no parameters
        plain = Model(model.config, load("reference"))
    assert found["model"]["parameters"] == sum(p.numel() for p in plain.parameters())
    environment = found["environment"]
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["hardware"]["threads"] == torch.get_num_threads()
    assert {"commit", "command", "date"} < set(environment)


def test_an_answer_without_hurry_is_done_in_full(model: Model) -> None:
    plan = BenchPlan(prompt=8, tokens=40, steps=3, seconds=20)
    model.config = dataclasses.replace(model.config, eos_ids=())
    with torch.inference_mode():
        found = parts.requests(model, plan, step=1e-6)
    assert found["diffusion"]["tokens"] == 64  # whole canvases
    assert found["diffusion"]["passes"] == 2 * 3
    assert found["autoregressive"]["tokens"] == 40


def test_an_answer_in_a_hurry_is_cut_and_says_so(model: Model) -> None:
    plan = BenchPlan(prompt=8, tokens=320, steps=10, seconds=0.001)
    model.config = dataclasses.replace(model.config, eos_ids=())
    with torch.inference_mode():
        found = parts.requests(model, plan, step=0.002)
    assert found["diffusion"]["tokens"] == 32
    assert found["diffusion"]["steps_per_canvas"] == 1
    assert found["autoregressive"]["tokens"] < 320


def test_measure_is_bounded_and_leaves_setup_out() -> None:
    cpu = torch.device("cpu")
    began = time.perf_counter()
    found = machine.measure(lambda: time.sleep(0.02), 0.1, cpu, repeats=1000)
    assert 1 <= found.repeats <= 10
    assert time.perf_counter() - began < 2
    assert found.fastest >= 0.02
    given: list[int] = []
    found = machine.measure(given.append, 5, cpu, repeats=2, setup=lambda: time.sleep(0.05) or 7)  # type: ignore[func-returns-value]
    assert given == [7, 7, 7]  # one to warm up
    assert found.median < 0.05
    assert machine.measure(lambda: time.sleep(0.05), 0, cpu).repeats == 1


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
    held = parts.Counted.of(model).weights
    assert held.experts == work.Kept(4.25, "bf16")
    assert held.dense.product == held.conditioning.product == "int8" and 8 < held.dense.bits < 9
    assert held.plain == work.Kept(16, "bf16") and held.width == 2
    assert held.name == "int4 and int8"
    found, counted = parts.Counted.of(model).step(16), work.step_work(WIDE, work.Precision.of(WIDE, "int4"), 16)
    assert found.flops == counted.flops and found.bytes == pytest.approx(counted.bytes, rel=0.02)


def test_a_sample_of_every_format_of_a_recipe() -> None:
    found = samples("int4")
    assert [(one.kind, one.group, one.shape) for one in found] == [("int4", 64, (32, 128)), ("int8", 128, (32, 128))]
    assert [one.kind for one in samples("nvfp4")] == ["nvfp4", "fp8"]
    assert [(one.kind, one.group) for one in samples("int4-small")] == [("int4", 128), ("int4", 64), ("int8", 128)]
    assert all(not unpack(one).any() for one in found)


def test_a_command_names_no_path_of_this_machine() -> None:
    root = machine.ROOT
    line = machine.command_line(
        [str(root / "benchmarks" / "x.py"), "-o", "/somewhere/out.json", str(root / "runs" / "y")]
    )
    assert line == "python benchmarks/x.py -o out.json runs/y"
    assert machine.command_line(["/venv/bin/sfumato", "bench"]) == "sfumato bench"


def test_more_than_the_context_holds_is_refused(model: Model) -> None:
    with pytest.raises(InputError, match="need 5008 tokens of context; the model has 4096"):
        parts.record(model, BenchPlan(prompt=4976, tokens=1), "tiny")


@pytest.mark.usefixtures("quick")
def test_the_command_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    arguments = ["--size", "tiny", "--seconds", "0.02", "--prompt", "16", "--tokens", "32", "--dtype", "bf16"]
    assert cli.main(["bench", *arguments, "--steps", "2", "--device", "cpu", "--json", "-o", str(path)]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out) == json.loads(path.read_text())
    assert json.loads(told.out)["dtype"] == "bfloat16"
    assert "bench: denoise pass" in told.err
    found = json.loads(told.out)
    assert [one["name"] for one in found["implementations"]] == ["reference", "fused", "cpu", "triton"]
    assert [one["name"] for one in found["implementations"] if one["is_auto"]] == [found["ops"]]


@pytest.mark.usefixtures("quick")
def test_the_command_shows_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--size", "tiny", "--seconds", "0.02", "--prompt", "16", "--tokens", "32", "--device", "cpu"]
    assert cli.main(["bench", *arguments]) == 0
    text = capsys.readouterr().out
    for part in (*PARTS, "diffusion", "autoregressive", "of ceiling", "Measured ceiling"):
        assert part in text
    assert "as auto does here" in text and "triton (" in text


def test_what_ran_is_told_beside_what_auto_takes() -> None:
    each = [
        {"name": "fused", "obstacle": None, "is_auto": False},
        {"name": "cpu", "obstacle": None, "is_auto": True},
        {"name": "triton", "obstacle": "they need a CUDA device", "is_auto": False},
    ]
    text = bench.standing({"ops": "fused", "implementations": each})
    assert text == "Ran: fused, where auto takes cpu. Not for these weights here: triton (they need a CUDA device)."


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--size", "huge"], "choose mid or tiny"),
        (["--dtype", "int3"], "choose bf16 or float32"),
        (["--device", "abacus"], "abacus"),
        (["--size", "tiny", "--ops", "magic"], "magic"),
        (["--size", "tiny", "--quantize", "int3"], "choose one of int8, fp8, int4"),
        (["-o", "not/there/out.json"], "not/there"),
        (["nowhere/at/all"], "nowhere/at/all"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *arguments]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("bench: ")]
    assert len(told) == 1
    assert part in told[0]


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.239, "1.24 s"), (0.0831, "83.1 ms"), (4.12e-4, "412 µs"), (None, "–")]
)
def test_durations_for_people(seconds: float | None, text: str) -> None:
    assert work.duration(seconds) == text
