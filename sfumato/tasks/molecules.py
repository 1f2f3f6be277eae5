"""Molecules as SMILES: complete one, or write one of a formula, with so many rings, with some functional groups.

An item is its kind and its facts, apart by spaces; a molecule with its part between bars, a formula, or numbers and
names:

    missing CC(=O)|OC|C
    formula C4H8O
    rings 1 9 NO                 (rings, atoms, and the elements besides carbon)
    groups 1 12 ester nitrile    (rings, atoms, and the groups)

Atoms are those that are not hydrogen. Many molecules answer an item, and every one that is valid and as asked is right:
`smiles` decides. The one to learn from is as predictable as can be: the molecule that was cut; else one built from the
facts by a fixed rule (rings first, then the chain, double bonds, polar groups), so that an item which is held out has
facts that no run has seen. What is cut comes from a generator of random small trees, each written in one way: from a
plain end, along the longest chain, branches short.

It lacks on purpose: charges, stereo marks, whether a chemist could make it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from sfumato.errors import InputError
from sfumato.tasks import smiles

KINDS = ("missing", "formula", "rings", "groups")
LONGEST = 30
"""Characters of a molecule that is generated."""

_WORDS = {
    "missing": "Complete this molecule:",
    "formula": "Molecule with this formula:",
    "rings": "Molecule with these rings:",
    "groups": "Molecule with these groups:",
}
_ELEMENTS = ("N", "O", "S", "F", "Cl")
_HALOGENS = ("Cl", "F")

# Parts of random molecules: a bond can be added before and behind each, `?` is a branch, 1 and 2 are rings. More of one
# is more often. Those that end in O, N, S or a halogen are followed by one that begins with a carbon.
_STARTS = ("C", "C", "C", "CC", "CC", "CCC", "O", "N", "F", "Cl", "N#C", "O=C", "OC(=O)")
_RINGS = (
    *("c1ccccc1", "c1ccccc1", "c1ccc(?)cc1", "c1ccc(?)cc1", "c1ccncc1", "c1ccoc1", "c1ccsc1"),
    *("C1CCCCC1", "C1CCCC1", "C1CCNCC1", "C1CCOC1", "c1ccc2ccccc2c1"),
)
_LINKS = (
    ("C",) * 8
    + ("CC",) * 4
    + ("C(?)",) * 6
    + ("C(=O)",) * 2
    + ("C=C", "C#C")
    + ("O", "O", "N", "N", "S", "N(?)", "C(=O)O", "C(=O)O", "C(=O)N", "C(=O)N", *_RINGS)
)
_BRANCHES = ("C", "C", "C", "CC", "O", "N", "F", "Cl", "OC", "C#N", "c2ccccc2")
_ENDS = (
    *("C", "C", "C", "CC", "CC", "O", "O", "N", "S", "F", "Cl", "C#N", "C(=O)O", "C=O", "C(=O)N", "C(F)(F)F"),
    *("n1cccc1", "N1CCCCC1", *_RINGS),
)
_ENDS_POLAR = re.compile(r"(^|[^#=(])([ONSFl]|N\(.*\))$")

# A group at a molecule's start and at its end; a carbon stands between.
_GROUPS = {
    "acid": ("OC(=O)", "C(=O)O"),
    "alcohol": ("OC", "CO"),
    "aldehyde": ("O=C", "C=O"),
    "alkene": ("C=C", "C=C"),
    "alkyne": ("C#C", "C#C"),
    "amide": ("NC(=O)", "C(=O)N"),
    "amine": ("NC", "CN"),
    "chloride": ("ClC", "CCl"),
    "ester": ("COC(=O)", "C(=O)OC"),
    "ether": ("COC", "COC"),
    "fluoride": ("FC", "CF"),
    "ketone": ("CC(=O)", "C(=O)C"),
    "nitrile": ("N#C", "C#N"),
    "sulfide": ("CSC", "CSC"),
    "thiol": ("SC", "CS"),
}


def random_molecule(rng: np.random.Generator, longest: int = LONGEST) -> str:
    """A valid SMILES of 4 or more atoms and at most so many characters (12 or more are needed)."""
    while True:
        text = _pick(rng, _STARTS) if rng.random() < 0.7 else _ring(rng)
        for _ in range(int(rng.integers(1, 6))):
            text += _part(rng, text, _LINKS)
        text += _part(rng, text, _ENDS)
        molecule = smiles.read(text) if len(text) <= longest else None
        if molecule is not None and len(molecule.elements) >= 4:
            return text


def _pick(rng: np.random.Generator, texts: Sequence[str]) -> str:
    return texts[int(rng.integers(len(texts)))]


def _ring(rng: np.random.Generator) -> str:
    return _with_branch(rng, _pick(rng, _RINGS))


def _part(rng: np.random.Generator, text: str, parts: Sequence[str]) -> str:
    """A part that may follow the text."""
    while True:
        part = _pick(rng, parts)
        if (part[0] in "Cc" and not part.startswith("Cl")) or not _ENDS_POLAR.search(text):
            return _with_branch(rng, part)


def _with_branch(rng: np.random.Generator, part: str) -> str:
    if "?" not in part:
        return part
    polar = part.startswith("N")
    branches = [branch for branch in _BRANCHES if not polar or branch in ("C", "CC")]
    return part.replace("?", _pick(rng, branches))


def generate(rng: np.random.Generator) -> str:
    """A random item; each kind as often as any other."""
    kind = _pick(rng, KINDS)
    while True:
        item = _random_item(kind, rng)
        text = _built(item)
        if text is not None and len(text) <= LONGEST:
            return item


def _random_item(kind: str, rng: np.random.Generator) -> str:
    if kind == "missing":
        return missing_item(random_molecule(rng), rng)
    facts = {"formula": _random_formula, "rings": _random_rings, "groups": _random_groups}[kind]
    return f"{kind} {facts(rng)}"


def missing_item(molecule: str, rng: np.random.Generator) -> str:
    """An item of a molecule (three signs of SMILES or more) with one to six of its signs missing, not all."""
    tokens = smiles.tokens(molecule)
    length = int(rng.integers(1, min(6, len(tokens) - 2) + 1))
    start = int(rng.integers(0, len(tokens) - length + 1))
    parts = tokens[:start], tokens[start : start + length], tokens[start + length :]
    return "missing " + "|".join("".join(part) for part in parts)


def _random_formula(rng: np.random.Generator) -> str:
    size, doubles = int(rng.integers(4, 11)), int(rng.integers(0, 6))
    others = rng.choice(_ELEMENTS, int(rng.integers(0, min(size, 5))), p=(0.32, 0.4, 0.12, 0.08, 0.08))
    counts = Counter(map(str, others))
    counts["C"] = size - counts.total()
    counts["H"] = max(0, 2 * counts["C"] + 2 + counts["N"] - counts["F"] - counts["Cl"] - 2 * doubles)
    return smiles.formula_text(smiles.in_hill_order(counts))


def _random_rings(rng: np.random.Generator) -> str:
    rings = int(rng.choice(4, p=(0.15, 0.35, 0.35, 0.15)))
    most = {"N": 2, "O": 2, "S": 1, "F": 1, "Cl": 1}
    others = Counter({element: int(rng.integers(0, most[element] + 1)) for element in _ELEMENTS})
    others = +others
    left = Counter(others)
    inside = "".join(_rings_of(rings, left)).count("c")
    atoms = others.total() + inside + left.total() + int(rng.integers(0 if inside else 4, 6))
    return f"{rings} {atoms} {smiles.formula_text(others) or 'C'}"


def _random_groups(rng: np.random.Generator) -> str:
    rings = int(rng.choice(3, p=(0.5, 0.35, 0.15)))
    count = 1 if rng.random() < 0.25 else 2
    names = sorted(rng.choice(list(_GROUPS), count, replace=False))
    least = 6 * rings + 1 + sum(len(_atoms(_GROUPS[name][1])) for name in names)
    return f"{rings} {least + int(rng.integers(0, 8))} {' '.join(names)}"


def _atoms(text: str) -> list[str]:
    return [token for token in smiles.tokens(text) if token[0].isalpha()]


def _facts(item: str) -> tuple[str, list[str]]:
    """InputError for a text that is no item."""
    kind, *facts = item.split(" ")
    if kind in _IS_SAID and all(facts) and _IS_SAID[kind](facts):
        return kind, facts
    raise InputError(
        f"{item[:80]!r} is not an item of the task molecules; write its kind ({', '.join(KINDS)}) and its facts, "
        "for example: formula C4H8O"
    )


def _are_numbers(texts: Sequence[str]) -> bool:
    return len(texts) == 2 and all(re.fullmatch("[0-9]{1,3}", text) for text in texts)


def _counts(text: str) -> Counter[str] | None:
    """The elements of a formula and how many of each."""
    pairs = re.findall("([A-Z][a-z]?)([0-9]{0,3})", text)
    if "".join(element + count for element, count in pairs) != text:
        return None
    counts: Counter[str] = Counter()
    for element, count in pairs:
        counts[element] += int(count or 1)
    return counts


_IS_SAID: Mapping[str, Callable[[list[str]], bool]] = {
    "missing": lambda facts: len(facts) == 1 and facts[0].count("|") == 2,
    "formula": lambda facts: len(facts) == 1 and _counts(facts[0]) is not None,
    "rings": lambda facts: len(facts) == 3 and _are_numbers(facts[:2]) and _counts(facts[2]) is not None,
    "groups": lambda facts: len(facts) > 2 and _are_numbers(facts[:2]) and set(facts[2:]) <= {*smiles.GROUPS},
}


def kind(item: str) -> str:
    """One of KINDS. InputError for a text that is no item."""
    return _facts(item)[0]


def prompt(item: str) -> str:
    """The user's message: a line of words that is the same for all items of a kind, and a line of facts.

    InputError for a text that is no item.
    """
    kind, facts = _facts(item)
    if kind in ("missing", "formula"):
        before, bar, rest = facts[0].partition("|")
        return f"{_WORDS[kind]}\n{before}{'_' + rest.partition('|')[2] if bar else ''}"
    rings, atoms, *names = facts
    return f"{_WORDS[kind]}\nrings {rings}, atoms {atoms}, {', '.join(names)}"


def answer(item: str) -> str:
    """The molecule to learn from, one of many that are right.

    InputError for a text that is no item, and for facts that the rule builds no molecule of.
    """
    text = _built(item)
    if text is None:
        raise InputError(f"no molecule is built for {item!r}; give facts that belong together, with carbon enough")
    return text


def is_right(text: str, item: str) -> bool:
    """Whether a text is a valid molecule and as the item asks. White space around it does not count; it never raises.

    A completion keeps what stands on both sides of the gap, and fills it. A formula is the whole formula. Rings and
    atoms are exact numbers; of elements the same; of functional groups there may be others besides.
    """
    text = text.strip()
    molecule = smiles.read(text)
    try:
        kind, facts = _facts(item)
    except InputError:
        return False
    if molecule is None:
        return False
    if kind == "missing":
        before, _, after = facts[0].split("|")
        return text.startswith(before) and text.endswith(after) and len(text) > len(before) + len(after)
    if kind == "formula":
        return smiles.formula(molecule) == _counts(facts[0])
    if smiles.rings(molecule) != int(facts[0]) or len(molecule.elements) != int(facts[1]):
        return False
    if kind == "groups":
        return all(smiles.GROUPS[name](molecule) for name in facts[2:])
    others = Counter(molecule.elements)
    del others["C"]
    expected = _counts(facts[2]) or Counter()
    del expected["C"]
    return others == expected


def measures(text: str, item: str) -> dict[str, float]:
    """`valid`: 1 where the text is a molecule at all, as asked or not."""
    return {"valid": float(smiles.is_valid(text.strip()))}


def _built(item: str) -> str | None:
    kind, facts = _facts(item)
    if kind == "missing":
        text = facts[0].replace("|", "")
    elif kind == "formula":
        text = _of_formula(_counts(facts[0]) or Counter())
    elif kind == "rings":
        text = _of_rings(int(facts[0]), int(facts[1]), _counts(facts[2]) or Counter())
    else:
        text = _of_groups(int(facts[0]), int(facts[1]), facts[2:])
    return text if is_right(text, item) else None


def _of_formula(counts: Counter[str]) -> str:
    """A molecule of a formula, or a text that is not one.

    Double bonds go, in this order, to aromatic rings, C=O, a nitrile, C#C and C=C.
    """
    atoms = Counter({element: counts[element] for element in ("C", *_ELEMENTS)})
    double = (2 * atoms["C"] + 2 + atoms["N"] - counts["H"] - atoms["F"] - atoms["Cl"]) // 2
    front, polar, end = "", "", ""
    for ring, bonds in (("c1ccccc1", 4), ("c1ccncc1", 4), ("c1ccsc1", 3), ("c1ccoc1", 3)):
        if double >= bonds and _takes(atoms, ring):
            front, double = front + ring, double - bonds
    while double > 0 and _takes(atoms, "C=O"):
        partner = "O" if _takes(atoms, "O") else "N" if _takes(atoms, "N") else ""
        polar, double = polar + "C(=O)" + partner, double - 1
    if double >= 2 and _takes(atoms, "C#N"):
        end, double = "C#N", double - 2
    for link, bonds in (("C#C", 2), ("C=C", 1), ("C=N", 1)):
        while double >= bonds and _takes(atoms, link):
            polar, double = link + polar, double - bonds
    return _joined(front, atoms, polar, end)


def _takes(atoms: Counter[str], text: str) -> bool:
    """Take a text's atoms from those that are left; False, and none are, where they are too few."""
    needed = Counter(name.capitalize() for name in _atoms(text))
    if not needed <= atoms:
        return False
    atoms -= needed
    return True


