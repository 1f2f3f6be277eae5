"""One step by itself: `python -m benchmarks.gpu "cells int4" [--dry]`. Its rows go to stdout, or to --rows."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", help="a module of this folder, and behind a space what it is to be done with")
    parser.add_argument("--rows", type=Path, help="default: stdout")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="where tuned.json lies")
    parser.add_argument("--until", type=float, help="time.time() at which it is killed; default: in ten minutes")
    parser.add_argument("--dry", action="store_true", help="toy sizes on the processor")
    arguments = parser.parse_args()
    if arguments.dry:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is there
    from benchmarks.gpu.setting import Setting

    setting = Setting.of(arguments.out, arguments.until or time.time() + 600, arguments.dry)
    module, _, kind = arguments.step.partition(" ")
    where = arguments.rows.open("a", buffering=1, encoding="utf-8") if arguments.rows else sys.stdout
    with where as file:
        try:
            for row in importlib.import_module(f"benchmarks.gpu.{module}").run(setting, kind):
                print(json.dumps(row, default=float), file=file, flush=True)
        except Exception as error:  # what ends a step early is one of its rows
            traceback.print_exc()
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            print(json.dumps({"name": module, "ok": False, "error": text, "says": text[:160]}), file=file, flush=True)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
