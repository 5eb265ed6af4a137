"""Interface for other programs: a robust network by name."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from common.errors import blame
from data.transforms import eval_transform
from zoo.description import NetworkDescription
from zoo.names import load_named


def load_robust_model(
    name: str,
    *,
    img_size: int | None = None,
    crop_pct: float | None = None,
    folder: str | Path | None = None,
    **description: Any,
) -> nn.Module:
    """Load a network: images (B, 3, H, W) in [0, 1] → logits, in eval mode on the CPU.

    Its attribute `transform` converts a PIL image to a tensor (3, img_size, img_size) in [0, 1].

    Args:
        name: published model or RobustBench id (downloaded to `folder` if needed), weights file, or folder of a run or an export.
        img_size, crop_pct: of the transform: resize to img_size / crop_pct, centre crop; default: as in the network's validation.
        folder: folder for downloads; default: `checkpoints` in the project.
        description: fields of `zoo.description.NetworkDescription`, such as arch and add_normalization, that name and file do not
            define.

    Raises:
        UserError: the name is unknown, or the download or loading fails.
    """
    with blame("name"):
        trained = load_named(name, NetworkDescription(**description), folder=folder and Path(folder))
    for note in trained.notes:
        warnings.warn(note, stacklevel=2)
    model, used = trained.model, trained.preprocessing
    size, crop_pct = img_size or used.img_size, crop_pct or used.crop_pct
    model.transform = eval_transform(size, crop_pct, used.interpolation, used.crop_mode)
    return model
