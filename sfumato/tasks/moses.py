"""Molecules of MOSES (Polykovskiy et al. 2020, arXiv 1811.12823) to complete: drug-like ones, cut as our own are.

The set is data of the package `molsets` (MIT), one SMILES a line in a gzip file. `pip install --no-deps molsets` is
enough: nothing of it is imported, its file is read, and its own dependencies are of 2020. One in eight of its molecules
has at most 30 characters, as those of the project's generator have; longer ones are for models with longer canvases.

It lacks on purpose: the benchmark's metrics, other kinds of items.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np

from sfumato.errors import InputError
from sfumato.tasks import molecules, smiles

MOST_BYTES = 128 * 1024 * 1024
"""Of a file, unpacked; the largest of the package has 58 MB."""

_FILE = "moses/dataset/data/{}.csv.gz"
_TRIES = 10_000


def package_file(split: str = "test") -> Path:
    """The file of the installed package: `train` (1,584,663 molecules), `test` or `test_scaffolds` (176,074 each).

    InputError where the package is not installed, or has no such file.
    """
    try:
        path = Path(str(distribution("molsets").locate_file(_FILE.format(split))))
    except PackageNotFoundError:
        raise InputError("the package molsets is not installed; pip install --no-deps molsets") from None
    if not path.is_file():
        raise InputError(f"molsets has no {path.name}; its files are train, test and test_scaffolds")
    return path


def read_file(path: Path, longest: int = molecules.LONGEST) -> list[str]:
    """The texts of at most `longest` characters in a file of the set's form, in order.

    The form: `.csv` or `.csv.gz`, a heading that begins with SMILES, then SMILES first in each line; whether they are
    molecules is not checked. InputError for another file, one that is too large, or one that has no such text.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error}); give a .csv or a .csv.gz of molecules") from None
    if len(data) > MOST_BYTES:
        raise InputError(f"{path} has over {MOST_BYTES} bytes; give a part of it")
    lines = [line.split(",", 1)[0] for line in data.decode("ascii", "replace").splitlines()]
    if lines[:1] != ["SMILES"]:
        raise InputError(f"the first line of {path} does not begin with SMILES; give a heading, then a molecule a line")
    texts = [text for text in lines[1:] if 3 <= len(text) <= longest]
    if not texts:
        raise InputError(f"{path} has no molecule of at most {longest} characters; allow longer ones")
    return texts


def generator(path: Path | None = None, longest: int = molecules.LONGEST) -> Callable[[np.random.Generator], str]:
    """Random items of the kind `missing` from a file, or without one from the installed package's test file.

    InputError as above, and when a call meets no molecule that `smiles` reads.
    """
    texts = read_file(package_file() if path is None else path, longest)

    def generate(rng: np.random.Generator) -> str:
        for _ in range(_TRIES):
            text = texts[int(rng.integers(len(texts)))]
            if smiles.is_valid(text) and len(smiles.tokens(text)) > 2:
                return molecules.missing_item(text, rng)
        raise InputError(f"of {_TRIES} lines of the file none is a molecule that can be read; give SMILES")

    return generate
