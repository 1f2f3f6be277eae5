"""tasks/sudoku.py: text in and out, the solver against a naive one, the generator, the counted training stream."""

from __future__ import annotations

import hashlib
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.errors import InputError
from sfumato.tasks import sudoku

# The puzzle of Wikipedia's article on Sudoku and its printed solution.
PUZZLE = "530070000600195000098000060800060003400803001700020006060000280000419005000080079"
SOLUTION = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
# A 17-clue puzzle, a hard one (by Arto Inkala) and one made to exhaust a row-by-row search; checked by two solvers.
FAMOUS = {
    "000000010400000000020000000000050407008000300001090000300400200050100000000806000": (
        "693784512487512936125963874932651487568247391741398625319475268856129743274836159"
    ),
    "800000000003600000070090200050007000000045700000100030001000068008500010090000400": (
        "812753649943682175675491283154237896369845721287169534521974368438526917796318452"
    ),
    "000000000000003085001020000000507000004000100090000000500000073002010000000040009": (
        "987654321246173985351928746128537694634892157795461832519286473472319568863745219"
    ),
}
# Rows 6 and 8, columns 4 and 6 of SOLUTION hold 9 4 over 4 9, in two boxes.
CROSS = (48, 50, 66, 68)
GRIDS = [sudoku.random_grid(np.random.default_rng(seed)) for seed in range(12)]


