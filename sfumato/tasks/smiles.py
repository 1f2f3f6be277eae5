"""SMILES, the line notation of molecules: a reader of its common part, and exact answers about what it reads.

The part: the atoms B C N O P S F Cl Br I without brackets, aromatic b c n o p s, `[nH]` in an aromatic ring, the bonds
- = #, branches, and ring closures 0 to 9 and %10 to %99. Hydrogens are implicit. All else is outside it and so not
valid here, though it may be SMILES: charges, isotopes, stereo marks, other brackets, `:`, several fragments (`.`),
halogens with more than one bond (iodine apart). Within the part the answers are those of RDKit, which
`tests/tasks/test_smiles.py` compares, but for where RDKit is lenient (an aromatic carbon with five bonds, an aromatic
sulfur with three), and for cages, where it may count a ring more (cubane has 5 here, 6 there).

An aromatic text is valid where its rings can be written with alternating double bonds: where the atoms that lack a
bond can be paired along aromatic ring bonds, a perfect matching. Edmonds' algorithm ("Paths, trees, and flowers", 1965)
decides that in polynomial time for any rings, fused ones included. Nothing here raises for any text, or takes long.

It lacks on purpose: a canonical form, geometry, names, properties that are not exact.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

LONGEST = 200
"""Characters; a longer text is not valid here, whatever it says."""

AROMATIC = 0
"""The order of a bond in an aromatic ring, where others have 1, 2 or 3."""

_VALENCES = {
    "B": (3,),
    "C": (4,),
    "N": (3,),
    "O": (2,),
    "P": (3, 5, 7),
    "S": (2, 4, 6),
    "F": (1,),
    "Cl": (1,),
    "Br": (1,),
    "I": (1, 3, 5),
}
_ORDERS = {"-": 1, "=": 2, "#": 3}
_TOKEN = re.compile(r"\[nH\]|Cl|Br|[BCNOPSFI]|[bcnops]|%[1-9][0-9]|[0-9]|[-=#()]")


@dataclass(frozen=True)
class Molecule:
    """A valid molecule as a graph; its atoms are numbered as they stand in the text."""

    elements: tuple[str, ...]
    aromatic: frozenset[int]
    """The atoms that are written as aromatic."""
    bonds: tuple[Mapping[int, int], ...]
    """For each atom, its neighbours and the order of the bond to each: 1, 2, 3 or AROMATIC."""
    hydrogens: tuple[int, ...]

    def neighbours(self, atom: int, element: str, order: int) -> list[int]:
        """Those of this element, by a bond of this order."""
        return [other for other, bond in self.bonds[atom].items() if bond == order and self.elements[other] == element]


def tokens(smiles: str) -> list[str]:
    """A text as its signs: atoms, bonds, brackets of branches, ring closures. What is none of them is left out."""
    return _TOKEN.findall(smiles)


class _NoMolecule(Exception):
    """The text is not a molecule of the part that is read."""


class _GraphReader:
    """The atoms and bonds of a text, before anything is said of valences."""

    def __init__(self) -> None:
        self.elements: list[str] = []
        self.aromatic: set[int] = set()
        self.explicit: list[int] = []  # hydrogens in a bracket
        self.bonds: list[dict[int, int]] = []
        self.parents: list[int] = []  # the atom before, in the tree that the text writes
        self.closures: list[tuple[int, int]] = []
        self._last = -1
        self._order: int | None = None
        self._branches: list[int] = []
        self._rings: dict[int, tuple[int, int | None]] = {}
        self._begins = False  # an atom must come before a ring closure or the end of the branch

    def read(self, text: str) -> None:
        place = 0
        while place < len(text):
            match = _TOKEN.match(text, place)
            if match is None:
                raise _NoMolecule
            self._take(match.group())
            place = match.end()
        if not self.elements or self._branches or self._rings or self._order is not None:
            raise _NoMolecule

    def _take(self, token: str) -> None:
        if token[0].isalpha() or token[0] == "[":
            self._atom(token)
        elif self._last < 0:
            raise _NoMolecule
        elif token in _ORDERS:
            if self._order is not None:
                raise _NoMolecule
            self._order = _ORDERS[token]
        elif token[0] not in "()":
            self._ring(int(token.lstrip("%")))
        elif self._order is not None or self._begins:
            raise _NoMolecule
        elif token == "(":
            self._branches.append(self._last)
            self._begins = True
        else:
            if not self._branches:
                raise _NoMolecule
            self._last = self._branches.pop()

    def _atom(self, token: str) -> None:
        atom = len(self.elements)
        name = token.strip("[]H")
        self.elements.append(name.capitalize())
        self.explicit.append(int(token == "[nH]"))
        self.bonds.append({})
        self.parents.append(self._last)
        if name.islower():
            self.aromatic.add(atom)
        if self._last >= 0:
            self._bond(self._last, atom, self._order)
        self._last, self._order, self._begins = atom, None, False

    def _ring(self, number: int) -> None:
        if self._begins:
            raise _NoMolecule
        order, self._order = self._order, None
        if number not in self._rings:
            self._rings[number] = self._last, order
            return
        start, first = self._rings.pop(number)
        if start == self._last or start in self.bonds[self._last]:
            raise _NoMolecule
        if first is not None and order is not None and first != order:
            raise _NoMolecule
        self._bond(start, self._last, order if first is None else first)
        self.closures.append((start, self._last))

    def _bond(self, one: int, other: int, order: int | None) -> None:
        if order is None:
            order = AROMATIC if {one, other} <= self.aromatic else 1
        self.bonds[one][other] = self.bonds[other][one] = order

    def ring_bonds(self) -> set[tuple[int, int]]:
        """The bonds that lie on a cycle, the smaller number first: a closure, and the tree's path between its ends."""
        bonds = {(min(ends), max(ends)) for ends in self.closures}
        for one, other in self.closures:
            while one != other:
                one, other = max(one, other), min(one, other)
                bonds.add((self.parents[one], one))
                one = self.parents[one]
        return bonds


