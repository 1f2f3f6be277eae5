"""What a CUDA machine is asked in one call of eight minutes: one file a step, run by scripts/gpu.py.

`plan.py` says which steps there are and when each must be over. A step is `run(setting, kind)`, a generator of rows:
JSON with a `name`, `ok` unless it only tells, `says` for the terminal, `skipped` with the reason where something cannot
run here, `stop` where nothing after it makes sense. `python -m benchmarks.gpu "cells int4"` runs one by itself.
"""
