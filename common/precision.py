"""TensorFloat-32 and deterministic algorithms on a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def float32_matmul(*, tf32: bool) -> Iterator[None]:
    """Allow or forbid TensorFloat-32 in float32 matrix products and convolutions on a GPU; restores the settings afterwards.

    By default PyTorch rounds the inputs of float32 convolutions to 10 bits.
    """
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Use only deterministic algorithms (`training.deterministic`), or else let cuDNN benchmark convolutions at each new shape."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not enabled
    try:
        yield
    finally:
        if enabled:
            torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
