"""One optimisation step: augment, attack, forward, backward, update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from attacks.losses import cross_entropy
from attacks.registry import Attack
from common.processes import Processes
from common.seeding import derive_seed
from data.loader import Batch
from data.prefetch import finish_augmentation
from data.transforms import Mixup
from training.config import TrainConfig
from training.shortcuts import loss_reusing_forward
from training.state import TrainState

AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16}


def autocast(device: torch.device, precision: str) -> Any:
    """Return the context for a network in `precision`; only autocast needs one (tf32 is a setting of the process)."""
    return torch.autocast(device.type, dtype=AUTOCAST[precision]) if precision in AUTOCAST else nullcontext()


def image_dtype(precision: str) -> torch.dtype:
    """Return the dtype of a network's weights and input images; autocast lowers it inside the network."""
    return torch.float64 if precision == "fp64" else torch.float32


def on_device(batch: Batch, config: TrainConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return images, in the form for a network of the run, and labels."""
    dtype, channels_last = image_dtype(config.training.precision), config.misc.use_channel_last
    x = finish_augmentation(batch, device=device, dtype=dtype, channels_last=channels_last)
    return x, batch.y.to(device, non_blocking=True)


def train_step(
    state: TrainState,
    batches: Sequence[Batch],
    *,
    config: TrainConfig,
    processes: Processes,
    attack: Attack,
    mixup: Mixup | None,
    lr: float,
    eps: float,
    on_attack_step: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Run one optimiser step over the micro-batches of this process; this advances `state`.

    The attack calls `state.attacked`. So DistributedDataParallel sees only the passes of training: one or two forward passes and
    one backward pass per micro-batch. It averages gradients once, at the last micro-batch. If the attack's last forward pass is
    also that of training (`training_loss`), it calls `state.parallel`, and one number per micro-batch is read back from the
    device; otherwise nothing is.

    Micro-batches of all processes are numbered as blocks in the order of their samples. All random numbers depend only on (seed,
    step, block). So the same number of blocks gives the same numbers on any number of processes.

    If the loss or averaged gradient is not finite on any process, all processes skip the step: weights, optimiser and running
    statistics of batch normalisation stay, but the step counts for the schedule and the EMA.

    Args:
        batches: micro-batches of equal size; their number is this process's share of a step (`Trainer.accum`).
        mixup: mixes images and makes soft labels; None for hard labels.

    Returns:
        On the device, float64 (2,): mean loss of this process, which may be non-finite, and 1 if the step was skipped, else 0.
    """
    precision, device = config.training.precision, processes.device
    statistics = [(buffer, buffer.clone()) for buffer in state.statistics]
    state.train_mode()
    for group in state.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for i, batch in enumerate(batches):
        block = i * processes.world_size + processes.rank
        # Drop path and random starts use this generator: they depend on the step, not on what ran before.
        torch.manual_seed(derive_seed("step", config.data.seed, state.step, block))
        with record_function("augmentation"):
            x, y = on_device(batch, config, device)
            if mixup is not None:
                x, y = mixup(x, y, seed=config.data.seed, step=state.step, block=block)
        last = i + 1 == len(batches)
        with nullcontext() if last or processes.world_size == 1 else state.parallel.no_sync():
            with autocast(device, precision):
                loss = training_loss(state, x, y, attack=attack, eps=eps, on_attack_step=on_attack_step)
            loss = loss / len(batches)
            _backward(state, loss)
        total += loss.detach()
    skipped = optimizer_step(state, grad_clip=config.training.grad_clip)
    if statistics:
        for buffer, before in statistics:
            buffer.copy_(torch.where(skipped, before, buffer))
        _average(state.statistics, processes)
    if state.ema is not None:
        state.ema.update(state.model, state.step)
    return torch.stack([total, skipped.double()])


def training_loss(
    state: TrainState,
    x: Tensor,
    y: Tensor,
    *,
    attack: Attack,
    eps: float,
    on_attack_step: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Return the mean cross-entropy on the attacked images, a scalar with its graph.

    Nothing is read back from the device, except one number if `state.reuses_forward`; the host waits for it.
    """
    if state.reuses_forward and attack.evaluates_last:
        return loss_reusing_forward(state, x, y, attack=attack, eps=eps, on_attack_step=on_attack_step)
    with record_function("attack"):
        x_adv = attack(state.attacked, x, y, eps=eps, on_step=on_attack_step)
    with record_function("forward"):
        return cross_entropy(state.parallel(x_adv), y).mean()


@record_function("backward")
def _backward(state: TrainState, loss: Tensor) -> None:
    # backward() starts from 1, or from NaN if the loss is not finite. Then every gradient is NaN, and averaging spreads this to
    # all processes. So all of them skip the step without extra communication.
    seed_gradient = loss.detach() * 0 + 1
    state.scaler.scale(loss).backward(seed_gradient)


@record_function("optimizer")
def optimizer_step(state: TrainState, *, grad_clip: float) -> Tensor:
    """Clip, step optimiser and scaler, and count the step; return whether it was skipped, a bool on the device."""
    state.scaler.unscale_(state.optimizer)
    gradients = [p.grad for group in state.optimizer.param_groups for p in group["params"] if p.grad is not None]
    # A sum of absolute values is finite only if all values are; a step whose sum overflows is to be skipped as well.
    # Zero times a number that is not finite is NaN; isfinite() would launch three more kernels.
    skipped = torch.stack(torch._foreach_norm(gradients, 1)).max() * 0 != 0
    if grad_clip > 0:
        torch.nn.utils.clip_grad_norm_((p for p in state.model.parameters() if p.requires_grad), grad_clip)
    if not state.scaler.is_enabled():
        # In float16 the scaler sets this for a fused optimiser: with 1 the optimiser changes nothing.
        state.optimizer.found_inf = skipped.float()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    return skipped


def _average(statistics: list[Tensor], processes: Processes) -> None:
    """Set the statistics of all processes to their mean, so that each attacks, averages and validates the same network."""
    if processes.world_size > 1:
        means = processes.sum(torch.cat([buffer.flatten() for buffer in statistics])) / processes.world_size
        for buffer, mean in zip(statistics, means.split([buffer.numel() for buffer in statistics])):
            buffer.copy_(mean.view_as(buffer))
