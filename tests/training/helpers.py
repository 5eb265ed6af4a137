"""Small runs for tests: a data set of coloured squares, and what a run left behind."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import train
from common.flags import load_config
from training.config import TrainConfig
from training.identity import find_folder

CLASSES = ("blue", "green", "grey", "red")


def write_images(folder: Path, *, train_images: int = 6, val_images: int = 2, size: int = 20, seed: int = 0) -> Path:
    """train/ and val/ with four classes of noisy squares whose colour tells the class."""
    generator = np.random.default_rng(seed)
    colours = {"blue": (40, 60, 200), "green": (40, 200, 60), "grey": (128, 128, 128), "red": (200, 40, 60)}
    for split, count in (("train", train_images), ("val", val_images)):
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                noise = generator.integers(-40, 40, (size, size, 3))
                pixels = np.clip(np.array(colours[name]) + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


@dataclass
class Outcome:
    """What one run of train.py left behind."""

    status: int
    folder: Path
    weights: dict[str, torch.Tensor] | None = None
    log: list[dict[str, Any]] = field(default_factory=list)  # without the lines of its starts
    params: dict[str, Any] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [r for r in self.log if r["kind"] == "step"]

    @property
    def epochs(self) -> list[dict[str, Any]]:
        return [r for r in self.log if r["kind"] == "epoch"]


def base_flags(images: Path, folder: Path) -> dict[str, Any]:
    """A run of three steps at 32 pixels, which always starts from scratch."""
    return {
        "model.arch": "convnext_micro",
        "model.pretrained": 0,
        "model.add_normalization": 0,
        "model.num_classes": 4,
        "resolution.min_res": 32,
        "resolution.max_res": 32,
        "data.train_dataset": images,
        "data.val_dataset": images,
        "data.num_workers": 0,
        "data.in_memory": 0,
        "data.augmentations": 2,
        "lr.lr_peak_epoch": 0,
        "training.batch_size": 8,
        "training.epochs": 1,
        "training.precision": "fp32",
        "training.resume": "none",
        "validation.precision": "fp32",
        "validation.resolution": 32,
        "validation.crop_pct": 1,
        "validation.adv_n_ex": 0,
        "logging.folder": folder,
        "logging.log_level": 2,
    }


def run(flags: dict[str, Any]) -> Outcome:
    """Run train.py in this process with these flags; None leaves a flag out."""
    argv = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    status = train.main(argv)
    if status != 0:
        return Outcome(status, Path(str(flags["logging.folder"])))
    return read_outcome(find_folder(load_config(TrainConfig, argv))[0])


def read_outcome(folder: Path) -> Outcome:
    """Read a run folder."""
    files = {p.name for p in folder.iterdir()}
    saved = sorted((p for p in folder.glob("weights_[0-9]*.pt")), key=lambda p: int(p.stem.split("_")[1]))
    return Outcome(
        status=0,
        folder=folder,
        weights=torch.load(saved[-1], weights_only=True) if saved else None,
        log=[
            record for record in map(json.loads, (folder / "log").read_text().splitlines()) if record["kind"] != "start"
        ],
        params=json.loads((folder / "params.json").read_text()),
        files=files,
    )


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference of two state dicts with the same names."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)
