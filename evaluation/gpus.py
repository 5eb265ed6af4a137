"""Choice of the devices of an evaluation: free GPUs, or processes on the CPU."""

from __future__ import annotations

import os
import sys
import time

import torch
from tqdm import tqdm

from common.errors import UserError
from common.gpus import usable_gpus
from common.processes import local_rank, under_torchrun
from evaluation.config import EvalAttackConfig

GPU_POLL_SECONDS = 10


def gpus_in_question(settings: EvalAttackConfig) -> list[int]:
    """Return the numbers of the GPUs that this process may use, busy or not; empty if it uses the CPU.

    Under torchrun, each process has the GPU of its local rank.

    Raises:
        UserError: a GPU does not exist.
    """
    visible = 0 if settings.gpus == "none" else usable_gpus()
    if under_torchrun():
        if visible and local_rank() >= visible:
            raise UserError(
                f"torchrun: more processes than GPUs on this machine ({visible}); expected --nproc-per-node of at most {visible}."
            )
        return [local_rank()] if visible else []
    if settings.gpus in ("auto", "none"):
        return list(range(visible))
    asked = list(dict.fromkeys(int(number) for number in settings.gpus.split(",")))
    if any(number >= visible for number in asked):
        raise UserError(
            f"eval.gpus: expected numbers of the {visible} GPUs visible to PyTorch, counted from 0; got {settings.gpus}."
        )
    return asked


def find_devices(settings: EvalAttackConfig, *, chunks: int) -> list[str]:
    """Return the device of each worker of this process, at most `chunks`: "cuda:<n>" for each GPU (eval.gpus=auto: free GPUs).

    Without GPUs: "cpu", as many times as cores and `eval.threads` allow; once under torchrun.

    Raises:
        UserError: a GPU does not exist, or no GPU is free.
    """
    gpus = gpus_in_question(settings)
    if not gpus:
        cores = len(os.sched_getaffinity(0))
        count = 1 if under_torchrun() else settings.workers or max(1, cores // settings.threads)
        return ["cpu"] * min(count, chunks)
    if settings.gpus == "auto" and not under_torchrun():
        gpus = _wait_for_free(settings, gpus)
    return [f"cuda:{number}" for number in gpus[:chunks]]


def _wait_for_free(settings: EvalAttackConfig, gpus: list[int]) -> list[int]:
    """Return the free ones of all `gpus`; if there is none, wait up to `eval.gpu_wait` minutes for one."""
    end = time.monotonic() + 60 * settings.gpu_wait
    while not (free := free_gpus(_uuids(gpus), settings.gpu_max_load, settings.gpu_max_memory)):
        if time.monotonic() >= end:
            raise UserError(
                f"eval.gpus: none of the {len(gpus)} GPUs is free (load at most {settings.gpu_max_load:g}, memory "
                f"in use at most {settings.gpu_max_memory:g}); expected one within {settings.gpu_wait:g} minutes (eval.gpu_wait). "
                "To use busy GPUs, list them, such as eval.gpus=0,1."
            )
        tqdm.write("waiting for a free GPU …", file=sys.stderr)  # keeps the progress bar intact
        time.sleep(min(GPU_POLL_SECONDS, max(0.0, end - time.monotonic())))
    return free


def free_gpus(visible: list[str], max_load: float, max_memory: float) -> list[int]:
    """Return the PyTorch numbers of the GPUs whose load and share of memory in use do not exceed the limits.

    nvidia-smi numbers all GPUs of the machine; PyTorch numbers those of CUDA_VISIBLE_DEVICES, in its order. UUIDs match the two.
    A GPU counts as free if nvidia-smi does not list it or reports no load (MIG devices). All GPUs count as free if nvidia-smi is
    missing or fails (with a warning).

    Args:
        visible: UUIDs of the GPUs that PyTorch sees, by number.
        max_load, max_memory: shares in [0, 1].
    """
    import GPUtil  # needs distutils, so imported only here

    try:
        listed = GPUtil.getGPUs()
    except (ValueError, IndexError, ZeroDivisionError) as error:  # GPUtil parses all lines, even error messages
        print(f"warning: eval.gpus: nvidia-smi does not report free GPUs ({error}); all are used.", file=sys.stderr)
        listed = []
    # Unknown values are NaN, which is never above a limit.
    busy = {_bare(gpu.uuid) for gpu in listed if gpu.load > max_load or gpu.memoryUtil > max_memory}
    return [number for number, uuid in enumerate(visible) if _bare(uuid) not in busy]


def _uuids(gpus: list[int]) -> list[str]:
    return [str(torch.cuda.get_device_properties(number).uuid) for number in gpus]


def _bare(uuid: str) -> str:
    return uuid.strip().lower().removeprefix("gpu-")
