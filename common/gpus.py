"""The GPUs that this process can use."""

from __future__ import annotations

import torch

from common.errors import UserError


def usable_gpus() -> int:
    """Number of visible GPUs; 0 on a machine without.

    PyTorch counts GPUs by asking the driver's management library, which also knows those that CUDA cannot use: under a driver
    that is too old for this PyTorch, or more of them than a GPU that is cut into parts (MIG) lets a process have.

    Raises:
        UserError: there are GPUs, and PyTorch cannot use them.
    """
    if not torch.cuda.device_count():
        return 0
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError, torch.cuda.DeferredCudaCallError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"this machine has a GPU, but PyTorch {torch.__version__} cannot use it ({reason}); expected a driver that is new "
            "enough, or CUDA_VISIBLE_DEVICES with the number, or the part of a GPU (MIG-…), to use, or empty for the CPU."
        ) from error
    # CUDA's own count, which torch.cuda.device_count gives in newer versions only.
    return torch._C._cuda_getDeviceCount()
