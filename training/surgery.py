"""What training changes of a network beside its weights: what is frozen, what is kept for the backward pass."""

from __future__ import annotations

from collections.abc import Set
from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from common.errors import UserError


def freeze_parameters(model: nn.Module, *, early: bool) -> list[nn.Module]:
    """Freeze all parameters but the stem's (`early`), or only the stem's (not `early`).

    The stem's parameters are those whose name contains `stem`. `requires_grad` is set on every parameter.

    Returns:
        The outermost modules that have parameters, all of them frozen. They belong into eval mode: in training mode batch
        normalisation (of a RegNet; a ConvStem has none) would move its statistics, and blocks be left out (`model.drop_path`).

    Raises:
        UserError: no name contains `stem` (a ViT with PatchStem, a ResNet), or nothing would be left to train.
    """
    in_stem = {name: "stem" in name for name, _ in model.named_parameters()}
    if not any(in_stem.values()):
        raise UserError(
            "model.freeze_some: expected a model with `stem` in the names of some parameters, got one without; "
            "ViTs have it only with --model.not_original=1."
        )
    if not early and all(in_stem.values()):
        raise UserError(
            "model.freeze_some: with --model.early=0 every parameter is frozen and nothing would be trained."
        )
    frozen = _freeze_all_but(model, {name for name, belongs in in_stem.items() if belongs == early})
    return [module for module in frozen if next(module.parameters(), None) is not None]


def head_names(model: nn.Module, other: nn.Module) -> set[str]:
    """Names of the head's tensors: those of another shape in `other`, the same network for another number of classes."""
    shapes = {name: value.shape for name, value in other.state_dict().items()}
    return {name for name, value in model.state_dict().items() if value.shape != shapes[name]}


def freeze_body(model: nn.Module, head: Set[str]) -> list[nn.Module]:
    """Freeze all parameters but those named in `head`; returns the outermost modules that hold none of these."""
    return _freeze_all_but(model, head)


def _freeze_all_but(model: nn.Module, trained: Set[str]) -> list[nn.Module]:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    holders = {name[:end] for name in trained for end in (0, *(i for i, c in enumerate(name) if c == "."))}
    return [
        module for name, module in model.named_modules() if name not in holders and name.rpartition(".")[0] in holders
    ]


def checkpoint_blocks(model: nn.Module) -> None:
    """Let every block keep only its input for the backward pass and compute the rest again there, in place.

    Blocks are the outermost modules whose class is named `…Block`: those of ConvNeXt and ViT, and of most of timm's others.
    Names in the state dict stay. timm's own switch does not work with `torch.autograd.grad`, which attacks use.

    Raises:
        UserError: the model has no such blocks, or batch normalisation, whose statistics a second forward pass would change.
    """
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise UserError(
            "training.grad_checkpointing: expected a model without batch normalisation, whose running statistics would be "
            "updated twice a step; leave the flag out."
        )
    found: list[str] = []
    for name, module in model.named_modules():
        if type(module).__name__.endswith("Block") and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)
    if not found:
        raise UserError("training.grad_checkpointing: the model has no modules named …Block; leave the flag out.")
