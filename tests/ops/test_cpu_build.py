"""ops/cpu/build.py, and whether `auto` takes it: built once, kept whole, and a sentence where it cannot be."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sfumato import ops
from sfumato.errors import InputError
from sfumato.ops import cpu
from sfumato.ops.cpu import build
from sfumato.quant import formats

pytestmark = pytest.mark.skipif(build.obstacle() is not None, reason=f"the library cannot be built: {build.obstacle()}")


def test_a_folder_that_cannot_be_written_and_a_compiler_that_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Asked for by name it is an error with a remedy; auto warns, and takes torch's own."""
    build.library.cache_clear()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    try:
        with pytest.raises(InputError, match=r"cannot be kept in .*XDG_CACHE_HOME, or choose fused"):
            build.library()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(build, "FLAGS", ["-no-such-option"])
        with pytest.raises(InputError, match=r"g\+\+ failed: .*no-such-option.*; choose fused"):
            build.library()
        with pytest.warns(UserWarning, match="choose fused"):
            assert ops.load("auto", "cpu", torch.float32).name == "fused"
        assert not [path for path in (tmp_path / "sfumato").iterdir() if path.suffix == ".so"]
    finally:
        build.library.cache_clear()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A library that is built at once, in a cache of its own; the folder that it is kept in."""
    (tmp_path / "kernels.cpp").write_text('extern "C" int sf_start() { return 0; }')
    monkeypatch.setattr(build, "HERE", tmp_path)
    monkeypatch.setattr(build, "FLAGS", ["-fPIC", "-shared"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build.library.cache_clear()
    yield tmp_path / "cache" / "sfumato"
    build.library.cache_clear()


def started(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Path, str]:
    """The library's file after a start, and what was said."""
    build.library.cache_clear()
    build.library()
    (path,) = folder.glob("*.so")
    assert {file.name for file in folder.iterdir()} == {path.name, path.with_suffix(".sha256").name}
    return path, capsys.readouterr().err


@pytest.mark.parametrize("damage", ["truncated", "zeros", "empty", "checksum"])
def test_a_damaged_library_is_built_anew(small: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Loaded, the truncated one would end the process."""
    path, message = started(small, capsys)
    whole, place = path.read_bytes(), path.stat().st_ino
    assert message == "" and started(small, capsys) == (path, "") and path.stat().st_ino == place
    broken = {"truncated": whole[:4096], "zeros": whole[:4096] + bytes(len(whole) - 4096), "empty": b""}
    if damage == "checksum":
        path.with_suffix(".sha256").write_bytes(b"\xff\0")
    else:
        path.unlink()  # the old one is still loaded, and its pages are the file's
        path.write_bytes(broken[damage])
    _, message = started(small, capsys)
    assert message == f"sfumato: {path} is damaged; the cpu operations are built anew\n"
    assert path.read_bytes() == whole and started(small, capsys)[1] == ""


def test_a_library_of_an_older_version_is_built_anew_in_silence(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = started(small, capsys)
    path.with_suffix(".sha256").unlink()
    assert started(small, capsys)[1] == "" and path.with_suffix(".sha256").exists()


def test_a_library_is_built_once_by_many_at_once(small: Path, tmp_path: Path) -> None:
    """Six threads, of which each has its own lock: one builds, the others wait for it."""
    built: list[Path] = []
    real = build._build

    def count(path: Path) -> None:
        built.append(path)
        real(path)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(6) as pool:
        patch.setattr(build, "_build", count)
        path = small / "it.so"
        assert list(pool.map(build._provide, [path] * 6)) == [None] * 6
    assert built == [path] and build._is_whole(path)


def test_a_full_cache_and_a_library_that_cannot_be_loaded_are_a_sentence(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = started(small, capsys)
    build.library.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", lambda _: (_ for _ in ()).throw(OSError("failed to map segment")))
        with pytest.raises(InputError, match=r"cannot be loaded: failed to map segment; choose fused"):
            build.library()
    path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(InputError, match=r"cannot be kept in .*: No space left on device; name a folder"):
            build.library()
    assert [file.suffix for file in small.iterdir()] == [".sha256"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
        with pytest.raises(InputError, match=r"cannot be kept in .*: cannot write .*: Read-only file system; name a"):
            build.library()


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_way", lambda: cpu.PLAIN)
    assert "neither AMX nor AVX-512 with BF16 and VNNI" in str(cpu.obstacle(torch.bfloat16))
    assert "neither AMX" in str(cpu.obstacle(torch.bfloat16, [formats.pack(torch.randn(4, 64), "int4")]))
    assert cpu.obstacle(torch.float32) is None
    monkeypatch.setattr(cpu, "_way", lambda: cpu.DOTS)
    assert cpu.obstacle(torch.bfloat16) is None


def test_auto_takes_it_where_it_is_the_fastest() -> None:
    assert ops.load("auto", "cpu", torch.float32) is cpu.OPS
    assert (ops.load("auto", "cpu", torch.bfloat16) is cpu.OPS) == (build.library().sf_start() != cpu.PLAIN)
