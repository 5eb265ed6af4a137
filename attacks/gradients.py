"""Loss and input gradient of a model under attack, for every gradient attack and precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from attacks.losses import cross_entropy, hard_labels

Model = Callable[[Tensor], Tensor]

# Largest |d loss / d logit| of a sample when the backward pass runs in float16. Pixel gradients are typically 1e-3 to 1e-6 of
# it, and float16 represents numbers from 6e-8 to 65504.
FP16_LOGIT_GRADIENT = 2.0**10


@contextmanager
def under_attack(model: Model) -> Iterator[None]:
    """Put a module into eval mode with frozen parameters; restores the mode of every sub-module and parameter afterwards.

    With frozen parameters autograd stores nothing for weight gradients and accumulates none. A plain function is unaffected.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    in_training = [module for module in model.modules() if module.training]
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        if in_training:
            model.eval()
        for p in trained:
            p.requires_grad_(False)
        yield
    finally:
        for module in in_training:
            module.training = True
        for p in trained:
            p.requires_grad_(True)


def judge(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the per-sample loss (B,) and whether the prediction is right (B,) bool, without a graph."""
    logits = logits.detach()
    return cross_entropy(logits, y), logits.argmax(dim=1) == hard_labels(y)


def evaluate(model: Model, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return `judge` of the model's logits for `x`."""
    with torch.no_grad():
        return judge(model(x), y)


def evaluate_with_gradient(model: Model, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return per-sample loss (B,), whether the prediction is right (B,) bool, and d loss / d x (B, …) in the dtype of `x`.

    The gradient is computed in two parts: of the loss with respect to the logits, in float32 or better, then through the
    network. In float16 each sample's logit gradient is first scaled by a power of two to a fixed size, and the result is scaled
    back in the dtype of `x`. Otherwise confident samples and small pixel gradients underflow to zero, and the attack loses these
    coordinates. No value is read back from the device. Gradients that are not finite become zero, so that no pixel becomes NaN.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        logits = model(x)
        leaf = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).requires_grad_(True)
        loss = cross_entropy(leaf, y)
        (logit_grad,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss))
        scale = _fp16_scale(logit_grad) if _backward_in_fp16(logits) else None
        if scale is not None:
            logit_grad = logit_grad * scale
        (grad,) = torch.autograd.grad(logits, x, grad_outputs=logit_grad.to(logits.dtype))
    if scale is not None:
        grad = grad / scale.view(-1, *[1] * (grad.dim() - 1))
    grad = torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0)
    return loss.detach(), leaf.detach().argmax(dim=1) == hard_labels(y), grad


def _backward_in_fp16(logits: Tensor) -> bool:
    device = logits.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    return autocast or logits.dtype == torch.float16


def _fp16_scale(logit_grad: Tensor) -> Tensor:
    """Return the (B, 1) powers of two that scale each sample's largest logit gradient to about `FP16_LOGIT_GRADIENT`."""
    largest = logit_grad.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
    return torch.exp2(torch.floor(torch.log2(FP16_LOGIT_GRADIENT / largest)))
