"""scripts/gpu.py and the steps of benchmarks/gpu, without a GPU: the whole plan at toy sizes, and what goes wrong.

A hung child, one that crashes, a gate that fails and a step without time are played by short programs in the place of
the steps. That a wrong kernel is seen is shown with operations that are made wrong.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import common, results, sections
from benchmarks.gpu import cells, choices, counters, kernels, nano, record
from benchmarks.gpu.alternatives import ALTERNATIVES, APART, WITHOUT, Entry, entries, standing
from benchmarks.gpu.plan import PLANS, SECONDS, Step
from benchmarks.gpu.setting import Setting
from sfumato.ops import load
from sfumato.ops.contract import Ops, ReadOut
from sfumato.ops.triton import tuning

ROOT = Path(__file__).parents[2]
FILES = {"results.json", "profile.json", "tuned.json", "log.txt"}


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_script", ROOT / "scripts" / "gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    return script()


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    monkeypatch.setattr(tuning, "TABLE", tuning.TABLE)
    return Setting.of(tmp_path, time.time() + 600, is_dry=True)


# ---- the plan at toy sizes -------------------------------------------------------------------------------------------


EACH_ONCE = ("prepare", "nano", "kernels", "blocks", "cells int4", "choices int4", "again int4")
"""Every module of the first plan, with one kind of weights."""


@pytest.mark.parametrize(
    ("plan", "only"),
    [("first", EACH_ONCE), *(pytest.param(plan, (), marks=pytest.mark.slow) for plan in ("first", "more"))],
    ids=["each once", "first", "more"],
)
def test_every_step_runs_on_a_processor(plan: str, only: tuple[str, ...], tmp_path: Path) -> None:
    """As `make gpu-dry` does: the same child processes, the same files, nothing left out without a reason."""
    more = ["--more"] if plan == "more" else []
    command = [sys.executable, "scripts/gpu.py", "--dry", *more, "--only", ",".join(only), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3 * SECONDS[plan] + 60)
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "log.txt").read_text()
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert all(path.stat().st_size < 2**20 for path in tmp_path.iterdir())
    actual = json.loads((tmp_path / "results.json").read_text())
    assert actual["state"] == "done" and actual["seconds"] < 3 * SECONDS[plan]
    names = [step.name for step in PLANS[plan]]
    assert {name.split()[0] for name in only or names} == {name.split()[0] for name in names}
    assert [step["step"] for step in actual["steps"]] == list(only or names)
    for step in actual["steps"]:
        assert step["ok"] and step["outcome"] == "done" and step["exit"] == 0 and step["rows"], step
        assert f"\n{step['step']} " in f"\n{done.stdout}" and step["says"] in done.stdout
        for row in step["rows"]:
            assert row["name"] and row.get("ok") is not False and row.get("skipped") != "", row
    rows = {f"{step['step']}: {row['name']}": row for step in actual["steps"] for row in step["rows"]}
    profiles = json.loads((tmp_path / "profile.json").read_text())
    timed = [name for name, row in rows.items() if "ms_a_pass" in row]
    assert set(timed) == set(profiles) and all("share_of_ceiling" in rows[name] for name in timed)
    assert all(kernel["count"] and kernel["us"] >= 0 for each in profiles.values() for kernel in each)
    if plan == "more":
        assert "compute-sanitizer" in rows["memcheck: nano"]["would"] and "ncu" in rows["counters: int4"]["would"]
    else:
        batches = {"again int4: int4 batch 16 context 1024", "cells int4: int4 batch 1 context 1024"}
        assert batches | (set() if only else {"cells bf16: bf16 batch 1 context 1024"}) <= set(timed)
        assert json.loads((tmp_path / "tuned.json").read_text()) is not None

    target = tmp_path / "record.json"
    again = subprocess.run([*command, "--record", str(target)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0, again.stderr
    kept = json.loads(target.read_text())
    assert kept["environment"]["command"] == " ".join(["python scripts/gpu.py", *more])
    text = sections.gpu(kept)
    assert "int4 batch 1 context" in text and "prepare: ok" in text
    assert results.page({"gpu.json": kept}).count("gpu.json") >= 1
    assert ("fp8, batch 16: times the tokens of batch 1" in kept["targets"]) == (plan == "first")


def test_the_plans_fit_their_time() -> None:
    for name, plan in PLANS.items():
        marks = [step.until for step in plan]
        assert marks == sorted(marks) and marks[-1] <= SECONDS[name] - 5
        assert len({step.name for step in plan}) == len(plan)
        for step in plan:
            assert callable(importlib.import_module(f"benchmarks.gpu.{step.name.split()[0]}").run)
    assert [step.name for step in PLANS["first"] if step.is_gate] == ["nano"]


def test_it_needs_only_what_it_says(tmp_path: Path) -> None:
    """torch, triton, safetensors, tokenizers, numpy, and what torch itself brings; and the runner not even those."""
    missing = "typer", "rich", "click", "huggingface_hub", "transformers", "pytest"
    names = [path.stem for path in (ROOT / "benchmarks" / "gpu").glob("*.py") if path.stem != "__main__"]
    code = f"import sys; sys.modules.update(dict.fromkeys({missing!r})); import importlib; "
    code += f"[importlib.import_module('benchmarks.gpu.' + name) for name in {names!r}]; import sfumato.llm; "
    code += f"sys.argv = ['gpu', 'nano', '--dry', '--out', {str(tmp_path)!r}]; "
    code += "import runpy; runpy.run_module('benchmarks.gpu', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert '"templates 2 of 2"' in done.stdout
    code = "import sys; sys.modules.update(dict.fromkeys(('torch', 'numpy', 'sfumato', 'triton'))); "
    code += "sys.argv = ['gpu.py', '--only', 'no such step']; import runpy; "
    code += "runpy.run_path('scripts/gpu.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "the steps are prepare, nano" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_gpu_it_says_so_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/gpu.py", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "cannot run: there is no CUDA device; --dry" in done.stdout
    assert done.stdout.count("stopped before") == len(PLANS["first"]) - 1


# ---- what goes wrong -------------------------------------------------------------------------------------------------

ROW = "import json, os, sys, time; say = lambda **row: print(json.dumps(row), file=open(sys.argv[1], 'a')); "


def played(parts: dict[str, str]) -> Callable[[Step, Path, float], Sequence[str]]:
    """Steps by these programs; `say` writes a row."""
    return lambda step, rows, until: [sys.executable, "-c", ROW + parts[step.name], str(rows)]


GOOD = "say(name='a', ok=True, says='fine')"


def run(gpu: ModuleType, out: Path, parts: dict[str, str], seconds: float = 30.0, **gates: bool) -> Any:
    """The exit code, and what results.json holds."""
    share = seconds / len(parts)
    plan = [Step(name, share * n, 0.2, is_gate=gates.get(name, False)) for n, name in enumerate(parts, 1)]
    call = gpu.Call(out, seconds, {"plan": "first", "is_dry": True})
    code = call.run(plan, played(parts))
    actual = json.loads((out / "results.json").read_text())
    assert {path.name for path in out.iterdir()} <= FILES
    return code, actual, {step["step"]: step for step in actual["steps"]}


def is_alive(pid: int, seconds: float = 3.0) -> bool:
    """Whether it still is after so long: who is killed goes a moment later."""
    until = time.monotonic() + seconds
    while _is_there(pid):
        if time.monotonic() > until:
            return True
        time.sleep(0.02)
    return False


def _is_there(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_hung_child_is_killed_with_all_that_it_started(gpu: ModuleType, tmp_path: Path) -> None:
    """It hears no signal that it could ignore; what it found before stays."""
    hung = "import signal, subprocess; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    hung += "own = subprocess.Popen(['sleep', '600']); say(name='a', ok=True, pids=[os.getpid(), own.pid]); "
    hung += "print('half a ro', end='', file=open(sys.argv[1], 'a')); time.sleep(600)"
    began = time.monotonic()
    code, actual, steps = run(gpu, tmp_path, {"hung": hung, "good": GOOD}, 8.0)
    assert code == 1 and time.monotonic() - began < 9 and actual["state"] == "done"
    assert steps["hung"]["outcome"] == "killed" and steps["hung"]["ok"] is False
    assert 3.5 < steps["hung"]["seconds"] < 5 and len(steps["hung"]["rows"]) == 1
    assert not any(map(is_alive, steps["hung"]["rows"][0]["pids"]))
    assert steps["good"]["ok"] and steps["good"]["says"] == "fine"


def test_what_a_child_leaves_running_ends_with_it(gpu: ModuleType, tmp_path: Path) -> None:
    code = "import subprocess; say(name='a', ok=True, pid=subprocess.Popen(['sleep', '600']).pid)"
    _, _, steps = run(gpu, tmp_path, {"one": code})
    assert steps["one"]["ok"] and not is_alive(steps["one"]["rows"][0]["pid"])


def test_a_child_that_crashes_takes_none_along(gpu: ModuleType, tmp_path: Path) -> None:
    parts = {
        "crash": "say(name='a', ok=True); print('last words', flush=True); os.kill(os.getpid(), 11)",
        "raise": "raise ValueError('no')",
        "wrong": "say(name='kernel x', ok=False); say(name='b', ok=True)",
        "good": GOOD,
    }
    code, actual, steps = run(gpu, tmp_path, parts)
    assert code == 1 and actual["state"] == "done"
    assert [step["outcome"] for step in steps.values()] == ["crashed", "failed", "done", "done"]
    assert steps["crash"]["exit"] == -signal.SIGSEGV and len(steps["crash"]["rows"]) == 1
    assert [step["ok"] for step in steps.values()] == [False, False, False, True]
    assert steps["wrong"]["says"].startswith("1 of 2 not right: kernel x")
    log = (tmp_path / "log.txt").read_text()
    assert "last words" in log and "ValueError: no" in log and "---- good" in log


@pytest.mark.parametrize(
    ("gate", "why"),
    [
        ("say(name='a', ok=False, stop='nano is not right: bans')", "nano is not right: bans"),
        ("os.abort()", "gate: after 0 rows"),
        ("time.sleep(600)", "gate: after 0 rows"),
    ],
)
def test_behind_a_gate_that_fails_nothing_runs(gpu: ModuleType, tmp_path: Path, gate: str, why: str) -> None:
    parts = {"first": GOOD, "gate": gate, "never": "open(sys.argv[1] + '-never', 'w')", "nor this": GOOD}
    code, actual, steps = run(gpu, tmp_path, parts, 4.0, gate=True)
    assert code == 3 and actual["state"].startswith(f"stopped: {why}")
    assert [step["outcome"] for step in steps.values()][2:] == ["not run", "not run"]
    assert steps["first"]["ok"] and steps["gate"]["ok"] is False and steps["never"]["ok"] is None


def test_a_gate_that_is_slow_but_right_lets_the_others_run(gpu: ModuleType, tmp_path: Path) -> None:
    slow = "say(name='a', ok=True); time.sleep(600)"
    code, _, steps = run(gpu, tmp_path, {"gate": slow, "good": GOOD}, 4.0, gate=True)
    assert code == 1 and steps["gate"]["outcome"] == "killed" and steps["good"]["ok"]


def test_a_gate_that_finds_something_less_lets_the_others_run(gpu: ModuleType, tmp_path: Path) -> None:
    code, _, steps = run(gpu, tmp_path, {"gate": "say(name='a', ok=False)", "good": GOOD}, gate=True)
    assert code == 1 and steps["good"]["ok"]


def test_a_step_without_time_is_not_begun_and_says_so(gpu: ModuleType, tmp_path: Path) -> None:
    call = gpu.Call(tmp_path, 2.0, {"plan": "first", "is_dry": True})
    plan = [Step("one", 1, 0.1), Step("two", 1.2, 0.9), Step("three", 2, 0.1)]
    assert call.run(plan, played({"one": "time.sleep(9)", "two": "open('/never')", "three": GOOD})) == 1
    steps = json.loads((tmp_path / "results.json").read_text())["steps"]
    assert [step["outcome"] for step in steps] == ["killed", "no time", "done"]
    assert steps[1]["ok"] is False and steps[1]["says"] == "to be over at 1 s"


def test_less_time_shortens_every_step(gpu: ModuleType, tmp_path: Path) -> None:
    call = gpu.Call(tmp_path, 1.0, {"plan": "first", "is_dry": True})
    began = time.monotonic()
    plan = [Step("one", 240, 5), Step("two", 480, 5)]
    assert call.run(plan, played({"one": "time.sleep(9)", "two": "time.sleep(9)"}), 1 / 480) == 1
    assert time.monotonic() - began < 2.5


def test_rows_and_kernels_are_on_disk_while_a_step_runs(gpu: ModuleType, tmp_path: Path) -> None:
    code = "say(name='a', ok=True, kernels=[{'name': 'k'}]); time.sleep(1); "
    code += f"say(name='b', seen=open({str(tmp_path / 'results.json')!r}).read()); time.sleep(0.3)"
    _, actual, steps = run(gpu, tmp_path, {"one": code})
    calls = json.loads(steps["one"]["rows"][1]["seen"])
    assert calls["state"] == "running" and calls["steps"][0]["outcome"] == "running"
    assert calls["steps"][0]["rows"] == [{"name": "a", "ok": True}]
    assert json.loads((tmp_path / "profile.json").read_text()) == {"one: a": [{"name": "k"}]}
    assert actual["state"] == "done"


def test_of_what_a_step_prints_the_end_is_kept(gpu: ModuleType, tmp_path: Path) -> None:
    run(gpu, tmp_path, {"one": "print('x' * 3_000_000); print('the end')", "two": GOOD})
    text = (tmp_path / "log.txt").read_text()
    assert len(text) < 2 * gpu.LOG_BYTES and "the end" in text and "3000009 bytes" in text


def test_an_interrupted_call_ends_its_child_and_keeps_what_there_is(tmp_path: Path) -> None:
    """As a machine's time limit does it: SIGTERM to the call alone."""
    driver = tmp_path / "driver.py"
    hung = "say(name='a', ok=True, pid=os.getpid()); time.sleep(600)"
    driver.write_text(
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'scripts')!r}, {str(ROOT / 'tests')!r}]\n"
        "import gpu\nfrom benchmarks.gpu.plan import Step\n"
        f"command = lambda step, rows, until: [sys.executable, '-c', {ROW + hung!r}, str(rows)]\n"
        "gpu.PLANS['first'] = (Step('hung', 400),)\ngpu.command_of = lambda *_: command\n"
        f"sys.argv = ['gpu.py', '--out', {str(tmp_path / 'out')!r}]\nsys.exit(gpu.main())\n"
    )
    child = subprocess.Popen([sys.executable, str(driver)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    path, until = tmp_path / "out" / "results.json", time.monotonic() + 60
    while time.monotonic() < until and not (path.exists() and '"pid"' in path.read_text()):
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=20) == 128 + signal.SIGTERM, child.communicate()
    child.communicate()
    actual = json.loads(path.read_text())
    assert actual["state"] == "interrupted"
    assert not is_alive(actual["steps"][0]["rows"][0]["pid"])


# ---- what the steps see ----------------------------------------------------------------------------------------------


def rows_of(module: ModuleType, setting: Setting, kind: str = "") -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in module.run(setting, kind)}


