"""The networks as a step calls them: compiled where that is asked for (`training.compile`) and possible, else as they are.

`torch.compile` computes weight gradients whenever parameters require them, even if only the input's gradient is asked for, and
compiles anew when a module goes from training to eval mode. So the attack and the training have a network each, over the same
memory: neither's mode nor `requires_grad` ever changes, and each is compiled once an image size.
"""

from __future__ import annotations

import copy
import sys

import torch
from torch import nn

from attacks.losses import cross_entropy
from common.config import TrainConfig
from common.distributed import Processes
from data.loader import Batch
from training.state import TrainState
from training.step import attack_batch, autocast, to_device

# Image sizes of a schedule times (with and without gradient); beyond PyTorch's own limit of 8 it would run uncompiled.
MAX_GRAPHS = 64


def frozen_twin(model: nn.Module) -> nn.Module:
    """The network in eval mode and without gradients, over the memory of the model's parameters and buffers.

    So it has the model's weights at any time, whatever mode the model is in.
    """
    shared: dict[int, object] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    shared |= {id(buffer): buffer for buffer in model.buffers()}
    return copy.deepcopy(model, shared).eval()


def wants_compiled(config: TrainConfig, processes: Processes) -> bool:
    """Whether `training.compile` asks for it: "auto" does on a GPU."""
    return {"auto": processes.device.type == "cuda", "1": True, "0": False}[config.training.compile]


def prepare_networks(state: TrainState, config: TrainConfig, processes: Processes, *, size: int) -> None:
    """Make `state` ready for steps at image size `size`: compile its networks, if asked for, and settle the buckets of gradients.

    Compilers fail in many ways: no C++ compiler, no Triton, an operation they do not know. A warning names the cause then, and
    all processes train uncompiled.

    After its first backward pass DistributedDataParallel orders its buckets anew, and sums over three or more processes are
    rounded otherwise from then on. So that has to lie before the first step, of every start.
    """
    if config.training.eval_only:
        return
    if wants_compiled(config, processes):
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS)
        # Random numbers from PyTorch's own generator: drop path leaves out the same blocks as uncompiled.
        settings = {"dynamic": False, "options": {"fallback_random": True}}
        problem = None
        try:
            state.attacked = torch.compile(frozen_twin(state.model), **settings)
            state.parallel = processes.parallel(torch.compile(state.model, **settings))
            rehearse(state, config, processes, size=size)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        problems = [found for found in processes.gather(problem) if found is not None]
        if not problems:
            return
        if processes.is_first:
            print(f"warning: training.compile: training runs uncompiled: {problems[0]}", file=sys.stderr)
    state.attacked, state.parallel = state.model, processes.parallel(state.model)
    if processes.world_size > 1:
        rehearse(state, config, processes, size=size, attack=False)


def rehearse(state: TrainState, config: TrainConfig, processes: Processes, *, size: int, attack: bool = True) -> None:
    """What a step calls, on black images of its shape; gradients and running statistics are thrown away."""
    training, device = config.training, processes.device
    y = torch.zeros(training.batch_size, dtype=torch.int64, device=device)
    batch = Batch(x=torch.zeros(len(y), 3, size, size), y=y, index=y, failures=[])
    x = to_device(batch, device=device, precision=training.precision, channels_last=config.misc.use_channel_last)
    buffers = [buffer.clone() for buffer in state.model.buffers()]
    state.model.train()
    try:
        if attack:
            with autocast(device, training.precision):
                attack_batch(state.attacked, x, y, adv=config.adv, eps=config.adv.eps)
        for _ in range(2 if processes.world_size > 1 else 1):
            with autocast(device, training.precision):
                loss = cross_entropy(state.parallel(x), y).mean()
            loss.backward()
    finally:
        for parameter in state.model.parameters():
            parameter.grad = None
        for buffer, before in zip(state.model.buffers(), buffers):
            buffer.copy_(before)
