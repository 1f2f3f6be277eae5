"""What reading data to train on costs: time, memory, padding, for so many generated questions with their answers.

    .venv/bin/python benchmarks/training_data.py --records 100000

The records are made in a temporary folder, which also takes the place of the cache. Printed is one line of JSON; times
are of the processor, in this process and in the one that renders.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import torch

import sfumato
from sfumato.text.template import CHILDREN, ChatTemplate
from sfumato.text.tokenizer import Tokenizer
from sfumato.training.data import open_data


def megabytes() -> float:
    """Of this process, resident."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=32)
    arguments = parser.parse_args()
    nano = Path(sfumato.__path__[0]) / "nano"
    tokenizer = Tokenizer.from_folder(nano)
    template = ChatTemplate.from_folder(nano, tokenizer.special)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        path = Path(folder) / "records.jsonl"
        with path.open("w") as file:
            for number in range(arguments.records):
                record = {"prompt": f"q{number} " + "word " * (number % 40), "response": "answer " * (number % 60 + 1)}
                file.write(json.dumps(record) + "\n")
        before, began = megabytes(), time.process_time()
        data = open_data([path], tokenizer, template, max_tokens=2000, held_out=0.05)
        grown, took = megabytes() - before, time.process_time() - began
        CHILDREN.end()  # so that its time is counted
        again = time.perf_counter()
        open_data([path], tokenizer, template, max_tokens=2000, held_out=0.05)
        again = time.perf_counter() - again
        data.train.batch(0, arguments.batch, torch.device("cpu"))
        began_steps = time.process_time()
        for step in range(100):
            data.train.batch(step, arguments.batch, torch.device("cpu"))
        figures = {
            "records": arguments.records,
            "file_mb": round(path.stat().st_size / 1e6),
            "tokens": int(data.train.lengths.sum()),
            "seconds_here": round(took, 1),
            "seconds_rendering": round(os.times().children_user + os.times().children_system, 1),
            "grown_mb": round(grown),
            "opened_again_seconds": round(again, 2),
            "batch_ms": round((time.process_time() - began_steps) * 10, 2),
            "padding": round(data.train.padding(arguments.batch), 4),
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
