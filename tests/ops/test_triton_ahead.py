"""ops/triton/ahead.py and tuning.py: every kernel compiled for five architectures; and the table of tile sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from sfumato.ops.triton import ahead, tuning

SPILLS = 64
"""Bytes a thread may spill: a few words outside the loop are cheaper than the tiles that would avoid them."""


# All of all five take eight minutes; this one has the most kinds of weights.
QUICK = (90, 5)
"""An architecture, and which part of what is compiled for it: see `ahead.sample`."""


@pytest.fixture(
    scope="module", params=[QUICK, *(pytest.param((arch, 1), marks=pytest.mark.slow) for arch in ahead.ARCHS)], ids=str
)
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """In a child, since kernels compile only where triton was imported without its interpreter. Its own cache, since a
    compiler that is never run tests nothing."""
    folder = tmp_path_factory.mktemp("ahead")
    environment = os.environ | {"TRITON_CACHE_DIR": str(folder / "cache"), "TRITON_INTERPRET": "0"}
    arch, every = map(str, request.param)
    command = [sys.executable, "-m", "sfumato.ops.triton.ahead", "--arch", arch, "--every", every]
    child = subprocess.run(
        [*command, "-o", str(folder / "rows.json")],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert child.returncode == 0, child.stdout
    compiled: list[dict[str, Any]] = json.loads((folder / "rows.json").read_text())
    return compiled


def test_every_file_with_kernels_is_compiled(rows: list[dict[str, Any]]) -> None:
    files = {file.stem for file in Path(ahead.__file__).parent.glob("*.py") if "\n@triton.jit" in file.read_text()}
    assert {"norm", "attention"} <= files
    assert {row["op"] for row in rows} == files - {"dependent"}  # a part of every kernel, and none by itself


def test_nothing_needs_more_shared_memory_than_there_is(rows: list[dict[str, Any]]) -> None:
    assert [row for row in rows if row["shared"] > tuning.SHARED_KIB[row["arch"]] * 1024] == []


def test_next_to_nothing_spills(rows: list[dict[str, Any]]) -> None:
    assert [row for row in rows if row["spills"] > SPILLS] == []


def test_no_kernel_is_a_trap(rows: list[dict[str, Any]]) -> None:
    """The compiler makes one, and says nothing, of a kernel that needs more tensor memory than there is."""
    assert [row for row in rows if row["registers"] < 10] == []


def test_registers_fit_the_threads(rows: list[dict[str, Any]]) -> None:
    assert [row for row in rows if row["registers"] * row["warps"] * 32 > 65536] == []


def test_a_sample_has_every_kernel() -> None:
    names = [f"{kernel}{number}" for kernel in "aab" for number in range(4)]
    specials = [ahead.Special(f"{at} {name}", name[0], {}) for at, name in enumerate(names)]
    assert ahead.sample(specials, 1) == specials
    assert [special.name for special in ahead.sample(specials, 5)] == ["0 a0", "5 a1", "8 b0", "11 b3"]


def test_a_special_names_each_argument_once() -> None:
    class Kernel:
        arg_names = ("x_ptr", "rows")

    with pytest.raises(RuntimeError, match=r"each argument once.*rows"):
        ahead.compile_one(ahead.Special("half", Kernel(), {"x_ptr": "*bf16"}), 90)


DEFAULT = {"BLOCK": 64, "num_warps": 4}


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tuning, "TABLE", tmp_path / "tuned.json")
    return tmp_path / "tuned.json"


def test_the_default_stands_where_nothing_was_measured(table: Path) -> None:
    assert tuning.config("op", (8, 16), torch.bfloat16, "sm_90", DEFAULT) == DEFAULT
    assert tuning.config("op", (8, 16), torch.bfloat16, "sm_90", DEFAULT) is not DEFAULT
    small = {"BLOCK": 32, "num_warps": 4}
    assert [tuning.config("op", (8,), "bfloat16", f"sm_{arch}", DEFAULT, small)["BLOCK"] for arch in ahead.ARCHS] == [
        64, 32, 64, 64, 32,
    ]  # fmt: skip


def test_tuning_writes_the_fastest_and_config_reads_it(table: Path) -> None:
    used: list[tuning.Config] = []

    def measure() -> float:
        used.append(tuning.config("op", (8, 16), torch.bfloat16, "cpu", DEFAULT))
        return abs(used[-1]["BLOCK"] - 33.0)

    tried = tuning.candidates(DEFAULT, {"BLOCK": (16, 32, 64), "num_warps": (4,)})
    assert [one["BLOCK"] for one in tried] == [64, 16, 32]
    measured = tuning.tune("op", (8, 16), torch.bfloat16, "cpu", measure, tried, table)
    assert [one["BLOCK"] for _, one in measured] == [32, 16, 64]
    assert used == tried
    assert tuning.config("op", (8, 16), "bfloat16", "cpu", DEFAULT) == {"BLOCK": 32, "num_warps": 4}
    assert tuning.config("op", (8, 17), "bfloat16", "cpu", DEFAULT) == DEFAULT
    assert tuning.config("op", (8, 16), "float32", "cpu", DEFAULT) == DEFAULT
    assert json.loads(table.read_text()) == {"cpu": {"op": {"8x16 bfloat16": {"BLOCK": 32, "num_warps": 4}}}}
    assert [file.name for file in table.parent.iterdir()] == ["tuned.json"]


def test_what_does_not_fit_is_left_out(table: Path) -> None:
    from triton.runtime.errors import OutOfResources

    def measure() -> float:
        raise OutOfResources(300, 227, "shared memory")

    with pytest.raises(ValueError, match="none of the 1 configurations of op runs on cpu"):
        tuning.tune("op", (8,), "bfloat16", "cpu", measure, [DEFAULT], table)
    assert not table.exists()


def test_the_table_of_the_package_is_in_its_own_spelling() -> None:
    for name, ops in json.loads(tuning.TABLE.read_text()).items():
        for op, entries in ops.items():
            for entry, chosen in entries.items():
                assert len(entry.split()) == 2, (name, op, entry)
                assert all(isinstance(value, int) for value in chosen.values()), (name, op, entry)
