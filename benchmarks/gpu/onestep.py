"""One step, eagerly, for a tool that looks at every access or counts within a kernel: "nano", or a kind of weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.gpu.setting import Row, Setting
from benchmarks.step import Steps
from sfumato.checkpoints.load import load
from sfumato.options import LoadOptions


@torch.inference_mode()
def run(setting: Setting, kind: str) -> Iterator[Row]:
    if kind == "nano":
        ops = setting.ops(torch.float32)
        model = load("nano", LoadOptions(device=setting.device, dtype="float32", ops=ops))
        Steps(model, 20)()
    else:
        model = setting.model(kind, 2)
        Steps(model, 16 if setting.is_dry else 1024)()
    setting.wait()
    yield {"name": kind, "ok": True, "ops": model.ops.name}
