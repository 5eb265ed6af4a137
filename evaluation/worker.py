"""Worker process: loads a network, attacks chunks of images, and returns a record of each."""

from __future__ import annotations

import hashlib
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from common.errors import UserError, blame
from common.files import write_atomically
from common.precision import float32_matmul
from evaluation.autoattack import Among, Verdicts, attack_chunk, check_adversarial
from evaluation.config import EvalAttackConfig, EvalConfig
from evaluation.images import Chunk, ImageList
from evaluation.plan import Evaluation
from evaluation.records import StateFolder
from evaluation.reliability import examine
from zoo.runs import load_trained

SHOWN = 8  # images saved for the picture


class Task(NamedTuple):
    """One chunk of one of the evaluations."""

    evaluation: int
    chunk: int


def setup(
    device_name: str, config: EvalConfig, evaluations: list[Evaluation], images: Mapping[str, ImageList]
) -> Callable[[Task, Callable[[str], None]], dict]:
    """Prepare this process and return the function task → record. `images` is by network.

    On a GPU, deterministic algorithms are selected: the same chunk on the same type of device has the same verdicts.
    """
    device = torch.device(device_name)
    if device.type == "cpu":
        torch.set_num_threads(config.eval.threads)  # a CPU is deterministic for a fixed number of threads
    else:
        torch.get_device_module(device).set_device(device)
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # slow, and no code here reads such memory
        # With warn_only, its gradient sums in any order; the attention kernels used instead are deterministic.
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        # AutoAttack's L1 projection uses a cumulative sum, for which a GPU has no deterministic algorithm.
        warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
    return _Worker(device, config, evaluations, images).run


