"""Signs that AutoAttack overestimates a network's robustness, as in `checks.py` of its authors' package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from common.precision import float32_matmul
from evaluation.autoattack import Among

TOLERANCE = 1e-5  # for equal outputs, and for a sum of probabilities
SQUARE_SHARE = 0.002  # share of the images that Square may break after the other attacks without a warning


def examine(model: nn.Module, x: Tensor, y: Tensor, *, device: torch.device, gradients: bool) -> dict[str, Any]:
    """Examine the network's outputs of two passes, and its gradients, on clean images. The random state is preserved.

    Args:
        model: (B, C, H, W) in [0, 1] → logits (B, K); in eval mode on `device`. For an `Among`, all outputs are examined.
        x: (B, C, H, W) float32 in [0, 1], on the CPU.
        y: (B,) int64.
        device: device of the network.
        gradients: also examine gradients. They need memory, and a network attacked by Square only need not have any.

    Returns:
        `zero_gradients`: number of images whose gradient of the cross-entropy is exactly 0, None without `gradients`; `random`:
        whether two passes differ; `probabilities`: whether the outputs are in [0, 1] and sum to 1.
    """
    gpus = [] if device.type == "cpu" else [device]
    with (
        torch.random.fork_rng(gpus, device_type=device.type),
        float32_matmul(tf32=False),
        torch.set_grad_enabled(gradients),
    ):
        whole, restricted = (
            (model.network, model.restricted) if isinstance(model, Among) else (model, lambda logits: logits)
        )
        x = x.to(device).detach().requires_grad_(gradients)
        before, outputs = whole(x).detach(), whole(x)
        zero = None
        if gradients:
            (gradient,) = torch.autograd.grad(cross_entropy(restricted(outputs), y.to(device), reduction="sum"), x)
            zero = int((gradient == 0).flatten(1).all(1).sum())
        outputs = outputs.detach()
    scale = max(1.0, outputs.abs().max().item())
    in_range = outputs.min() >= -TOLERANCE and outputs.max() <= 1 + TOLERANCE
    return {
        "zero_gradients": zero,
        "random": (outputs - before).abs().max().item() > TOLERANCE * scale,
        "probabilities": bool(in_range and ((outputs.sum(1) - 1).abs() <= TOLERANCE).all()),
    }


def flags(records: Sequence[Mapping[str, Any]], attacks: Sequence[str]) -> Iterator[str]:
    """Yield a sentence for each sign in an evaluation's records; records of earlier versions have no `reliability`."""
    broken_by = [broken for record in records for broken in record["broken_by"]]
    by_gradients, by_square = [name for name in attacks if name != "square"], broken_by.count("square")
    if by_gradients and by_square > SQUARE_SHARE * len(broken_by):
        yield (
            f"Square, which needs no gradients, broke {by_square} of {len(broken_by)} images that {', '.join(by_gradients)} did "
            "not break: a sign of masked gradients; an adaptive attack may break more"
        )
    found = [(record["reliability"], len(record["positions"])) for record in records if record.get("reliability")]
    zeros = [(each["zero_gradients"], n) for each, n in found if each["zero_gradients"] is not None]
    if zero := sum(count for count, _ in zeros):
        n = sum(n for _, n in zeros)
        yield (
            f"the gradient of the cross-entropy is exactly 0 on {zero} of {n} clean images ({zero / n:.1%}); "
            "gradient-based attacks are blind there"
        )
    if any(each["random"] for each, _ in found):
        yield (
            "two forward passes of the same images differ: the network is random. AutoAttack's standard version is not made for "
            'that (its version "rand" averages over passes)'
        )
    if found and all(each["probabilities"] for each, _ in found):
        yield "the outputs are in [0, 1] and sum to 1, like probabilities; the attacks expect logits"
