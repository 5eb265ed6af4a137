"""Clean and quick adversarial accuracy of a run's networks, over all processes, each image counted once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from attacks.apgd import apgd
from attacks.gradients import evaluate_with_gradient, under_attack
from attacks.losses import UnitGap
from attacks.registry import Attack
from common.errors import UserError
from common.precision import float32_matmul
from common.processes import Processes
from common.seeding import derive_seed
from data.loader import EvalLoader, spread_indices
from data.source import Source, StreamSource
from training.config import TrainConfig
from training.console import warn
from training.step import autocast, on_device
from training.stop import StopRequest

PREFIX = {"raw": "", "ema": "ema_"}  # kind of network → prefix of its numbers' names


class Validator:
    """Measures networks on the images of `source`; its loader workers live as long as the object.

    Args:
        attack: the attack used in training.
        stop: ends a running validation.

    Attributes:
        n_images: number of images.
        n_attacked: number of images under attack; 0: none.
        measures_training_attack: whether validation and training both attack images. Then accuracy under the training attack is
            measured besides accuracy under APGD, and the latter selects the best weights.
    """

    def __init__(
        self,
        config: TrainConfig,
        processes: Processes,
        source: Source | StreamSource,
        *,
        attack: Attack,
        stop: StopRequest,
    ) -> None:
        self.config, self.processes, self.stop = config, processes, stop
        data, validation = config.data, config.validation
        self.loader = EvalLoader(
            source,
            size=validation.resolution,
            crop_pct=validation.crop_pct,
            batch_size=validation.batch_size,
            rank=processes.rank,
            world_size=processes.world_size,
            num_workers=data.num_workers,
            pin_memory=processes.device.type != "cpu",
            keep_workers=True,
        )
        self.n_images = len(source)
        self._subset = spread_indices(len(source), validation.adv_n_ex) if validation.adv_n_ex else []
        self.n_attacked = len(self._subset)
        self.measures_training_attack = self.n_attacked > 0 and config.adv.attack != "none"
        self._attack = attack
        self._reported: set[str] = set()  # damaged images that were reported

    def is_due(self, epoch: int) -> bool:
        """Return whether epoch `epoch` (from 1 on) is validated."""
        return epoch == self.config.training.epochs or epoch % self.config.validation.freq == 0

    def close(self) -> None:
        """Stop the loader's workers."""
        self.loader.close()

    def run(self, networks: Mapping[str, nn.Module]) -> dict[str, float] | None:
        """Validate on all clean images, and on the attacked subset, if any. Every network gets each decoded batch.

        Args:
            networks: "raw", and "ema" if there is one; they are left in eval mode.

        Returns:
            Means over the images by name: top1, top5 (shares in [0, 1]) and loss (nats) of each network; if images are attacked,
            adv_top1 and zero_gradients of each network, and train_attack_top1 of the raw network. Names for the EMA have the
            prefix `ema_`. None if a process was asked to stop meanwhile.

        Raises:
            UserError: no image can be decoded.
        """
        for network in networks.values():
            network.eval()
        clean = self._means(lambda x, y: self._clean(networks, x, y), images=None)
        if clean is None or not self._subset:
            return clean
        # The random starts of the training attack are the same in every validation.
        torch.manual_seed(derive_seed("validation", self.config.data.seed, self.processes.rank))
        attacked = self._means(lambda x, y: self._under_attack(networks, x, y), images=self._subset)
        return None if attacked is None else clean | attacked

    def _clean(self, networks: Mapping[str, nn.Module], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Return sums over the batch for each network: correct predictions, labels among the top 5, cross-entropy."""
        sums = {}
        for kind, network in networks.items():
            with torch.no_grad():
                logits = network(x)
                if self.config.validation.lr_tta:
                    logits = (logits + network(x.flip(dims=[3]))) / 2
            logits = logits.float()
            top5 = logits.topk(min(5, logits.shape[1]), dim=1).indices
            sums[f"{PREFIX[kind]}top1"] = (top5[:, 0] == y).sum()
            sums[f"{PREFIX[kind]}top5"] = (top5 == y[:, None]).sum()
            sums[f"{PREFIX[kind]}loss"] = nn.functional.cross_entropy(logits, y, reduction="sum")
        return sums

    def _under_attack(self, networks: Mapping[str, nn.Module], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Return the number of images that are robust, that have a zero gradient, and that are robust to the training attack.

        The first number, per network, counts images that are correctly classified on every iterate, including the clean image, of
        a quick APGD on two losses: cross-entropy and a loss that does not depend on the logits' scale. The second one, also per
        network, refers to the gradient of the cross-entropy. The third one is for the raw network only.

        A few steps give an upper bound of robust accuracy to monitor training, not a number to report.
        """
        adv, sums = self.config.adv, {}
        attack = partial(apgd, norm=adv.norm, eps=adv.eps, n_iter=self.config.validation.adv_n_iter)
        for kind, network in networks.items():
            standing = attack(network, x, y).acc
            left = standing.nonzero().flatten()  # the host waits; a list would also be copied back for each use
            if len(left):
                standing[left] = attack(UnitGap(network), x[left], y[left]).acc
            with under_attack(network):
                _, _, grad = evaluate_with_gradient(network, x, y)
            sums[f"{PREFIX[kind]}adv_top1"] = standing.sum()
            sums[f"{PREFIX[kind]}zero_gradients"] = (grad.flatten(1) == 0).all(1).sum()
        if self.measures_training_attack:
            x_adv = self._attack(networks["raw"], x, y, eps=adv.eps)
            with torch.no_grad():
                sums["train_attack_top1"] = (networks["raw"](x_adv).argmax(1) == y).sum()
        return sums

    def _means(
        self, measure: Callable[[Tensor, Tensor], dict[str, Tensor]], *, images: list[int] | None
    ) -> dict[str, float] | None:
        """Return the sums of `measure` divided by the number of images of all processes; None after a request to stop."""
        precision, device = self.config.validation.precision, self.processes.device
        sums: dict[str, Tensor] = {}
        count, stopped = 0, False
        for batch in self.loader.batches(images):
            for name, reason in batch.failures:
                if name in self._reported:
                    continue
                self._reported.add(name)
                warn(f"{name} cannot be decoded ({reason}); it is skipped in the validation.")
            if len(batch.y):
                # A network trained in float64 is validated in float64, for any given precision.
                x, y = on_device(batch, self.config, device)
                with float32_matmul(tf32=precision == "tf32"), autocast(device, precision):
                    for name, value in measure(x, y).items():
                        sums[name] = sums.get(name, 0) + value.double()
                count += len(y)
            if stopped := self.stop.anywhere() is not None:
                break
        # Collect by name, because a process without images has no names.
        shares = self.processes.gather(({name: value.cpu() for name, value in sums.items()}, count, stopped))
        if any(stopped for _, _, stopped in shares):
            return None
        if not (total := sum(count for _, count, _ in shares)):
            which = "its images" if images is None else f"the {len(images)} images under attack (validation.adv_n_ex)"
            raise UserError(f"data.val_dataset: none of {which} can be decoded, so there is nothing to validate on.")
        names = dict.fromkeys(name for share, _, _ in shares for name in share)
        sums = {name: sum(share[name] for share, _, _ in shares if name in share) for name in names}
        return {name: (value / total).item() for name, value in sums.items()}
