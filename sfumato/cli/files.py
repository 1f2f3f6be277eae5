"""Files of text, in and out byte for byte.

A file is read as bytes and decoded strictly as UTF-8: line endings, a missing last newline and a byte order mark stay
what they are, so that what is not rewritten comes out as it went in.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from sfumato.errors import InputError, SfumatoError

LIMIT = 16 << 20
"""The largest file that is read, in bytes."""
BOM = "\ufeff"
"""The byte order mark, as a character."""


def read(name: str) -> str:
    """The text of a file, or of standard input for "-"; InputError where it cannot be read or is no text."""
    if name == "-":
        if sys.stdin.isatty():
            raise InputError("there is no text on standard input; pipe it in, or give a file")
        return decode(sys.stdin.buffer.read(LIMIT + 1), "standard input")
    try:
        with open(name, "rb") as file:
            return decode(file.read(LIMIT + 1), name)
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}; give a text file, or - for standard input") from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read {name!r}: {error}") from None  # a name with a NUL


def decode(data: bytes, name: str) -> str:
    """Bytes to text with nothing changed on the way; InputError for what is not text, or too much of it."""
    if len(data) > LIMIT:
        raise InputError(f"{name} is larger than {LIMIT >> 20} MiB, the limit; cut out the part to work on")
    if (at := data.find(0)) >= 0:
        raise InputError(f"{name} is not a text file: byte {at} is NUL; give UTF-8 text")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"byte {error.start} ({data[error.start]:#04x}) is not UTF-8"
        raise InputError(f"{name} is not a text file: {what}; convert it to UTF-8 first") from None


def parse_json(text: str, name: str) -> Any:
    """The value that JSON text holds; InputError where it is not JSON, or names a key twice."""

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in pairs:
            if key in values:
                raise InputError(f"{name} says {key!r} twice; give each name once")
            values[key] = value
        return values

    try:
        return json.loads(text.removeprefix(BOM), object_pairs_hook=object_of)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is not JSON: {error}") from None


def out_path(text: str, name: str) -> Path:
    """The path to write to; InputError, which names the option or argument `name`, where the text is empty."""
    if not text.strip():
        raise InputError(f"{name} is empty; give a path to write to")
    return Path(text)


@dataclass(frozen=True)
class NewFile:
    """A file to write that replaces nothing unasked."""

    path: Path
    force: bool = False

    def write(self, text: str) -> None:
        """Write the file, whole or not at all: beside its place, then renamed. InputError where one is there by now."""
        target = Path(os.path.realpath(self.path)) if self.force else self.path
        beside = target.with_name(f".sfumato-{secrets.token_hex(8)}")
        try:
            with open(beside, "xb") as file:
                file.write(text.encode("utf-8", "backslashreplace"))
                file.flush()
                os.fsync(file.fileno())
            if self.force:
                with suppress(FileNotFoundError):
                    os.chmod(beside, stat.S_IMODE(os.stat(target).st_mode))
                os.replace(beside, target)
                return
            try:
                os.link(beside, self.path)  # fails where something is there, even if it came this moment
            except FileExistsError:
                raise _exists(self.path) from None
            except OSError:  # a file system without links
                if os.path.lexists(self.path):
                    raise _exists(self.path) from None
                os.replace(beside, self.path)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(beside)


def check_not_read(paths: Iterable[str | Path | None], sources: Sequence[str | None]) -> None:
    """InputError where a file to write is one of those that are read, however both are spelled."""
    for path, source in product(paths, sources):
        if path is None or source is None or not (os.path.exists(path) and os.path.exists(source)):
            continue
        if os.path.samefile(path, source):
            raise InputError(f"{path} is read by this command, so that it cannot be written too; give another name")


def new_path(text: str | None, force: bool, name: str = "--output") -> NewFile | None:
    """The file to write, None where none is asked for.

    InputError, better now than after the work, for one that cannot be written, or is there and not to be replaced."""
    if text is None:
        return None
    if text == "-":
        raise InputError(f"{name} is -; leave it out for standard output")
    path = out_path(text, name).expanduser()
    if path.is_dir():
        raise InputError(f"{path} is a folder; give a file to write to")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path} cannot be written: there is no folder {path.parent}")
    if os.path.lexists(path):
        if not force:
            raise _exists(path)
        if not path.is_file():
            raise InputError(f"{path} is not a regular file, so --force cannot replace it; give another name")
    if not os.access(path.absolute().parent, os.W_OK):
        raise InputError(f"{path} cannot be written: its folder is read-only; give another place")
    return NewFile(path, force)


def _exists(path: Path) -> InputError:
    return InputError(f"{path} is there already; give another name, or --force to replace it")


def check_writable(name: str) -> None:
    """InputError where `write` could not replace this file: better known before the model has worked."""
    if name == "-":
        raise InputError("standard input cannot be written; give a file, or leave --write out")
    path = os.path.realpath(name)
    if not os.path.exists(path):
        return  # `read` says so
    if not os.path.isfile(path):
        raise InputError(f"{name} is not a regular file, so --write cannot replace it; leave --write out")
    if not os.access(path, os.W_OK):
        raise InputError(f"{name} is read-only; allow writing, or leave --write out")
    if not os.access(os.path.dirname(path), os.W_OK):
        raise InputError(f"--write needs to make a file beside {name}, and its folder is read-only; leave --write out")


def write(name: str, old: str, new: str) -> None:
    """Replace a file's text, whole or not at all: the new text is written beside it, then renamed.

    Owner, permissions and extended attributes stay as far as the system allows, and a link stays a link. SfumatoError
    where the file no longer holds `old`, or is no regular file.
    """
    path = os.path.realpath(name)
    with open(path, "rb", opener=_open_at_once) as file:
        was = os.fstat(file.fileno())
        if not stat.S_ISREG(was.st_mode) or file.read() != old.encode():
            raise SfumatoError(f"{name} has changed since it was read, so it was left as it is; run this again")
    handle, beside = tempfile.mkstemp(prefix=".sfumato-", dir=os.path.dirname(path))
    try:
        with open(handle, "wb") as file:
            file.write(new.encode())
            file.flush()
            with suppress(OSError, AttributeError):  # another's file, or a system without owners
                os.chown(beside, was.st_uid, was.st_gid)
            os.chmod(beside, stat.S_IMODE(was.st_mode))
            _copy_attributes(path, beside)
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise


def _open_at_once(path: str, flags: int) -> int:
    """Open without waiting: a pipe in the file's place would wait for its other end."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _copy_attributes(source: str, target: str) -> None:
    """Copy extended attributes, and with them access lists and labels, as far as they may be read and set."""
    if not hasattr(os, "listxattr"):  # Linux alone has them in Python
        return
    with suppress(OSError):
        for name in os.listxattr(source):
            with suppress(OSError):
                os.setxattr(target, name, os.getxattr(source, name))
