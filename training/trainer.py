"""The training run: train epoch by epoch, validate, save, and stop or resume at any point."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, NoReturn

import torch

from attacks.registry import build_attack
from common.errors import UserError
from common.flags import config_to_dict
from common.processes import Processes
from common.provenance import provenance
from data.loader import Batch, dead_worker
from data.source import facts_of
from training.advice import notes_for
from training.build import build_mixup, build_parts
from training.checkpoint import Checkpointer, StateFiles
from training.compiled import prepare_networks, prepare_size
from training.config import TrainConfig
from training.console import epoch_line, progress_bar, progress_numbers, say, warn
from training.efficiency import Efficiency
from training.guard import Diverged, Guard
from training.meter import AttackLog, Meter, Synced
from training.profiling import StepProfiler
from training.progress import Progress
from training.resume import STATE_FORMAT, STOP_FILE, Start, accumulation, check_run, restore
from training.run_folder import NoRunFolder, RunFolder
from training.schedule import eps_at, lr_at, resolution_at_epoch
from training.step import train_step
from training.stop import PATIENCE_VARIABLE, StopRequest, end_of_job, patience_of_torchrun
from training.validation import PREFIX, Validator


class Stopped(Exception):
    """Stopped on request, with everything saved; the entry script exits with `training.stop.STOPPED`."""


class Trainer:
    """One process of a training run; `start` says where the run starts, and is the same on all processes.

    Raises:
        UserError: data, weights, model or training state do not fit the flags.
    """

    def __init__(self, config: TrainConfig, processes: Processes, start: Start) -> None:
        self.config, self.processes, self.start = config, processes, start
        # By default PyTorch uses TF32 for "fp32" convolutions.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.training.precision == "tf32"
        saved = start.hand_over()
        self.resumes = saved is not None
        self.accum = accumulation(saved, config, processes.world_size) if self.resumes else config.training.grad_accum
        parts = build_parts(config, processes, accum=self.accum, initial=not self.resumes, once=processes.once_here)
        self.loader, self.state = parts.loader, parts.state
        self.attack = build_attack(config.adv)
        self.mixup = build_mixup(config)
        self.data_facts = facts_of(parts.train_source)
        steps_of_run = config.training.epochs * self.loader.steps_per_epoch
        advice = notes_for(config, processes.device.type, global_batch=self.images_per_step, steps=steps_of_run)
        notes = [*start.notes, *advice, *parts.notes]
        self.progress = Progress()
        if self.resumes:
            notes += check_run(
                saved["run"],
                self._run_facts(),
                config=config,
                any_workers=self.loader.repeatable_for_any_workers,
                on_cpu=processes.device.type == "cpu",
            )
            self.progress = restore(saved, self.state, steps_per_epoch=self.loader.steps_per_epoch, source=start.source)
        self.stop_request = StopRequest(
            processes,
            file=start.folder / STOP_FILE if processes.is_first else None,
            end_time=end_of_job(config.dist.end_margin_minutes),
        )
        self.validator = Validator(config, processes, parts.val_source, attack=self.attack, stop=self.stop_request)
        self.meter = Meter(processes, self.progress)
        self.guard = Guard(config, processes, self.progress)
        epoch = min(self.progress.epochs_done, config.training.epochs - 1)
        size = resolution_at_epoch(epoch, resolution=config.resolution)
        prepare_networks(self.state, config, processes, size=size)
        self.prepared = {size}  # image sizes
        self.efficiency = Efficiency(config, self.state, processes)
        self.run_folder = processes.on_first(lambda: self._open_folder(saved, notes)) or NoRunFolder()
        self.checkpointer = Checkpointer(
            processes.on_first(lambda: StateFiles(self.run_folder.path)),
            minutes=config.logging.ckpt_minutes,
            steps=config.logging.ckpt_steps,
            step=self.state.step,
            stored=saved["step"] if self.resumes and start.own else 0,
            patience=patience_of_torchrun() if processes.from_launcher else None,
        )
        self.profiler = StepProfiler(
            self.run_folder.path,
            steps=config.training.profile_steps,
            left=steps_of_run - self.state.step,
            device=processes.device,
        )

    @property
    def images_per_step(self) -> int:
        """Global batch: images of all processes per optimiser step."""
        return self.config.training.batch_size * self.accum * self.processes.world_size

    @property
    def keeps_best(self) -> bool:
        """Whether best weights are saved: clean accuracy does not show which weights of an adversarial run are best."""
        return self.validator.measures_training_attack or self.config.adv.attack == "none"

    # --- the run ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the last epoch (or only validate, with `training.eval_only`).

        The state is saved on a stop and at the end; after a failure the state saved last remains.

        Raises:
            Stopped: on request; the state is saved.
            Diverged: too many non-finite losses in a row, or overfitting with `validation.stop_on_overfitting`.
            LostProcess: another process died or hangs.
            UserError: too many images cannot be decoded.
        """
        if self.processes.is_first:
            say(self._headline())
        with self.stop_request, self._reported():
            if self.config.training.eval_only:
                self.validate(epoch=0, metrics={})
            else:
                self.train()
            self._set_status("finished")
        self.say(f"run folder: {self.run_folder.path}")

    def train(self) -> None:
        """Train until the last epoch."""
        epochs, save_freq, complete = self.config.training.epochs, self.config.logging.save_freq, True
        while (epoch := self.progress.epochs_done + 1) <= epochs:
            metrics = self.train_epoch(epoch - 1)
            if epoch == epochs or epoch % save_freq == 0:
                complete = self.run_folder.save_weights(self.state.networks(), epoch)
            if self.validator.is_due(epoch):
                self.validate(epoch, metrics)
            self.progress.finish_epoch()
        if complete:  # else the next start resumes from the previous state, and writes the weights again
            self.save_state(wait=True)
        if self.processes.is_first and self.checkpointer.stored_step != self.state.step:
            raise UserError(
                f"logging.folder: the last weights or state could not be written to {self.run_folder.path} (see above). Free space "
                f"there; the same command resumes from step {self.checkpointer.stored_step}."
            )

    def train_epoch(self, epoch: int) -> dict[str, Any]:
        """Train on the rest of epoch `epoch` (from 0 on), a pass over the images; return the epoch's numbers."""
        steps, size = self.loader.steps_per_epoch, self._image_size(epoch)
        images = steps * self.images_per_step
        first = self.state.step - epoch * steps  # not 0 if a run resumes within an epoch
        lr, eps = self.lr_and_eps(epoch, max(first - 1, 0))  # values of the last step, if no step remains
        self.meter.start_epoch()
        loaded = self.loader.epoch(epoch, size, first)
        bar = progress_bar(
            epoch=epoch + 1,
            epochs=self.config.training.epochs,
            images=images,
            done=first * self.images_per_step,
            shown=self.processes.is_first,
        )
        with bar, self.meter.watch(loaded, accum=self.accum) as groups:
            for step, batches in enumerate(groups, first):
                lr, eps = self.lr_and_eps(epoch, step)
                self._step(batches, epoch=epoch, size=size, lr=lr, eps=eps)
                bar.update(self.images_per_step)
                if self.meter.is_due or step + 1 == steps or self._must_sync():
                    synced = self.sync()
                    efficiency = self._efficiency(synced.steps_per_second * self.images_per_step, size)
                    bar.set_postfix(progress_numbers(loss=synced.loss, lr=lr, **efficiency), refresh=False)
        numbers = self.meter.summary(images=images)
        numbers |= self._efficiency(numbers["images_per_second"], size)
        return numbers | {"lr": lr, "eps": eps, "resolution": size}

    def _efficiency(self, images_per_second: float, size: int) -> dict[str, float]:
        """Return the numbers of `Efficiency`, which only the first process shows."""
        return self.efficiency.numbers(images_per_second, size=size) if self.processes.is_first else {}

    def _image_size(self, epoch: int) -> int:
        """Return the image size of an epoch, and prepare the networks for it."""
        size = resolution_at_epoch(epoch, resolution=self.config.resolution)
        if size not in self.prepared:
            prepare_size(self.state, self.config, self.processes, size=size)
            self.prepared.add(size)
        return size

    def _step(self, batches: list[Batch], *, epoch: int, size: int, lr: float, eps: float) -> None:
        """Run one optimiser step and pass its result to the meter."""
        attack_log = AttackLog() if self.config.adv.verbose and self.attack.reports_steps else None
        result = train_step(
            self.state,
            batches,
            config=self.config,
            processes=self.processes,
            attack=self.attack,
            mixup=self.mixup,
            lr=lr,
            eps=eps,
            on_attack_step=attack_log,
        )
        extra = {"attack": attack_log.lines()} if attack_log else {}
        shape = [self.config.training.batch_size, 3, size, size]
        self.meter.add(result, epoch=epoch + 1, step=self.state.step, shape=shape, lr=lr, **extra)
        self.profiler.step()

    def lr_and_eps(self, epoch: int, step: int) -> tuple[float, float]:
        """Return learning rate and radius of step `step` of epoch `epoch`, both from 0 on."""
        config, steps = self.config, self.loader.steps_per_epoch
        lr = lr_at(epoch + step / steps, lr=config.lr, epochs=config.training.epochs)
        # eps is taken at the step's end, so that it is not 0 in the very first step.
        return lr, eps_at(epoch + (step + 1) / steps, eps=config.adv.eps, warmup_epochs=config.adv.eps_warmup_epochs)

    def sync(self) -> Synced:
        """Exchange losses between processes about once per second, and decide together whether to continue, stop or save."""
        synced = self.meter.sync(stop=self.stop_request.here() is not None)
        self.run_folder.log_steps(synced.steps)
        if self.checkpointer.has_stored():
            self._set_status("running")
        if (speed := self.meter.take_speed()) is not None:
            self.say(self._forecast(speed))
        self.guard.check(synced)
        if synced.stop:
            self.leave()
        if self.checkpointer.is_due(self.state.step) and not self.progress.bad_in_a_row:
            self.save_state()
        return synced

    def validate(self, epoch: int, metrics: dict[str, Any]) -> None:
        """Measure the networks, log the numbers with the epoch's `metrics`, and save the best weights.

        Raises:
            Stopped: on request during validation.
            Diverged: overfitting, with `validation.stop_on_overfitting`.
        """
        trains, begin = not self.config.training.eval_only, time.perf_counter()
        found = self.validator.run(self.state.networks())
        if found is None:
            self.leave()
        record = {"epoch": epoch, "step": self.state.step} | metrics | found
        record["validation_seconds"] = round(time.perf_counter() - begin, 3)
        lost = None
        if trains and self.validator.measures_training_attack:
            lost = self.guard.overfitting(record, epoch=epoch, images=self.validator.n_attacked)
        if lost:
            record["overfitting"] = lost
            if self.processes.is_first:
                warn(f"{lost} The best weights before this are in weights_best.pt.")
        if self.processes.is_first:
            for text in self.guard.suspicions(record, images=self.validator.n_images):
                warn(text)
        self.run_folder.log_epoch(record)
        self.say(epoch_line(record, epochs=self.config.training.epochs))
        if trains and self.keeps_best:
            self._save_best(record)
        if lost and self.config.validation.stop_on_overfitting:
            raise Diverged(lost)

    def _save_best(self, record: dict[str, Any]) -> None:
        """Save the weights of each network with a new best robust accuracy (in clean training: clean accuracy)."""
        key, best = "adv_top1" if self.validator.measures_training_attack else "top1", self.progress.best
        improved = {}
        for kind, network in self.state.networks().items():
            value = record[PREFIX[kind] + key]
            if kind not in best or value > best[kind]["value"]:
                best[kind] = {"epoch": record["epoch"], "value": value}
                improved[kind] = network
        self.run_folder.save_best(improved)

    def _must_sync(self) -> bool:
        """Return whether a save or stop is known to be due after this step; the same on all processes."""
        every = self.config.logging.ckpt_steps
        alone = self.processes.world_size == 1
        return bool(every and self.state.step % every == 0) or (alone and self.stop_request.here() is not None)

    # --- saving and leaving -------------------------------------------------------------------------------------------

    def save_state(self, *, wait: bool = False) -> None:
        """Save everything that a resumed run needs, in the background; `wait`: until it is on disk."""
        self.checkpointer.save(
            self.state.step,
            lambda: {
                "format": STATE_FORMAT,
                "step": self.state.step,
                "train": self.state.state_dict(),
                "config": config_to_dict(self.config),
                "run": self._run_facts(),
                "progress": asdict(self.progress),
                "log": self.run_folder.position(),
            },
        )
        if wait and self.checkpointer.has_stored(wait=True):
            self._set_status("running")

    def leave(self) -> NoReturn:
        """Save everything and stop."""
        reason = self.stop_request.here() or "another process was asked to stop"
        if self.config.training.eval_only:
            raise Stopped(f"{reason}: nothing was validated")
        limit = ""
        if self.processes.from_launcher:
            limit = f"; torchrun kills its processes {patience_of_torchrun():g} s after SIGTERM ({PATIENCE_VARIABLE})"
        self.say(f"{reason}: saving the state of step {self.state.step}{limit}")
        self.save_state(wait=True)
        # torchrun ends all processes when one has ended. So all wait until everything is saved.
        self.processes.wait()
        steps, stored = self.config.training.epochs * self.loader.steps_per_epoch, self.checkpointer.stored_step
        if self.processes.is_first and stored != self.state.step:
            raise Stopped(
                f"{reason}: the state of step {self.state.step} of {steps} could not be saved; the same command resumes from "
                f"step {stored}"
            )
        again = "--training.resume=auto" if self.config.training.resume == "none" else "the same command"
        raise Stopped(f"{reason}: saved at step {self.state.step} of {steps}; {again} resumes from there")

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """Keep status.json up to date, however the run ends."""
        try:
            self._set_status("running")
            yield
        except Stopped as reason:
            self._end("stopped", str(reason))
            try:
                self.stop_request.clear_file()
            except OSError as error:
                warn(f"{self.run_folder.path / STOP_FILE} cannot be removed ({error.strerror}).")
            raise
        except Diverged as reason:
            self._end("diverged", str(reason))
            raise
        except UserError as error:
            self._end("failed", str(error))
            raise
        except Exception as error:
            # DataLoader's SIGCHLD handler would raise again here for the same dead worker.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            lost = self.processes.lost(error)
            reason = str(lost) if lost else dead_worker(error) or f"{type(error).__name__}: {error}"
            # A process or machine that was lost may be back at the next start, but a defect would occur again.
            defect = "DataLoader worker" not in reason and (lost is None or lost.failed)
            self._end("failed" if defect else "running", reason)
            if lost is not None:
                raise lost from error
            raise
        finally:
            self.profiler.close()
            self.loader.close()
            self.validator.close()
            self.checkpointer.has_stored(wait=True)
            self.run_folder.close()

    def _end(self, status: str, reason: str) -> None:
        self.checkpointer.has_stored(wait=True)
        self._set_status(status, reason)

    def _set_status(self, status: str, reason: str = "") -> None:
        self.run_folder.set_status(
            status, step=self.checkpointer.stored_step, epoch=self.progress.epochs_done, reason=reason
        )

    # --- folder and console ------------------------------------------------------------------------------------------

    def _open_folder(self, saved: dict[str, Any] | None, notes: list[str]) -> RunFolder:
        """Return the run's folder, locked; `saved`: the training state to resume from."""
        facts = self._provenance()
        if saved is not None:
            facts |= {"step": saved["step"], "from": str(self.start.source)}
        if saved is not None or notes:
            facts["notes"] = notes
        self.start.hold()
        position = saved["log"] | {"step": saved["step"]} if saved is not None and self.start.own else None
        folder = RunFolder(self.start.folder, self.config, facts, resume=position)
        if folder.set_aside:
            self.start.release()
            self.start.hold()
        folder.log_start(
            {name: facts[name] for name in ("step", "from", "notes", "started", "processes") if name in facts}
        )
        for note in notes:
            warn(note)
        return folder

    def _run_facts(self) -> dict[str, Any]:
        """Return the facts, besides the flags, that a later start is checked against."""
        return {
            **self.data_facts,
            "epochs_done": self.progress.epochs_done,
            # A run that started from another run's state resumes from its own state when the same command is given again.
            "origin": self.start.origin,
            "steps_per_epoch": self.loader.steps_per_epoch,
            "global_batch": self.images_per_step,
            "grad_accum": self.accum,
            "world_size": self.processes.world_size,
            "readers": [self.processes.world_size, self.config.data.num_workers],
            "threads": torch.get_num_threads(),
        }

    def _provenance(self) -> dict[str, Any]:
        return provenance() | {
            "given": sorted(self.config.given),
            "origin": self.start.origin,
            "folder": self.start.folder.name,
            **self.data_facts,
            "first_weights": self.state.first_weights,
            "processes": self.processes.world_size,
            "rendezvous": self.processes.rendezvous,
            "global_batch": self.images_per_step,
            "steps_per_epoch": self.loader.steps_per_epoch,
            "parameters": sum(p.numel() for p in self.state.model.parameters()),
            "trained_parameters": sum(p.numel() for p in self.state.model.parameters() if p.requires_grad),
        }

    def say(self, text: str) -> None:
        """Print a line, only on the first process."""
        if self.processes.is_first:
            say(text)

    def _headline(self) -> str:
        """Describe the run, and where it starts, in one line."""
        adv, model, device = self.config.adv, self.config.model, self.processes.device
        attack = "clean" if adv.attack == "none" else f"{adv.attack} {adv.norm} eps {adv.eps:.4g}"
        aside = ""
        if self.resumes:
            aside = f"; resumes after step {self.state.step} from {self.start.source}"
            if self.start.own and self.start.origin:
                aside += f"; started from {self.start.origin}"
        if self.run_folder.set_aside:
            aside += f"; the earlier run of this name is now {self.run_folder.set_aside}"
        if first := self.state.first_weights:
            aside += (
                f"; starts from {first['file']}{first['key'] and ', ' + first['key']}, sha256 {first['sha256'][:12]}"
            )
        return (
            f"{self.run_folder.path.name}: {model.arch}{' with ConvStem' if model.not_original else ''}, {attack}, "
            f"{self.loader.steps_per_epoch} steps per epoch with {self.images_per_step} images each on "
            f"{self.processes.world_size} × {device.type}{aside}"
        )

    def _forecast(self, speed: float) -> str:
        """Return the remaining time at `speed` steps per second; the time of a step is proportional to its images' pixels."""
        steps, done = self.loader.steps_per_epoch, self.progress.epochs_done
        epochs = range(done, self.config.training.epochs)
        pixels = [resolution_at_epoch(epoch, resolution=self.config.resolution) ** 2 for epoch in epochs]
        hours = (sum(pixels) / pixels[0] * steps - (self.state.step - done * steps)) / speed / 3600
        kind = "process" if self.processes.device.type == "cpu" else "GPU"
        return (
            f"{speed * self.images_per_step:.4g} images/s: {hours:.3g} h left, "
            f"{hours * self.processes.world_size:.3g} {kind}-hours, without validation"
        )