def _rings_of(count: int, atoms: Counter[str]) -> list[str]:
    """So many aromatic rings; S, O and N go into them first, one each, and are taken from what is left."""
    rings = []
    for _ in range(count):
        element = next((name for name in ("S", "O", "N") if atoms[name] > 0), "C")
        if element != "C":
            atoms[element] -= 1
        rings.append({"S": "c1ccsc1", "O": "c1ccoc1", "N": "c1ccncc1", "C": "c1ccccc1"}[element])
    return rings


def _of_rings(count: int, size: int, others: Counter[str]) -> str:
    others = Counter({element: others[element] for element in _ELEMENTS})
    carbons = size - others.total()
    front = "".join(_rings_of(min(count, 20), others))
    others["C"] = carbons - front.count("c")
    return _joined(front, others)


def _of_groups(count: int, size: int, names: Sequence[str]) -> str:
    first, last = _GROUPS[names[0]][0] if len(names) > 1 else "", _GROUPS[names[-1]][1]
    rings = "c1ccccc1" * min(count, 20)
    chain = size - len(_atoms(first + last)) - len(_atoms(rings))
    return first + rings + "C" * chain + last


def _joined(front: str, atoms: Mapping[str, int], polar: str = "", end: str = "") -> str:
    """The first halogen, rings, a plain chain, then other halogens, N, O and S on a carbon each, and what is given."""
    halogens = [element for element in _HALOGENS for _ in range(atoms[element])]
    units = [f"C({element})" for element in halogens[1:]]
    units += [f"C{element}" for element in ("N", "O", "S") for _ in range(atoms[element])]
    bare = max(0, len(units) - max(0, atoms["C"]))  # these stand without a carbon, the last ones
    units = [unit[1:] if place >= len(units) - bare else unit for place, unit in enumerate(units)]
    chain = "C" * (atoms["C"] - len(units) + bare)
    text = "".join(halogens[:1]) + front + chain + "".join(units) + polar + end
    return re.sub(r"\(([^()]+)\)$", r"\1", text)  # what stands last is no branch