def naive_count(puzzle: str, limit: int = 2) -> int:
    """Solutions counted the plain way, sharing nothing with the module: sets, the cell with the fewest digits."""
    cells = [int(cell) for cell in puzzle]

    def free(at: int) -> list[int]:
        row, column = divmod(at, 9)
        excluded = set(cells[9 * row : 9 * row + 9]) | set(cells[column::9])
        for i in range(3):
            start = 9 * (row // 3 * 3 + i) + column // 3 * 3
            excluded |= set(cells[start : start + 3])
        return [digit for digit in range(1, 10) if digit not in excluded]

    def count(left: int) -> int:
        blanks = [at for at in range(81) if not cells[at]]
        if not blanks:
            return 1
        at = min(blanks, key=lambda blank: len(free(blank)))
        total = 0
        for digit in free(at):
            cells[at] = digit
            total += count(left - total)
            cells[at] = 0
            if total >= left:
                break
        return total

    return count(limit)


def is_grid(cells: np.ndarray) -> bool:
    """Does every row, column and box of uint8 [81] hold 1 to 9? Written without the module."""
    board = cells.reshape(9, 9)
    boxes = board.reshape(3, 3, 3, 3).transpose(0, 2, 1, 3).reshape(9, 9)
    return all((np.sort(units, axis=1) == np.arange(1, 10)).all() for units in (board, board.T, boxes))


def array(text: str) -> np.ndarray:
    return np.array([int(cell) for cell in text], np.uint8)


def text(cells: np.ndarray) -> str:
    return "".join(str(cell) for cell in cells)


@pytest.fixture(scope="module")
def pool() -> sudoku.Pool:
    return sudoku.minimal_puzzles(40, np.random.default_rng(7))


# Text in


def test_parse_takes_dots_spaces_and_line_breaks() -> None:
    lines = [PUZZLE[i : i + 9] for i in range(0, 81, 9)]
    assert sudoku.parse(PUZZLE) == PUZZLE
    assert sudoku.parse("\n".join(" ".join(line) for line in lines).replace("0", ".") + "\r\n") == PUZZLE


@pytest.mark.parametrize(
    ("puzzle", "words"),
    [
        (PUZZLE[:-1], ["80 cells", "not 81", "9 rows of 9"]),
        (PUZZLE + "1", ["82 cells", "not 81"]),
        ("", ["0 cells", "not 81"]),
        (PUZZLE[:5] + "x" + PUZZLE[6:], ["'x'", "position 6", "0 or ."]),
        ("5 3\n|" + PUZZLE, ["'|'", "position 3"]),
        (PUZZLE[:5] + "３" + PUZZLE[6:], ["'３'", "position 6"]),
        ("55" + "0" * 79, ["digit 5", "2 times", "row 1", "correct"]),
        ("0" * 8 + "4" + "0" * 71 + "4", ["digit 4", "column 9"]),
        ("0" * 30 + "7" + "0" * 9 + "7" + "0" * 40, ["digit 7", "box 5"]),
    ],
)
def test_parse_refuses_in_one_sentence(puzzle: str, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        sudoku.parse(puzzle)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parse_file() -> None:
    other = next(iter(FAMOUS))
    board = "\n".join(PUZZLE[i : i + 9] for i in range(0, 81, 9))
    assert sudoku.parse_file(f"# two\n\n{PUZZLE}\n  # more\n{other.replace('0', '.')}\n") == [PUZZLE, other]
    assert sudoku.parse_file(f"# a board\n{board}\n\n") == [PUZZLE]
    assert sudoku.parse_file("\n".join([PUZZLE] * 9)) == [PUZZLE] * 9


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (f"# note\n{PUZZLE}\n\n{PUZZLE[:-3]}\n", ["line 4", "78 cells"]),
        (f"{PUZZLE}\n{'33' + PUZZLE[2:]}", ["line 2", "digit 3", "row 1"]),
        ("# nothing\n\n", ["0 puzzles", "at least 1"]),
    ],
)
def test_parse_file_names_the_line(lines: str, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        sudoku.parse_file(lines)
    for word in words:
        assert word in str(caught.value)


# Text out


def test_prompt_and_answer_are_bare_digits() -> None:
    assert sudoku.prompt(PUZZLE) == "Solve this Sudoku:\n" + PUZZLE
    assert sudoku.prompt(PUZZLE.replace("0", ".")) == sudoku.prompt(array(PUZZLE)) == sudoku.prompt(PUZZLE)
    assert sudoku.answer_text(SOLUTION) == sudoku.answer_text(array(SOLUTION)) == SOLUTION


def test_render() -> None:
    lines = sudoku.render(PUZZLE).splitlines()
    assert len(lines) == 13
    assert lines[0] == lines[4] == lines[8] == lines[12] == "+-------+-------+-------+"
    assert lines[1] == "| 5 3 . | . 7 . | . . . |"
    assert lines[11] == "| . . . | . 8 . | . 7 9 |"
    assert sudoku.render(PUZZLE, SOLUTION).splitlines()[1] == "| 5 3 4 | 6 7 8 | 9 1 2 |"
    assert sudoku.render(PUZZLE, "5x\n0").splitlines()[1] == "| 5 ? ? | ? ? ? | ? ? ? |"
    assert len(sudoku.render(PUZZLE, SOLUTION * 2)) == len(sudoku.render(PUZZLE))


def test_bands() -> None:
    for clues, name in [(55, "easy"), (40, "easy"), (39, "medium"), (30, "medium"), (29, "hard"), (17, "hard")]:
        assert sudoku.band(SOLUTION[:clues] + "0" * (81 - clues)) == name
        assert sudoku.band(SOLUTION[:clues] + "." * (81 - clues)) == name


# The solver


@pytest.mark.parametrize(("puzzle", "solution"), [(PUZZLE, SOLUTION), *FAMOUS.items()])
def test_known_puzzles_have_their_known_solution(puzzle: str, solution: str) -> None:
    assert sudoku.solve(puzzle) == solution
    assert sudoku.count_solutions(puzzle) == 1
    assert sudoku.is_solved(solution, puzzle)


def test_a_puzzle_with_two_solutions() -> None:
    """Where two digits stand crosswise in two boxes, blanking the four cells leaves exactly two ways."""
    cells = list(SOLUTION)
    for cell in CROSS:
        cells[cell] = "0"
    puzzle = "".join(cells)
    assert sudoku.count_solutions(puzzle) == sudoku.count_solutions(puzzle, limit=9) == 2
    assert sudoku.count_solutions(puzzle, limit=1) == 1
    assert sudoku.is_solved(sudoku.solve(puzzle), puzzle)
    assert sudoku.count_solutions(puzzle[: CROSS[0]] + SOLUTION[CROSS[0]] + puzzle[CROSS[0] + 1 :]) == 1


def test_no_solution() -> None:
    assert sudoku.solve("55" + "0" * 79) is None
    assert sudoku.count_solutions("55" + "0" * 79) == 0
    blocked = "123456780" + "000000009" + "0" * 63  # no clue twice anywhere, and no digit for the last cell of row 1
    assert sudoku.parse(blocked) == blocked
    assert sudoku.solve(blocked) is None


def test_counting_stops_at_the_limit() -> None:
    assert sudoku.count_solutions("0" * 81, limit=25) == 25
    with pytest.raises(InputError, match="limit is 0"):
        sudoku.count_solutions("0" * 81, limit=0)
    with pytest.raises(InputError, match="3 cells"):
        sudoku.solve("123")


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(GRIDS), st.permutations(range(81)), st.integers(28, 60))
def test_counts_agree_with_a_naive_solver(grid: str, order: list[int], clues: int) -> None:
    kept = set(order[:clues])
    puzzle = "".join(digit if cell in kept else "0" for cell, digit in enumerate(grid))
    assert sudoku.count_solutions(puzzle, limit=3) == naive_count(puzzle, limit=3)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(GRIDS), st.integers(0, 80), st.integers(1, 9), st.integers(20, 60))
