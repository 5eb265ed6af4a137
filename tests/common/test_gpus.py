"""The GPUs that PyTorch can use, by what CUDA and the driver's management library say."""

from __future__ import annotations

import pytest
import torch

from common.errors import UserError
from common.gpus import usable_gpus


def counts(monkeypatch, *, listed, usable):
    """What PyTorch counts before and after CUDA has started; None: it cannot start."""
    started = []

    def init():
        if usable is None:
            raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).\nPlease update")
        started.append(True)

    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: usable if started else listed)


@pytest.mark.parametrize(("listed", "usable"), [(0, None), (2, 2), (8, 1)])
def test_count(monkeypatch, listed, usable):
    counts(monkeypatch, listed=listed, usable=usable)
    assert usable_gpus() == (usable or 0)


def test_a_gpu_that_cannot_be_used_is_said(monkeypatch):
    counts(monkeypatch, listed=8, usable=None)
    with pytest.raises(
        UserError, match=r"^this machine has a GPU, but PyTorch .* too old \(found version 12020\)\. CUDA_VIS"
    ):
        usable_gpus()
