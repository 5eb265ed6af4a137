"""Clean and quick adversarial accuracy of a network, over all processes, each image counted once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from attacks.apgd import apgd
from attacks.registry import build_attack
from common.errors import UserError
from common.precision import float32_matmul
from common.processes import Processes
from common.seeding import derive_seed
from data.loader import Batch
from training.config import TrainConfig
from training.step import autocast, to_device


def clean_accuracy(
    model: nn.Module, batches: Iterable[Batch], *, config: TrainConfig, processes: Processes
) -> dict[str, float]:
    """Top-1 and top-5 accuracy and mean cross-entropy in eval mode; `validation.lr_tta` adds the mirrored image's logits.

    Returns:
        {"top1": …, "top5": …, "loss": …}: shares in [0, 1], nats.
    """

    def measure(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            logits = model(x)
            if config.validation.lr_tta:
                logits = (logits + model(x.flip(dims=[3]))) / 2
        logits = logits.float()
        top5 = logits.topk(min(5, logits.shape[1]), dim=1).indices
        loss = torch.nn.functional.cross_entropy(logits, y, reduction="sum")
        return torch.stack([(top5[:, 0] == y).sum(), (top5 == y[:, None]).sum(), loss])

    top1, top5, loss = _mean_over_images(model, batches, measure, 3, config=config, processes=processes)
    return {"top1": top1, "top5": top5, "loss": loss}


def training_attack_accuracy(
    model: nn.Module, batches: Iterable[Batch], *, config: TrainConfig, processes: Processes
) -> float:
    """Share of images classified correctly after the attack of training itself, at its full `adv.eps`.

    Random starts are the same at every call, so that calls can be compared.
    """
    torch.manual_seed(derive_seed("validation", config.data.seed, processes.rank))

    attack = build_attack(config.adv)

    def measure(x: Tensor, y: Tensor) -> Tensor:
        x_adv = attack(model, x, y, eps=config.adv.eps)
        with torch.no_grad():
            return (model(x_adv).argmax(1) == y).sum().unsqueeze(0)

    return _mean_over_images(model, batches, measure, 1, config=config, processes=processes)[0]


def adversarial_accuracy(
    model: nn.Module, batches: Iterable[Batch], *, config: TrainConfig, processes: Processes
) -> float:
    """Share of images classified correctly on every iterate of APGD with `validation.adv_n_iter` updates at `adv.norm`, `adv.eps`.

    A few-step, single-loss attack: an upper bound of robust accuracy to watch training by, not a number to report.
    """

    def measure(x: Tensor, y: Tensor) -> Tensor:
        result = apgd(model, x, y, norm=config.adv.norm, eps=config.adv.eps, n_iter=config.validation.adv_n_iter)
        return result.acc.sum().unsqueeze(0)

    return _mean_over_images(model, batches, measure, 1, config=config, processes=processes)[0]


def _mean_over_images(model, batches, measure, width: int, *, config: TrainConfig, processes: Processes) -> list[float]:
    """Sums of `measure` over all images of all processes, divided by their number."""
    precision = config.validation.precision
    sums = torch.zeros(width + 1, dtype=torch.float64, device=processes.device)
    model.eval()
    dtype = next(model.parameters()).dtype
    for batch in batches:
        # A network trained in float64 is validated in it, whatever the precision asked for.
        x = to_device(
            batch,
            device=processes.device,
            precision="fp64" if dtype == torch.float64 else precision,
            channels_last=config.misc.use_channel_last,
        )
        y = batch.y.to(processes.device, non_blocking=True)
        with float32_matmul(tf32=precision == "tf32"), autocast(processes.device, precision):
            values = measure(x, y)
        sums[:width] += values.double()
        sums[width] += len(y)
    *totals, count = processes.sum(sums).tolist()
    if not count:
        raise UserError("data.val_dataset: none of its images can be decoded; there is nothing to validate on.")
    return [total / count for total in totals]
