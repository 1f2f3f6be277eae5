"""tasks/molecules.py: items of every kind, an answer to learn from that is right, and a check of any other."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from sfumato.errors import InputError
from sfumato.tasks import molecules, smiles
from sfumato.tasks.task import held_out_items, named

EXAMPLES = {
    "missing CC(=O)|OC|C": ("Complete this molecule:\nCC(=O)_C", "CC(=O)OCC"),
    "missing |CC|O": ("Complete this molecule:\n_O", "CCO"),
    "formula C4H8O": ("Molecule with this formula:\nC4H8O", "CCCC=O"),
    "formula C8H9NO": ("Molecule with this formula:\nC8H9NO", "c1ccccc1CC(=O)N"),
    "rings 1 9 NO": ("Molecule with these rings:\nrings 1, atoms 9, NO", "c1ccoc1CCCN"),
    "rings 0 4 C": ("Molecule with these rings:\nrings 0, atoms 4, C", "CCCC"),
    "groups 1 16 ester nitrile": ("Molecule with these groups:\nrings 1, atoms 16, ester, nitrile", None),
}

RIGHT = {
    "missing CC(=O)|OC|C": ["CC(=O)CC", "CC(=O)c1ccccc1C", " CC(=O)NC(F)(F)C\n"],
    "formula C4H8O": ["CC(=O)CC", "C1CCCO1", "C=CCCO", "OC1CCC1"],
    "rings 1 9 NO": ["C1CCCCC1CON", "Oc1ccccc1CN", "NCC1CCCCC1O"],
    "rings 0 4 C": ["CC(C)C", "C#CC=C", "C=CC=C"],
    "groups 0 6 acid": ["CCCC(=O)O", "OC(=O)CCN", "O=C(O)C=CO"],
}

WRONG = {
    "missing CC(=O)|OC|C": ["CC(=O)C", "CC(=O)OCCN", "CC(=O)C(C", "CC(=O)_C", "CCC(=O)CC", "CC(=O) C", ""],
    "formula C4H8O": ["CCCCO", "CCC=O", "C4H8O", "CCCC=O.C", "CC(C)(C)(C)=O", "CCCC=S"],
    "rings 1 9 NO": ["C1CCCCC1CN", "CCCCCCCNO", "C1CCCCC1CNN", "C1CC1C1CC1CNO", "C1CCCCC1SNO"],
    "rings 0 4 C": ["CCC", "CCCO", "C1CCC1", "CCCCC"],
    "groups 0 6 acid": ["CCCC(=O)OC", "CCCC(=O)", "CCCCC(=O)O", "CCC(=O)OC", "OC1CC1C=O"],
}

HOSTILE = (
    *("", "missing", "missing CC", "missing C|C", "missing C|C|C|C", "formula", "formula c4", "formula 4", "rings 1 2"),
    *("rings a 2 C", "rings 1 2 x", "rings -1 2 C", "groups 1 2", "groups 1 2 spirit", "other C4", "formula C4 H8"),
    *("rings ² 2 C", "formula  C4", "rings 1 9999 C", "missing |||", "C4H8O", "formula C9999"),
)


@pytest.mark.parametrize("item", EXAMPLES)
def test_prompt_and_answer(item: str) -> None:
    prompt, answer = EXAMPLES[item]
    assert molecules.prompt(item) == prompt
    assert molecules.is_right(molecules.answer(item), item)
    assert answer is None or molecules.answer(item) == answer


def test_random_items_have_right_answers() -> None:
    rng = np.random.default_rng(4)
    items = [molecules.generate(rng) for _ in range(400)]
    lengths = []
    for item in items:
        answer = molecules.answer(item)
        lengths.append(len(answer))
        assert molecules.is_right(answer, item) and molecules.measures(answer, item) == {"valid": 1.0}
        assert not molecules.is_right(answer + "(", item) and molecules.measures("C(", item) == {"valid": 0.0}
        assert not molecules.is_right("", item) and not molecules.is_right(answer[:-1] + "..", item)
        words, facts = molecules.prompt(item).split("\n")
        assert words in molecules.prompt(item) and "|" not in facts and len(facts) < 50
    counts = Counter(map(molecules.kind, items))
    assert counts.keys() == {*molecules.KINDS} and min(counts.values()) > 75
    assert max(lengths) <= molecules.LONGEST and 8 < float(np.median(lengths)) < 20
    assert len({*items}) > 320


def test_answers_of_one_item_are_refused_for_another() -> None:
    rng = np.random.default_rng(5)
    items, others = ([molecules.generate(rng) for _ in range(30)] for _ in range(2))
    mixed = [(molecules.answer(one), other) for one, other in itertools.product(items, others)]
    assert sum(molecules.is_right(answer, item) for answer, item in mixed) < 0.02 * len(mixed)


@pytest.mark.parametrize("item", RIGHT)
def test_any_molecule_as_asked_is_right(item: str) -> None:
    assert [text for text in RIGHT[item] if not molecules.is_right(text, item)] == []
    assert [text for text in WRONG[item] if molecules.is_right(text, item)] == []


def test_what_is_no_item_is_refused() -> None:
    for item in HOSTILE:
        with pytest.raises(InputError, match="write its kind"):
            molecules.prompt(item)
        with pytest.raises(InputError):
            molecules.answer(item)
        assert not molecules.is_right("CCCC=O", item)
        assert molecules.measures("CCCC=O", item) == {"valid": 1.0}


@pytest.mark.parametrize(
    "item", ["formula C4H99", "formula H2", "rings 3 4 C", "groups 0 2 ester nitrile", "missing C|(|C"]
)
def test_facts_without_a_molecule_are_refused(item: str) -> None:
    with pytest.raises(InputError, match="no molecule is built"):
        molecules.answer(item)


def test_every_pair_of_groups_has_an_answer() -> None:
    for first, second in itertools.combinations(sorted(smiles.GROUPS), 2):
        for rings in range(3):
            item = f"groups {rings} {6 * rings + 12} {first} {second}"
            assert molecules.is_right(molecules.answer(item), item)
    for group, rings in itertools.product(smiles.GROUPS, range(3)):
        item = f"groups {rings} {6 * rings + 8} {group}"
        assert molecules.is_right(molecules.answer(item), item)


def test_random_molecules_are_valid_and_vary() -> None:
    rng = np.random.default_rng(6)
    texts = [molecules.random_molecule(rng) for _ in range(300)]
    assert all(smiles.is_valid(text) and len(text) <= molecules.LONGEST for text in texts)
    assert len({*texts}) > 280
    assert {smiles.ring_count(text) for text in texts} >= {0, 1, 2, 3}
    assert all(any(smiles.has_group(text, group) for text in texts) for group in smiles.GROUPS)
    assert max(len(molecules.random_molecule(rng, 14)) for _ in range(20)) <= 14


def test_items_that_are_held_out_are_of_all_kinds() -> None:
    items = held_out_items(named("molecules"), 50, 7)
    assert {*map(molecules.kind, items)} == {*molecules.KINDS} and len({*items}) == 50
