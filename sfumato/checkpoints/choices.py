"""Which GGUF is meant where a folder or a hub repository holds several: one file, or all parts of a set.

Names alone are looked at. A quantisation is named as people write it in file names: `Q4_K_M` is `x-Q4_K_M.gguf`,
`Q4_K_M/x-00001-of-00002.gguf` and what is split beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from sfumato.checkpoints.formats.gguf_split import set_of
from sfumato.errors import CheckpointError

_ASIDE = ("mmproj", "imatrix")
"""What files are called that lie beside models and are none."""
_QUANTISATION = re.compile(r"(?:UD-)?(?:I?Q\d\w*|TQ\d_\d|B?F16|F32|MXFP4\w*|NVFP4)", re.IGNORECASE | re.ASCII)
_SHOWN = 20


def gguf_names(folder: Path) -> list[str]:
    """The GGUF files of a folder and of the folders right in it, as paths from there with slashes."""
    places = (*folder.glob("*"), *folder.glob("*/*"))
    return sorted(path.relative_to(folder).as_posix() for path in places if is_gguf(path.name) and path.is_file())


def is_gguf(name: str) -> bool:
    """Whether a file's name says that it is a GGUF."""
    return name.lower().endswith(".gguf")


def models(names: Iterable[str]) -> dict[str, list[str]]:
    """The models among files: for each the name of the whole, and its parts in order.

    Vision towers and importance matrices, which lie beside models, are left out."""
    sets: dict[str, list[str]] = {}
    for name in sorted(filter(is_gguf, names)):
        path = PurePosixPath(name)
        if not any(word in path.name.lower() for word in _ASIDE):
            sets.setdefault(str(path.with_name(set_of(path.name)[0])), []).append(name)
    return sets


def chosen(names: Iterable[str], tag: str | None, place: str) -> list[str]:
    """The files of the one model that is meant: all parts of it, in order.

    `tag` is a quantisation, or a file's name with or without its ending; capitals do not matter. `place` is what a
    person calls the folder. CheckpointError where no model is meant, or several are."""
    sets = models(names)
    if not sets:
        raise CheckpointError(f"{place} holds no GGUF file of a model")
    fitting = list(sets) if tag is None else _fitting(sets, tag.lower())
    if len(fitting) == 1:
        return sets[fitting[0]]
    if not fitting:
        raise CheckpointError(f"{place} holds no GGUF {tag!r:.100}; it has {_listed(sets)}")
    match = _QUANTISATION.search(_label(fitting[0]))
    raise CheckpointError(
        f"{place} holds {len(fitting)} models{'' if tag is None else f' {tag!r:.100}'}: {_listed(fitting)}; "
        f"name one, as {place}:{match[0] if match and tag is None else _label(fitting[0])}"
    )


def _fitting(sets: dict[str, list[str]], tag: str) -> list[str]:
    """The sets that bear this name, else those with this word in their name."""
    exact = [
        whole
        for whole, parts in sets.items()
        if tag in {spelling.lower() for name in (whole, *parts) for spelling in _spellings(name)}
    ]
    before = "[-._/ ]" if _QUANTISATION.fullmatch(tag) else "[-./ ]"  # in K_M the line is no separator
    word = re.compile(rf"(?:^|{before}){re.escape(tag)}(?:[-./ ]|$)")
    return exact or [whole for whole in sets if word.search(_label(whole).lower())]


def _spellings(name: str) -> tuple[str, ...]:
    base = PurePosixPath(name).name
    return name, base, _label(name), _label(base)


def _label(name: str) -> str:
    return name[: -len(".gguf")]


def _listed(names: Iterable[str]) -> str:
    labels = list(names)
    more = f" and {len(labels) - _SHOWN} more" if len(labels) > _SHOWN else ""
    return ", ".join(repr(label)[1:-1] for label in labels[:_SHOWN]) + more
