"""benchmarks/ at toy sizes: they run and write what they promise. No figure is checked."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import time
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from released_config import RELEASED

from benchmarks import common, kernels, ops, predict, results, sections
from sfumato.measure import machine
from sfumato.measure.work import Parameters, step_work
from sfumato.model.config import ModelConfig
from sfumato.model.network import Model, products
from sfumato.ops.packed import Packed

ROOT = machine.ROOT
FILES = ("linear", "experts", "attention", "norms", "read_out", "soft_embedding")
ENVIRONMENT = {"hardware", "versions", "commit", "command", "date"}


@pytest.fixture(scope="module")
def ceilings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Measured once, with little memory, and shared as `make bench` does."""
    path = tmp_path_factory.mktemp("bench") / "ceilings.json"
    small = {"one": (8, 64, 96)}
    most = machine.ceilings(small, 0.01, torch.device("cpu"), 2**20)
    common.write(path, {"what": "ceilings", "ceilings": most})
    return path


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, path: Path, *arguments: str) -> dict[str, Any]:
    """A benchmark's command; its record."""
    name = str(Path(str(module.__file__)).resolve())
    monkeypatch.setattr(sys, "argv", [name, "--device", "cpu", *arguments, "-o", str(path)])
    module.main()
    actual: dict[str, Any] = json.loads(path.read_text())
    assert set(actual["environment"]) == ENVIRONMENT
    command = actual["environment"]["command"]
    assert command.startswith("python benchmarks/") and str(ROOT) not in command and "/tmp" not in command
    return actual


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


# ---- operations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", FILES)
@pytest.mark.parametrize("size", ["tiny", "odd"])
def test_every_implementation_of_an_operation_is_timed_beside_its_error(op: str, size: str, ceilings: Path) -> None:
    most = json.loads(ceilings.read_text())["ceilings"]
    expected = {(name, ops.kind_of(dtype, kind)) for name, dtype, kind in ops.implementations("cpu")}
    for case in importlib.import_module(f"benchmarks.ops.{op}").cases(size, "cpu"):
        actual = list(ops.rows(op, case, "cpu", 0.001, most))
        plain = {pair for pair in expected if pair[1] in ("float32", "bf16")}
        assert {(row["ops"], row["kind"]) for row in actual} == plain | {
            (name, kind) for name, kind in expected - plain if case.takes(kind)
        }
        for row in actual:
            assert "failed" not in row, row
            assert row["seconds"] > 0 and row["bytes"] > 0 and row["share_of_ceiling"] > 0
            limit = {"float32": 1e-5, "bf16": max(2 * row["error_of_plain_bf16"], 2e-6), "int8": 0.06}
            assert row["error"] <= limit.get(row["kind"], 0.25), row  # 4 bits


def test_formats_are_timed_where_their_groups_divide_the_widths() -> None:
    tiny, odd = (next(importlib.import_module("benchmarks.ops.linear").cases(size, "cpu")) for size in ("tiny", "odd"))
    assert [kind for kind in ops.CPU if tiny.takes(kind)] == ["int8", "int4-g32", "int4"]
    assert [kind for kind in ops.CPU if odd.takes(kind)] == ["int8"]
    norm = next(importlib.import_module("benchmarks.ops.norms").cases("tiny", "cpu"))
    assert norm.takes("") and not norm.takes("int8")
    weights = sum(w.numel() for w in tiny.weights.values())
    moved = 2 * tiny.moved
    assert tiny.cost("int4").bytes - moved == weights * 4.25 / 8 and set(tiny.cost("int4").flops) == {"bf16"}
    assert tiny.cost("bf16").bytes - moved == 2 * weights
    assert weights < tiny.cost("int8").bytes - moved < 1.1 * weights and set(tiny.cost("int8").flops) == {"int8"}


def test_an_operations_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ceilings: Path) -> None:
    module = importlib.import_module("benchmarks.ops.experts")
    monkeypatch.setattr(
        sys,
        "argv",
        ["experts.py", "--sizes", "tiny", "--seconds", "0.01", "--device", "cpu", "--ceilings", str(ceilings)],
    )
    sys.argv += ["-o", str(tmp_path / "experts.json")]
    ops.main("experts", module.cases, str(module.__doc__))
    actual = json.loads((tmp_path / "experts.json").read_text())
    assert (
        actual["what"] == "ops"
        and actual["op"] == "experts"
        and actual["rows"]
        and set(actual["environment"]) == ENVIRONMENT
    )


