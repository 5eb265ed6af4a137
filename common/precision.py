"""What float32 means on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def float32_matmul(*, tf32: bool) -> Iterator[None]:
    """Let matrix products and convolutions of float32 on a GPU use TensorFloat-32, or not; as before afterwards.

    PyTorch's own default rounds the inputs of "float32" convolutions to 10 bits.
    """
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
