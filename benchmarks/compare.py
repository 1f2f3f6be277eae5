"""Two folders of records from `make bench`, beside each other: how many times as long everything takes now.

    .venv/bin/python benchmarks/compare.py benchmarks/results/folders/before benchmarks/results/folders/after

Every time in seconds that both folders have is compared, whatever record it stands in. Prints a line for each file (how
many times, the middle ratio, the lowest and the highest) and the times that differ most. Two runs of one commit differ
by some per cent, single operations by more: only a middle ratio says something of a change.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TIMES = ("seconds", "first_tokens_seconds")
"""What is compared, by its key."""
ASIDE = ("environment", "ceilings")
"""Parts of a record that are the machine's, not the program's."""


def times(value: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """Every time of a record, by the place where it stands. A row of a list is named by its texts."""
    if isinstance(value, list):
        for number, row in enumerate(value):
            texts = [str(one) for one in row.values() if isinstance(one, str)] if isinstance(row, dict) else []
            yield from times(row, f"{place}/{', '.join(texts) or number}")
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key in TIMES and isinstance(inner, (int, float)):
                yield f"{place}/{key}", float(inner)
            elif key not in ASIDE:
                yield from times(inner, f"{place}/{key}")


def ratios(before: Path, after: Path) -> dict[str, dict[str, float]]:
    """File -> place -> the time after over the time before, of all times that both folders have."""
    files = {}
    for path in sorted(before.glob("*.json")):
        if (after / path.name).is_file():
            old, new = (dict(times(json.loads(one.read_text("utf-8")))) for one in (path, after / path.name))
            files[path.name] = {place: new[place] / old[place] for place in old if place in new and old[place] > 0}
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    arguments = parser.parse_args()
    files = ratios(arguments.before, arguments.after)
    print("| record | times | middle | lowest | highest |\n| --- | ---: | ---: | ---: | ---: |")
    for name, each in files.items():
        if each:
            middle, low, high = statistics.median(each.values()), min(each.values()), max(each.values())
            print(f"| {name} | {len(each)} | {middle:.3f} | {low:.2f} | {high:.2f} |")
    every = [(ratio, name, place) for name, each in files.items() for place, ratio in each.items()]
    every.sort(reverse=True)
    for ratio, name, place in [*every[:5], *every[-3:]]:
        print(f"{ratio:.2f}  {name} {place}")


if __name__ == "__main__":
    main()
