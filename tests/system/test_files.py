"""system/files.py: locks that go with their process, and files that are there whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sfumato.errors import SfumatoError
from sfumato.system import files

HOLDER = (
    "import sys, time\nfrom pathlib import Path\nfrom sfumato.system.files import locked\n"
    "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
)


def holder(target: Path) -> subprocess.Popen[str]:
    """A process that holds the lock of `target` until its standard input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def ended(process: subprocess.Popen[str]) -> None:
    process.communicate(timeout=60)


@pytest.mark.parametrize("kind", ["nothing", "file", "folder", "link"])
def test_the_second_is_refused_until_the_first_ends(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "deep" / "it"
    if kind != "nothing":
        target.parent.mkdir()
    if kind == "file":
        target.write_text("x")
    elif kind == "folder":
        target.mkdir()
    elif kind == "link":
        (tmp_path / "it").mkdir()
        target.symlink_to(tmp_path / "it")
    process = holder(target)
    other = tmp_path / "it" if kind == "link" else target
    second = r"another process is writing .*it; wait until it has ended, or give"
    with pytest.raises(SfumatoError, match=second), files.locked(other):
        pytest.fail("two at once")
    with files.locked(target.with_name("another")):
        pass
    ended(process)
    with files.locked(target), pytest.raises(SfumatoError, match="another process"), files.locked(target):
        pytest.fail("two at once")
    assert not [path for path in tmp_path.rglob(".*")]


def test_a_lock_goes_with_its_process(tmp_path: Path) -> None:
    process = holder(tmp_path / "it")
    process.send_signal(signal.SIGKILL)
    ended(process)
    assert os.listdir(tmp_path) == [".it.lock"]
    with files.locked(tmp_path / "it"):
        pass
    assert os.listdir(tmp_path) == []


def test_waiting_ends_with_the_holder_and_no_two_hold_it(tmp_path: Path) -> None:
    inside, most, failed = 0, 0, []

    def work() -> None:
        nonlocal inside, most
        try:
            for _ in range(50):
                with files.locked(tmp_path / "it", wait=True):
                    inside += 1
                    most = max(most, inside)
                    time.sleep(0.0002)
                    inside -= 1
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (most, failed) == (1, []) and os.listdir(tmp_path) == []


def test_a_folder_in_a_place_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mounted volume: the folder itself is locked. Without the folder it is one sentence."""
    real = os.open

    def refused(path: os.PathLike[str], *rest: int) -> int:
        if str(path).endswith(".lock"):
            raise OSError(30, "Read-only file system", str(path))
        return real(path, *rest)

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(SfumatoError, match=r"cannot write .*it: Read-only file system"), files.locked(tmp_path / "it"):
        pass
    (tmp_path / "it").mkdir()
    one, two = files.locked(tmp_path / "it"), files.locked(tmp_path / "it")
    with one, pytest.raises(SfumatoError, match="another process"), two:
        pytest.fail("two at once")
    with files.locked(tmp_path / "it"):
        assert os.listdir(tmp_path) == ["it"]


def test_a_system_without_locks_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", missing)
    with files.locked(tmp_path / "it"):
        pass
    monkeypatch.setattr(files, "fcntl", None)
    with files.locked(tmp_path / "it"), files.locked(tmp_path / "it"):
        pass


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "it"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["it"]
    (tmp_path / ".it.part").write_text("what a killed writer left, longer than the new")
    with files.replacing(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["it"]
