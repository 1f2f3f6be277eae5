"""Sudoku: puzzles in and out as text, a solver, a generator, and an endless counted source of training puzzles.

A puzzle is 81 digits, row by row, 0 for a blank; an answer is 81 digits without a blank. Lists of them are uint8 arrays
[count, 81]. The solver sees Sudoku as exact cover: one Python integer holds all 729 candidates (digit, row, column), so
that a state is immutable and backtracking is free, and "which of the 324 constraints (a cell, or a digit in a row,
column or box) have no, one or two candidates left?" is answered for all of them at once by a few shifts of that
integer. Training puzzles come from a pool of nearly minimal ones: a true clue added keeps the solution unique, and a
symmetry of the board keeps everything, so a small pool gives more fresh puzzles than a training run can use.

It lacks on purpose: human solving techniques, difficulty beyond the number of clues, other board sizes, any model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sfumato.errors import InputError

BANDS = {"easy": range(40, 82), "medium": range(30, 40), "hard": range(30)}
"""Band name -> the numbers of clues it holds."""

FEWEST, MOST = 24, 55
"""The numbers of clues that `generate` offers: below 24 few removal orders arrive, above 55 little is left to solve."""

Pool = tuple[np.ndarray, np.ndarray]
"""Puzzles and their solutions, both uint8 [count, 81]."""

# Candidate `81 * (digit - 1) + cell` is that bit of a state. A kind of constraint is a base (the mask of each
# constraint's first candidate) and nine offsets from there to its nine candidates.
_ALL = (1 << 729) - 1
_KINDS = tuple(
    (sum(1 << start for start in starts), tuple(offsets), sum(1 << offset for offset in offsets))
    for starts, offsets in (
        (range(81), range(0, 729, 81)),
        (range(0, 729, 9), range(9)),
        ([81 * d + c for d in range(9) for c in range(9)], range(0, 81, 9)),
        (
            [81 * d + 27 * i + 3 * j for d in range(9) for i in range(3) for j in range(3)],
            [9 * i + j for i in range(3) for j in range(3)],
        ),
    )
)


def _kept_by_candidate() -> list[int]:
    """What stays possible once a candidate is placed: itself, and all that shares no constraint with it."""
    kept = [_ALL] * 729
    for base, offsets, pattern in _KINDS:
        for start in (bit for bit in range(729) if base >> bit & 1):
            for offset in offsets:
                kept[start + offset] &= ~(pattern << start)
    return [mask | 1 << candidate for candidate, mask in enumerate(kept)]


_KEPT = _kept_by_candidate()

_UNIT_OF: dict[str, Callable[[int], int]] = {
    "row": lambda cell: cell // 9,
    "column": lambda cell: cell % 9,
    "box": lambda cell: cell // 27 * 3 + cell % 9 // 3,
}
_UNITS = tuple(
    (name, number, tuple(cell for cell in range(81) if unit_of(cell) == number))
    for name, unit_of in _UNIT_OF.items()
    for number in range(9)
)


def _cells(text: str) -> str:
    """81 digits from text with `.` for 0 and white space anywhere; the form only, clues may contradict each other."""
    cells = "".join(text.split()).replace(".", "0")
    for position, character in enumerate(cells, 1):
        if character not in "0123456789":
            raise InputError(
                f"character {character!r} at position {position} of the puzzle (white space not counted) is no cell; "
                "use 1-9 for a clue and 0 or . for a blank"
            )
    if len(cells) != 81:
        raise InputError(f"the puzzle has {len(cells)} cells, not 81; give 9 rows of 9, with 0 or . for a blank")
    return cells


def parse(text: str) -> str:
    """One puzzle as 81 digits, 0 for a blank, from text that may use `.` for it and any white space between.

    InputError for a foreign character, another length, or a digit twice in a row, column or box (numbered from 1,
    boxes row by row). That a solution exists is not checked: see `count_solutions`.
    """
    puzzle = _cells(text)
    for name, number, unit in _UNITS:
        clues = [puzzle[cell] for cell in unit if puzzle[cell] != "0"]
        for digit in clues:
            if clues.count(digit) > 1:
                raise InputError(
                    f"digit {digit} stands {clues.count(digit)} times in {name} {number + 1} and may stand there once; "
                    "correct the clues"
                )
    return puzzle


def parse_file(text: str) -> list[str]:
    """The puzzles of a file: one a line, or the whole file one board of 9 lines; blank and `#` lines are skipped.

    InputError as `parse`, with the number of the line; also for a file without a puzzle.
    """
    numbered = [(number, "".join(line.split())) for number, line in enumerate(text.splitlines(), 1)]
    lines = [(number, line) for number, line in numbered if line and not line.startswith("#")]
    if not lines:
        raise InputError("the file has 0 puzzles and needs at least 1; give 81 digits a line, with 0 or . for a blank")
    if [len(line) for _, line in lines] == [9] * 9:
        return [parse("".join(line for _, line in lines))]
    puzzles = []
    for number, line in lines:
        try:
            puzzles.append(parse(line))
        except InputError as error:
            raise InputError(f"line {number}: {error}") from None
    return puzzles


def _digits(cells: str | np.ndarray) -> str:
    return cells if isinstance(cells, str) else "".join(str(int(digit)) for digit in cells)


def prompt(puzzle: str | np.ndarray) -> str:
    """The user's message for a puzzle (81 characters, or uint8 [81]): one line of words, one of 81 digits."""
    return "Solve this Sudoku:\n" + _digits(puzzle).replace(".", "0")


