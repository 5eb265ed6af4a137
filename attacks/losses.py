"""Per-sample losses that the attacks maximise and training minimises."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each sample.

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


def hard_labels(y: Tensor) -> Tensor:
    """Class index of each sample, (B,) int64: `y` itself, or the arg-max of soft labels (B, K)."""
    return y.argmax(dim=1) if y.is_floating_point() else y
