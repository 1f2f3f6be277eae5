"""Compile every kernel without a GPU, for every architecture, and read the result.

Each file of this package that holds kernels has `ahead(arch) -> list[Special]`: its specialisations at the released
model's sizes. Triton makes cubins of them with the ptxas in its own wheel; cuobjdump tells their registers, spills and
shared memory, nvdisasm the instructions of each loop. Nothing runs here: that a kernel fits says nothing about its
answers, which the interpreter checks.

    python -m sfumato.ops.triton.ahead --arch 90 --only attention -o runs/ahead.json
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ARCHS = (80, 89, 90, 100, 120)


@dataclass(frozen=True)
class Special:
    """One kernel for one set of sizes."""

    name: str
    """What is compiled, for people: "attention sliding bfloat16"."""
    kernel: Any
    """The function under @triton.jit."""
    signature: Mapping[str, str]
    """Types of the arguments that are passed when it runs: "*bf16", "i32", "fp32". Pointers count as aligned to 16
    bytes, as torch allocates them; "i32:16" is an integer that 16 divides, such as a stride."""
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    """Values of all other arguments, but for PDL, which is for all kernels alike (`dependent`)."""
    num_warps: int = 4
    num_stages: int = 1


POINTERS = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
"""How Special spells a pointer to these dtypes."""


def specials(arch: int) -> dict[str, list[Special]]:
    """The specialisations of each file of this package that has `ahead`, by the file's name."""
    here = Path(__file__).parent
    by_file = {}
    for name in sorted(module.name for module in pkgutil.iter_modules([str(here)])):
        if name != Path(__file__).stem:
            module = importlib.import_module(f"{__spec__.parent}.{name}")
            if hasattr(module, "ahead"):
                by_file[name] = module.ahead(arch)
    return by_file


def compile_all(archs: Iterable[int] = ARCHS, only: str | None = None, every: int = 1) -> list[dict[str, Any]]:
    """A row for each specialisation and architecture: op, name, arch, and what `compile_one` says.

    `only` keeps the names and files that contain this text, `every` what `sample` does."""
    rows = []
    for arch in archs:
        for op, each in specials(arch).items():
            for special in sample(each, every):
                if only is None or only in f"{op} {special.name}":
                    rows.append({"op": op, "name": special.name, "arch": arch, **compile_one(special, arch)})
    return rows


def sample(specials: Sequence[Special], every: int) -> list[Special]:
    """The first specialisation of each kernel, and of the others every `every`-th one, in their order."""
    kernels: set[Any] = set()
    kept, others = [], 0
    for special in specials:
        is_first = special.kernel not in kernels
        kernels.add(special.kernel)
        others += not is_first
        if is_first or others % every == 0:
            kept.append(special)
    return kept


def compile_one(special: Special, arch: int) -> dict[str, Any]:
    """What the compiler makes of this kernel, as a row.

    Registers and spills (bytes) of a thread, shared memory (bytes), warps and stages; instructions in all and in its
    largest innermost loop (a warp, one turn), which matrix instructions and copies are in it; size (bytes of cubin),
    seconds. RuntimeError where it does not compile."""
    began = time.perf_counter()
    return {**read(compiled(special, arch)), "seconds": round(time.perf_counter() - began, 2)}


