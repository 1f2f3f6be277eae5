"""Builds the CPU library once a machine, with the compiler that is there, and loads it.

The library is kept in the user's cache folder under a name that follows from its sources, the compiler and the
processor: what another machine or an older version built is never taken for it. A checksum lies beside it: a library
that is damaged would end the process at its first use, so it is checked before it is loaded, and built anew.
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

from sfumato.errors import InputError, SfumatoError
from sfumato.ops.cpu import waiting
from sfumato.system.files import locked, replacing

HERE = Path(__file__).parent
FLAGS = ["-std=c++17", "-O3", "-march=native", "-pthread", "-fno-math-errno", "-fPIC", "-shared", "-Wno-psabi"]
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
    try:
        if not _is_whole(path):
            _provide(path)
    except InputError:
        raise
    except (OSError, SfumatoError) as error:
        raise InputError(
            f"the cpu operations cannot be kept in {path.parent}: {getattr(error, 'strerror', None) or error}; name a "
            "folder that can be written in XDG_CACHE_HOME, or choose fused"
        ) from error
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise InputError(f"the cpu operations cannot be loaded: {error}; choose fused") from error
    loaded.sf_start()
    waiting.shorten()
    return loaded


def _is_whole(path: Path) -> bool:
    """Whether the library is there and as it was built."""
    checksum = path.with_suffix(".sha256")
    if not path.is_file() or not checksum.is_file():
        return False
    return hashlib.sha256(path.read_bytes()).hexdigest() == checksum.read_text(errors="replace").strip()


def _provide(path: Path) -> None:
    """Build the library where no other process has just done so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path, wait=True):
        if _is_whole(path):
            return
        if path.exists() and path.with_suffix(".sha256").exists():  # older versions left none
            print(f"sfumato: {path} is damaged; the cpu operations are built anew", file=sys.stderr, flush=True)
        _build(path)
        if not _is_whole(path):
            raise InputError(f"the cpu operations cannot be used: {path} is not what was written; choose fused")


def _build(path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        beside = Path(temporary) / path.name
        command = [str(_compiler()), *FLAGS, str(HERE / "kernels.cpp"), "-o", str(beside)]
        if sys.stderr.isatty():
            print("sfumato: building the cpu operations, once for this machine …", file=sys.stderr, flush=True)
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=600)
        except subprocess.TimeoutExpired:
            raise InputError(
                "the cpu operations cannot be used: g++ has not ended in ten minutes; choose fused"
            ) from None
        if done.returncode:
            raise InputError(
                f"the cpu operations cannot be used: g++ failed: {' '.join(done.stderr.split())[:300]}; choose fused"
            )
        checksum = hashlib.sha256(beside.read_bytes()).hexdigest()
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    with replacing(path.with_suffix(".sha256")) as file:
        file.write(checksum.encode() + b"\n")


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