# ---- steps, answers, peers ------------------------------------------------------------------------------------------


def test_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ceilings: Path) -> None:
    module = importlib.import_module("benchmarks.step")
    small = ("--size", "tiny", "--slice", "tiny", "--prompt", "16", "--seconds", "0.02", "--kinds", "bf16,magic")
    actual = run(module, monkeypatch, tmp_path / "step.json", *small, "--ceilings", str(ceilings))
    assert actual["what"] == "step" and "failed" in actual["mid"]["magic"]
    assert actual["mid"]["bf16"]["parts"]["whole step"]["share_of_ceiling"] > 0
    one = actual["slice"]
    assert one["logits_buffer_bytes"] == 32 * 512 * 2
    assert one["peak_beyond_bytes"] is not None and one["products_seconds"] > 0
    assert all("torch.matmul" in means for means in one["products"].values())
    assert len(one["targets"]) == 2 and {target["reached"] for target in one["targets"].values()} <= {True, False}


def test_adapters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, module = tmp_path / "adapters.json", importlib.import_module("benchmarks.adapters")
    with tiny.one_thread():
        small = ("--size", "tiny", "--prompt", "16", "--rank", "2", "--seconds", "0.02", "--kinds", "int4,fused")
        actual = run(module, monkeypatch, path, *small)
    assert set(actual["kinds"]) == {"int4", "fused"}
    for one in actual["kinds"].values():
        assert set(one["one row"]) == {"without", "one adapter", "merged"} and len(one["sixteen rows"]) == 3
        for row in (*one["one row"].values(), *one["sixteen rows"].values()):
            assert row["fastest_seconds"] > 0 and row["rounds"] >= 1 and -1 < row["cost"] < 100
        assert one["one row"]["without"]["cost"] == 0
    assert "one adapter" in sections.SECTIONS["adapters"][1](actual)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # raised inside transformers
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
def test_request_and_sudoku(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    module = importlib.import_module("benchmarks.request")
    small = (
        "--size",
        "tiny",
        "--prompt",
        "16",
        "--tokens",
        "64",
        "--steps",
        "2",
        "--seconds",
        "0.05",
        "--kinds",
        "float32",
    )
    actual = run(module, monkeypatch, tmp_path / "r.json", *small, "--sudoku", "2", "--batches", "1,2", "--rounds", "1")
    one = actual["answers"]["float32"]
    assert one["diffusion"]["passes_per_canvas"] == one["diffusion"]["steps_per_canvas"] == 2
    assert one["autoregressive"]["tokens_per_second"] > 0
    engines = actual["sudoku"]["engines"]
    assert set(engines) == {"sfumato", "transformers", "sfumato, clues pinned"}
    assert all([row["batch"] for row in rows] == [1, 2] for rows in engines.values())
    assert all(row["solved"] == 1 for rows in engines.values() for row in rows)  # many clues: nobody fails these
    assert set(actual["sudoku"]["ratios_at_the_same_batch"]) == {"1", "2"}


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
def test_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is inside a step and what is outside it is all of a turn; the model is left as it was."""
    path, module = tmp_path / "turns.json", load("benchmarks/turns.py")
    with tiny.one_thread():
        actual = run(module, monkeypatch, path, "--rows", "1,2", "--requests", "3", "--rounds", "1", "--ops", "fused")
    assert [one["rows"] for one in actual["levels"]] == [1, 2]
    for one in actual["levels"]:
        assert one["step_ms_a_turn"] > 0 and one["outside_ms_a_turn"] > 0 and one["tokens_per_second"] > 0
        assert one["calls_a_turn"] == pytest.approx(sum(one["calls"].values()), rel=0.01)
    assert all(getattr(Model, name).__qualname__ == f"Model.{name}" for name in module.PASSES)


def test_decisions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ceilings: Path) -> None:
    """Every way of asking is timed, no method stays replaced, and what is measured again replaces its part alone."""
    path, module = tmp_path / "decisions.json", importlib.import_module("benchmarks.decisions")
    own = {name: getattr(Model, name) for name in ("logits_of", "read")}
    with tiny.one_thread():
        run(module, monkeypatch, path, "--quick", "--only", "shapes,direct", "--ceilings", str(ceilings))
        actual = run(module, monkeypatch, path, "--quick", "--only", "reads", "--options", "2", "--heavy", "150")
    assert {name: getattr(Model, name) for name in own} == own
    one, several = actual["reads"]["toy"]["cells"]
    assert set(one["ways"]) == {"encoded", "kept", "all words", "everywhere", "generated"} and one["questions"] == 1
    assert set(several["ways"]) == {"kept", "all words"} and several["canvases"] == several["questions"] == 4
    assert all(way["ms_a_read"] > 0 for way in one["ways"].values())
    rows = actual["direct"]["toy"]["rows"]
    assert [row["clients"] for row in rows] == [1, 2] * len(module.STATES) and all(row["requests"] for row in rows)
    floor = actual["direct"]["toy"]["floor"]
    assert len(actual["direct"]["toy"]["targets"]) == len(module.STATES)
    assert floor["alone_seconds"] >= floor["together_seconds"] > 0 and floor["positions"] > 16
    text = sections.SECTIONS["decisions"][1](actual)
    assert "a state of 64 tokens" in text and "16 draws" in text and "through `LLM.arun`" in text


def test_questions_are_alike_in_length_and_unlike_in_words() -> None:
    texts = importlib.import_module("benchmarks.decision_texts")
    llm = texts.model_of("toy", "cpu")
    for kind in ("2", "16", "255"):
        each = texts.questions(kind, 64, llm.tokenizer)
        assert len({one.text() for one in each.values()}) == 64
        assert all(len(one.options) == int(kind) for one in each.values())
    assert texts.questions("255 unlike", 1, llm.tokenizer) is None  # of a vocabulary without words
    states = [texts.state(llm.tokenizer, 64, number) for number in (1, 2)]
    assert states[0] != states[1] and [len(llm.tokenizer.encode(one)) for one in states] == [64, 64]
    prompt, schema = texts.json_request(states[0], texts.questions("2", 2, llm.tokenizer))
    assert prompt.startswith(states[0]) and schema["properties"]["q01"] == {"enum": ["Yes", "No"]}


def test_peers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    module = importlib.import_module("benchmarks.peers")
    small = ("--size", "tiny", "--prompt", "16", "--tokens", "64", "--steps", "2", "--seconds", "0.05")
    absent = str(tmp_path / "python")
    actual = run(module, monkeypatch, tmp_path / "p.json", *small, "--dtype", "float32", "--kinds", "", "--mlx", absent)
    assert actual["logits"]["sfumato float32"]["largest_difference_from_transformers"] < 2e-4
    assert actual["logits"]["transformers"]["error_against_float32"] < 1e-5
    assert set(actual["parts"]) == set(actual["ratios"]) == {"denoise forward", "whole step", "whole answer"}
    for rows in actual["parts"].values():
        assert set(rows) == {"transformers", "sfumato float32"}
        assert len({row["repeats"] for row in rows.values()}) == 1  # they took turns
    assert absent in actual["ways of mlx-vlm"]["float32"]["failed"]
    assert module.table(actual).endswith(f"mlx-vlm: {actual['mlx-vlm']}")


def test_the_peer_holds_the_same_weights() -> None:
    pytest.importorskip("transformers")
    peers = importlib.import_module("benchmarks.peers")
    plain, _ = peers.model_of("tiny", "float32", "cpu")
    common.without_eos(plain)
    plan = peers.BenchPlan(48, 64, 2, 0.05)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers', about its own code
        theirs = peers.twin(plain)
        assert theirs.lm_head.weight.data_ptr() == plain.embed_tokens.weight.data_ptr()
        assert peers.difference(theirs, plain, plan) < 2e-4
        assert peers.difference(theirs, peers.packed(plain, "", "auto"), plan) < 2e-4
        assert peers.generate(theirs, plain, plan, 64, 2) == 64
        assert len(peers.steps_of(plain, plan, 4)) == len(peers.steps_of_theirs(theirs, plain, plan, 4)) == 3


# ---- counted figures ------------------------------------------------------------------------------------------------


def test_the_released_config_is_the_release() -> None:
    theirs, ours = ModelConfig.from_dict(RELEASED), common.released_config()
    for name in (
        "layers",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_experts",
        "expert_size",
        "canvas_length",
    ):
        assert getattr(theirs, name) == getattr(ours, name)
    assert [layer.is_sliding for layer in common.released_config(2).layers] == [True, False]
    assert Parameters.of(ours).total == pytest.approx(25.2e9, rel=0.01)


def test_the_cost_of_a_step_is_infos() -> None:
    from sfumato.measure.work import Precision

    config = common.released_config()
    for kind in ("bf16", "int4"):
        cost, work = common.step_cost(config, kind, 1, 1024), step_work(config, Precision.of(config, kind), 1024)
        assert cost == work
        many, token = common.step_cost(config, kind, 16, 1024), common.step_cost(config, kind, 1, 1024, True)
        assert many.all_flops == pytest.approx(16 * work.all_flops) and many.bytes < 2 * cost.bytes
        assert token.all_flops < cost.all_flops / 256 and token.bytes < cost.bytes / 2


def test_the_predicted_floor_is_that_of_a_step() -> None:
    config = common.released_config()
    for batch in (1, 16):
        one, other = predict.floor_of(config, "bf16", batch, 1024), common.step_cost(config, "bf16", batch, 1024)
        assert one.bytes == pytest.approx(other.bytes) and one.all_flops == pytest.approx(other.all_flops)


def test_predicted_is_committed_and_up_to_date() -> None:
    pytest.importorskip("triton")
    kept = json.loads((ROOT / "benchmarks" / "results" / "predicted.json").read_text())
    actual = json.loads(json.dumps(predict.predict()))
    assert {key: kept[key] for key in actual} == actual, "run benchmarks/kernels.py and then benchmarks/predict.py"
    floor = {row["kind"]: row["floor_ms"] for row in actual["rows"] if row["batch"] == 1}
    assert floor["bf16"] == pytest.approx(11.7, rel=0.05) and floor["fp8"] == pytest.approx(5.9, rel=0.05)
    assert all(row["predicted_ms"] >= row["floor_ms"] for row in actual["rows"])


def test_nodes_are_counted_on_what_is_committed() -> None:
    pytest.importorskip("triton")
    kept = json.loads((ROOT / "benchmarks" / "results" / "kernels.json").read_text())
    assert kernels.counts(["int4"]) == [row for row in kept["steps"] if row["kind"] == "int4"]
    assert {row["arch"] for row in kept["rows"]} == {80, 89, 90, 100, 120}


def test_a_prediction_follows_its_counts() -> None:
    """More programs than processors take turns; few cannot use them all; bytes bound what arithmetic does not."""
    facts = {"loop": 200, "warps": 4, "registers": 128, "shared": 64 << 10}
    one = predict.programs(132, 40, 512, 8192, facts, 0)
    assert predict.programs(264, 40, 512, 8192, facts, 0).seconds > 1.5 * one.seconds - predict.FILL
    assert predict.programs(66, 40, 512, 8192, facts, 0).uses["issue"] == pytest.approx(one.uses["issue"] / 2)
    bound = predict.programs(132, 40, 512, 8192, facts, 10**9)
    assert bound.bound == "memory" and bound.seconds == pytest.approx(10**9 / predict.MEMORY + predict.FILL)
    assert predict.held_at_once(facts) == 3
    tiles, filled = predict.expert_tiles(common.released_config(), 256, 32)
    assert 128 < tiles < 134 and filled == pytest.approx(2048 / (32 * tiles))


@pytest.mark.parametrize("recipe", ["", "int8", "int4", "int4-fp8", "nvfp4", "int4-small"])
def test_a_model_made_layer_by_layer_runs(recipe: str) -> None:
    from sfumato.measure.parts import Counted, random_config
    from sfumato.measure.work import needs
    from sfumato.model.cache import KVCache

    model = common.random_packed(random_config("tiny"), "cpu", "fused", recipe, dtype=torch.bfloat16)
    cache = KVCache.allocate(model.config, 1, 64, dtype=torch.bfloat16)
    with torch.inference_mode():
        hidden = model.encode(torch.arange(8)[None], cache)
    assert torch.isfinite(hidden).all() and float(model.layers[0].encode_scalar) == 1.0  # type: ignore[arg-type]
    packed = [getattr(owner, leaf) for owner, leaf in products(model)]
    held = sum(w.nbytes for w in packed if isinstance(w, Packed)) + sum(t.nbytes for t in model.state_dict().values())
    assert held == needs(model.config, recipe or "bf16", 64)["weight_bytes"]
    assert Counted.of(model).weights.experts.bits < 16 if recipe else True


def test_what_takes_turns_is_bounded() -> None:
    order: list[str] = []
    calls = {"a": lambda: order.append("a") or time.sleep(0.01), "b": lambda: order.append("b")}  # type: ignore[func-returns-value]
    actual = common.alternate(calls, 0.05, "cpu", repeats=1000)
    assert order[:4] == ["a", "b", "a", "b"] and 1 <= actual["a"].repeats == actual["b"].repeats < 20


# ---- results --------------------------------------------------------------------------------------------------------


def test_the_pages_are_up_to_date() -> None:
    actual = results.records(ROOT / "benchmarks" / "results")
    assert (ROOT / "RESULTS.md").read_text(encoding="utf-8") == results.page(actual), "run python benchmarks/results.py"
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert results.readme(text, actual) == text, "run python benchmarks/results.py"


def test_committed_records_name_no_path_of_a_machine() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        text = path.read_text()
        assert not any(part in text for part in ("/tmp/", "/home/", "/root/", "/work/")), path.name


def test_the_page_shows_targets_and_replaces_readmes_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    reached = {"a": common.target(1.0, 2.0), "b": common.target(3.0, 2.0)}
    record: dict[str, Any] = {
        "what": "pins",
        "holes": [],
        "beside": {},
        "targets": reached,
        "environment": machine.environment(),
    }
    common.write(folder / "pins.json", record)
    rows = [{"kind": "fp8", "batch": 1, "floor_ms": 6.0, "predicted_ms": 8.0, "nodes": 300, "tokens_per_second": 2e3}]
    record = {"what": "predicted", "within": 0.25, "rows": [{**rows[0], "kernels": []}], "targets": reached}
    common.write(folder / "predicted.json", {**record, "environment": machine.environment()})
    (folder / "old.json").write_text('{"what": "something of before"}')
    (tmp_path / "README.md").write_text("# A\n<!-- results -->\nstale\n<!-- /results -->\nrest\n")
    monkeypatch.setattr(sys, "argv", ["results.py", "--root", str(tmp_path)])
    assert results.main() == 0
    page, readme = (tmp_path / "RESULTS.md").read_text(), (tmp_path / "README.md").read_text()
    assert "## Targets" in page and "**not reached**" in page and "`old.json`" in page
    predictions = page[page.index("## Predictions, not run") :]
    assert "Nothing of this was run" in predictions and "reached" not in predictions
    assert "stale" not in readme and readme.startswith("# A\n") and readme.endswith("rest\n")
    monkeypatch.setattr(sys, "argv", ["results.py", "--check", "--root", str(tmp_path)])
    assert results.main() == 0
    (tmp_path / "RESULTS.md").write_text("by hand")
    assert results.main() == 1


def test_the_curve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module("benchmarks.curve")
    small = ("--tasks", "sudoku", "--items", "3", "--axis", "max_steps=2,1", "--lose", "90", "--threads", "1")
    with tiny.one_thread():
        actual = run(module, monkeypatch, tmp_path / "curve.json", *small, "--picture", "curve.svg")
    assert [point["setting"] for point in actual["points"]][:3] == ["reference", "max_steps=2", "max_steps=1"]
    assert actual["targets"] == {"passes saved at no significant loss on four tasks": common.target(None, 0.25, False)}
    assert (tmp_path / "build" / "curve.answers.jsonl").exists() and (tmp_path / "curve.svg").exists()
    text = sections.SECTIONS["curve"][1](actual)
    assert "`reference`" in text and actual["choice"]["sentence"] in text
