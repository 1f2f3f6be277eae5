"""Print the codebooks of ggml's IQ kinds as sfumato/checkpoints/formats/gguf_codebooks.py holds them.

The gguf package has each as a list of points. All lie on a small lattice and are listed in ascending order, so that one
bit for each point of the lattice says the same. Run: .venv/bin/python scripts/gguf_codebooks.py
"""

from __future__ import annotations

import base64
import zlib

import numpy as np
from gguf import quants

KINDS = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_S", "IQ3_XXS", "IQ3_S")
WIDTH = 100


def is_member(kind: str) -> bytes:
    """One bit for each point of the lattice of a kind, the lowest first."""
    source = getattr(quants, kind)
    source.init_grid()
    sizes = np.array(source.grid_map)
    digits = np.searchsorted(sizes, source.grid.reshape(source.grid_shape))
    points = (digits * len(sizes) ** np.arange(digits.shape[1])).sum(axis=1)
    if not (np.diff(points) > 0).all():
        raise SystemExit(f"{kind}'s points are not in ascending order")
    flags = np.zeros(len(sizes) ** digits.shape[1], np.uint8)
    flags[points] = 1
    return np.packbits(flags, bitorder="little").tobytes()


if __name__ == "__main__":
    text = base64.b85encode(zlib.compress(b"".join(map(is_member, KINDS)), 9)).decode()
    for at in range(0, len(text), WIDTH):
        print(f'    "{text[at : at + WIDTH]}"')
