"""One optimisation step: augment, attack, forward, backward, update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

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
    """Context in which a network runs in `precision`; the others need none (tf32 is a switch of the process)."""
    return torch.autocast(device.type, dtype=AUTOCAST[precision]) if precision in AUTOCAST else nullcontext()


def image_dtype(precision: str) -> torch.dtype:
    """Of a network's weights and of the images that it is given; autocast lowers it inside."""
    return torch.float64 if precision == "fp64" else torch.float32


def on_device(batch: Batch, config: TrainConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images, as a network of the run is given them, and labels."""
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
    """One optimiser step over the micro-batches of this process; advances `state`.

    The attack calls `state.attacked`, so that DistributedDataParallel sees only the passes of training, one or two forward and one
    backward of each micro-batch, and averages gradients once, at the last one. Where the attack's last forward pass is that of
    training (`training_loss`), it calls `state.parallel` there, and one number a micro-batch is read back from the device; else
    nothing is.

    Micro-batches of all processes are numbered as blocks in the order of their samples, and everything random is a function of
    (seed, step, block): as many blocks on another number of processes see the same.

    A step whose loss or averaged gradient is not finite on any process is skipped on all: weights, optimiser and running
    statistics of batch normalisation stay, while the step counts for the schedule and the average.

    Args:
        batches: micro-batches of equal size, as many as make this process's share of a step (`Trainer.accum`).
        mixup: mixes images and makes soft labels; None for hard labels.

    Returns:
        On the device, float64 (2,): mean loss of this process, which may be non-finite, and 1 where the step was skipped, else 0.
    """
    precision, device = config.training.precision, processes.device
    statistics = [(buffer, buffer.clone()) for buffer in state.statistics]
    state.train_mode()
    for group in state.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for i, batch in enumerate(batches):
        block = i * processes.world_size + processes.rank
        # Drop path and random starts draw from here: a function of the step, not of what ran before.
        torch.manual_seed(derive_seed("step", config.data.seed, state.step, block))
        x, y = on_device(batch, config, device)
        if mixup is not None:
            x, y = mixup(x, y, seed=config.data.seed, step=state.step, block=block)
        last = i + 1 == len(batches)
        with nullcontext() if last or processes.world_size == 1 else state.parallel.no_sync():
            with autocast(device, precision):
                loss = training_loss(state, x, y, attack=attack, eps=eps, on_attack_step=on_attack_step)
            loss = loss / len(batches)
            # backward() starts from 1, or from NaN where the loss is not finite. That makes every gradient NaN, and averaging
            # spreads it: all processes skip the step, without a message of their own.
            seed_gradient = torch.where(loss.isfinite(), 1.0, torch.nan).to(loss.dtype)
            state.scaler.scale(loss).backward(seed_gradient)
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
    """Mean cross-entropy on the attacked images, a scalar with its graph.

    Nothing is read back from the device unless `state.reuses_forward`: then one number is, for which the host waits.
    """
    if state.reuses_forward and attack.evaluates_last:
        return loss_reusing_forward(state, x, y, attack=attack, eps=eps, on_attack_step=on_attack_step)
    x_adv = attack(state.attacked, x, y, eps=eps, on_step=on_attack_step)
    return cross_entropy(state.parallel(x_adv), y).mean()


def optimizer_step(state: TrainState, *, grad_clip: float) -> Tensor:
    """Clip, let optimiser and scaler do their step, count it; returns whether the step was skipped, a bool on the device."""
    state.scaler.unscale_(state.optimizer)
    gradients = [p.grad for group in state.optimizer.param_groups for p in group["params"] if p.grad is not None]
    # Sums of absolute values are finite if and only if all are; a sum that overflows belongs to a step to skip as well.
    skipped = ~torch.stack(torch._foreach_norm(gradients, 1)).max().isfinite()
    if grad_clip > 0:
        torch.nn.utils.clip_grad_norm_((p for p in state.model.parameters() if p.requires_grad), grad_clip)
    if not state.scaler.is_enabled():
        # What the scaler tells a fused optimiser in float16: leave everything as it is where this is 1.
        state.optimizer.found_inf = skipped.float()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    return skipped


def _average(statistics: list[Tensor], processes: Processes) -> None:
    """Give all processes the same: their own means, so that each attacks, averages and validates the same network."""
    if processes.world_size > 1:
        means = processes.sum(torch.cat([buffer.flatten() for buffer in statistics])) / processes.world_size
        for buffer, mean in zip(statistics, means.split([buffer.numel() for buffer in statistics])):
            buffer.copy_(mean.view_as(buffer))
