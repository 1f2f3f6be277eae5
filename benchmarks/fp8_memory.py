"""Memory of transformers' FP8 when it is loaded: blocks of 128 x 128 over the released model's 704 and 2112 outputs.

    .venv/bin/python benchmarks/fp8_memory.py [experts]

Two layers of the released widths with few experts are written as tools write them (a module an expert, with
`weight_scale_inv`) and loaded. Printed: what the experts take, what the process has grown by, and what all layers and
experts of the release take, from these.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import released_config
from sfumato.checkpoints.contents import blank
from sfumato.checkpoints.load import load
from sfumato.checkpoints.names import released_name
from sfumato.model.config import ModelConfig
from sfumato.ops import load as load_ops
from sfumato.ops.packed import Packed
from sfumato.options import LoadOptions


def main() -> None:
    """Print one line of JSON."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 16
    config = dataclasses.replace(released_config(2), vocab_size=2048, num_experts=count, eos_ids=(1,))
    release = released_config()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        (folder / "config.json").write_text(json.dumps({**config.to_dict(), "quantization_config": settings}))
        save_file(dict(written(config)), folder / "model.safetensors")
        before = resident()
        model = load(folder, LoadOptions(device="cpu", ops="fused"))
        grown = resident() - before
    owners = [model.get_submodule(f"layers.{number}.experts") for number in range(len(model.layers))]
    stacks = [getattr(owner, name) for owner in owners for name in ("gate_up_proj", "down_proj")]
    assert all(isinstance(weight, Packed) and weight.kind == "fp8" for weight in stacks)
    whole = sum(weight.nbytes for weight in stacks)
    each = whole / len(model.layers) / count
    plain = 2 * 3 * config.expert_size * config.hidden_size
    numbers = len(release.layers) * release.num_experts
    record = {
        "experts_MB": round(whole / 1e6, 1),
        "experts_bfloat16_MB": round(plain * len(model.layers) * count / 1e6, 1),
        "grown_MB": round(grown / 1e6, 1),
        "release_experts_GB": round(each * numbers / 1e9, 2),
        "release_experts_bfloat16_GB": round(plain * numbers / 1e9, 2),
    }
    print(json.dumps(record))


def written(config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """The tensors of such a file; codes and weights are all zero."""
    for own, tensor in blank(config, load_ops("reference")).state_dict().items():
        name = released_name(own)
        if match := re.fullmatch(r"(.*\.experts)\.(gate_up|down)_proj", name):
            kinds = ("gate", "up") if match[2] == "gate_up" else ("down",)
            for number in range(tensor.shape[0]):
                for kind in kinds:
                    shape = (tensor.shape[1] // len(kinds), tensor.shape[2])
                    yield from coded(f"{match[1]}.{number}.{kind}_proj.weight", shape)
        elif re.search(r"\.layers\.\d+\.(self_attn|mlp)\..*_proj\.weight", name):
            yield from coded(name, tuple(tensor.shape))
        else:
            yield name, torch.zeros(tensor.shape, dtype=torch.bfloat16)


def coded(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Tensor]]:
    """A matrix of codes and its scales."""
    yield name, torch.zeros(shape, dtype=torch.float8_e4m3fn)
    yield f"{name}_scale_inv", torch.ones(*(-(-size // 128) for size in shape))


def resident() -> int:
    """Bytes of memory that this process holds."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) << 10


if __name__ == "__main__":
    main()