def answer_text(solution: str | np.ndarray) -> str:
    """The answer to `prompt`: the 81 digits of the solution (a string, or uint8 [81]) and nothing else."""
    return _digits(solution)


def render(puzzle: str, answer: str | None = None) -> str:
    """A board of 13 plain ASCII lines, blanks as `.`; with `answer`, its cells, and `?` for one it lacks or garbles."""
    shown = puzzle.replace("0", ".")
    if answer is not None:
        shown = "".join(cell if cell in "123456789" else "?" for cell in answer[:81].ljust(81, "?"))
    bar = "+-------+-------+-------+"
    lines = [bar]
    for row in range(9):
        cells = shown[9 * row : 9 * row + 9]
        lines.append("| " + " | ".join(" ".join(cells[i : i + 3]) for i in (0, 3, 6)) + " |")
        if row % 3 == 2:
            lines.append(bar)
    return "\n".join(lines)


def band(puzzle: str) -> str:
    """The name in BANDS for the puzzle's number of clues."""
    clues = sum(cell in "123456789" for cell in puzzle)
    return next(name for name, numbers in BANDS.items() if clues in numbers)


def is_solved(answer: object, puzzle: str) -> bool:
    """Is `answer` 81 digits 1-9, once each in every row, column and box, with every clue kept? Never raises."""
    if not isinstance(answer, str) or len(answer) != 81 or len(puzzle) != 81:
        return False
    if any({answer[cell] for cell in unit} != set("123456789") for _, _, unit in _UNITS):
        return False
    return all(clue in (cell, "0", ".") for clue, cell in zip(puzzle, answer, strict=True))


def _place_forced(state: int, placed: int) -> tuple[int, int]:
    """Place candidates that are alone in a constraint until none is new; (0, 0) where a constraint has none left."""
    while True:
        forced = 0
        for base, offsets, pattern in _KINDS:
            ones = twos = 0
            for offset in offsets:
                here = state >> offset & base
                twos |= ones & here
                ones |= here
            if ones != base:
                return 0, 0
            forced |= state & ((ones ^ twos) * pattern)
        new = forced & ~placed
        if not new:
            return state, placed
        placed = forced
        while new:
            lowest = new & -new
            state &= _KEPT[lowest.bit_length() - 1]
            new ^= lowest


def _branches(state: int) -> list[int]:
    """The candidates of a constraint with the fewest left (two nearly always; else a small number)."""
    fewest: list[int] = []
    for base, offsets, _ in _KINDS:
        ones = twos = threes = 0
        for offset in offsets:
            here = state >> offset & base
            threes |= twos & here
            twos |= ones & here
            ones |= here
        two = twos & ~threes
        open_ = two or twos
        if not open_:
            continue
        start = (open_ & -open_).bit_length() - 1
        candidates = [start + offset for offset in offsets if state >> (start + offset) & 1]
        if two:
            return candidates
        if not fewest or len(candidates) < len(fewest):
            fewest = candidates
    return fewest


def _search(state: int, limit: int, rng: np.random.Generator | None = None) -> list[int]:
    """Up to `limit` solved states below `state`; with `rng`, branches are tried in random order."""
    solved: list[int] = []
    stack = [(state, 0)]
    while stack and len(solved) < limit:
        state, placed = _place_forced(*stack.pop())
        if not state:
            continue
        if state == placed:
            solved.append(state)
            continue
        branches = _branches(state)
        if rng is not None:
            rng.shuffle(branches)
        stack.extend((state & _KEPT[candidate], placed) for candidate in branches)
    return solved


def _state(puzzle: str) -> int:
    state = _ALL
    for cell, digit in enumerate(puzzle):
        if digit != "0":
            state &= _KEPT[81 * (int(digit) - 1) + cell]
    return state


def _grid(state: int) -> str:
    cells = ["0"] * 81
    while state:
        lowest = state & -state
        digit, cell = divmod(lowest.bit_length() - 1, 81)
        cells[cell] = str(digit + 1)
        state ^= lowest
    return "".join(cells)


def count_solutions(puzzle: str, limit: int = 2) -> int:
    """How many solutions the puzzle has, counted up to `limit` (1 or more); 0 where clues contradict each other.

    InputError where the text is no puzzle. With the default limit 1 means unique; about 0.2 ms for a typical puzzle.
    """
    if limit < 1:
        raise InputError(f"limit is {limit}, so nothing would be counted; give 1 or more")
    return len(_search(_state(_cells(puzzle)), limit))


