"""tasks/moses.py: a file of molecules in the form of MOSES becomes items to complete; other files are refused."""

from __future__ import annotations

import gzip
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pytest

from sfumato.errors import InputError
from sfumato.tasks import molecules, moses, smiles
from sfumato.tasks.task import named

LINES = "SMILES,SPLIT\nCC(=O)Oc1ccccc1C(=O)O,test\nCn1cnc2c1c(=O)n(C)c(=O)n2C,test\nC1(,test\nCCCC[NH3+],test\n"


@pytest.mark.parametrize("name", ["set.csv", "set.csv.gz"])
def test_molecules_of_a_file_become_items(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(LINES.encode()) if name.endswith("gz") else LINES.replace("\n", "\r\n").encode())
    generate = moses.generator(path)
    items = [generate(np.random.default_rng(seed)) for seed in range(30)]
    assert {molecules.answer(item) for item in items} == {"CC(=O)Oc1ccccc1C(=O)O", "Cn1cnc2c1c(=O)n(C)c(=O)n2C"}
    assert {molecules.kind(item) for item in items} == {"missing"} and len({*items}) > 15
    assert moses.read_file(path, 21) == ["CC(=O)Oc1ccccc1C(=O)O", "C1(", "CCCC[NH3+]"]


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("absent.csv", None, "cannot be read"),
        ("set.csv.gz", b"SMILES\nCCO\n", "cannot be read"),
        ("set.csv.gz", gzip.compress(LINES.encode(), mtime=0)[:-12], "cannot be read"),
        ("set.csv.gz", gzip.compress(LINES.encode(), mtime=0)[:12] + b"\xff" * 20, "cannot be read"),
        ("set.csv", b"", "does not begin with SMILES"),
        ("set.csv", b"CCO\nCCC\n", "does not begin with SMILES"),
        ("set.csv", b"\xff\xfe\x00\n", "does not begin with SMILES"),
        ("set.csv", b"SMILES\n" + b"C" * 31, "no molecule of at most 30 characters"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, name: str, data: bytes | None, reason: str) -> None:
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(InputError, match=reason):
        moses.generator(path)


def test_a_file_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "set.csv.gz"
    path.write_bytes(gzip.compress(b"SMILES\n" + b"CCO\n" * 1000))
    monkeypatch.setattr(moses, "MOST_BYTES", 1000)
    with pytest.raises(InputError, match="over 1000 bytes"):
        moses.read_file(path)


def test_a_file_without_molecules_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "set.csv"
    path.write_bytes(b"SMILES\nhello\n\xc3\xa9\xc3\xa9CC\n")
    monkeypatch.setattr(moses, "_TRIES", 10)
    with pytest.raises(InputError, match="of 10 lines of the file none is a molecule"):
        moses.generator(path)(np.random.default_rng(0))


def test_the_package_has_its_file_or_is_named() -> None:
    try:
        version("molsets")
    except PackageNotFoundError:
        with pytest.raises(InputError, match="pip install --no-deps molsets"):
            named("molecules-moses")
        return
    task = named("molecules-moses")
    item = task.generate(np.random.default_rng(0))
    assert task.name == "molecules-moses" and task.is_right(task.answer(item), item)
    with pytest.raises(InputError, match="its files are"):
        moses.package_file("valid")


@pytest.mark.slow
def test_rdkit_says_the_same_of_the_set() -> None:
    """20,000 of its molecules: formula and rings; all but those that write a hydrogen as an atom are read."""
    chem = pytest.importorskip("rdkit.Chem", reason="RDKit is not installed: pip install 'sfumato[molecules]'")
    described = pytest.importorskip("rdkit.Chem.rdMolDescriptors")
    try:
        texts = moses.read_file(moses.package_file(), smiles.LONGEST)
    except InputError as error:
        pytest.skip(str(error))
    for text in np.random.default_rng(0).choice(texts, 20_000, replace=False):
        theirs = chem.MolFromSmiles(text)
        if "[H]" in text:
            assert not smiles.is_valid(text)
            continue
        assert smiles.formula_of(text) == described.CalcMolFormula(theirs), text
        assert smiles.ring_count(text) == theirs.GetNumBonds() - theirs.GetNumAtoms() + 1, text
