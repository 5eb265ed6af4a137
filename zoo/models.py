"""The network as training and evaluation use it: architecture, blurpool, normaliser."""

from __future__ import annotations

from torch import nn

from utils_architecture import add_blurpool, get_new_model, normalize_model


def build_model(
    arch: str,
    *,
    pretrained: bool = False,
    not_original: bool = False,
    updated: bool = False,
    num_classes: int = 1000,
    drop_path: float | None = None,
    use_blurpool: bool = False,
    add_normalization: bool = False,
) -> nn.Module:
    """Images (B, 3, H, W) in [0, 1] → logits (B, num_classes). Arguments as in `get_new_model` and the flags of their names.

    Raises:
        UserError: see `get_new_model`, `add_blurpool`.
    """
    model = get_new_model(
        arch,
        pretrained=pretrained,
        not_original=not_original,
        num_classes=num_classes,
        updated=updated,
        drop_path=drop_path,
    )
    if use_blurpool:
        add_blurpool(model)
    return normalize_model(model) if add_normalization else model
