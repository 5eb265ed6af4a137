"""Per-sample losses that the attacks maximise and training minimises."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy of each sample.

    Args:
        logits: (B, K), any floating dtype; computed in at least float32.
        y: class indices (B,) int64, or soft labels (B, K) that sum to one.

    Returns:
        (B,) float32 (float64 for float64 logits), in nats.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if y.is_floating_point():
        y = y.to(logits.dtype)
    return F.cross_entropy(logits, y, reduction="none")


class UnitGap(nn.Module):
    """`network` with logits divided by the gap between the largest and the third largest (second largest with 2 classes).

    The divisor counts as a constant. Cross-entropy on the result therefore does not depend on the logits' scale, like the DLR
    loss (Croce & Hein 2020). Plain cross-entropy has no gradient if large logits saturate the softmax. Predictions are unchanged.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits = self.network(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        largest = logits.detach().topk(min(3, logits.shape[1]), dim=1).values
        return logits / (largest[:, :1] - largest[:, -1:]).clamp(min=torch.finfo(logits.dtype).tiny)


def hard_labels(y: Tensor) -> Tensor:
    """Return the class index of each sample, (B,) int64: `y` itself, or the arg-max of soft labels (B, K)."""
    return y.argmax(dim=1) if y.is_floating_point() else y
