"""Typed questions about texts: yes or no, one of several, a level, a passage; each with how sure the answer is.

    python examples/decide.py [MODEL]

MODEL is a checkpoint folder, a hub id, "nano", the default, or a Sfumato server's URL. The released model,
google/diffusiongemma-26B-A4B-it, reads the texts. nano knows nothing but Sudoku: its answers mean nothing, but
each is one of those allowed, and the probabilities of a question sum to 1.
"""

import asyncio
import sys

from sfumato import LLM, Choice, Decide, Noul, Options, Remote, Score, Span
from sfumato.questions import Dependency, Question

TEXTS = [
    "My order came broken. I want my money back today!",
    "Do you also ship to Norway? No hurry.",
    "Thank you. The lamp is lovely.",
]
QUESTIONS: dict[str, Question] = {
    "team": Choice({"Repairs": "Something is broken", "Delivery": "How or when it comes", "None": None}),
    "refund": Noul("Does the writer ask for money back?"),
    "tone": Score(["happy", "calm", "annoyed", "furious"], "How does the writer feel?"),
    "reason": Span("Which sentence says why?", depends_on=Dependency("refund", "true")),
}


async def decide(llm: LLM | Remote) -> None:
    # Each question is read on its own, behind the text, which is encoded once. What is awaited together shares passes.
    queries = [Decide(text, QUESTIONS, options=Options(seed=0)) for text in TEXTS]
    for text, decisions in zip(TEXTS, await asyncio.gather(*map(llm.arun, queries)), strict=True):
        print(text)
        for name, decision in decisions.items():
            level = f", {decision.score:.1f} of 3" if decision.kind == "score" else ""
            print(f"  {name}: {decision.choice} (sure by {decision.confidence:.2f}{level})")
        for name in decisions.skipped:  # nobody asks for money back, so there is no reason
            print(f"  {name}: not asked")


def main(arguments: list[str]) -> None:
    model = arguments[0] if arguments else "nano"
    asyncio.run(decide(LLM.connect(model) if "://" in model else LLM.load(model)))


if __name__ == "__main__":
    main(sys.argv[1:])