def test_wrong_clues_agree_with_a_naive_solver(grid: str, cell: int, digit: int, clues: int) -> None:
    """One clue made wrong (or not): contradictions found late, which true clues never show."""
    puzzle = grid[:clues] + "0" * (81 - clues)
    puzzle = puzzle[:cell] + str(digit) + puzzle[cell + 1 :]
    try:
        sudoku.parse(puzzle)
    except InputError:
        assert sudoku.count_solutions(puzzle) == 0
    else:
        assert sudoku.count_solutions(puzzle) == naive_count(puzzle)


def test_is_solved_refuses_wrong_answers() -> None:
    assert sudoku.is_solved(SOLUTION, PUZZLE.replace("0", "."))
    assert not sudoku.is_solved(GRIDS[0], PUZZLE), "a valid grid that ignores the clues"
    assert not sudoku.is_solved(SOLUTION, "6" + "0" * 80)
    swapped = SOLUTION[1] + SOLUTION[0] + SOLUTION[2:]  # row and box stay right, two columns do not
    assert not sudoku.is_solved(swapped, "0" * 81)
    shifted = "".join(str((row + column) % 9 + 1) for row in range(9) for column in range(9))
    assert not sudoku.is_solved(shifted, "0" * 81), "rows and columns right, boxes not"


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "5",
        SOLUTION[:-1],
        SOLUTION + "1",
        SOLUTION[:-1] + "0",
        SOLUTION[:-1] + "９",
        SOLUTION[:-1] + "\ud800",
        None,
        5,
    ],
)
def test_is_solved_never_raises(answer: str) -> None:
    assert sudoku.is_solved(answer, PUZZLE) is False


# The generator


def test_random_grids_are_valid_and_differ() -> None:
    assert all(is_grid(array(grid)) for grid in GRIDS)
    assert len(set(GRIDS)) == len(GRIDS)
    assert sudoku.random_grid(np.random.default_rng(3)) == GRIDS[3]


@pytest.mark.parametrize("clues", [24, 25, 30, 39, 40, 55])
def test_generate_gives_exactly_the_clues_and_one_solution(clues: int) -> None:
    puzzle = sudoku.generate(clues, np.random.default_rng(clues))
    assert sudoku.parse(puzzle) == puzzle
    assert sum(cell != "0" for cell in puzzle) == clues
    assert naive_count(puzzle) == 1


@pytest.mark.parametrize("clues", [-1, 0, 16, 23, 56, 81])
def test_generate_says_its_range(clues: int) -> None:
    with pytest.raises(InputError, match=f"{clues} clues.* 24 to 55"):
        sudoku.generate(clues, np.random.default_rng(0))


def test_minimal_puzzles(pool: sudoku.Pool) -> None:
    puzzles, solutions = pool
    assert puzzles.shape == solutions.shape == (40, 81)
    assert puzzles.dtype == solutions.dtype == np.uint8
    clues = (puzzles > 0).sum(axis=1)
    assert clues.min() == 24
    assert clues.mean() < 26
    for puzzle, solution in zip(puzzles, solutions, strict=True):
        assert is_grid(solution)
        assert ((puzzle == 0) | (puzzle == solution)).all()
    assert all(naive_count(text(puzzle)) == 1 for puzzle in puzzles[:15])


def test_minimal_puzzles_repeat_and_report() -> None:
    sizes = []
    first, _ = sudoku.minimal_puzzles(3, np.random.default_rng(7), lambda done, count: sizes.append((done, count)))
    again, _ = sudoku.minimal_puzzles(3, np.random.default_rng(7))
    assert (first == again).all()
    assert sizes == [(1, 3), (2, 3), (3, 3)]


def test_above_the_floor_no_clue_can_go(pool: sudoku.Pool) -> None:
    """A puzzle that kept more than 24 clues kept them because each is needed."""
    puzzle = text(next(puzzle for puzzle in pool[0] if (puzzle > 0).sum() > 24))
    for cell in range(81):
        if puzzle[cell] != "0":
            assert sudoku.count_solutions(puzzle[:cell] + "0" + puzzle[cell + 1 :]) == 2


# The stream


