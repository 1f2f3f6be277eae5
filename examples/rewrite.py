"""Rewrite parts of a paragraph where they stand: the rest stays byte for byte, and the change is shown as a diff.

    python examples/rewrite.py [MODEL]

MODEL is a checkpoint folder, a hub id or "nano", the default. The released model,
google/diffusiongemma-26B-A4B-it, rewrites words here. nano knows nothing but Sudoku: it puts digits in their place, and
only the form is shown: nothing changes outside the spans.
"""

import re
import sys

from sfumato import LLM, Options

TEXT = """\
The meeting starts at nine. Please be on time.
Send me your really very good proposals beforehand, and bring some stuff to write.
We will be finished at noon.
"""
VAGUE = r"really very good|some stuff"
"""The words to replace."""


def main(arguments: list[str]) -> None:
    llm = LLM.load(arguments[0] if arguments else "nano")
    spans = [match.span() for match in re.finditer(VAGUE, TEXT)]
    # The spans start from the old words, four in five of their tokens replaced by noise. 0 would start from the words
    # as they are, 1 from nothing but noise.
    edited = llm.edit(TEXT, "Say it precisely.", spans, strength=0.8, options=Options(seed=0))
    print(edited.diff("notice.txt"), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
