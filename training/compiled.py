"""The networks as a step calls them: compiled where that is asked for (`training.compile`) and possible, else as they are.

`torch.compile` computes weight gradients whenever parameters require them, even if only the input's gradient is asked for, and
compiles anew when a module goes from training to eval mode. So the attack and the training have a network each, over the same
memory: neither's mode nor `requires_grad` ever changes, and each is compiled once an image size.
"""

from __future__ import annotations

import copy
import gc

import torch
from torch import Tensor, nn

from attacks.losses import cross_entropy
from attacks.registry import ATTACKS, build_attack
from common.processes import Processes
from data.loader import Batch
from training.config import TrainConfig
from training.console import warn
from training.shortcuts import asked_for, change_in_training, places_again
from training.state import TrainState
from training.step import autocast, on_device

# Random numbers from PyTorch's own generator: drop path leaves out the same blocks as uncompiled.
SETTINGS = {"dynamic": False, "options": {"fallback_random": True}}
# Of a network: two an image size (the attack with and without gradient; training with all images and with few). Beyond PyTorch's
# own limit of 8 it would run uncompiled.
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
    state.reuses_forward = _reuses_forward(state, config, processes, size=size)
    if wants_compiled(config, processes):
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS)
        _compile_or_stay_uncompiled(state, config, processes, size=size)
    else:
        _stay_uncompiled(state, config, processes, size=size)


def _reuses_forward(state: TrainState, config: TrainConfig, processes: Processes, *, size: int) -> bool:
    """Whether `training.reuse_forward` asks for it and the network is the same function in training as under attack."""
    asked, device, precision = config.training.reuse_forward, processes.device, config.training.precision
    if not ATTACKS[config.adv.attack].evaluates_last or not asked_for(asked, device):
        return False
    x = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    x[2] *= 0.3
    x, _ = on_device(Batch(x=x, y=x, index=x, failures=[]), config, device)
    with autocast(device, precision):
        change = change_in_training(state.model, x)
    change = next((found for found in processes.gather(change) if found is not None), None)
    if change and asked == "1" and processes.is_first:
        warn(f"training.reuse_forward: training has a forward pass of its own: the network {change}.")
    return change is None


def prepare_size(state: TrainState, config: TrainConfig, processes: Processes, *, size: int) -> None:
    """Before the first step at another image size: compile for it, where `prepare_networks` has compiled. Fails as that does."""
    if state.attacked is not state.model:
        _compile_or_stay_uncompiled(state, config, processes, size=size)


def _compile_or_stay_uncompiled(state: TrainState, config: TrainConfig, processes: Processes, *, size: int) -> None:
    """Compile the networks that are not yet, each by calling it as a step does."""

    def compile_attacked() -> None:
        if state.attacked is state.model:
            state.attacked = torch.compile(frozen_twin(state.model), **SETTINGS)
        _rehearse_attack(state, config, processes, size=size)

    def compile_trained() -> None:
        if state.parallel is state.model:
            state.parallel = processes.parallel(torch.compile(state.model, **SETTINGS))
        _rehearse_training(state, config, processes, size=size)

    # The attack needs no other process. So one that cannot compile says so before the others wait for its gradients.
    for compile_one in (compile_attacked, compile_trained):
        problem = None
        try:
            compile_one()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            problem = f"{type(error).__name__}: {' '.join(lines[:2])}"
        problems = [found for found in processes.gather(problem) if found is not None]
        if problems:
            if processes.is_first:
                warn(f"training.compile: training runs uncompiled: {problems[0]}")
            _stay_uncompiled(state, config, processes, size=size)
            return


def _stay_uncompiled(state: TrainState, config: TrainConfig, processes: Processes, *, size: int) -> None:
    state.attacked = state.parallel = state.model
    if processes.world_size > 1:
        gc.collect()  # what averaged the gradients of a network that did not compile must not do so beside the new one
        state.parallel = processes.parallel(state.model)
        _rehearse_training(state, config, processes, size=size)


def _rehearse_attack(state: TrainState, config: TrainConfig, processes: Processes, *, size: int) -> None:
    """What a step calls of the attacked network, on black images of its shape; where there is no attack, a forward pass."""
    x, y = _black(config, processes, size=size)
    with autocast(processes.device, config.training.precision):
        if config.adv.attack != "none":
            logits = torch.zeros(len(y), config.model.num_classes, device=x.device)
            last = (lambda images: logits) if state.reuses_forward else None  # it is rehearsed as a pass of training
            build_attack(config.adv)(state.attacked, x, y, eps=config.adv.eps, evaluate_last=last)
        elif processes.world_size > 1:
            with torch.no_grad():
                state.attacked(x)


def _rehearse_training(state: TrainState, config: TrainConfig, processes: Processes, *, size: int) -> None:
    """What a step calls of the trained network; gradients and running statistics are thrown away."""
    x, y = _black(config, processes, size=size)
    buffers = [buffer.clone() for buffer in state.model.buffers()]
    state.train_mode()
    try:
        for _ in range(2 if processes.world_size > 1 else 1):
            with autocast(processes.device, config.training.precision):
                loss = cross_entropy(state.parallel(x), y).mean()
                if state.reuses_forward:
                    few = x[: places_again(len(x))]
                    loss = loss + cross_entropy(state.parallel(few), y[: len(few)]).mean()
            loss.backward()
    finally:
        for parameter in state.model.parameters():
            parameter.grad = None
        for buffer, before in zip(state.model.buffers(), buffers):
            buffer.copy_(before)


def _black(config: TrainConfig, processes: Processes, *, size: int) -> tuple[Tensor, Tensor]:
    """Images and labels of one micro-batch."""
    y = torch.zeros(config.training.batch_size, dtype=torch.int64)
    batch = Batch(x=torch.zeros(len(y), 3, size, size), y=y, index=y, failures=[])
    return on_device(batch, config, processes.device)