def solve(puzzle: str) -> str | None:
    """The solution, 81 digits; None where there is none, one of them where there are several. InputError as above."""
    states = _search(_state(_cells(puzzle)), 1)
    return _grid(states[0]) if states else None


def random_grid(rng: np.random.Generator) -> str:
    """A random full grid, 81 digits: three independent diagonal boxes, then a search with random branches.

    Every grid can come out; they are not exactly equally likely.
    """
    cells = ["0"] * 81
    for box in (0, 4, 8):
        for cell, digit in zip(_UNITS[18 + box][2], rng.permutation(9), strict=True):
            cells[cell] = str(digit + 1)
    return _grid(_search(_state("".join(cells)), 1, rng)[0])


def _dig(grid: str, fewest: int, rng: np.random.Generator) -> str:
    """`grid` less clues, each in random order removed if the solution stays unique, until `fewest` are left."""
    clues = {int(cell): 81 * (int(grid[cell]) - 1) + int(cell) for cell in rng.permutation(81)}
    for cell, candidate in list(clues.items()):
        if len(clues) == fewest:
            break
        del clues[cell]
        state = _ALL ^ 1 << candidate  # a second solution would have another digit here
        for other in clues.values():
            state &= _KEPT[other]
        if _search(state, 1):
            clues[cell] = candidate
    return "".join(grid[cell] if cell in clues else "0" for cell in range(81))


def generate(clues: int, rng: np.random.Generator) -> str:
    """A random puzzle with exactly `clues` clues, 24 to 55 (else InputError), and one solution.

    A removal order that dead-ends above `clues` is given up for another grid; that is rare above 26 clues.
    """
    if not FEWEST <= clues <= MOST:
        raise InputError(f"{clues} clues cannot be asked for; choose a number from {FEWEST} to {MOST}")
    while True:
        puzzle = _dig(random_grid(rng), clues, rng)
        if 81 - puzzle.count("0") == clues:
            return puzzle


def minimal_puzzles(count: int, rng: np.random.Generator, progress: Callable[[int, int], None] | None = None) -> Pool:
    """A pool for `sample`: `count` random grids, each dug to as few clues as its removal order allows, at least 24.

    Returns puzzles and solutions, both uint8 [count, 81]. Takes about 6 ms a puzzle; `progress(done, count)` is called
    after each. Every superset of a puzzle's clues, taken from its solution, has the same unique solution.
    """
    puzzles = np.zeros((count, 81), np.uint8)
    solutions = np.zeros((count, 81), np.uint8)
    for i in range(count):
        grid = random_grid(rng)
        puzzles[i] = np.frombuffer(_dig(grid, FEWEST, rng).encode(), np.uint8) - 48
        solutions[i] = np.frombuffer(grid.encode(), np.uint8) - 48
        if progress is not None:
            progress(i + 1, count)
    return puzzles, solutions


def sample(pool: Pool, count: int, clues: np.ndarray | int, seed: int, index: int) -> Pool:
    """Batch number `index` of the endless stream `seed` over `pool`: puzzles and solutions, both uint8 [count, 81].

    Example i is a random pool puzzle given random true clues up to `clues[i]` (int [count] or one int, 0 to 81; never
    fewer than the pool puzzle has), then a random symmetry: digits renamed, bands and the rows within them permuted,
    the same for columns, transposed or not. A pure function of its arguments; seed and index are 0 or more.
    """
    puzzles, solutions = pool
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(index,))))

    def permutations(*shape: int) -> np.ndarray:
        return np.argsort(rng.random((count, *shape)), axis=-1, kind="stable")

    rows = (rng.random(count) * len(puzzles)).astype(np.int64)
    solution, is_clue = solutions[rows], puzzles[rows] > 0
    # The pool's own clues rank first, the others in random order behind them.
    order = np.argsort(rng.random((count, 81)) - is_clue, axis=1, kind="stable")
    clue_counts = np.maximum(np.broadcast_to(clues, count), is_clue.sum(axis=1))
    shown = np.zeros((count, 81), bool)
    np.put_along_axis(shown, order, np.arange(81) < clue_counts[:, None], axis=1)

    down = (3 * permutations(3)[:, :, None] + permutations(3, 3)).reshape(count, 9, 1)
    across = (3 * permutations(3)[:, :, None] + permutations(3, 3)).reshape(count, 1, 9)
    cells = 9 * down + across
    cells = np.where(rng.random((count, 1, 1)) < 0.5, cells.transpose(0, 2, 1), cells).reshape(count, 81)
    names = (permutations(9) + 1).astype(np.uint8)
    solution = np.take_along_axis(names, np.take_along_axis(solution, cells, axis=1).astype(np.int64) - 1, axis=1)
    return solution * np.take_along_axis(shown, cells, axis=1), solution


@dataclass(frozen=True)
class Stream:
    """A pool and a seed: an endless source of batches, each found by its number, so that a run resumes exactly."""

    pool: Pool
    seed: int

    def sample(self, count: int, clues: np.ndarray | int, index: int) -> Pool:
        """Batch number `index`, as `sample` gives it."""
        return sample(self.pool, count, clues, self.seed, index)
