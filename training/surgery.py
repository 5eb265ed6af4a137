"""Changes that training makes to a network besides its weights: frozen parameters, and less memory for the backward pass."""

from __future__ import annotations

from collections.abc import Set
from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from common.errors import UserError


def freeze_parameters(model: nn.Module, *, early: bool) -> list[nn.Module]:
    """Freeze all parameters except the stem's (`early`), or only the stem's (not `early`).

    The stem's parameters are those with `stem` in their name. `requires_grad` is set on every parameter.

    Returns:
        The outermost modules with parameters that are all frozen. They must stay in eval mode: in training mode, batch
        normalisation (of a RegNet; a ConvStem has none) would change its statistics, and `model.drop_path` would skip blocks.

    Raises:
        UserError: no name contains `stem` (a ViT with PatchStem, a ResNet), or no parameter would be trained.
    """
    in_stem = {name: "stem" in name for name, _ in model.named_parameters()}
    if not any(in_stem.values()):
        raise UserError(
            "model.freeze_some: expected a model with `stem` in the names of some parameters, got one without; "
            "ViTs have it only with --model.not_original=1."
        )
    if not early and all(in_stem.values()):
        raise UserError(
            "model.freeze_some: with --model.early=0 every parameter is frozen, so nothing would be trained."
        )
    frozen = _freeze_all_but(model, {name for name, belongs in in_stem.items() if belongs == early})
    return [module for module in frozen if next(module.parameters(), None) is not None]


def head_names(model: nn.Module, other: nn.Module) -> set[str]:
    """Return the names of the head's tensors: their shapes differ in `other`, the same network with another number of classes."""
    shapes = {name: value.shape for name, value in other.state_dict().items()}
    return {name for name, value in model.state_dict().items() if value.shape != shapes[name]}


def freeze_body(model: nn.Module, head: Set[str]) -> list[nn.Module]:
    """Freeze all parameters except those in `head`; return the outermost modules that contain none of these."""
    return _freeze_all_but(model, head)


def _freeze_all_but(model: nn.Module, trained: Set[str]) -> list[nn.Module]:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    holders = {name[:end] for name in trained for end in (0, *(i for i, c in enumerate(name) if c == "."))}
    return [
        module for name, module in model.named_modules() if name not in holders and name.rpartition(".")[0] in holders
    ]


def checkpoint_blocks(model: nn.Module) -> None:
    """Change every block in place to keep only its input for the backward pass, and to recompute the rest there.

    Blocks are the outermost modules whose class is named `…Block`: those of ConvNeXt, ViT, and most other timm models.
    Names in the state dict stay. timm's own switch does not work with `torch.autograd.grad`, which attacks use.

    Raises:
        UserError: the model has no such blocks, or batch normalisation, whose statistics a second forward pass would change.
    """
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise UserError(
            "training.grad_checkpointing: expected a model without batch normalisation, whose running statistics would be "
            "updated twice per step; give --training.grad_checkpointing=0."
        )
    found: list[str] = []
    for name, module in model.named_modules():
        if type(module).__name__.endswith("Block") and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)
    if not found:
        raise UserError("training.grad_checkpointing: the model has no modules named …Block; set the flag to 0.")
