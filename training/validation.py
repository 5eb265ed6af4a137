"""Clean and quick adversarial accuracy of a run's networks, over all processes, each image counted once."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from attacks.apgd import apgd
from attacks.registry import build_attack
from common.errors import UserError
from common.precision import float32_matmul
from common.processes import Processes
from common.seeding import derive_seed
from data.loader import EvalLoader, spread_indices
from data.prefetch import finish_augmentation
from data.source import Source, StreamSource
from training.config import TrainConfig
from training.step import autocast, image_dtype
from training.stop import StopRequest


class Validator:
    """Measures networks on the validation images; its loader workers live as long as it.

    Args:
        config, processes: of the run.
        source: the validation images.
        stop: ends a validation that is running.
        warn: takes one sentence for the user.

    Attributes:
        attacked: number of images under attack; 0: none.
    """

    def __init__(
        self,
        config: TrainConfig,
        processes: Processes,
        source: Source | StreamSource,
        *,
        stop: StopRequest,
        warn: Callable[[str], None],
    ) -> None:
        self.config, self.processes, self.stop, self.warn = config, processes, stop, warn
        data, validation = config.data, config.validation
        self.loader = EvalLoader(
            source,
            size=validation.resolution,
            crop_pct=validation.crop_pct,
            batch_size=validation.batch_size,
            rank=processes.rank,
            world_size=processes.world_size,
            num_workers=data.num_workers,
            pin_memory=processes.device.type == "cuda",
            keep_workers=True,
        )
        self._subset = spread_indices(len(source), validation.adv_n_ex) if validation.adv_n_ex else []
        self.attacked = len(self._subset)
        self._attack = build_attack(config.adv)

    def is_due(self, epoch: int) -> bool:
        """Whether epoch `epoch` (from 1 on) is validated."""
        return epoch == self.config.training.epochs or epoch % self.config.validation.freq == 0

    def close(self) -> None:
        """End the loader's workers."""
        self.loader.close()

    @property
    def watches_attack(self) -> bool:
        """Whether the training attack is measured too."""
        return bool(self._subset) and self.config.adv.attack != "none"

    def run(self, networks: Mapping[str, nn.Module]) -> dict[str, float] | None:
        """Two passes: over all images, clean, and over a subset of them, attacked. Every network sees each decoded batch.

        Args:
            networks: "raw", and "ema" where there is one; left in eval mode.

        Returns:
            top1, top5 (shares in [0, 1]), loss (nats), adv_top1 and train_attack_top1, those of the EMA with the prefix `ema_`;
            None where a process was asked to stop meanwhile.

        Raises:
            UserError: no image can be decoded.
        """
        for network in networks.values():
            network.eval()
        names = [f"{_prefix(kind)}{name}" for kind in networks for name in ("top1", "top5", "loss")]
        metrics = self._mean_over_images(names, lambda x, y: self._clean(networks, x, y), images=None)
        if metrics is None or not self._subset:
            return metrics
        names = [f"{_prefix(kind)}adv_top1" for kind in networks] + ["train_attack_top1"] * self.watches_attack
        # The random starts of the training attack are the same in every validation.
        torch.manual_seed(derive_seed("validation", self.config.data.seed, self.processes.rank))
        found = self._mean_over_images(names, lambda x, y: self._attacked(networks, x, y), images=self._subset)
        return None if found is None else metrics | found

    def _clean(self, networks: Mapping[str, nn.Module], x: Tensor, y: Tensor) -> list[Tensor]:
        """Sums over the batch: right predictions, labels among the best five, cross-entropy; of each network."""
        sums = []
        for network in networks.values():
            with torch.no_grad():
                logits = network(x)
                if self.config.validation.lr_tta:
                    logits = (logits + network(x.flip(dims=[3]))) / 2
            logits = logits.float()
            top5 = logits.topk(min(5, logits.shape[1]), dim=1).indices
            loss = nn.functional.cross_entropy(logits, y, reduction="sum")
            sums += [(top5[:, 0] == y).sum(), (top5 == y[:, None]).sum(), loss]
        return sums

    def _attacked(self, networks: Mapping[str, nn.Module], x: Tensor, y: Tensor) -> list[Tensor]:
        """Images that each network classifies correctly on every iterate of a quick APGD; then the raw one under training's attack.

        A few-step, single-loss attack gives an upper bound of robust accuracy to watch training by, not a number to report.
        """
        adv, n_iter = self.config.adv, self.config.validation.adv_n_iter
        sums = [
            apgd(network, x, y, norm=adv.norm, eps=adv.eps, n_iter=n_iter).acc.sum() for network in networks.values()
        ]
        if self.watches_attack:
            x_adv = self._attack(networks["raw"], x, y, eps=adv.eps)
            with torch.no_grad():
                sums.append((networks["raw"](x_adv).argmax(1) == y).sum())
        return sums

    def _mean_over_images(
        self, names: list[str], measure: Callable[[Tensor, Tensor], list[Tensor]], *, images: list[int] | None
    ) -> dict[str, float] | None:
        """Sums of `measure` over all images of all processes, divided by their number; None after a request to stop."""
        precision, device = self.config.validation.precision, self.processes.device
        sums = torch.zeros(len(names) + 2, dtype=torch.float64, device=device)
        for batch in self.loader.batches(images):
            for name, reason in batch.failures:
                self.warn(f"{name} cannot be decoded ({reason}); it is left out of the validation.")
            if len(batch.y):
                # A network trained in float64 is validated in it, whatever the precision asked for.
                x = finish_augmentation(
                    batch,
                    device=device,
                    dtype=image_dtype(self.config.training.precision),
                    channels_last=self.config.misc.use_channel_last,
                )
                y = batch.y.to(device, non_blocking=True)
                with float32_matmul(tf32=precision == "tf32"), autocast(device, precision):
                    values = measure(x, y)
                sums[:-2] += torch.stack([value.double() for value in values])
                sums[-2] += len(y)
            if self.stop.anywhere() is not None:
                sums[-1] = 1
                break
        *totals, count, stopped = self.processes.sum(sums).tolist()
        if stopped:
            return None
        if not count:
            raise UserError("data.val_dataset: none of its images can be decoded; there is nothing to validate on.")
        return {name: total / count for name, total in zip(names, totals, strict=True)}


def _prefix(kind: str) -> str:
    return "" if kind == "raw" else f"{kind}_"
