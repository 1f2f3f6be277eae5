"""What tests of the compiled library share: every way of multiplying tiles that this processor has, and AMX on every
processor, if need be in plain code (`amx.h`)."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest

from sfumato.ops import cpu
from sfumato.ops.cpu import build, calls

WAYS = {"amx": cpu.AMX, "avx512": cpu.DOTS, "plain": cpu.PLAIN}
AMX_IN_CODE = Path(__file__).parents[1] / "amx.h"


@functools.cache
def library_with_amx() -> ctypes.CDLL:
    """The library with tile registers that are arrays: kept beside the others, under a name of its own."""
    content = hashlib.sha256(AMX_IN_CODE.read_bytes()).hexdigest()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "FLAGS", [*build.FLAGS, "-include", str(AMX_IN_CODE), f"-DAMX_IN_CODE={content[:7]}"])
        return build.library.__wrapped__()


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """How tiles are multiplied: as the processor can, as it could if it were an older one, and by AMX in any case."""
    library, tier = build.library(), WAYS[request.param]
    if tier == cpu.AMX and library.sf_start() != tier:
        if platform.machine() not in ("x86_64", "AMD64"):
            pytest.skip("this processor's compiler has no AMX")
        library = library_with_amx()
        monkeypatch.setattr(build, "library", lambda: library)
    monkeypatch.setattr(calls, "_ENTRIES", {})
    try:
        if library.sf_limit(tier) != tier:
            pytest.skip(f"this processor has no {request.param}")
        yield request.param
    finally:
        library.sf_start()
