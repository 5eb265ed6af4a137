"""The networks as a step calls them: compiled with `torch.compile` if `training.compile` asks for it, else uncompiled.

`torch.compile` computes weight gradients whenever parameters require them, even if only the input's gradient is needed. It also
recompiles when a module changes between training and eval mode. So the attack and the training each have their own module. Both
share the same memory. Neither changes its mode or `requires_grad`, and each is compiled once per image size.
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
from training.config import CUDA_GRAPHS, TrainConfig
from training.console import warn
from training.shortcuts import asked_for, change_in_training, places_again
from training.state import TrainState
from training.step import autocast, on_device

# A CUDA graph is recorded in the second call and replayed from the third on.
GRAPH_CALLS = 3
# Graphs of one network: two per image size (attack with and without gradient; training with all images and with few). PyTorch's
# own limit is 8; beyond it the network runs uncompiled.
MAX_GRAPHS = 64


def frozen_twin(model: nn.Module) -> nn.Module:
    """Return a copy of the network in eval mode and without gradients that shares the model's parameters and buffers.

    The copy always has the model's current weights, in whatever mode the model is.
    """
    shared: dict[int, object] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    shared |= {id(buffer): buffer for buffer in model.buffers()}
    return copy.deepcopy(model, shared).eval()


def wants_compiled(config: TrainConfig, processes: Processes) -> bool:
    """Return whether `training.compile` asks for compilation; "auto" does so on a GPU."""
    asked = config.training.compile
    return processes.device.type != "cpu" if asked == "auto" else asked != "0"


def compiled(network: nn.Module, config: TrainConfig) -> nn.Module:
    """Compile the network in the mode of `training.compile`.

    PyTorch's own random numbers are used, so that drop path skips the same blocks as without compilation.
    """
    asked = config.training.compile
    options = {"fallback_random": True}
    if asked not in ("auto", "1"):
        options |= torch._inductor.list_mode_options(asked)
    return torch.compile(network, dynamic=False, options=options)


def prepare_networks(state: TrainState, config: TrainConfig, processes: Processes, *, size: int) -> None:
    """Prepare `state` for steps at image size `size`: compile its networks if wanted, and fix the order of gradient buckets.

    Compilers fail in many ways: no C++ compiler, no Triton, an unsupported operation. Then a warning gives the cause, and all
    processes train uncompiled.

    DistributedDataParallel reorders its buckets after its first backward pass. This changes the rounding of sums over three or
    more processes. So the first backward pass runs here, before the first step of every start.
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
    """Return whether `training.reuse_forward` asks for it and the network computes the same in training as under attack."""
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
        warn(f"training.reuse_forward: training uses a separate forward pass, because the network {change}.")
    return change is None


def prepare_size(state: TrainState, config: TrainConfig, processes: Processes, *, size: int) -> None:
    """Compile for another image size before its first step, if `prepare_networks` compiled; on failure do the same as there."""
    if state.attacked is not state.model:
        _compile_or_stay_uncompiled(state, config, processes, size=size)


def _compile_or_stay_uncompiled(state: TrainState, config: TrainConfig, processes: Processes, *, size: int) -> None:
    """Compile the networks that are not compiled yet by calling each one as a step does."""
    calls = GRAPH_CALLS if config.training.compile in CUDA_GRAPHS else 1

    def compile_attacked() -> None:
        if state.attacked is state.model:
            state.attacked = compiled(frozen_twin(state.model), config)
        for _ in range(calls):
            _rehearse_attack(state, config, processes, size=size)

    def compile_trained() -> None:
        if state.parallel is state.model:
            state.parallel = processes.parallel(compiled(state.model, config))
        for _ in range(calls):
            _rehearse_training(state, config, processes, size=size)

    # The attack needs no other process. So a process that cannot compile reports it before the others wait for its gradients.
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
        gc.collect()  # DistributedDataParallel of the network that did not compile must not average gradients any more
        state.parallel = processes.parallel(state.model)
        _rehearse_training(state, config, processes, size=size)


def _rehearse_attack(state: TrainState, config: TrainConfig, processes: Processes, *, size: int) -> None:
    """Call the attacked network as a step does, on black images of the step's shape; without an attack, run a forward pass."""
    x, y = _black(config, processes, size=size)
    with autocast(processes.device, config.training.precision):
        if config.adv.attack != "none":
            logits = torch.zeros(len(y), config.model.num_classes, device=x.device)
            last = (lambda images: logits) if state.reuses_forward else None  # `_rehearse_training` covers this pass
            build_attack(config.adv)(state.attacked, x, y, eps=config.adv.eps, evaluate_last=last)
        elif processes.world_size > 1:
            with torch.no_grad():
                state.attacked(x)


def _rehearse_training(state: TrainState, config: TrainConfig, processes: Processes, *, size: int) -> None:
    """Call the trained network as a step does; discard gradients and changes of running statistics."""
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
    """Return black images and labels of one micro-batch."""
    y = torch.zeros(config.training.batch_size, dtype=torch.int64)
    batch = Batch(x=torch.zeros(len(y), 3, size, size), y=y, index=y, failures=[])
    return on_device(batch, config, processes.device)
