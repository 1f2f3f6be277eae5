"""Extract a record from a text: the answer is JSON that obeys a schema, whatever the model would rather say.

    python examples/extract.py [MODEL]

MODEL is a checkpoint folder, a hub id or "nano", the default. The released model,
google/diffusiongemma-26B-A4B-it, reads the text. nano knows nothing but Sudoku: its record is not true, but it is a
record, with every field in its place and every value of its kind.
"""

import json
import sys

from sfumato import LLM, Options

TEXT = "Parcel 4417 left Lyon on Monday. It weighs 12 kg and is fragile."
SCHEMA = {
    "type": "object",
    "properties": {
        "number": {"type": "integer", "minimum": 1, "maximum": 9999},
        "from": {"type": "string", "maxLength": 10},
        "weight": {"type": "number", "exclusiveMinimum": 0, "maximum": 50, "multipleOf": 0.5},
        "handling": {"type": "array", "items": {"enum": ["fragile", "heavy", "cool"]}, "maxItems": 2},
    },
    "required": ["number", "from", "weight", "handling"],
    "additionalProperties": False,
}


def main(arguments: list[str]) -> None:
    llm = LLM.load(arguments[0] if arguments else "nano")
    message = {"role": "user", "content": f"Extract the record.\n\n{TEXT}"}
    answer = llm.chat([message], options=Options(schema=SCHEMA, max_tokens=160, seed=0))
    record = json.loads(answer.text)  # complete: whatever the model begins is ended within max_tokens
    print(json.dumps(record, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main(sys.argv[1:])
