"""What a network is built with. Imports no PyTorch: command lines need it."""

from __future__ import annotations

from dataclasses import dataclass

# In front of names where an architecture is named: of RobustBench's package, of open_clip's configurations.
ROBUSTBENCH_PREFIX, CLIP_PREFIX = "robustbench_", "open_clip_"
# The weights of an exported folder, and the key of its config.json under which it holds the sections of a run's params.json.
EXPORTED, EXPORT_KEY = "model.safetensors", "robust_training"


@dataclass(frozen=True, kw_only=True)
class NetworkDescription:
    """What a network is built with, as in the flags `model.*` and `training.use_blurpool`; None: found out from its weights."""

    arch: str | None = None
    not_original: bool | None = None
    add_normalization: bool | None = None
    updated: bool | None = None
    num_classes: int | None = None
    use_blurpool: bool | None = None
    weights_key: str | None = None  # of a file with several networks: the key of one, by dots if nested
    mean: tuple[float, ...] | None = None  # with std: a normaliser for images in [0, 1], where the file has none
    std: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Preprocessing:
    """The images that a network was validated with."""

    img_size: int = 224  # side of the square images in pixels
    crop_pct: float = 0.875  # the shorter side is resized to img_size / crop_pct, the centre cropped
    interpolation: str = "bicubic"  # of that resize; or "bilinear"
    # "center" for that; "squash": both sides are resized to img_size; "crop": the centre is cropped without a resize.
    crop_mode: str = "center"
    source: str = "the default"  # where this is from, in words

    def __str__(self) -> str:
        resize = {"center": f"crop {self.crop_pct:g}, {self.interpolation}", "crop": "the centre, not resized"}
        return f"{self.img_size} px, {resize.get(self.crop_mode, f'squashed, {self.interpolation}')} ({self.source})"


@dataclass(frozen=True)
class RunFacts:
    """What a run says of its own weights: threat model and radius it was trained for, validated clean accuracy; None: nothing."""

    norm: str | None = None
    eps: float | None = None
    clean_acc: float | None = None
    beats_average: bool = False  # raw weights that validated better than their moving average
    worse_than_raw: bool = False  # a moving average that did not


ASKED_ONLY = ("weights_key", "mean", "std")  # fields of `NetworkDescription` that nothing but a user says
# Field of `NetworkDescription` → section of a run's params.json that holds it, and its type.
DESCRIPTION = {
    "arch": ("model", str),
    "not_original": ("model", bool),
    "add_normalization": ("model", bool),
    "updated": ("model", bool),
    "num_classes": ("model", int),
    "use_blurpool": ("training", bool),
}
