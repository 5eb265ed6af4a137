"""Data classes that describe a network. The module does not import PyTorch, so that command lines start fast."""

from __future__ import annotations

from dataclasses import dataclass

# Prefixes of `arch` for RobustBench's models and open_clip's configurations.
ROBUSTBENCH_PREFIX, CLIP_PREFIX = "robustbench_", "open_clip_"
# Weights file of an exported folder, and the key of its config.json with the sections of a run's params.json.
EXPORTED, EXPORT_KEY = "model.safetensors", "robust_training"


@dataclass(frozen=True, kw_only=True)
class NetworkDescription:
    """Arguments of a network, as in the flags `model.*` and `training.use_blurpool`; None: inferred from its weights."""

    arch: str | None = None
    not_original: bool | None = None
    add_normalization: bool | None = None
    updated: bool | None = None
    num_classes: int | None = None
    use_blurpool: bool | None = None
    weights_key: str | None = None  # key of one network in a file with several; dotted if nested
    mean: tuple[float, ...] | None = None  # with std: normaliser for images in [0, 1], if the file has none
    std: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of the images that a network was validated on."""

    img_size: int = 224  # side of the square images in pixels
    crop_pct: float = 0.875  # the shorter side is resized to img_size / crop_pct, then the centre is cropped
    interpolation: str = "bicubic"  # of the resize; or "bilinear"
    # "center": as above; "squash": both sides are resized to img_size; "crop": the centre is cropped without a resize.
    crop_mode: str = "center"
    source: str = "the default"  # origin of these values, in words

    def __str__(self) -> str:
        resize = {"center": f"crop {self.crop_pct:g}, {self.interpolation}", "crop": "centre crop, not resized"}
        return f"{self.img_size} px, {resize.get(self.crop_mode, f'squashed, {self.interpolation}')} ({self.source})"


@dataclass(frozen=True)
class RunFacts:
    """Facts recorded by a training run: threat model, radius, clean validation accuracy of the weights; None: unknown."""

    norm: str | None = None
    eps: float | None = None
    clean_acc: float | None = None
    beats_average: bool = False  # raw weights with a better validation than their EMA
    worse_than_raw: bool = False  # EMA weights with a worse validation than the raw weights


ASKED_ONLY = ("weights_key", "mean", "std")  # fields of `NetworkDescription` that only users set
# Field of `NetworkDescription` → its section in a run's params.json, and its type.
DESCRIPTION = {
    "arch": ("model", str),
    "not_original": ("model", bool),
    "add_normalization": ("model", bool),
    "updated": ("model", bool),
    "num_classes": ("model", int),
    "use_blurpool": ("training", bool),
}