def test_recorded_steps_that_are_not_eager_stop_the_call(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = nano.tokens

    def other(setting: Setting, llm: Any, variant: nano.Variant, record: bool, lag: int) -> list[list[int]]:
        actual = tokens(setting, llm, variant, record, lag)
        if record and variant.name == "bans":
            actual[1] = [*actual[1][:-1], actual[1][-1] ^ 1]
        if record and variant.name == "early":
            raise RuntimeError("operation not permitted when stream is capturing")
        return actual

    monkeypatch.setattr(nano, "tokens", other)
    actual = rows_of(nano, setting)
    assert actual["pins"]["ok"] and not actual["bans"]["ok"] and not actual["early"]["ok"]
    assert [name for name, row in actual.items() if row.get("stop")] == ["early", "bans"]
    assert "capturing" in actual["early"]["errors"]["recorded"]


def test_a_rare_difference_from_fused_is_told_and_stops_nothing(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tokens(setting: Setting, llm: Any, variant: nano.Variant, record: bool, lag: int) -> list[list[int]]:
        return [[1], [1], [1 if llm.model.ops.name == "fused" else 2]]

    monkeypatch.setattr(nano, "tokens", tokens)
    monkeypatch.setattr(nano, "VARIANTS", nano.VARIANTS[:1])
    actual = rows_of(nano, setting)
    assert actual["pins"]["as_fused"] == 2 and not actual["pins"]["ok"] and "stop" not in actual["pins"]


def broken(monkeypatch: pytest.MonkeyPatch, **changed: Callable[[Any], Any]) -> None:
    """The operations that are checked, with another outcome of some; the reference stays right."""

    def wrong(name: str, *more: Any) -> Ops:
        record = load(name, *more)
        if name == "reference":
            return record
        parts: dict[str, Any] = {
            op: (lambda *args, op=op, change=change, **named: change(getattr(record, op)(*args, **named)))
            for op, change in changed.items()
        }
        return replace(record, **parts)

    monkeypatch.setattr(kernels, "load", wrong)


def test_every_output_of_an_operation_is_compared(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of three products, of which the benchmarks look at the last alone; a router's weights; and a row of
    experts that depends on its batch."""
    broken(
        monkeypatch,
        linear=lambda outs: (outs[0] * 1.02, *outs[1:]),
        route=lambda out: (out[0].flip(1), out[1]),
        experts=lambda out: out * (1 + 2**-7 * (len(out) > 1)) if out.dtype.itemsize == 2 else out,
    )
    actual = rows_of(kernels, setting)
    wrong = {name.split(",")[0] for name, row in actual.items() if row.get("ok") is False}
    assert "interpreter" in actual
    assert wrong == {"linear: queries", "norms: route", "experts: 8 tokens"}
    assert [part for part, one in actual["linear: queries, keys, values, 8 rows, bf16"]["errors"].items()
            if one["error"] > one["bound"]] == ["w1"]  # fmt: skip
    assert actual["experts: 8 tokens, 2 of 8 experts, int8"]["first_row_same_bits"] is False


READS: dict[str, Callable[[ReadOut], ReadOut]] = {
    "plain argmax": lambda read: read._replace(argmax_BL=read.logits_BLV.argmin(-1)),
    "plain sample": lambda read: read._replace(sample_BL=(read.sample_BL + 200) % 512),
    "plain entropy_BL": lambda read: read._replace(entropy_BL=read.entropy_BL * 1.01),
    "plain logits_BLV": lambda read: read._replace(logits_BLV=read.logits_BLV * 1.02),
    "banned sample_BL": lambda read: read._replace(sample_BL=torch.full_like(read.sample_BL, 7)),
    "plain, first row alone": lambda read: read._replace(logits_BLV=read.logits_BLV + torch.rand(1).bfloat16() * 1e-2),
}


@pytest.mark.parametrize("what", READS)
def test_everything_that_a_read_out_returns_is_compared(
    what: str, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kernels.read_out(setting, "tiny")["ok"]
    broken(monkeypatch, read_out=READS[what])
    actual = kernels.read_out(setting, "tiny")
    assert not actual["ok"] and what in actual["wrong"]


def test_bans_that_touch_other_positions_are_seen(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(name: str, *more: Any) -> Ops:
        record = load(name, *more)
        if name == "reference":
            return record

        def read_out(*args: Any, banned: Any = None, **named: Any) -> Any:
            banned = banned and (torch.ones_like(banned[0]), banned[1])
            return record.read_out(*args, **{**named, "banned": banned})

        return replace(record, read_out=read_out)

    monkeypatch.setattr(kernels, "load", wrong)
    assert "positions without bans" in kernels.read_out(setting, "tiny")["wrong"]


# ---- choices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int4", "int4-fp8", "fp8", "bf16"])
def test_choices_know_every_shape_of_a_pass(kind: str) -> None:
    actual = [one.name for one in entries(common.released_config(), kind)]
    dense = {"int4": "int8", "int4-fp8": "fp8"}.get(kind, kind)
    experts = kind.removesuffix("-fp8")
    assert len(actual) == len(set(actual))
    products = {"8192x2816", "9216x2816", "2816x4096", "2816x8192", "2816x2112"}
    assert {name for name in actual if name.startswith("linear")} == {f"linear {shape} {dense}" for shape in products}
    assert {f"experts_gate_up 128x1408x2816 {experts}", f"experts_down 128x2816x704 {experts}"} <= set(actual)
    assert ("attention 512 bf16" in actual) == ("read_out 262144x2816 bf16" in actual) == (kind == "int4")
    assert {one.op for one in entries(common.released_config(), kind)} <= set(ALTERNATIVES)


@pytest.fixture
def trial(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., choices.Trial]:
    """Steps whose time hangs on what the table says of one entry: `outcomes` is BLOCK_N -> (of the base, entropy)."""

    def make(entry: Entry, outcomes: dict[int, tuple[float | None, float]]) -> choices.Trial:
        actual = choices.Trial(setting, setting.model("bf16", 2), tmp_path)
        place = tuning.key(entry.shape, entry.dtype)

        def recorded(table: choices.Table, batch: int) -> choices.Recorded:
            size = table.get(entry.op, {}).get(place, {}).get("BLOCK_N", 0)
            took, entropy = outcomes.get(size, (1.0, 1.0))
            if took is None:
                raise RuntimeError("out of resource: shared memory")
            return (lambda: took), [torch.ones(2), torch.full((2,), entropy), torch.ones(2)]

        def beside(base: choices.Recorded, other: choices.Recorded) -> dict[str, Any]:
            return {
                "of_base": other[0]() / base[0](),
                "entropy_difference": float((other[1][1] - base[1][1]).abs().max()),
            }

        monkeypatch.setattr(actual, "recorded", recorded)
        monkeypatch.setattr(actual, "beside", beside)
        return actual

    return make


def test_only_what_is_faster_and_right_is_chosen(setting: Setting, trial: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest is wrong, the next does not fit, the next is slower at sixteen canvases."""
    entry = next(one for one in entries(setting.config(2), "bf16") if one.op == "linear")
    outcomes = {32: (0.2, 1.5), 64: (None, 1.0), 128: (0.5, 1.0), 256: (0.8, 1.0), 512: (0.999, 1.0)}
    actual = trial(entry, outcomes)
    monkeypatch.setattr(actual, "_is_fine", lambda entry, row: row["values"] != {"BLOCK_N": 128})
    row = actual.best(entry, tuple({"BLOCK_N": size} for size in outcomes))
    assert row["chosen"] == {"BLOCK_N": 256} and "shared memory" in row["tried"][1]["cannot"]
    table = json.loads((setting.out / "tuned.json").read_text())
    assert table["cpu"]["linear"] == {tuning.key(entry.shape, entry.dtype): {"BLOCK_N": 256}}
    assert actual.best(entry, ({"BLOCK_N": 512},))["chosen"] is None  # slower than what is known by now
    again = json.loads((setting.out / "tuned.json").read_text())
    assert again == table


def test_what_is_gained_by_chance_or_lost_at_sixteen_is_not_chosen(setting: Setting, trial: Any) -> None:
    entry = next(one for one in entries(setting.config(2), "bf16") if one.op == "linear")
    actual = trial(entry, {64: (0.9, 1.0)})
    actual.setting = replace(setting, is_dry=False)
    times = iter([1.0, 0.9, 1.2, 0.9, 0.9, 1.0])
    calls = []

    def beside(base: Any, other: Any) -> dict[str, Any]:
        if other[0]() < 1:
            calls.append(next(times))
            return {"of_base": calls[-1], "entropy_difference": 0.0}
        return {"of_base": 1.0, "entropy_difference": 0.0}

    actual.beside = beside
    assert actual.best(entry, ({"BLOCK_N": 64},))["chosen"] is None and calls == [1.0]  # no gain
    assert actual.best(entry, ({"BLOCK_N": 64},))["chosen"] is None and calls == [1.0, 0.9, 1.2]  # not again
    assert actual.best(entry, ({"BLOCK_N": 64},))["chosen"] == {"BLOCK_N": 64} and len(calls) == 6


def test_a_table_that_is_slower_as_a_whole_is_put_back(setting: Setting, trial: Any) -> None:
    entry = next(one for one in entries(setting.config(2), "bf16") if one.op == "linear")
    actual = trial(entry, {64: (0.9, 1.0)})
    assert actual.best(entry, ({"BLOCK_N": 64},))["chosen"]
    assert "put back" not in actual.table(1)["says"] and actual.known != actual.before
    actual.beside = lambda base, other: {"of_base": 1.02, "entropy_difference": 0.0}
    assert "put back" not in actual.table(16)["says"]
    assert "put back" in actual.table(1)["says"] and actual.known == actual.before
    assert json.loads((setting.out / "tuned.json").read_text()) == {"cpu": {}}


def test_a_cell_without_a_profile_keeps_its_times(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(setting: Setting, run_: Any, turns: int) -> list[dict[str, Any]]:
        raise RuntimeError("CUPTI could not be loaded")

    monkeypatch.setattr(cells, "profile", broken)
    actual = cells.cell(setting, setting.model("bf16", 2), "bf16", 1, 16)
    assert actual["ms_a_pass"] > 0 and "CUPTI" in actual["profile"] and "kernels" not in actual


def test_a_table_is_what_a_step_looks_up(setting: Setting, tmp_path: Path) -> None:
    """Trial tables reach `tuning.config`, and what others wrote into the table stays."""
    tuning.TABLE.write_text(json.dumps({"cpu": {"linear": {"1x2 bfloat16": {"BLOCK_K": 32}}}, "other": {"x": {}}}))
    actual = choices.Trial(setting, setting.model("bf16", 2), tmp_path)
    entry = Entry("linear", "", (1, 2))
    file = actual._file(actual._with(entry, {"BLOCK_N": 64}))
    before = tuning.TABLE
    tuning.TABLE = file
    try:
        chosen = tuning.config("linear", (1, 2), torch.bfloat16, "cpu", {"BLOCK_N": 128, "BLOCK_K": 64})
    finally:
        tuning.TABLE = before
    assert chosen == {"BLOCK_N": 64, "BLOCK_K": 32}
    actual.known = actual._with(entry, {"BLOCK_N": 64})
    actual.write()
    table = json.loads((setting.out / "tuned.json").read_text())
    assert table["other"] == {"x": {}} and table["cpu"]["linear"] == {"1x2 bfloat16": {"BLOCK_K": 32, "BLOCK_N": 64}}


@pytest.mark.parametrize("name", [*APART, *WITHOUT])
def test_a_choice_that_is_no_number_is_put_back(name: str, setting: Setting) -> None:
    """And says where this tree has nothing to choose."""
    model = setting.model("bf16", 2)
    ops = model.ops
    if name in APART:
        pytest.importorskip("triton")
        file, _, function = APART[name][0].partition(".")
        try:
            module = importlib.import_module(f"sfumato.ops.triton.{file}")
        except ImportError:
            module = None
        before = getattr(module, function, None)
        with standing(name, model) as is_there:
            assert is_there == (before is not None)
            assert not is_there or getattr(module, function) is APART[name][1]
        assert getattr(module, function, None) is before
    else:
        with standing(name, model) as is_there:
            assert not is_there or model.ops is not ops
    assert model.ops is ops


def test_compiled_kernels_are_found_again_by_other_processes(tmp_path: Path) -> None:
    """Two of them, for an H200, without one."""
    pytest.importorskip("triton")
    code = "import time; from benchmarks.gpu import compile as c; from benchmarks.gpu.setting import Setting; "
    code += f"s = Setting.of(c.Path({str(tmp_path)!r}), time.time() + 99, True); "
    code += "found = c.Compiling(c.of_steps(s.config(2), ['fp8'], [1])[:1], c.H200, s.until, 2).wait(); "
    code += "print(found['compiled'], len(found['left_kernels']), found['left_steps'], found.get('errors'))"
    surroundings = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    counts = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=surroundings, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        compiled, left, steps, errors = done.stdout.split()
        assert (compiled, steps, errors) == ("2", "0", "None") and int(left) > 10, done.stdout
        counts.append(sorted(path.name for path in (tmp_path / "cache").iterdir()))
    assert counts[0] == counts[1]


# ---- what is read ----------------------------------------------------------------------------------------------------


def test_a_trace_becomes_kernels_by_grid() -> None:
    def event(name: str, us: float, grid: list[int]) -> dict[str, Any]:
        return {"cat": "kernel", "name": name, "dur": us, "args": {"grid": grid, "block": [128, 1, 1]}}

    events = [event("a", 2, [1, 1, 1]), event("b", 9, [4, 1, 1]), event("a", 3, [1, 1, 1]), event("a", 1, [2, 1, 1])]
    actual = cells.by_kernel(iter(events))
    assert [(one["name"], one["count"], one["us"], one["grid"]) for one in actual] == [
        ("b", 1, 9.0, "[4, 1, 1]"),
        ("a", 2, 5.0, "[1, 1, 1]"),
        ("a", 1, 1.0, "[2, 1, 1]"),
    ]


def test_counters_are_gathered_by_launch() -> None:
    head = '"ID","Process ID","Kernel Name","Grid Size","Metric Name","Metric Unit","Metric Value"'
    lines = ["==PROF== Connected", head]
    lines += [f'"{n}","7","_linear","(64, 1, 1)","{name}","%","{n}5"' for n in (0, 1) for name in ("a", "b")]
    assert counters.table("\n".join(lines)) == [
        {"kernel": "_linear", "grid": "(64, 1, 1)", "a": f"{n}5 %", "b": f"{n}5 %"} for n in (0, 1)
    ]
    assert counters.table("==ERROR== ERR_NVGPUCTRPERM") == []


def test_a_record_tells_what_was_wrong() -> None:
    rows = [
        {"name": "int4 batch 1 context 1024", "ok": True, "ms_a_pass": 6.0, "tokens_per_second": 2600.0},
        {"name": "int4 batch 16 context 1024", "ok": False, "error": "out of memory"},
    ]
    step = {
        "step": "cells int4",
        "outcome": "done",
        "ok": False,
        "rows": rows,
        "says": "1 of 2 not right",
        "seconds": 9,
    }
    again = {"step": "again int4", "outcome": "done", "ok": True, "says": "", "rows": [
        {**rows[0], "ms_a_pass": 5.5, "is_tuned": True}]}  # fmt: skip
    actual = record.record(
        {"steps": [step, again], "plan": "first", "state": "done", "seconds": 11, "environment": {"hardware": {}}}, {}
    )
    assert actual["targets"]["int4, batch 1, 1K context: ms a pass"]["value"] == 5.5
    text = sections.gpu(actual)
    assert "int4 batch 1 context 1024 tuned" in text and "cells int4: done: 1 of 2 not right" in text
    assert actual["tasks"][1]["wrong"] == [{"name": "int4 batch 16 context 1024", "error": "out of memory"}]


def test_without_a_call_there_is_no_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert record.write(tmp_path, tmp_path / "record.json") == 2
    assert "run the call first" in capsys.readouterr().err
