"""Tests of the package data, and the small pictures that they share."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    """Return a smooth RGB picture, different for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def encoded(seed: int, width: int = 40, height: int = 30, kind: str = "PNG") -> bytes:
    """Return a file's bytes with `picture(seed, width, height)`."""
    file = io.BytesIO()
    picture(seed, width, height).save(file, kind)
    return file.getvalue()


def write_folder(root: Path, counts: dict[str, int]) -> Path:
    """Write `counts[name]` pictures into each class folder `root/name`; seeds count up in the order of the names."""
    seed = 0
    for name in sorted(counts):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(counts[name]):
            (root / name / f"{i:03d}.png").write_bytes(encoded(seed))
            seed += 1
    return root
