"""The GPUs that this process can use."""

from __future__ import annotations

import torch

from common.errors import UserError


def usable_gpus() -> int:
    """Return the number of GPUs that PyTorch can use; 0 on a machine without GPUs.

    PyTorch's own count comes from the driver's management library, which also counts GPUs that CUDA cannot use: with a driver
    too old for this PyTorch, or more parts of a GPU (MIG) than a process can use.

    Raises:
        UserError: there are GPUs, but PyTorch cannot use them.
    """
    if not torch.cuda.device_count():
        return 0
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError, torch.cuda.DeferredCudaCallError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"this machine has a GPU, but PyTorch {torch.__version__} cannot use it ({reason}). Install a newer driver, or set "
            "CUDA_VISIBLE_DEVICES to the number of a GPU, to a part of a GPU (MIG-…), or to an empty value for the CPU."
        ) from error
    # CUDA's own count, which torch.cuda.device_count returns only in newer versions.
    return torch._C._cuda_getDeviceCount()
