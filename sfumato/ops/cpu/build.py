"""Builds the CPU library once a machine, with the compiler that is there, and loads it.

The library is kept in the user's cache folder under a name that follows from its sources, the compiler and the
processor: what another machine or an older version built is never taken for it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from sfumato.events import InputError

HERE = Path(__file__).parent
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fPIC", "-shared", "-Wno-psabi"]
FLAGS += ["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []


def obstacle() -> str | None:
    """Why the library cannot be built here, None where it can."""
    if sys.platform != "linux":
        return "it is built on Linux alone"
    if _compiler() is None:
        return "it needs g++ to build once (Debian, Ubuntu: apt install g++)"
    return None


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library; builds it if this machine has not done so (some fifteen seconds). InputError says why not."""
    if reason := obstacle():
        raise InputError(f"the cpu operations cannot be used: {reason}; choose fused")
    path = _folder() / f"cpu-{_key()}.so"
    if not path.exists():
        try:
            _build(path)
        except OSError as error:
            raise InputError(
                f"the cpu operations cannot be kept in {path.parent}: {error.strerror or error}; name a folder "
                "that can be written in XDG_CACHE_HOME, or choose fused"
            ) from error
    import torch  # noqa: F401 - its OpenMP runtime must be the one that the library finds

    loaded = ctypes.CDLL(str(path))
    loaded.sf_start()
    return loaded


def _build(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        beside = Path(temporary) / path.name
        command = [str(_compiler()), *FLAGS, str(HERE / "kernels.cpp"), "-o", str(beside)]
        if sys.stderr.isatty():
            print("sfumato: building the cpu operations, once for this machine …", file=sys.stderr, flush=True)
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode:
            raise InputError(
                f"the cpu operations cannot be used: g++ failed: {' '.join(done.stderr.split())[:300]}; choose fused"
            )
        os.replace(beside, path)


@functools.cache
def _compiler() -> str | None:
    return shutil.which("g++")


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "sfumato"


def _key() -> str:
    compiler = subprocess.run([str(_compiler()), "--version"], capture_output=True, text=True, timeout=60).stdout
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line for line in lines if line.startswith("flags")), "")
    except OSError:
        processor = platform.processor()
    sources = b"".join(file.read_bytes() for file in sorted(HERE.glob("*.[ch]*")))
    parts = [sources, compiler.encode(), processor.encode(), platform.machine().encode(), " ".join(FLAGS).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]
