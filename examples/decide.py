"""Classify texts: several questions with given answers, all of them read in one denoise pass a text.

    python examples/decide.py [MODEL]

MODEL is a checkpoint folder, a hub id or "nano", the default. The released model,
google/diffusiongemma-26B-A4B-it, reads the texts. nano knows nothing but Sudoku: its choices mean nothing, but each is
one of those allowed, and the probabilities of a question sum to 1.
"""

import sys

from sfumato import LLM, Options

TEXTS = [
    "My order came broken. I want my money back today!",
    "Do you also ship to Norway? No hurry.",
    "Thank you, the lamp is lovely.",
]
QUESTIONS = {
    "topic": ["damage", "delivery", "praise"],
    "tone": ["angry", "calm", "happy"],
    "urgent": ["yes", "no"],
}


def main(arguments: list[str]) -> None:
    llm = LLM.load(arguments[0] if arguments else "nano")
    for text in TEXTS:
        message = {"role": "user", "content": f"Classify this message.\n\n{text}"}
        decisions = llm.decide([message], QUESTIONS, options=Options(seed=0))
        print(text)
        for question, decision in decisions.items():
            print(f"  {question}: {decision.choice} ({decision.probabilities[decision.choice]:.0%})")


if __name__ == "__main__":
    main(sys.argv[1:])