def compiled(special: Special, arch: int) -> Any:
    """This kernel as Triton returns it. RuntimeError where it does not compile."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sfumato.ops.triton.dependent import is_on

    names = special.kernel.arg_names
    constexprs = {**special.constexprs, **({"PDL": is_on(f"sm_{arch}")} if "PDL" in names else {})}
    wrong = set(names) ^ (set(special.signature) | set(constexprs))
    if wrong or set(special.signature) & set(constexprs):
        raise RuntimeError(f"{special.name}: each argument once, in signature or constexprs; see {sorted(wrong)}")
    signature = {name: special.signature.get(name, "constexpr").removesuffix(":16") for name in names}
    aligned = [i for i, name in enumerate(names) if special.signature.get(name, "").startswith("*")]
    aligned += [i for i, name in enumerate(names) if special.signature.get(name, "").endswith(":16")]
    source = ASTSource(
        special.kernel,
        signature,
        constexprs,
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    try:
        return triton.compile(
            source,
            target=GPUTarget("cuda", arch, 32),
            options={"num_warps": special.num_warps, "num_stages": special.num_stages},
        )
    except Exception as error:
        raise RuntimeError(f"{special.name} does not compile for sm_{arch}: {error}") from error


def read(kernel: Any) -> dict[str, Any]:
    """What `compile_one` says, of a compiled kernel."""
    usage = _usage(kernel.asm["cubin"])
    instructions, labels = disassembled(kernel.asm["cubin"])
    return {
        "registers": usage["REG"],
        "spills": usage["STACK"] + usage["LOCAL"],
        "instructions": len(instructions),
        **largest_loop(instructions, labels),
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "stages": kernel.metadata.num_stages,
        "size": len(kernel.asm["cubin"]),
    }


def _usage(cubin: bytes) -> dict[str, int]:
    text = _tool("cuobjdump", "-res-usage", cubin)
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


def _tool(name: str, option: str, cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout


def disassembled(cubin: bytes) -> tuple[list[str], dict[str, int]]:
    """The instructions in order, and where each label stands."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in _tool("nvdisasm", "-c", cubin).splitlines():
        if label := re.match(r"\s*(\.L_\S+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(instruction[1].strip())
    return instructions, labels


MATRIX = ("HGMMA", "QGMMA", "HMMA", "QMMA", "IMMA", "UTCHMMA", "UTCQMMA")
"""Instructions of the tensor cores."""
COPIES = ("LDGSTS", "UTMALDG", "LDG", "LDSM", "LDS", "STS", "STSM")


def largest_loop(instructions: Sequence[str], labels: Mapping[str, int]) -> dict[str, Any]:
    """Of the innermost loops the longest with tensor cores in it, or else the longest of all.

    0 where there is none, or it is unrolled. A branch backwards ends a loop; the one to itself behind the end is
    none."""
    loops = []
    for at, instruction in enumerate(instructions):
        branch = re.search(r"BRA.*?`\((\.L\S+)\)", instruction)
        if branch and labels.get(branch[1], at + 1) < at:
            loops.append((labels[branch[1]], at))
    inner = [
        one for one in loops if not any(one != other and one[0] <= other[0] <= other[1] <= one[1] for other in loops)
    ]
    counted = [Counter(map(_operation, instructions[first : last + 1])) for first, last in inner]
    if not counted:
        return {"loop": 0, "loop_matrix": 0, "loop_copies": {}}
    best = max(counted, key=lambda one: (any(one[name] for name in MATRIX), one.total()))
    return {
        "loop": best.total(),
        "loop_matrix": sum(best[name] for name in MATRIX),
        "loop_copies": {name: best[name] for name in COPIES if best[name]},
    }


def _operation(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0].split(".")[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m sfumato.ops.triton.ahead", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, action="append", choices=ARCHS, help="this one only; may be given again")
    parser.add_argument("--only", help="files and names in which this text stands")
    parser.add_argument("--every", type=int, default=1, help="of each kernel the first, and of the others every n-th")
    parser.add_argument("-o", "--output", type=Path, help="write the rows as JSON too")
    options = parser.parse_args(arguments)
    print(
        f"{'op':<16}{'name':<40}{'arch':>6}{'regs':>6}{'spills':>8}{'shared':>8}{'warps':>6}{'loop':>6}{'seconds':>9}"
    )
    rows = []
    for arch in options.arch or ARCHS:
        for row in compile_all([arch], options.only, options.every):
            rows.append(row)
            print(
                f"{row['op']:<16}{row['name']:<40}{row['arch']:>6}{row['registers']:>6}{row['spills']:>8}"
                f"{row['shared']:>8}{row['warps']:>6}{row['loop']:>6}{row['seconds']:>9}",
                flush=True,
            )
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
