"""The run: train epoch by epoch, validate, save, and stop or go on wherever it is interrupted."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from typing import Any

import torch
from tqdm import tqdm

from attacks.registry import build_attack
from common.errors import UserError
from common.files import take_folder, writable
from common.flags import config_to_dict
from common.processes import Processes
from common.provenance import provenance
from data.loader import Batch, EvalLoader, dead_worker, spread_indices
from data.prefetch import prefetch
from data.transforms import Mixup
from training.build import build_state, build_train_loader, check_image_sizes, open_sources
from training.checkpoint import StateFiles
from training.compiled import prepare_networks, prepare_size
from training.config import TrainConfig
from training.feeding import NOTICED_SECONDS, Feed
from training.forecast import Forecast
from training.log import RunFolder
from training.overfitting import OverfittingWatch
from training.progress import AttackLog, Progress, StepLog
from training.resume import FORMAT, STOP, Start, accumulation
from training.schedule import eps_at, lr_at, resolution_at_epoch
from training.step import train_step
from training.stop import StopRequest
from training.validation import adversarial_accuracy, clean_accuracy, training_attack_accuracy

# The processes exchange losses and whether to stop about so often, in between they only meet in the gradients: reading
# losses makes the host wait for the device.
LOOK_SECONDS = 1.0
MAX_STEPS_UNSEEN = 50


class Diverged(Exception):
    """Training went wrong for good; the entry ends with exit status 3."""


class Stopped(Exception):
    """Ended on request, with everything saved; the entry exits with `training.stop.STOPPED`."""


class Trainer:
    """One process of a training run.

    Args:
        config: all flags.
        processes: this process among all of the run.
        start: where the run begins, the same on all processes.

    Raises:
        UserError: data, weights, model or training state do not fit the flags.
    """

    def __init__(self, config: TrainConfig, processes: Processes, start: Start) -> None:
        self.config, self.processes, self.start = config, processes, start
        # By default PyTorch rounds the inputs of "fp32" convolutions.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.training.precision == "tf32"
        train_source, val_source = open_sources(config, once=processes.once_here, progress=processes.is_first)
        self.accum = config.training.grad_accum
        if start.state is not None:
            self.accum = accumulation(start.state, config, processes.world_size)
        self.loader = build_train_loader(config, train_source, processes, accum=self.accum)
        self.images = len(train_source)
        self.feed, self._advised = Feed(num_workers=config.data.num_workers, device=processes.device), False
        self._loader_rate: float | None = None  # images/s of all processes together
        self.state = build_state(config, processes, initial=start.state is None)
        self.progress, self.watch = Progress(), OverfittingWatch(chance=1 / config.model.num_classes)
        device = processes.device.type
        self.forecast = Forecast(
            config,
            steps_per_epoch=self.loader.steps_per_epoch,
            images_per_step=self._images_per_step,
            devices=(processes.world_size, "GPU" if device == "cuda" else "process"),
        )
        check_image_sizes(self.state.model, config)
        self.class_names = train_source.class_names
        self.val_loader = self._eval_loader(val_source)
        self.adv_loader = None
        if config.validation.adv_n_ex:
            shown = spread_indices(len(val_source), config.validation.adv_n_ex)
            self.adv_loader, self.adv_images = self._eval_loader(val_source, indices=shown), len(shown)
        self.folder: RunFolder | None = None
        self.states: StateFiles | None = None  # on the first process, like the folder
        self._bad_losses: deque[tuple[int, float]] = deque(maxlen=5)  # steps skipped since the last good one
        self._stored_step = start.state["step"] if start.own and start.state else 0  # of the newest state on disk
        self.attack = build_attack(config.adv)
        self.mixup = None
        if config.data.augmentations == 1:
            self.mixup = Mixup(num_classes=config.model.num_classes, label_smoothing=config.label_smoothing)
        notes = list(start.notes)
        # A run that began at another's state goes on from its own when the same command is given again.
        self.origin = ""
        if start.state is not None:
            self.origin = start.state["run"]["origin"] if start.own else config.training.resume
            notes += self._check_run(start.state["run"])
            self._restore(start.state)
        first = min(self.progress.epochs_done, config.training.epochs - 1)
        size = resolution_at_epoch(first, resolution=config.resolution)
        prepare_networks(self.state, config, processes, size=size)
        self._prepared = {size}  # image sizes
        self._together(lambda: self._open_folder(notes))
        if start.state is not None:
            start.state = {"step": start.state["step"]}  # the rest is as large as the model, average and optimiser

    def _eval_loader(self, source: Any, **options: Any) -> EvalLoader:
        data, validation = self.config.data, self.config.validation
        return EvalLoader(
            source,
            size=validation.resolution,
            crop_pct=validation.crop_pct,
            batch_size=validation.batch_size,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            num_workers=data.num_workers,
            pin_memory=self.processes.device.type == "cuda",
            **options,
        )

    # --- beginning ----------------------------------------------------------------------------------------------------

    def _together(self, action: Callable[[], None]) -> None:
        """`action` on the first process; if it meets bad input, every process ends with the same error."""
        problem = None
        if self.processes.is_first:
            try:
                action()
            except UserError as error:
                problem = str(error)
        if (problem := self.processes.gather(problem)[0]) is not None:
            raise UserError(problem)

    def _open_folder(self, notes: list[str]) -> None:
        start, facts = self.start, self._provenance()
        if start.state is not None:
            facts |= {"step": start.state["step"], "from": str(start.source), "notes": notes}
        position = start.state["log"] | {"step": start.state["step"]} if start.own and start.state else None
        path = self.config.run_folder
        if start.lock is None:  # there was no folder yet; another run may have made it meanwhile
            with writable("logging.folder", path):
                path.mkdir(parents=True, exist_ok=True)
                start.lock = take_folder(path, flag="logging.folder")
        self.folder = RunFolder(self.config, facts, warn=self._warn, resume=position)
        if self.folder.set_aside:
            start.release()
            start.lock = take_folder(path, flag="logging.folder")
        for note in notes:
            self._warn(note)
        self.states = StateFiles(self.folder.path)

    def _check_run(self, run: dict[str, Any]) -> list[str]:
        """Hold the data and processes of a training state against this start's; returns what the user should know."""
        force, own, notes = self.config.training.resume_force, self.start.own, []
        differences = []
        if run["images"] != self.images:
            differences.append(f"data.train_dataset had {run['images']} images and has {self.images}")
        readers = [self.processes.world_size, self.config.data.num_workers]
        if not self.loader.repeatable_for_any_workers and run["readers"] != readers:
            differences.append(
                f"a stream is read by {readers[0]} processes with {readers[1]} loader workers each, it was by "
                f"{run['readers'][0]} with {run['readers'][1]}, which makes another order"
            )
        if self.config.training.epochs < run["epochs_done"] or (
            self.config.training.epochs == run["epochs_done"] and not own
        ):
            raise UserError(
                f"training.epochs: {self.start.source} has {run['epochs_done']} epochs behind it, expected more than that, got "
                f"{self.config.training.epochs}."
            )
        if differences and not force:
            raise UserError(
                f"training.resume: {'; '.join(differences)}. Put back what was there, give --training.resume_force=1 to go on "
                "all the same, or --training.resume=none to start anew."
            )
        if run["threads"] != torch.get_num_threads() and self.processes.device.type == "cpu":
            notes.append(
                f"a process has {torch.get_num_threads()} threads, it had {run['threads']}: the last digits may differ from an "
                "undisturbed run's (OMP_NUM_THREADS)"
            )
        return notes + differences

    def _restore(self, saved: dict[str, Any]) -> None:
        """Take over a training state."""
        try:
            self.state.load_state_dict(saved["train"])
            self.progress = Progress(**saved["progress"])
            self.watch.load_state_dict(self.progress.watch)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"training.resume: {self.start.source} does not fit the model: {error}") from error
        before, now = saved["run"]["steps_per_epoch"], self.loader.steps_per_epoch
        if before != now:  # by force: go on at the same share of the run
            self.state.step = round(self.state.step / before * now)

    # --- the run ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the last epoch (or only validate, with `training.eval_only`).

        Raises:
            Stopped: on request; the state is saved.
            Diverged: too many non-finite losses in a row, or overfitting with `validation.stop_on_overfitting`.
            LostProcess: another process died or hangs.
            UserError: too many images that cannot be decoded.
        """
        self._say(self._headline())
        stop_file = self.folder.path / STOP if self.folder else None
        with StopRequest(self.processes, file=stop_file, end_time=end_of_job(self.config)) as self.stop:
            try:
                self._status("running")
                self._run()
            except Stopped as reason:
                self._end("stopped", str(reason))
                self._clear_stop_file()
                raise
            except Diverged as reason:
                self._end("diverged", str(reason))
                raise
            except UserError as error:
                self._end("failed", str(error))
                raise
            except Exception as error:
                # DataLoader's handler would raise again here for the same dead worker.
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                lost = self.processes.lost(error)
                reason = str(lost) if lost else dead_worker(error) or f"{type(error).__name__}: {error}"
                # What died, or cannot be reached, may be there again at the next start; a defect is met again.
                defect = "DataLoader worker" not in reason and (lost is None or lost.failed)
                self._end("failed" if defect else "running", reason)
                if lost is not None:
                    raise lost from error
                raise
            finally:
                self._close()
        self._say(f"run folder: {self.folder.path}" if self.folder else "")

    def _run(self) -> None:
        epochs, freq = self.config.training.epochs, self.config.validation.freq
        if self.config.training.eval_only:
            self._validate(epoch=0)
            self._status("finished")
            return
        self._saved_at, self._saved_step = time.monotonic(), self.state.step
        kept = True
        while self.progress.epochs_done < epochs:
            epoch = self.progress.epochs_done
            summary = self._train_epoch(epoch)
            last = epoch + 1 == epochs
            if self.folder is not None and (last or (epoch + 1) % self.config.logging.save_freq == 0):
                kept = self.folder.save_weights(self.state.networks(), epoch + 1)
            if last or (epoch + 1) % freq == 0:
                self._validate(epoch=epoch + 1, summary=summary)
            self.progress.finish_epoch()
        if kept:  # else the state before stays the newest, and the next start makes the weights again
            self._save_state()
            self._finish_writing()
        if self.folder is not None and self._stored_step != self.state.step:
            raise UserError(
                f"logging.folder: the run has come to its end, but {self.folder.path} did not take its last weights or state (see "
                f"above). Make room there; the same command goes on from step {self._stored_step}."
            )
        self._status("finished")

    def _train_epoch(self, epoch: int) -> dict[str, Any]:
        """What is left of one pass over the training images; returns the epoch's part of its record."""
        config, state, progress = self.config, self.state, self.progress
        size = resolution_at_epoch(epoch, resolution=config.resolution)
        steps = self.loader.steps_per_epoch
        first = state.step - epoch * steps
        if size not in self._prepared:
            prepare_size(state, config, self.processes, size=size)
            self._prepared.add(size)
        losses = StepLog(epoch=epoch, shape=[config.training.batch_size, 3, size, size])
        self._begin, self._counted, bad_names = time.perf_counter(), set(), set()
        lr, eps = self._schedule(epoch, max(first - 1, 0))
        on_device = prefetch(
            self.feed.watch(self.loader.epoch(epoch, size, first)), self.processes.device, self.feed.on_gap
        )
        groups = grouped(on_device, self.accum)
        del on_device
        # Closed in any case: an error would keep the generators, and with them the loader's workers.
        with self._bar(epoch, first) as bar, closing(groups):
            for step, batches in enumerate(groups, first):
                self._note_failures(batches, bad_names)
                lr, eps = self._schedule(epoch, step)
                attack_log = AttackLog() if config.adv.verbose else None
                result = train_step(
                    state,
                    batches,
                    config=config,
                    processes=self.processes,
                    attack=self.attack,
                    mixup=self.mixup,
                    lr=lr,
                    eps=eps,
                    on_attack_step=attack_log,
                )
                losses.add(result, step=state.step, lr=lr, attack=attack_log)
                bar.update(self._images_per_step)
                if losses.is_due or step + 1 == steps or self._is_time_to_look():
                    bar.set_postfix(loss=f"{self._look(losses, bad_names):.3f}", lr=f"{lr:.2g}", refresh=False)
        return {
            "train_loss": progress.loss_sum / max(progress.loss_count, 1),
            "lr": lr,
            "eps": eps,
            "resolution": size,
            "seconds": round(progress.seconds, 3),
            "images_per_second": round(steps * self._images_per_step / max(progress.seconds, 1e-9), 2),
            # Not known where a run goes on shortly before the epoch's end.
            **({"loader_images_per_second": round(self._loader_rate, 2)} if self._loader_rate else {}),
            "data_wait": round(progress.waiting / max(progress.seconds, 1e-9), 4),
            "bad_images": progress.bad_images,
            "skipped_steps": progress.skipped,
        }

    def _is_time_to_look(self) -> bool:
        """Whether something is known to be up after this step; the same on all processes."""
        every = self.config.logging.ckpt_steps
        alone = self.processes.world_size == 1
        return bool(every and self.state.step % every == 0) or (alone and self.stop.here() is not None)

    def _schedule(self, epoch: int, step: int) -> tuple[float, float]:
        """Learning rate and radius of one step."""
        config, steps = self.config, self.loader.steps_per_epoch
        lr = lr_at(epoch + step / steps, lr=config.lr, epochs=config.training.epochs)
        # eps grows to the step's end, so that the very first step has a ball to search.
        return lr, eps_at(epoch + (step + 1) / steps, eps=config.adv.eps, warmup_epochs=config.adv.eps_warmup_epochs)

    def _look(self, losses: StepLog, bad_names: set[str]) -> float:
        """All that the processes have to agree on, in one exchange: losses, skipped steps, undecodable images, requests to stop.

        Returns the mean loss of the steps since the last look.
        """
        progress, pending = self.progress, losses.take()
        now = time.perf_counter()
        seconds, self._begin = now - self._begin, now
        until = min(max(int(LOOK_SECONDS * len(pending) / max(seconds, 1e-9)), 1), MAX_STEPS_UNSEEN)
        mine = [self.stop.here() is not None, until if self.processes.is_first else 0, len(bad_names - self._counted)]
        mine += [self.feed.take(), self.feed.rate or 0.0]
        self._counted |= bad_names
        results = torch.stack([result for _, result in pending]).flatten()
        mine = torch.tensor(mine, dtype=results.dtype, device=results.device)
        *values, stops, until, bad, waited, rate = self.processes.sum(torch.cat([results, mine])).tolist()
        losses.until = int(until)
        progress.seconds += seconds
        progress.bad_images += int(bad)
        self._say(self.forecast.add(step=self.state.step, steps=len(pending), seconds=seconds) or "")
        progress.waiting += waited / self.processes.world_size
        self._note_feeding(rate)
        mean = [loss / self.processes.world_size for loss in values[::2]]
        skipped = [count > 0 for count in values[1::2]]
        for (record, _), loss, skip in zip(pending, mean, skipped, strict=True):
            self._count_step(record, loss, skip)
        self._note_writes()
        if progress.bad_in_a_row >= self.config.training.max_bad_steps:
            self._skipped_too_often()
        if progress.bad_images > (limit := self.config.data.max_bad_images):
            raise UserError(
                f"data.max_bad_images: {progress.bad_images} images of data.train_dataset could not be decoded in one epoch, "
                f"{limit} are allowed; they are named above. Repair the data set or raise the limit."
            )
        if stops:
            self._stop()
        if self._is_due():
            self._save_state()
        return sum(mean) / len(mean)

    def _note_feeding(self, rate: float) -> None:
        """Tell how fast images come: once at the start, and once more if that is too slow. `rate`: of all processes together."""
        if rate and self._loader_rate is None:
            self._loader_rate = rate
            self._say(f"loader alone: {rate:.0f} images/s with data.num_workers={self.config.data.num_workers}")
        progress = self.progress
        if self._advised or progress.seconds < NOTICED_SECONDS or not self.processes.is_first:
            return
        images = (self.state.step - progress.epochs_done * self.loader.steps_per_epoch) * self._images_per_step
        advice = self.feed.advice(
            images_per_second=images / progress.seconds / self.processes.world_size,
            waiting=progress.waiting / progress.seconds,
            processes=self.processes.on_this_machine,
        )
        if advice is not None:
            self._advised = True
            self._warn(advice)

    def _count_step(self, record: dict[str, Any], loss: float, skipped: bool) -> None:
        progress, level = self.progress, self.config.logging.log_level
        if skipped:
            # A float16 gradient that overflows makes the scaler lower its scale: no news.
            if not math.isfinite(loss) and not progress.bad_in_a_row and self.processes.is_first:
                self._warn(f"the loss is {loss} at step {record['step']}; the step is skipped.")
            progress.skipped += 1
            progress.bad_in_a_row += 1
            self._bad_losses.append((record["step"], loss))
        else:
            progress.bad_in_a_row = 0
            self._bad_losses.clear()
            progress.loss_sum += loss
            progress.loss_count += 1
        if self.folder is None:
            return
        shown = {"epoch", "step", "attack"} if level == 0 else record.keys()
        line = {key: value for key, value in record.items() if key in shown}
        if level > 1 or skipped:
            line["loss"] = loss
        if skipped:
            line["skipped"] = True
        if level or skipped or "attack" in record:
            self.folder.write(line)

    def _skipped_too_often(self) -> None:
        numbers = ", ".join(f"{loss:.4g} at step {step}" for step, loss in self._bad_losses)
        raise Diverged(
            f"{self.progress.bad_in_a_row} steps in a row were skipped, as loss or gradient were not finite (loss {numbers}); "
            "lr.lr, adv.eps and training.precision are where to look; states and weights saved before are untouched"
        )

    # --- saving and stopping ------------------------------------------------------------------------------------------

    def _is_due(self) -> bool:
        """Whether a state is to be saved now: by time or steps, and not while steps are being skipped."""
        logging = self.config.logging
        by_time = logging.ckpt_minutes and time.monotonic() - self._saved_at >= 60 * logging.ckpt_minutes
        by_steps = logging.ckpt_steps and self.state.step - self._saved_step >= logging.ckpt_steps
        return bool(by_time or by_steps) and not self.progress.bad_in_a_row

    def _save_state(self) -> None:
        """Hand everything to the writer; the first process's part alone, the others hold the same."""
        self._saved_at, self._saved_step = time.monotonic(), self.state.step
        if self.folder is None:
            return
        self.progress.watch = self.watch.state_dict()
        self.states.save(
            {
                "format": FORMAT,
                "step": self.state.step,
                "train": self.state.state_dict(),
                "config": config_to_dict(self.config),
                "run": self._run_facts(),
                "progress": asdict(self.progress),
                "log": self.folder.position(),
            }
        )

    def _run_facts(self) -> dict[str, Any]:
        """What a later start is held against, beside the flags."""
        return {
            "images": self.images,
            "epochs_done": self.progress.epochs_done,
            "origin": self.origin,
            "steps_per_epoch": self.loader.steps_per_epoch,
            "global_batch": self._images_per_step,
            "grad_accum": self.accum,
            "world_size": self.processes.world_size,
            "readers": [self.processes.world_size, self.config.data.num_workers],
            "threads": torch.get_num_threads(),
        }

    def _note_writes(self) -> None:
        """Tell what became of the states handed to the writer."""
        if self.folder is None:
            return
        for outcome in self.states.outcomes():
            if outcome.error is None:
                self._stored_step = outcome.step
                self._status("running")
            else:
                self._warn(
                    f"the training state of step {outcome.step} cannot be written ({outcome.error}); training goes on, and the "
                    f"state of step {self._stored_step} stays."
                )

    def _clear_stop_file(self) -> None:
        try:
            self.stop.clear_file()
        except OSError as error:
            self._warn(f"{self.folder.path / STOP} cannot be removed ({error.strerror}).")

    def _end(self, status: str, reason: str) -> None:
        self._finish_writing()
        self._status(status, reason)

    def _close(self) -> None:
        self.loader.close()
        if self.folder is not None:
            self.states.wait()
            self.folder.close()

    def _finish_writing(self) -> None:
        """Wait for the state that is being written, if any."""
        if self.folder is not None:
            self.states.wait()
            self._note_writes()

    def _status(self, status: str, reason: str = "") -> None:
        if self.folder is not None:
            self.folder.set_status(status, step=self._stored_step, epoch=self.progress.epochs_done, reason=reason)

    def _stop(self) -> None:
        """Save everything and end."""
        reason = self.stop.here() or "another process was asked to stop"
        if self.config.training.eval_only:
            raise Stopped(f"{reason}: nothing was validated")
        self._save_state()
        self._finish_writing()
        # torchrun ends all when one has ended; so none ends before everything is saved.
        self.processes.wait()
        steps = self.config.training.epochs * self.loader.steps_per_epoch
        if self.folder is not None and self._stored_step != self.state.step:
            raise Stopped(
                f"{reason}: the state of step {self.state.step} of {steps} could not be saved; the same command goes on from "
                f"step {self._stored_step}"
            )
        again = "--training.resume=auto" if self.config.training.resume == "none" else "the same command"
        raise Stopped(f"{reason}: saved at step {self.state.step} of {steps}; {again} goes on from there")

    # --- validation ---------------------------------------------------------------------------------------------------

    def _validate(self, *, epoch: int, summary: dict[str, Any] | None = None) -> None:
        """Clean and quick adversarial accuracy of raw and EMA weights: one record of the log, one line on the screen."""
        record: dict[str, Any] = {"epoch": epoch, "step": self.state.step, **(summary or {})}
        begin = time.perf_counter()
        for kind, network in self.state.networks().items():
            prefix = "" if kind == "raw" else f"{kind}_"
            clean = self._measure(clean_accuracy, network, self.val_loader)
            record.update({prefix + key: value for key, value in clean.items()})
            if self.adv_loader is not None:
                record[f"{prefix}adv_top1"] = self._measure(adversarial_accuracy, network, self.adv_loader)
        watched = self.adv_loader is not None and self.config.adv.attack != "none"
        if watched:
            record["train_attack_top1"] = self._measure(training_attack_accuracy, self.state.model, self.adv_loader)
        record["validation_seconds"] = round(time.perf_counter() - begin, 3)
        warning = self._watch_overfitting(record) if watched and summary else None
        if self.folder is not None:
            self.folder.write(record)
        shown = {k: v for k, v in record.items() if k.endswith(("loss", "top1", "per_second"))}
        self._say(
            f"epoch {epoch}/{self.config.training.epochs}  " + "  ".join(f"{k} {v:.4g}" for k, v in shown.items())
        )
        if summary:
            self._note_best(record, key="adv_top1" if watched else "top1")
        if warning and self.config.validation.stop_on_overfitting:
            raise Diverged(warning)

    def _measure(self, measure: Callable[..., Any], network: torch.nn.Module, loader: EvalLoader) -> Any:
        """One accuracy over all processes; ends the run if one of them was asked to stop meanwhile."""
        value = measure(network, self._shown(loader), config=self.config, processes=self.processes)
        asked = torch.tensor(float(self.stop.anywhere() is not None), device=self.processes.device)
        if self.processes.sum(asked).item():
            self._stop()
        return value

    def _shown(self, loader: EvalLoader) -> Iterator[Batch]:
        """Validation batches, until a stop is asked for; names the images that cannot be decoded."""
        for batch in loader:
            for name, reason in batch.failures:
                self._warn(f"{name} cannot be decoded ({reason}); it is left out of the validation.")
            if len(batch.y):
                yield batch
            if self.stop.anywhere() is not None:
                return

    def _watch_overfitting(self, record: dict[str, Any]) -> str | None:
        """Ask the watch; a warning goes to the record and the screen."""
        warning = self.watch.update(
            epoch=record["epoch"],
            strong=record["adv_top1"],
            weak=record["train_attack_top1"],
            n=self.adv_images,
        )
        if warning is not None:
            record["overfitting"] = warning
            if self.processes.is_first:
                self._warn(f"{warning} The weights before are weights_best.pt.")
        return warning

    def _note_best(self, record: dict[str, Any], *, key: str) -> None:
        """Keep the weights of each network that are better than all before."""
        improved = {}
        for kind, network in self.state.networks().items():
            value = record[key if kind == "raw" else f"{kind}_{key}"]
            if kind not in self.progress.best or value > self.progress.best[kind]["value"]:
                self.progress.best[kind] = {"epoch": record["epoch"], "value": value}
                improved[kind] = network
        if self.folder is not None and improved:
            self.folder.save_best(improved)

    # --- words --------------------------------------------------------------------------------------------------------

    @property
    def _images_per_step(self) -> int:
        """Global batch: images of all processes in one optimiser step."""
        return self.config.training.batch_size * self.accum * self.processes.world_size

    def _note_failures(self, batches: list[Batch], bad_names: set[str]) -> None:
        """Name the images of these batches that could not be decoded, and add them to the epoch's."""
        for name, reason in (failure for batch in batches for failure in batch.failures):
            if name not in bad_names:
                self._warn(f"{name} cannot be decoded ({reason}); the next image takes its place.")
            bad_names.add(name)

    def _bar(self, epoch: int, first: int) -> tqdm:
        """Progress in images, with the rate and the remaining time; on a log file one line a minute at most."""
        tqdm.monitor_interval = 0  # no thread that refreshes bars
        return tqdm(
            total=self.loader.steps_per_epoch * self._images_per_step,
            initial=first * self._images_per_step,
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
        c, start = self.config, self.start
        aside = ""
        if start.state is not None:
            aside = f"; goes on after step {self.state.step} from {start.source}"
        elif self.folder and self.folder.set_aside:
            aside = f"; the earlier run of this name is now {self.folder.set_aside}"
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


def end_of_job(config: TrainConfig) -> float | None:
    """When to stop so that everything is saved before Slurm ends the job, in Unix seconds; None outside of Slurm."""
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    return int(end) - 60 * config.dist.end_margin_minutes if end.isdigit() else None


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Inside the context only deterministic algorithms (`training.deterministic`), else the fastest: cuDNN tries its convolutions
    at each new shape."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA's linear algebra starts
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not enabled
    try:
        yield
    finally:
        if enabled:
            torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def grouped(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """Successive lists of `size` batches."""
    group: list[Batch] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
