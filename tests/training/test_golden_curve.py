"""The golden curve: three short runs whose losses and weights no change of the code may move.

The numbers are in tests/golden/curves.json. They are made again, only where numbers are meant to change, by

    python -m tests.training.test_golden_curve
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from tests.training.helpers import run

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "curves.json"
STEPS, BATCH = 20, 4
COMMON: dict[str, Any] = {
    "model.pretrained": 0,
    "model.add_normalization": 0,
    "model.num_classes": 10,
    "resolution.min_res": 32,
    "resolution.max_res": 32,
    "data.num_workers": 0,
    "data.in_memory": 0,
    "data.augmentations": 0,
    "data.seed": 0,
    "lr.lr": 1e-3,
    "lr.lr_peak_epoch": 0,
    "training.batch_size": BATCH,
    "training.epochs": 1,
    "training.precision": "fp64",
    "training.resume": "none",
    "validation.precision": "fp64",
    "validation.resolution": 32,
    "validation.crop_pct": 1,
    "validation.adv_n_ex": 0,
    "logging.log_level": 2,
}
RUNS: dict[str, dict[str, Any]] = {
    "clean": {"model.arch": "convnext_micro", "adv.attack": "none"},
    "apgd_linf_heavy": {
        "model.arch": "convnext_micro",
        "model.not_original": 1,
        "model.add_normalization": 1,
        "model.model_ema": 1,
        "model.ema_decay": 0.9,
        "data.augmentations": 1,
        "training.label_smoothing": 0.1,
        "adv.attack": "apgd",
        "adv.norm": "Linf",
        "adv.n_iter": 2,
        "adv.eps": 0.05,
        "adv.eps_warmup_epochs": 1,
    },
    "apgd_l1": {
        "model.arch": "vit_micro",
        "resolution.min_res": 16,
        "resolution.max_res": 16,
        "validation.resolution": 16,
        "adv.attack": "apgd",
        "adv.norm": "L1",
        "adv.n_iter": 2,
        "adv.eps": 5,
    },
}


def write_digits(folder: Path) -> Path:
    """scikit-learn's first handwritten digits as PNG files, 8 of each class: one epoch of `STEPS` steps."""
    digits = load_digits()
    for label in range(10):
        images = digits.images[digits.target == label][: STEPS * BATCH // 10]
        (folder / f"{label}").mkdir(parents=True)
        for i, image in enumerate(images):
            pixels = np.rint(image * (255 / 16)).astype(np.uint8)
            Image.fromarray(pixels).convert("RGB").save(folder / f"{label}" / f"{i:02}.png")
    return folder


def curve(name: str, folder: Path) -> dict[str, Any]:
    """Losses of all steps, and a checksum of each network's weights: their sum of squares, and a sum with signs that differ."""
    images = write_digits(folder / "digits")
    places = {"data.train_dataset": images, "data.val_dataset": images, "logging.folder": folder / "runs"}
    outcome = run(COMMON | RUNS[name] | places)
    assert outcome.status == 0
    losses = [record["loss"] for record in outcome.steps]
    networks = {path.stem: checksum(path) for path in sorted(outcome.folder.glob("weights*_1.pt"))}
    return {"losses": losses, **networks}


def checksum(path: Path) -> list[float]:
    weights = torch.load(path, weights_only=True)
    values = torch.cat([weights[name].double().flatten() for name in sorted(weights)])
    return [values.square().sum().item(), (values * torch.arange(len(values)).double().sin()).sum().item()]


@pytest.mark.parametrize("name", RUNS)
def test_golden_curve_has_not_moved(name, tmp_path):
    """Images are resampled in float32, whose last digit is another with AVX2 than with AVX-512: losses then differ by up to 4e-8,
    and sums of weights in which most cancels by up to 1e-6.
    """
    expected = json.loads(GOLDEN.read_text())[name]
    found = curve(name, tmp_path)
    assert found.keys() == expected.keys() and len(found["losses"]) == STEPS
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, rel=1e-6 if key == "losses" else 1e-5, abs=0), key


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        curves = {name: curve(name, Path(temporary) / name) for name in RUNS}
    GOLDEN.write_text(json.dumps(curves, indent=1) + "\n")