def test_samples_are_unique_puzzles_with_their_solution(pool: sudoku.Pool) -> None:
    clues = np.random.default_rng(0).integers(24, 56, 128)
    puzzles, solutions = sudoku.sample(pool, 128, clues, seed=1, index=2)
    assert puzzles.shape == solutions.shape == (128, 81)
    assert puzzles.dtype == solutions.dtype == np.uint8
    is_clue = (puzzles > 0).sum(axis=1)
    assert (is_clue >= clues).all()
    assert (is_clue == np.maximum(clues, 24))[clues > 30].all()
    for puzzle, solution in zip(puzzles, solutions, strict=True):
        assert is_grid(solution)
        assert ((puzzle == 0) | (puzzle == solution)).all()
        assert sudoku.solve(text(puzzle)) == text(solution)
        assert sudoku.count_solutions(text(puzzle)) == 1
    assert all(naive_count(text(puzzle)) == 1 for puzzle in puzzles[:15])


def test_clues_are_bounded_by_the_pool_and_the_board(pool: sudoku.Pool) -> None:
    fewest = {int(clues) for clues in (pool[0] > 0).sum(axis=1)}
    assert len(fewest) > 1
    puzzles, _ = sudoku.sample(pool, 400, 0, seed=0, index=0)
    assert {int(clues) for clues in (puzzles > 0).sum(axis=1)} == fewest, "every kind of pool puzzle is drawn"
    puzzles, solutions = sudoku.sample(pool, 8, 81, seed=0, index=0)
    assert (puzzles == solutions).all()


def test_batches_are_counted(pool: sudoku.Pool) -> None:
    def batch(seed: int, index: int) -> bytes:
        return b"".join(part.tobytes() for part in sudoku.sample(pool, 16, 30, seed, index))

    assert batch(3, 5) == batch(3, 5)
    assert len({batch(seed, index) for seed in (0, 1, 3, 2**32, 2**32 + 1) for index in (0, 1, 5, 2**32)}) == 20
    stream = sudoku.Stream(pool, seed=3)
    assert b"".join(part.tobytes() for part in stream.sample(16, 30, 5)) == batch(3, 5)


def test_the_stream_stays_what_it_was() -> None:
    """A resumed run needs the same batches from a later version; a change here must be meant."""
    one = (array(PUZZLE)[None], array(SOLUTION)[None])
    puzzles, solutions = sudoku.sample(one, 4, np.array([0, 32, 40, 55]), seed=20261121, index=9)
    digest = hashlib.sha256(puzzles.tobytes() + solutions.tobytes()).hexdigest()
    assert digest[:16] == "432c92b99baf316e"


def test_every_symmetry_is_used() -> None:
    """From one puzzle alone: all kinds of symmetry must show, and what all of them keep must be kept."""
    puzzle_, solution_ = list(FAMOUS.items())[1]  # its bands differ in their clues
    one = (array(puzzle_)[None], array(solution_)[None])
    puzzles, solutions = sudoku.sample(one, 400, 0, seed=0, index=0)
    assert len({puzzle.tobytes() for puzzle in puzzles}) == 400
    assert {int((puzzle == 1).sum()) for puzzle in puzzles} == {puzzle_.count(digit) for digit in "123456789"}
    assert len({text(solution[:1]) for solution in solutions}) == 9
    is_clue = (puzzles > 0).reshape(400, 9, 9)

    def bands(board: np.ndarray) -> list[tuple[int, ...]]:
        """Clues per row, band by band."""
        return [tuple(band) for band in board.sum(axis=1).reshape(3, 3).tolist()]

    def profile(board: np.ndarray) -> list[tuple[int, ...]]:
        """The same, sorted within each band and among the bands: what no permutation of rows can change."""
        return sorted(tuple(sorted(band)) for band in bands(board))

    original = array(puzzle_).reshape(9, 9) > 0
    assert profile(original) != profile(original.T), "else a transposition would not show"
    straight = [board for board in is_clue if profile(board) == profile(original)]
    turned = [board.T for board in is_clue if profile(board) == profile(original.T)]
    assert len(straight) + len(turned) == 400
    assert 140 < len(straight) < 260
    for turn in (False, True):  # rows, then columns: every order of the bands, and of the rows within one
        boards = [board.T if turn else board for board in straight + turned]
        start = bands(original.T if turn else original)
        orders = {tuple(tuple(sorted(band)) for band in bands(board)) for board in boards}
        assert orders == set(permutations(tuple(sorted(band)) for band in start))
        for place in range(3):
            inside = {bands(board)[place] for board in boards}
            assert inside == {order for band in start for order in permutations(band)}


def test_added_clues_differ_between_rows_of_a_batch() -> None:
    one = (array(PUZZLE)[None], array(SOLUTION)[None])
    puzzles, _ = sudoku.sample(one, 50, 31, seed=0, index=0)  # 30 clues and one more
    solved = {tuple(sorted(np.bincount(puzzle, minlength=10)[1:])) for puzzle in puzzles}
    assert len(solved) > 1
