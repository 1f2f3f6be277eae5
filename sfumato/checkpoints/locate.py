"""Where a checkpoint is: an embedded model, a folder, a file, or the Hugging Face hub and its offline cache."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from sfumato.checkpoints import unreadable
from sfumato.checkpoints.choices import chosen, gguf_names, is_gguf, models
from sfumato.checkpoints.shards import short
from sfumato.errors import CheckpointError, is_panic
from sfumato.system.embedded import EMBEDDED

NANO = EMBEDDED["nano"]
"""The folder of the model that is loaded where none is named."""
_BESIDE = ("*.json", "*.jinja")
"""What stands beside weights: configuration, tokenizer, chat template."""
_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(.+))?", re.ASCII)
"""A hub id, and which of its GGUF files."""


def resolve(path: str | Path, weights: bool = True) -> Path:
    """The place of a checkpoint: the name of an embedded model, a folder, a .gguf file, or a hub id ("owner/name").

    Where a folder or a repository holds GGUF files and no safetensors, the place is the GGUF file; which of several is
    named behind a colon, by its quantisation or its name: "owner/name:Q4_K_M", "folder:Q4_K_M". A hub id is downloaded,
    or read from the offline cache; without `weights`, only its configuration, tokenizer and chat template.
    `Path("nano")` or "./nano" is a folder of that name. CheckpointError when there is no such thing, or several."""
    if isinstance(path, str) and path in EMBEDDED:
        return EMBEDDED[path]
    place = os.path.expanduser(path)
    if os.path.isdir(place):
        return _in_folder(Path(place), None)
    if os.path.isfile(place):
        if is_gguf(place) or _begins_like_gguf(place):
            return Path(place)
        raise CheckpointError(
            unreadable.sentence(Path(place))
            or f"{path} is a file of no known kind; give a .gguf file, or the folder that holds config.json and weights"
        )
    folder, _, tag = place.rpartition(":")
    if folder and tag and os.path.isdir(folder):
        return _in_folder(Path(folder), tag)
    if isinstance(path, str) and (match := _ID.fullmatch(path)):
        return _from_hub(match[1], match[2], weights)
    raise CheckpointError(
        f"there is no folder {short(path)}; give a checkpoint folder, a .gguf file, a hub id like owner/name, or nano"
    )


def _begins_like_gguf(path: str) -> bool:
    """Whether a file of any name is a GGUF: other programs keep theirs under a hash."""
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def _in_folder(folder: Path, tag: str | None) -> Path:
    """The folder itself, or the GGUF file in it that is meant."""
    names = gguf_names(folder)
    if tag is None and (not models(names) or any(folder.glob("*.safetensors"))):
        return folder
    return folder / chosen(names, tag, str(folder))[0]


def _from_hub(name: str, tag: str | None, weights: bool) -> Path:
    """The snapshot of a repository, or the GGUF file in it that is meant; nothing else of it is fetched."""
    if tag is None:
        folder = _snapshot(name, [*_BESIDE, *(["*.safetensors"] if weights else [])], ["*/*"])
        if any(folder.glob("*.safetensors")) or (not weights and (folder / "config.json").is_file()):
            return folder
        names = _names(name)
        if not models(names):
            return folder
    else:
        names = _names(name)
    parts = chosen(names, tag, name)
    if not weights:
        folder = _snapshot(name, [])
        if not all((folder / part).is_file() for part in parts):
            raise CheckpointError(
                f"{name} is a GGUF, which holds its description within; get it first: sfumato pull "
                f"{name}:{PurePosixPath(parts[0]).name}"
            )
        return folder / parts[0]
    places = (PurePosixPath(), PurePosixPath(parts[0]).parent)
    beside = [one for one in names if PurePosixPath(one).parent in places and one.endswith((".json", ".jinja"))]
    return _snapshot(name, [glob.escape(one) for one in (*parts, *beside)]) / parts[0]


def _snapshot(name: str, patterns: list[str], ignored: list[str] | None = None) -> Path:
    """The folder of a repository, with the files of these patterns in it."""
    import huggingface_hub  # here: it takes a while to import, and local checkpoints do without

    with _explained(name):
        # The hub's own rules: when the net is down or HF_HUB_OFFLINE is set, what the cache holds is used.
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, ignore_patterns=ignored))


def _names(name: str) -> list[str]:
    """The files of a repository; those in the cache where the hub cannot be asked."""
    import huggingface_hub

    with _explained(name):
        try:
            return list(huggingface_hub.HfApi().list_repo_files(name))
        except Exception as error:
            try:
                folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=[], local_files_only=True))
            except Exception:
                raise error from None
            return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """CheckpointError in the place of whatever the hub's library raises."""
    try:
        yield
    except BaseException as error:  # of many families: the hub's, its HTTP library's, the disk's, a panic in hf_xet
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        kind = type(error).__name__
        known = {
            "RepositoryNotFoundError": "the hub has no such model, or it is private and needs `hf auth login`",
            "GatedRepoError": "its licence must be accepted on the hub first, then `hf auth login`",
            "LocalEntryNotFoundError": "it is not in the cache and the hub cannot be reached",
            "OfflineModeIsEnabled": "it is not in the cache and the hub cannot be reached",
            "IncompleteSnapshotError": "the cache holds only a part of it and the hub cannot be reached",
        }
        reason = known.get(kind, short(f"{kind}: {error}"))
        raise CheckpointError(f"cannot get {name} from the hub: {reason}") from error