def read(smiles: str) -> Molecule | None:
    """The molecule that a text says, or None where it says none.

    That is: wrong grammar, an impossible valence, an aromatic ring that no double bonds can be placed in, a text
    outside the part that is read, or one over LONGEST characters.
    """
    if not isinstance(smiles, str) or not 0 < len(smiles) <= LONGEST:
        return None
    reader = _GraphReader()
    try:
        reader.read(smiles)
        return _molecule(reader)
    except _NoMolecule:
        return None


def _molecule(reader: _GraphReader) -> Molecule:
    ring_bonds = reader.ring_bonds()
    conjugated = {atom for atom, bonds in enumerate(reader.bonds) if AROMATIC in bonds.values()}
    for one, neighbours in enumerate(reader.bonds):
        for other, order in neighbours.items():
            if order == AROMATIC and (min(one, other), max(one, other)) not in ring_bonds:
                neighbours[other] = 1
    in_rings = {atom for bond in ring_bonds for atom in bond}
    if not reader.aromatic <= in_rings:
        raise _NoMolecule
    hydrogens: list[int] = []
    lacking: set[int] = set()  # aromatic atoms that one bond of their ring must be double at
    for atom, explicit in enumerate(reader.explicit):
        if explicit and list(reader.bonds[atom].values()) != [AROMATIC, AROMATIC]:
            raise _NoMolecule
        free = _free(reader, atom)
        if free and atom in conjugated:
            lacking.add(atom)
            free -= 1
        hydrogens.append(explicit + free)
    pairs = {
        atom: [other for other, order in reader.bonds[atom].items() if order == AROMATIC and other in lacking]
        for atom in sorted(lacking)
    }
    if not _can_pair(pairs):
        raise _NoMolecule
    return Molecule(tuple(reader.elements), frozenset(reader.aromatic), tuple(reader.bonds), tuple(hydrogens))


def _free(reader: _GraphReader, atom: int) -> int:
    """The bonds that an atom has room for, up to the next valence of its element; an aromatic bond counts as one."""
    bonds = reader.bonds[atom]
    used = reader.explicit[atom] + sum(max(order, 1) for order in bonds.values())
    is_aromatic = AROMATIC in bonds.values()
    for valence in _VALENCES[reader.elements[atom]]:
        if valence >= used:
            return valence - used
    # A nitro group, an N-oxide or an azide, written without charges: nitrogen with five bonds.
    partners = {(reader.elements[other], order) for other, order in bonds.items()}
    if reader.elements[atom] == "N" and used + is_aromatic == 5 and partners & {("O", 2), ("N", 3)}:
        return int(is_aromatic)
    raise _NoMolecule


