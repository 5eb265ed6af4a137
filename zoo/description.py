"""What a network is built with. Imports no PyTorch: command lines need it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class NetworkDescription:
    """What a network is built with, as in the flags `model.*` and `training.use_blurpool`; None: found out from its weights."""

    arch: str | None = None
    not_original: bool | None = None
    add_normalization: bool | None = None
    updated: bool | None = None
    num_classes: int | None = None
    use_blurpool: bool | None = None


# Field of `NetworkDescription` → section of a run's params.json that holds it, and its type.
DESCRIPTION = {
    "arch": ("model", str),
    "not_original": ("model", bool),
    "add_normalization": ("model", bool),
    "updated": ("model", bool),
    "num_classes": ("model", int),
    "use_blurpool": ("training", bool),
}
