"""Puts trained weights into the package: python scripts/export_nano.py runs/nano

Takes `checkpoint/` of a training run (or, where there is none yet, its state) and writes sfumato/nano/model.safetensors
in the released layout; config, tokenizer and template there stay as they are.
"""

import os
import sys
import tempfile
from pathlib import Path

from sfumato import ops
from sfumato.checkpoints.save import save
from sfumato.checkpoints.shards import read_tensors
from sfumato.model.config import ModelConfig
from sfumato.model.network import Model

run, package = Path(sys.argv[1]), Path("sfumato/nano")
tensors, note = read_tensors(run / "state.safetensors")
model = Model(ModelConfig.from_file(package / "config.json"), ops.load("reference"))
model.load_state_dict({name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")})
with tempfile.TemporaryDirectory(dir=package.parent) as folder:
    save(model, Path(folder))
    os.replace(Path(folder) / "model.safetensors", package / "model.safetensors")
size = (package / "model.safetensors").stat().st_size
print(f"{package / 'model.safetensors'}: {size / 1e6:.1f} MB, step {note['step']}")
