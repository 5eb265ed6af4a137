"""A robust network for use in other programs."""

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
    """A ready network: images (B, 3, H, W) in [0, 1] → logits, in eval mode on the CPU.

    Its attribute `transform` turns a PIL image into such a tensor (3, img_size, img_size).

    Args:
        name: a published model or RobustBench id (downloaded to `folder` where it is not there yet), a weights file, or the
            folder of a run or an export.
        img_size, crop_pct: of the transform: resize to img_size / crop_pct, centre crop; by default as the network was validated.
        folder: where downloads go; by default `checkpoints` in the project.
        description: of the network, such as arch and add_normalization, where name and file do not say it
            (`zoo.description.NetworkDescription`).

    Raises:
        UserError: nothing is called so, or it cannot be downloaded or loaded.
    """
    with blame("name"):
        trained = load_named(name, NetworkDescription(**description), folder=folder and Path(folder))
    for note in trained.notes:
        warnings.warn(note, stacklevel=2)
    model, used = trained.model, trained.preprocessing
    size, crop_pct = img_size or used.img_size, crop_pct or used.crop_pct
    model.transform = eval_transform(size, crop_pct, used.interpolation, used.crop_mode)
    return model