class _Worker:
    """Runs tasks; keeps the network of the last task, because the next task usually needs it."""

    def __init__(
        self, device: torch.device, config: EvalConfig, evaluations: list[Evaluation], images: Mapping[str, ImageList]
    ) -> None:
        self.device, self.config, self.evaluations, self.images = device, config, evaluations, images
        self._network: tuple[Any, nn.Module, nn.Module | None] | None = None

    def run(self, task: Task, note: Callable[[str], None]) -> dict[str, Any]:
        """Return the record of one chunk."""
        evaluation = self.evaluations[task.evaluation]
        try:
            return self._record(evaluation, task.chunk, note)
        except torch.OutOfMemoryError as error:
            reason = str(error).split("\n")[0]
            raise RuntimeError(
                f"{self.device} has not enough memory for {len(evaluation.positions(task.chunk))} images of "
                f"{evaluation.img_size} px at a time; give a smaller eval.batch_size and another eval.out, because "
                f"verdicts depend on the batch size ({reason})"
            ) from error

    def _record(self, evaluation: Evaluation, number: int, note: Callable[[str], None]) -> dict[str, Any]:
        started, begin = time.time(), time.perf_counter()
        model, fast = self._load_network(evaluation)
        chunk = self.images[evaluation.network].read(evaluation.positions(number), evaluation.preprocessing)
        verdicts, check, signs = Verdicts(chunk.y, [], chunk.y, chunk.x), None, None
        classes = torch.arange(evaluation.outputs) if evaluation.among is None else torch.tensor(evaluation.among)
        y = torch.searchsorted(classes, chunk.y)  # class numbers used by the attacks
        if len(chunk.y):  # at least one image was decoded
            threat = {"norm": evaluation.norm, "eps": evaluation.eps, "device": self.device}
            settings = {"seed": self.config.eval.seed, "attacks": self.config.eval.chosen, "progress": note}
            tf32 = self.config.eval.precision == "tf32"
            verdicts = attack_chunk(model, chunk.x, y, fast=fast, tf32=tf32, **settings, **threat)
            check = check_adversarial(model, chunk.x, verdicts, y, **threat)
            gradients = self.config.eval.chosen != ("square",)
            signs = examine(model, chunk.x, y, device=self.device, gradients=gradients)
        return {
            "chunk": number,
            "positions": chunk.positions.tolist(),
            "labels": chunk.y.tolist(),
            "unreadable": chunk.unreadable,
            "pixels_sha256": hashlib.sha256(chunk.x.numpy().tobytes()).hexdigest(),
            "images_kept": self._keep_images(evaluation, number, chunk, verdicts),
            "clean_pred": classes[verdicts.clean_pred].tolist(),
            "broken_by": verdicts.broken_by,
            "adv_pred": classes[verdicts.adv_pred].tolist(),
            "attack_seconds": verdicts.attack_seconds,
            "rejoined": verdicts.rejoined,
            "check": check,
            "reliability": signs,
            "started": started,
            "seconds": time.perf_counter() - begin,
            "device": "cpu"
            if self.device.type == "cpu"
            else torch.get_device_module(self.device).get_device_name(self.device),
        }

    def _keep_images(self, evaluation: Evaluation, number: int, chunk: Chunk, verdicts: Verdicts) -> int:
        """Write all adversarial images if `eval.save_adv`, else a few of the first chunk for the picture; return the number.

        A failed write only prints a warning: the chunk's verdicts must not be lost.
        """
        most = len(chunk.y) if self.config.eval.save_adv else SHOWN if number == 0 else 0
        count = min(most, len(chunk.y))
        if not count:
            return 0
        arrays = {
            "x": chunk.x[:count].numpy(),
            "x_adv": verdicts.x_adv[:count].numpy(),
            "y": chunk.y[:count].numpy(),
            "positions": chunk.positions[:count].numpy(),
            "broken_by": np.array(verdicts.broken_by[:count]),
        }
        file = StateFolder(evaluation.folder).images_file(number)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, lambda f: np.savez(f, **arrays))
        except OSError as error:
            print(f"warning: adversarial images not saved: cannot write {file} ({error.strerror}).", file=sys.stderr)
            return 0
        return count

    def _load_network(self, evaluation: Evaluation) -> tuple[nn.Module, nn.Module | None]:
        key = (evaluation.weights, evaluation.description, evaluation.among)
        key += (evaluation.img_size if self.config.eval.compile else None,)
        if self._network is None or self._network[0] != key:
            self._network = None  # frees memory before the next one is loaded
            if self.config.eval.compile:
                torch._dynamo.reset()  # recompilations of the code shared by all networks are limited
            with blame("eval.model_in"):
                trained = load_trained(evaluation.weights, evaluation.description)
                if trained.sha256 != evaluation.identity["network"]["sha256"]:
                    raise UserError(
                        f"{evaluation.weights} is not the same file on all machines, or has changed since the start."
                    )
            model = trained.model.to(self.device).float().eval().requires_grad_(False)
            if evaluation.identity["arithmetic"]["channels_last"]:
                model = model.to(memory_format=torch.channels_last)
            if evaluation.among is not None:
                model = Among(model, evaluation.among).to(self.device)
            fast = fast_copy(model, self.config.eval, size=evaluation.img_size, device=self.device)
            self._network = key, model, fast
        return self._network[1:]


def fast_copy(model: nn.Module, settings: EvalAttackConfig, *, size: int, device: torch.device) -> nn.Module | None:
    """Return the network as requested by `eval.precision` and `eval.compile`; None if that is the network itself.

    A network that cannot be compiled at this image size is attacked uncompiled, with a warning.
    """
    tf32 = settings.precision == "tf32"
    if settings.compile:
        try:
            compiled = torch.compile(model, dynamic=True)
            x = torch.zeros(min(2, settings.batch_size), 3, size, size, device=device, requires_grad=True)
            with float32_matmul(tf32=tf32):  # as in the attacks, which would otherwise recompile
                torch.autograd.grad(compiled(x).sum(), x)
                with torch.no_grad():
                    compiled(x.detach())
            return compiled
        except torch.OutOfMemoryError:
            raise
        # Compilation can fail with any exception: no C++ compiler, no Triton, an unknown operation.
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            print(f"warning: eval.compile: running uncompiled: {type(error).__name__}: {reason}", file=sys.stderr)
    return model if tf32 else None
