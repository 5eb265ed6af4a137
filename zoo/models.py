"""The network as training and evaluation use it: architecture, blurpool, normaliser."""

from __future__ import annotations

from torch import nn

from common.errors import UserError
from utils_architecture import add_blurpool, get_new_model, normalize_model
from zoo.robustbench import robustbench_architecture

# In front of a RobustBench id where an architecture is named.
ROBUSTBENCH_PREFIX = "robustbench_"


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

    `arch` may also be `robustbench_<id>`: the network as RobustBench builds it, which takes no other argument.

    Raises:
        UserError: see `get_new_model`, `add_blurpool`, `robustbench_architecture`.
    """
    if arch.startswith(ROBUSTBENCH_PREFIX):
        if pretrained or not_original or updated or use_blurpool or num_classes != 1000:
            raise UserError(f"model.arch: {arch} is as RobustBench builds it; expected no other model.* flags.")
        return robustbench_architecture(arch.removeprefix(ROBUSTBENCH_PREFIX))
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
