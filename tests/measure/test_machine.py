"""measure/machine.py: timings are bounded, and a record names no path of this machine."""

from __future__ import annotations

import time

import torch

from sfumato.measure import machine


def test_measure_is_bounded_and_leaves_setup_out() -> None:
    cpu = torch.device("cpu")
    began = time.perf_counter()
    timing = machine.measure(lambda: time.sleep(0.02), 0.1, cpu, repeats=1000)
    assert 1 <= timing.repeats <= 10
    assert time.perf_counter() - began < 10
    assert timing.fastest >= 0.02
    arguments: list[int] = []

    def setup() -> int:
        time.sleep(0.05)
        return 7

    timing = machine.measure(arguments.append, 5, cpu, repeats=2, setup=setup)
    assert arguments == [7, 7, 7]  # one to warm up
    assert timing.median < 0.05
    assert machine.measure(lambda: time.sleep(0.05), 0, cpu).repeats == 1


def test_a_command_names_no_path_of_this_machine() -> None:
    root = machine.ROOT
    line = machine.command_line(
        [str(root / "benchmarks" / "x.py"), "-o", "/somewhere/out.json", str(root / "runs" / "y")]
    )
    assert line == "python benchmarks/x.py -o out.json runs/y"
    assert machine.command_line(["/venv/bin/sfumato", "bench"]) == "sfumato bench"
