"""Fill the middle of a Python function: what stands before the gap and what stands behind it both decide what comes.

    python examples/infill.py [MODEL]

MODEL is a checkpoint folder, a hub id or "nano", the default. The released model,
google/diffusiongemma-26B-A4B-it, writes code here. nano knows nothing but Sudoku: its middle is digits, and only the
form is shown: both sides stay as they are, byte for byte.
"""

import sys

from sfumato import LLM, Options

BEFORE = '''\
def median(numbers):
    """The middle one of the sorted numbers, or the mean of the middle two."""
    ordered = sorted(numbers)
    '''

BEHIND = """
    return (ordered[middle] + ordered[-middle - 1]) / 2
"""


def main(arguments: list[str]) -> None:
    llm = LLM.load(arguments[0] if arguments else "nano")
    # Without a length, some are tried side by side, and the one that the model is surest of is used.
    filled = llm.infill(BEFORE, BEHIND, at_most=24, options=Options(seed=0))
    print(filled.text)
    print(f"# written: {filled.values['middle']!r}, {filled.lengths['middle']} tokens in {filled.usage.steps} steps")


if __name__ == "__main__":
    main(sys.argv[1:])
