"""Files that others may read or write at the same time: a lock for the writer, and files that are whole or not there.

Both hold where a process is killed: its lock goes with it, and the file that it wrote beside is replaced by the next
writer. Lacks: what to do about files of others, which each caller decides for itself.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from sfumato.errors import SfumatoError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def locked(target: Path, wait: bool = False) -> Iterator[None]:
    """Within the block no other process, and no other block of this one, writes `target`.

    `target` is a file or a folder and need not exist yet; its parents are created. The lock is the system's, on a file
    beside the target, `.NAME.lock`, which is removed at the end; a process that is killed leaves at most that file, and
    no lock. Where another holds it: SfumatoError, or with `wait` its end is waited for. SfumatoError too where the
    lock's file cannot be written. A system or a drive without such locks (Windows, some networks) has none here
    either."""
    if fcntl is None:
        yield
        return
    path = target.resolve()
    held = path.parent / f".{path.name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = _lock(held, wait)
        except OSError as error:
            if error.errno not in _REFUSED or not path.is_dir():
                raise
            held, handle = path, _lock(path, wait)  # a volume, say, mounted where nothing else is writable
    except BlockingIOError:
        raise SfumatoError(
            f"another process is writing {target}; wait until it has ended, or give another place"
        ) from None
    except OSError as error:
        raise SfumatoError(f"cannot write {target}: {error.strerror or error}") from error
    try:
        yield
    finally:
        if held != path:
            with suppress(OSError):
                held.unlink()
        os.close(handle)


def _lock(path: Path, wait: bool) -> int:
    """The file or folder of this name, locked. Who held it before may have removed it: the name is another's then."""
    while True:
        how = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
        handle = os.open(path, how | os.O_CLOEXEC, 0o666)
        try:
            _flock(handle, wait)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(path)):
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _flock(handle: int, wait: bool) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:
        pass  # this drive has no locks


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` when the block ends well; after an error nothing is changed.

    It is written beside, as `.NAME.part`: two writers of one path at one time need `locked`."""
    beside = path.with_name(f".{path.name}.part")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise
