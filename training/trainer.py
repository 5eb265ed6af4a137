"""The run: build everything, train epoch by epoch, validate, save."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from tqdm import tqdm

from common.config import TrainConfig
from common.distributed import Processes
from common.errors import UserError
from common.provenance import provenance
from data.loader import Batch, EvalLoader, spread_indices
from data.transforms import Mixup
from training.build import build_state, build_train_loader, check_image_sizes, open_sources
from training.log import RunFolder
from training.schedule import eps_at, lr_at, resolution_at_epoch
from training.step import train_step
from training.validation import adversarial_accuracy, clean_accuracy

FLUSH_STEPS = 20  # steps whose losses are read from the device together, so that the device never waits for the log


class Diverged(Exception):
    """The loss became infinite or NaN; the entry ends with exit status 3."""


class Trainer:
    """One process of a training run.

    Args:
        config: all flags.
        processes: this process among all of the run.

    Raises:
        UserError: data, weights or model do not fit the flags.
    """

    def __init__(self, config: TrainConfig, processes: Processes) -> None:
        self.config, self.processes = config, processes
        torch.backends.cudnn.allow_tf32 = False  # otherwise "fp32" convolutions are not float32
        train_source, val_source = open_sources(config, copies=processes.on_this_machine, progress=processes.is_first)
        self.state = build_state(config, processes)
        check_image_sizes(self.state.model, config)
        data, validation = config.data, config.validation
        self.loader = build_train_loader(config, train_source, processes)
        eval_loader = {
            "size": validation.resolution,
            "crop_pct": validation.crop_pct,
            "batch_size": validation.batch_size,
            "rank": processes.rank,
            "world_size": processes.world_size,
            "num_workers": data.num_workers,
            "pin_memory": processes.device.type == "cuda",
        }
        self.class_names = train_source.class_names
        self.val_loader = EvalLoader(val_source, **eval_loader)
        self.adv_loader = None
        if validation.adv_n_ex:
            subset = spread_indices(len(val_source), validation.adv_n_ex)
            self.adv_loader = EvalLoader(val_source, **eval_loader, indices=subset)
        self.mixup = None
        if data.augmentations == 1:
            self.mixup = Mixup(num_classes=config.model.num_classes, label_smoothing=config.label_smoothing)
        self.folder = self._open_folder()

    def _open_folder(self) -> RunFolder | None:
        """The run folder, on the first process; if it cannot be made, every process ends with the same error."""
        folder, problem = None, None
        if self.processes.is_first:
            try:
                folder = RunFolder(self.config, self._provenance())
            except UserError as error:
                problem = str(error)
        if (problem := self.processes.gather(problem)[0]) is not None:
            raise UserError(problem)
        return folder

    def run(self) -> None:
        """Train from the first epoch to the last (or only validate, with `training.eval_only`)."""
        epochs = self.config.training.epochs
        self._say(self._headline())
        try:
            if self.config.training.eval_only:
                self._validate(epoch=0)
                return
            for epoch in range(epochs):
                summary = self._train_epoch(epoch)
                last = epoch + 1 == epochs
                if last or (epoch + 1) % self.config.logging.save_freq == 0:
                    self._save(epoch + 1)
                if last or (epoch + 1) % self.config.validation.freq == 0:
                    self._validate(epoch=epoch + 1, summary=summary)
        finally:
            if self.folder is not None:
                self.folder.close()
        self._say(f"run folder: {self.folder.path}" if self.folder else "")

    def _train_epoch(self, epoch: int) -> dict[str, Any]:
        """One pass over the training images; returns the epoch's part of its record."""
        config, state = self.config, self.state
        size = resolution_at_epoch(epoch, resolution=config.resolution)
        steps = self.loader.steps_per_epoch
        losses = LossLog(self, epoch=epoch, size=size)
        begin, bad_images = time.perf_counter(), set()
        with self._bar(steps, epoch) as bar:
            for step, batches in enumerate(grouped(self.loader.epoch(epoch, size), config.training.grad_accum)):
                self._note_failures(batches, bad_images)
                lr = lr_at(epoch + step / steps, lr=config.lr, epochs=config.training.epochs)
                # eps grows to the step's end, so that the very first step has a ball to search.
                eps = eps_at(epoch + (step + 1) / steps, eps=config.adv.eps, warmup_epochs=config.adv.eps_warmup_epochs)
                attack_log = AttackLog() if config.adv.verbose else None
                loss = train_step(
                    state,
                    batches,
                    config=config,
                    processes=self.processes,
                    mixup=self.mixup,
                    lr=lr,
                    eps=eps,
                    on_attack_step=attack_log,
                )
                losses.add(loss, lr=lr, attack=attack_log)
                if (step + 1) % FLUSH_STEPS == 0 or step + 1 == steps:
                    bar.set_postfix(loss=f"{losses.flush():.3f}", lr=f"{lr:.2g}", refresh=False)
                    bad_count = self._count_bad(bad_images)
                bar.update(self._images_per_step)
        seconds = time.perf_counter() - begin
        return {
            "train_loss": losses.mean,
            "lr": lr,
            "eps": eps,
            "resolution": size,
            "seconds": round(seconds, 3),
            "images_per_second": round(steps * self._images_per_step / seconds, 2),
            "bad_images": bad_count,
        }

    def _validate(self, *, epoch: int, summary: dict[str, Any] | None = None) -> None:
        """Clean and quick adversarial accuracy of raw and EMA weights: one record of the log, one line on the screen."""
        record: dict[str, Any] = {"epoch": epoch, "step": self.state.step, **(summary or {})}
        begin = time.perf_counter()
        for kind, network in self.state.networks().items():
            prefix = "" if kind == "raw" else f"{kind}_"
            clean = clean_accuracy(
                network, self._checked(self.val_loader), config=self.config, processes=self.processes
            )
            record.update({prefix + key: value for key, value in clean.items()})
            if self.adv_loader is not None:
                record[f"{prefix}adv_top1"] = adversarial_accuracy(
                    network, self._checked(self.adv_loader), config=self.config, processes=self.processes
                )
        record["validation_seconds"] = round(time.perf_counter() - begin, 3)
        if self.folder is not None:
            self.folder.write(record)
        shown = {k: v for k, v in record.items() if k.endswith(("loss", "top1", "per_second"))}
        self._say(
            f"epoch {epoch}/{self.config.training.epochs}  " + "  ".join(f"{k} {v:.4g}" for k, v in shown.items())
        )

    def _save(self, epoch: int) -> None:
        if self.folder is not None:
            self.folder.save_weights(self.state.networks(), epoch)

    @property
    def _images_per_step(self) -> int:
        """Global batch: images of all processes in one optimiser step."""
        return self.config.training.batch_size * self.config.training.grad_accum * self.processes.world_size

    def _note_failures(self, batches: list[Batch], bad_images: set[str]) -> None:
        """Name the images of these batches that could not be decoded, and add them to the epoch's."""
        for name, reason in (failure for batch in batches for failure in batch.failures):
            if name not in bad_images:
                self._warn(f"{name} cannot be decoded ({reason}); the next image takes its place.")
            bad_images.add(name)

    def _count_bad(self, bad_images: set[str]) -> int:
        """Undecodable images of this epoch over all processes; past the limit all of them stop."""
        count = int(self.processes.sum(torch.tensor(len(bad_images), device=self.processes.device)).item())
        limit = self.config.data.max_bad_images
        if count > limit:
            raise UserError(
                f"data.max_bad_images: {count} images of data.train_dataset could not be decoded in one epoch, {limit} are "
                "allowed; they are named above. Repair the data set or raise the limit."
            )
        return count

    def _checked(self, loader: EvalLoader) -> Iterator[Batch]:
        for batch in loader:
            for name, reason in batch.failures:
                self._warn(f"{name} cannot be decoded ({reason}); it is left out of the validation.")
            if len(batch.y):
                yield batch

    def _bar(self, steps: int, epoch: int) -> tqdm:
        """Progress in images, with the rate and the remaining time; on a log file one line a minute at most."""
        return tqdm(
            total=steps * self._images_per_step,
            desc=f"epoch {epoch + 1}/{self.config.training.epochs}",
            unit="img",
            disable=not self.processes.is_first,
            mininterval=0.5 if sys.stderr.isatty() else 60.0,
            delay=0.0 if sys.stderr.isatty() else 60.0,
            dynamic_ncols=True,
            leave=False,
        )

    def _provenance(self) -> dict[str, Any]:
        rendezvous = f"{self.config.dist.address}:{self.config.dist.port}" if self.processes.world_size > 1 else None
        return provenance() | {
            "classes": self.class_names,
            "processes": self.processes.world_size,
            "rendezvous": rendezvous,
            "global_batch": self._images_per_step,
            "steps_per_epoch": self.loader.steps_per_epoch,
            "parameters": sum(p.numel() for p in self.state.model.parameters()),
            "trained_parameters": sum(p.numel() for p in self.state.model.parameters() if p.requires_grad),
        }

    def _headline(self) -> str:
        c = self.config
        aside = (
            f"; the earlier run of this name is now {self.folder.set_aside}"
            if self.folder and self.folder.set_aside
            else ""
        )
        attack = "clean" if c.adv.attack == "none" else f"{c.adv.attack} {c.adv.norm} eps {c.adv.eps:.4g}"
        return (
            f"{c.run_name}: {c.model.arch}{' with ConvStem' if c.model.not_original else ''}, {attack}, "
            f"{self.loader.steps_per_epoch} steps an epoch of {self._images_per_step} images on {self.processes.world_size} × "
            f"{self.processes.device.type}{aside}"
        )

    def _say(self, text: str) -> None:
        if self.processes.is_first and text:
            tqdm.write(text)

    def _warn(self, text: str) -> None:
        tqdm.write(f"warning: {text}", file=sys.stderr)