def _can_pair(neighbours: Mapping[int, list[int]]) -> bool:
    """Whether a graph has a perfect matching: Edmonds' search for augmenting paths, which contracts odd cycles."""
    mates: dict[int, int] = {}
    for atom, others in neighbours.items():  # most pairs, at once
        free = next((other for other in others if other not in mates), None)
        if atom not in mates and free is not None:
            mates[atom], mates[free] = free, atom
    return all(atom in mates or _augment(neighbours, mates, atom) for atom in neighbours)


def _augment(neighbours: Mapping[int, list[int]], mates: dict[int, int], root: int) -> bool:
    """Pair `root` as well, by an alternating path to another atom without a mate. False: there is none."""
    base = {atom: atom for atom in neighbours}
    before: dict[int, int] = {}  # an odd atom -> the even one that it was reached from
    even = {root}
    queue = deque([root])
    while queue:
        atom = queue.popleft()
        for other in neighbours[atom]:
            if base[atom] == base[other] or mates.get(atom) == other:
                continue
            if other == root or mates.get(other) in before:
                stem = _common_base(base, mates, before, atom, other)
                blossom = _mark_path(base, mates, before, atom, stem, other)
                blossom |= _mark_path(base, mates, before, other, stem, atom)
                for member in neighbours:
                    if base[member] in blossom:
                        base[member] = stem
                        if member not in even:
                            even.add(member)
                            queue.append(member)
            elif other not in before:
                before[other] = atom
                mate = mates.get(other)
                if mate is None:
                    _flip(mates, before, other)
                    return True
                even.add(mate)
                queue.append(mate)
    return False


def _common_base(
    base: Mapping[int, int], mates: Mapping[int, int], before: Mapping[int, int], one: int, other: int
) -> int:
    """The base in which the paths of two even atoms to the root meet."""
    bases = set()
    while True:
        one = base[one]
        bases.add(one)
        if one not in mates:  # the root
            break
        one = before[mates[one]]
    while base[other] not in bases:
        other = before[mates[base[other]]]
    return base[other]


def _mark_path(
    base: Mapping[int, int], mates: Mapping[int, int], before: dict[int, int], atom: int, stem: int, child: int
) -> set[int]:
    """The bases on the path from an even atom to a blossom's stem; the path is made one that can be walked back."""
    marked = set()
    while base[atom] != stem:
        mate = mates[atom]
        marked |= {base[atom], base[mate]}
        before[atom] = child
        child = mate
        atom = before[mate]
    return marked


def _flip(mates: dict[int, int], before: Mapping[int, int], end: int) -> None:
    """Exchange paired and unpaired edges on the path from `end` to the root."""
    atom: int | None = end
    while atom is not None:
        previous = before[atom]
        following = mates.get(previous)
        mates[atom], mates[previous] = previous, atom
        atom = following


def is_valid(smiles: str) -> bool:
    """Whether a text is one molecule of the part of SMILES that this module reads (see there). Never raises."""
    return read(smiles) is not None


def formula(molecule: Molecule) -> dict[str, int]:
    """Element -> how many atoms, hydrogen (H) included, in Hill's order."""
    return in_hill_order(Counter(molecule.elements) + Counter(H=sum(molecule.hydrogens)))


def in_hill_order(counts: Mapping[str, int]) -> dict[str, int]:
    """Elements in Hill's order: C, H, then the alphabet; without C, the alphabet. Those of which there are none go."""
    first = ["C", "H"] if counts.get("C") else []
    return {name: counts[name] for name in sorted(counts, key=lambda name: (name not in first, name)) if counts[name]}


def formula_text(counts: Mapping[str, int]) -> str:
    """Elements and their counts as chemists write them, in the order given; a count of 1 is not written: C2H6O."""
    return "".join(f"{element}{count if count > 1 else ''}" for element, count in counts.items())


def formula_of(smiles: str) -> str | None:
    """The molecular formula in Hill's order, with implicit hydrogens: `CCO` is C2H6O. None: the text is not valid."""
    molecule = read(smiles)
    return None if molecule is None else formula_text(formula(molecule))


def rings(molecule: Molecule) -> int:
    """The number of independent cycles: bonds - atoms + 1."""
    return sum(len(bonds) for bonds in molecule.bonds) // 2 - len(molecule.elements) + 1


def ring_count(smiles: str) -> int | None:
    """The number of independent rings (naphthalene has 2). None for a text that is not valid."""
    molecule = read(smiles)
    return None if molecule is None else rings(molecule)


