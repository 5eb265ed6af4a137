"""The number of GPUs that PyTorch can use, from CUDA and the driver's management library."""

from __future__ import annotations

import pytest
import torch

from common.errors import UserError
from common.gpus import usable_gpus


def counts(monkeypatch, *, listed, usable):
    """Set the counts of PyTorch and CUDA; an exception as `usable`: CUDA cannot start."""

    def init():
        if isinstance(usable, Exception):
            raise usable

    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: listed)
    monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", lambda: usable, raising=False)


@pytest.mark.parametrize(("listed", "usable"), [(0, 0), (2, 2), (8, 1)])
def test_count(monkeypatch, listed, usable):
    counts(monkeypatch, listed=listed, usable=usable)
    assert usable_gpus() == usable


def test_without_gpus_cuda_is_not_started(monkeypatch):
    counts(monkeypatch, listed=0, usable=RuntimeError("no driver"))
    assert usable_gpus() == 0


TOO_OLD = "The NVIDIA driver on your system is too old (found version 12020)."


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError(f"{TOO_OLD}\nPlease update"), TOO_OLD),
        (torch.cuda.DeferredCudaCallError("device >= 0 && device < num_gpus INTERNAL ASSERT FAILED"), "device >= 0"),
        (AssertionError("Invalid device id"), "Invalid device id"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_reported(monkeypatch, error, reason):
    counts(monkeypatch, listed=8, usable=error)
    with pytest.raises(UserError, match=r"^this machine has a GPU, but PyTorch .* CUDA_VISIBLE_DEVICES") as said:
        usable_gpus()
    assert reason in str(said.value) and "Please" not in str(said.value)