class LossLog:
    """Losses of one epoch, left on the device until `flush` reads them together, averages over processes and logs them."""

    def __init__(self, trainer: Trainer, *, epoch: int, size: int) -> None:
        self.trainer, self.epoch, self.size = trainer, epoch, size
        self._pending: list[tuple[dict[str, Any], torch.Tensor]] = []
        self._sum, self._count = 0.0, 0

    @property
    def mean(self) -> float:
        return self._sum / max(self._count, 1)

    def add(self, loss: torch.Tensor, *, lr: float, attack: AttackLog | None) -> None:
        config, state = self.trainer.config, self.trainer.state
        shape = [config.training.batch_size, 3, self.size, self.size]
        record = {"epoch": self.epoch, "step": state.step, "shape": shape, "lr": lr}
        if attack is not None:
            record["attack"] = attack.lines()
        self._pending.append((record, loss))

    def flush(self) -> float:
        """Mean loss of the steps since the last flush; writes their records."""
        processes, level = self.trainer.processes, self.trainer.config.logging.log_level
        values = processes.sum(torch.stack([loss for _, loss in self._pending]).double()) / processes.world_size
        losses = values.tolist()
        if self.trainer.folder is not None and level > 0:
            for (record, _), loss in zip(self._pending, losses):
                self.trainer.folder.write(record | {"loss": loss} if level > 1 else record)
        elif self.trainer.folder is not None and self.trainer.config.adv.verbose:
            for record, _ in self._pending:
                self.trainer.folder.write({key: record[key] for key in ("epoch", "step", "attack")})
        steps = [record["step"] for record, _ in self._pending]
        self._pending = []
        for step, loss in zip(steps, losses):
            if loss != loss or loss in (float("inf"), float("-inf")):
                raise Diverged(
                    f"the loss is {loss} at step {step} (epoch {self.epoch + 1}); lr.lr, adv.eps and training.precision are "
                    "where to look; the weights saved last are untouched"
                )
        self._sum, self._count = self._sum + sum(losses), self._count + len(losses)
        return sum(losses) / len(losses)


class AttackLog:
    """Mean best loss and share of samples still correct after each evaluation of one attack (`adv.verbose`)."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def __call__(self, update: int, loss: torch.Tensor, acc: torch.Tensor) -> None:
        self._rows.append((update, loss.mean(), acc.float().mean()))

    def lines(self) -> list[dict[str, float]]:
        return [{"update": u, "loss": loss.item(), "acc": acc.item()} for u, loss, acc in self._rows]


def grouped(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """Successive lists of `size` batches."""
    group: list[Batch] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
