"""Which devices an evaluation runs on: the free GPUs, or processes on the CPU."""

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
    """Numbers of the GPUs that this process may use, busy or not; none where it is to use the CPU.

    Under torchrun each process has the GPU of its local rank.

    Raises:
        UserError: a GPU that is not there.
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
            f"eval.gpus: expected numbers of the {visible} GPUs that PyTorch sees here, from 0 on; got {settings.gpus}."
        )
    return asked


def find_devices(settings: EvalAttackConfig, *, chunks: int) -> list[str]:
    """The device of each worker of this process, at most `chunks`: every GPU (with eval.gpus=auto every free one) as "cuda:<n>".

    On the CPU "cpu", as often as cores and `eval.threads` allow; under torchrun once.

    Raises:
        UserError: a GPU that is not there, or none free.
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
    """Those of all `gpus` that are free; waits for one for `eval.gpu_wait` minutes."""
    end = time.monotonic() + 60 * settings.gpu_wait
    while not (free := free_gpus(_uuids(gpus), settings.gpu_max_load, settings.gpu_max_memory)):
        if time.monotonic() >= end:
            raise UserError(
                f"eval.gpus: none of the {len(gpus)} GPUs is free (load at most {settings.gpu_max_load:g}, memory "
                f"in use at most {settings.gpu_max_memory:g}); expected one within {settings.gpu_wait:g} minutes (eval.gpu_wait). "
                "Name those to use with eval.gpus=0,1."
            )
        tqdm.write("waiting for a free GPU …", file=sys.stderr)  # without tearing the bar
        time.sleep(min(GPU_POLL_SECONDS, max(0.0, end - time.monotonic())))
    return free


def free_gpus(visible: list[str], max_load: float, max_memory: float) -> list[int]:
    """Numbers, in PyTorch's counting, of the GPUs whose load and share of memory in use are not above the limits.

    nvidia-smi counts all GPUs of the machine, PyTorch those that CUDA_VISIBLE_DEVICES shows, in its order: their UUIDs match
    them. A GPU that nvidia-smi does not list, or without a load (parts of a GPU), counts as free; all do where nvidia-smi is
    missing, or fails (with a warning).

    Args:
        visible: UUIDs of the GPUs that PyTorch sees, by number.
        max_load, max_memory: shares in [0, 1].
    """
    import GPUtil  # needs distutils, so only where it is used

    try:
        listed = GPUtil.getGPUs()
    except (ValueError, IndexError, ZeroDivisionError) as error:  # GPUtil takes every line for a GPU, also a complaint
        print(f"warning: eval.gpus: nvidia-smi does not say which GPUs are free ({error}); all count.", file=sys.stderr)
        listed = []
    # What is not known is NaN, which is never above.
    busy = {_bare(gpu.uuid) for gpu in listed if gpu.load > max_load or gpu.memoryUtil > max_memory}
    return [number for number, uuid in enumerate(visible) if _bare(uuid) not in busy]


def _uuids(gpus: list[int]) -> list[str]:
    return [str(torch.cuda.get_device_properties(number).uuid) for number in gpus]


def _bare(uuid: str) -> str:
    return uuid.strip().lower().removeprefix("gpu-")