def _is_carbonyl(molecule: Molecule, atom: int) -> bool:
    return molecule.elements[atom] == "C" and bool(molecule.neighbours(atom, "O", 2))


def _carbons(molecule: Molecule, atom: int) -> list[int]:
    return molecule.neighbours(atom, "C", 1)


def _acyl(molecule: Molecule, element: str, hydrogens: int | None = None) -> Iterator[int]:
    """The atoms of an element, with single bonds alone, that a C=O holds; with so many hydrogens."""
    for atom in range(len(molecule.elements)):
        if not _is_carbonyl(molecule, atom):
            continue
        for other in molecule.neighbours(atom, element, 1):
            if hydrogens in (None, molecule.hydrogens[other]) and {2, 3}.isdisjoint(molecule.bonds[other].values()):
                yield other


def _on_plain_carbon(molecule: Molecule, element: str, hydrogens: int, carbons: int) -> bool:
    """Is there such an atom with so many hydrogens and single bonds to carbons, none of them a C=O, and no others?"""
    return any(
        name == element
        and molecule.hydrogens[atom] == hydrogens
        and len(molecule.bonds[atom]) == carbons == len(_carbons(molecule, atom))
        and not any(_is_carbonyl(molecule, other) for other in _carbons(molecule, atom))
        for atom, name in enumerate(molecule.elements)
    )


def _has_bond(molecule: Molecule, one: str, other: str, order: int) -> bool:
    return any(name == one and molecule.neighbours(atom, other, order) for atom, name in enumerate(molecule.elements))


def _joins_carbons(molecule: Molecule, order: int) -> bool:
    """Is there such a bond between two carbons outside aromatic rings?"""
    plain = {atom for atom, name in enumerate(molecule.elements) if name == "C"} - molecule.aromatic
    return any(not plain.isdisjoint(molecule.neighbours(atom, "C", order)) for atom in plain)


def _has_amine(molecule: Molecule) -> bool:
    return any(_on_plain_carbon(molecule, "N", 3 - carbons, carbons) for carbons in (1, 2, 3))


def _has_oxo(molecule: Molecule, hydrogens: int, carbons: int) -> bool:
    """A C=O whose other bonds are so many hydrogens and carbons."""
    return any(
        _is_carbonyl(molecule, atom)
        and molecule.hydrogens[atom] == hydrogens
        and len(_carbons(molecule, atom)) == carbons
        for atom in range(len(molecule.elements))
    )


GROUPS: Mapping[str, Callable[[Molecule], bool]] = {
    "acid": lambda molecule: any(True for _ in _acyl(molecule, "O", 1)),
    "alcohol": lambda molecule: _on_plain_carbon(molecule, "O", 1, 1),
    "aldehyde": lambda molecule: _has_oxo(molecule, 1, 1),
    "alkene": lambda molecule: _joins_carbons(molecule, 2),
    "alkyne": lambda molecule: _joins_carbons(molecule, 3),
    "amide": lambda molecule: any(True for _ in _acyl(molecule, "N")),
    "amine": _has_amine,
    "chloride": lambda molecule: _has_bond(molecule, "C", "Cl", 1),
    "ester": lambda molecule: any(len(_carbons(molecule, atom)) == 2 for atom in _acyl(molecule, "O", 0)),
    "ether": lambda molecule: _on_plain_carbon(molecule, "O", 0, 2),
    "fluoride": lambda molecule: _has_bond(molecule, "C", "F", 1),
    "ketone": lambda molecule: _has_oxo(molecule, 0, 2),
    "nitrile": lambda molecule: _has_bond(molecule, "C", "N", 3),
    "sulfide": lambda molecule: _on_plain_carbon(molecule, "S", 0, 2),
    "thiol": lambda molecule: _on_plain_carbon(molecule, "S", 1, 1),
}
"""The functional groups that there are names for; aromatic is what is written so. An alcohol's carbon may be aromatic
(a phenol); carbons of alkenes and alkynes, an amine's nitrogen, and the atoms of a C=O stand outside aromatic rings;
the carbons of an ether, alcohol, amine, sulfide or thiol are no C=O."""


def has_group(smiles: str, group: str) -> bool:
    """Whether a molecule has a functional group, by its name in GROUPS.

    False for a text that is not valid, or a name that there is not. Never raises.
    """
    molecule = read(smiles)
    return molecule is not None and group in GROUPS and GROUPS[group](molecule)
