"""Construction of the network used in training and evaluation: architecture, blurpool, normaliser."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from utils_architecture import get_new_model, normalize_model
from zoo.clip import clip_architecture
from zoo.description import CLIP_PREFIX, ROBUSTBENCH_PREFIX
from zoo.robustbench import robustbench_entry


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
    global_pool: str | None = None,
    img_size: int | None = None,
) -> nn.Module:
    """Build a network: images (B, 3, H, W) in [0, 1] → logits (B, num_classes). Arguments as in `get_new_model`.

    Arguments that are flags have the meaning of the flag. `arch` may also be `robustbench_<id>`, RobustBench's network with its
    normaliser for 1000 classes, or `open_clip_<name>`, see `zoo.clip.clip_architecture`.

    Raises:
        UserError: see `get_new_model`, `add_blurpool`, `robustbench_entry`, `clip_architecture`.
    """
    if arch.startswith((ROBUSTBENCH_PREFIX, CLIP_PREFIX)):
        if pretrained or not_original or updated or use_blurpool:
            raise UserError(f"arch: {arch} is built by another package; expected no other options of the model.")
        if arch.startswith(CLIP_PREFIX):
            model = clip_architecture(arch.removeprefix(CLIP_PREFIX), num_classes)
            return normalize_model(model) if add_normalization else model
        if num_classes != 1000:
            raise UserError(f"num_classes: {arch} has 1000 classes, but {num_classes} were requested.")
        network = robustbench_entry(arch.removeprefix(ROBUSTBENCH_PREFIX))["model"]()
        if hasattr(network, "normalization"):  # RaWRN has a built-in one with ImageNet's mean and std
            network.normalization = nn.Identity()
            network = normalize_model(network)
        return network
    model = get_new_model(
        arch,
        pretrained=pretrained,
        not_original=not_original,
        num_classes=num_classes,
        updated=updated,
        drop_path=drop_path,
        global_pool=global_pool,
        img_size=img_size,
    )
    if use_blurpool:
        add_blurpool(model)
    return normalize_model(model) if add_normalization else model


def add_blurpool(model: nn.Module) -> nn.Module:
    """Blur the input of every strided convolution with at least 16 input channels, in place; return `model`.

    The blur is the fixed binomial 3x3 kernel (1, 2, 1) ⊗ (1, 2, 1) / 16 with zero padding (Zhang, "Making
    Convolutional Networks Shift-Invariant Again", ICML 2019). It is a forward pre-hook of the convolution, so names in the
    state dict do not change and every checkpoint of the model still loads. A second call has no effect.

    Raises:
        UserError: the model has no such convolution.
    """
    strided = [
        module
        for module in model.modules()
        if isinstance(module, nn.Conv2d) and max(module.stride) > 1 and module.in_channels >= 16
    ]
    if not strided:
        raise UserError("use_blurpool: expected strided convolutions with at least 16 input channels; remove it.")
    for conv in strided:
        if not hasattr(conv, "blur_kernel"):
            row = torch.tensor([0.25, 0.5, 0.25], device=conv.weight.device, dtype=conv.weight.dtype)
            kernel = torch.outer(row, row).expand(conv.in_channels, 1, 3, 3).contiguous()
            conv.register_buffer("blur_kernel", kernel, persistent=False)
            conv.register_forward_pre_hook(_blur_input)
    return model


def _blur_input(conv: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    (x,) = inputs
    return F.conv2d(x, conv.blur_kernel, padding=1, groups=conv.in_channels)
