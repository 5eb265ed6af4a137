"""Every flag of the project, declared once: the fields of frozen dataclasses become fastargs sections and `--section.name` flags.

A field holds default, meaning and check (`flag`); `load_config` turns a command line and YAML files into one frozen object, or
raises a `UserError` that names the flag, what was expected and what came. The rest of the project receives these plain
dataclasses and never sees fastargs. Order of precedence: command line, then later config files, then earlier ones, then the
default; environment variables are not read.

The 55 flags of the published system keep their names, defaults and meaning (README, "Flags").
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import fastargs
import fastargs.validation
import yaml

from common.errors import UserError

# Radius used where no eps is given, in units of pixels in [0, 1] (ImageNet threat models of the paper, Section 2).
DEFAULT_EPS = {"Linf": 4 / 255, "L2": 2.0, "L1": 75.0}
NORMS = tuple(DEFAULT_EPS)
# fp64 is for comparing runs to the last digits, not for training.
PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "fp64")
IMAGE_IDS = ("auto", "robustbench", "all")
# Top-level key of a run's params.json that is not a section, so that the file itself serves as a config file.
PROVENANCE_KEY = "provenance"


def flag(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    harmless: bool = False,
) -> Any:
    """Declare one flag as a dataclass field.

    Args:
        default: value when it is not given; `dataclasses.MISSING` makes the flag required.
        help: meaning, with units.
        choices: the allowed strings.
        at_least, at_most, above: bounds of a number, the last one exclusive.
        harmless: the flag cannot change the trained weights; it does not count for the run's name.
    """
    checks = {"choices": choices, "at_least": at_least, "at_most": at_most, "above": above}
    return field(default=default, metadata={"help": help, "harmless": harmless, **checks})


REQUIRED: Any = dataclasses.MISSING
# Flags that a config file may leave empty: unset has a meaning of its own.
OPTIONAL = ("model.drop_path", "adv.eps", "eval.eps", "eval.channels_last")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is trained."""

    arch: str = flag("convnext_tiny", "architecture: a name of utils_architecture.ARCHITECTURES or timm_<timm name>")
    pretrained: bool = flag(True, "1: start from timm's pretrained weights (downloaded)")
    ckpt_path: str = flag(
        "", "weights to start from: file, run folder, or a published model's clean ones (NAME; NAME:robust)"
    )
    add_normalization: bool = flag(True, "1: ImageNet mean/std normalisation inside the model")
    not_original: bool = flag(False, "1: replace the PatchStem by a ConvStem")
    updated: bool = flag(False, "1: convnext_iso with stem and width 432")
    model_ema: bool = flag(False, "1: keep an exponential moving average of the weights, save and validate it too")
    freeze_some: bool = flag(False, "1: train only a part of the parameters, chosen by model.early")
    early: bool = flag(True, "with freeze_some: 1 trains only parameters named *stem*, 0 freezes only those")
    num_classes: int = flag(1000, "number of classes of the head", at_least=2)
    drop_path: float | None = flag(None, "stochastic depth rate; unset: timm's default", at_least=0, at_most=0.95)
    ema_decay: float = flag(0.9999, "decay of the average at every optimiser step", at_least=0, at_most=1)
    ema_warmup: bool = flag(False, "1: decay min(ema_decay, (1 + step) / (10 + step)), for short runs")


@dataclass(frozen=True, kw_only=True)
class ResolutionConfig:
    """Training image size by epoch."""

    min_res: int = flag(160, "image size in pixels up to epoch start_ramp", at_least=8)
    max_res: int = flag(160, "image size in pixels from epoch end_ramp", at_least=8)
    start_ramp: int = flag(0, "epoch up to which min_res holds", at_least=0)
    end_ramp: int = flag(0, "epoch from which max_res holds; between the two linear, in multiples of 32", at_least=0)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images come from and how they are augmented."""

    train_dataset: str = flag(REQUIRED, "training images: folder, tar, digits, or hfds/… wds/… tfds/… torch/…")
    val_dataset: str = flag(REQUIRED, "validation images, likewise")
    num_workers: int = flag(REQUIRED, "loader processes of each training process", at_least=0, harmless=True)
    in_memory: bool = flag(REQUIRED, "1: keep all encoded images in memory, shared by the workers", harmless=True)
    seed: int = flag(0, "seed of everything random", at_least=0)
    augmentations: int = flag(
        0, "0 basic (crop, flip), 1 heavy (RandAugment, erasing, mixup), 2 none", at_least=0, at_most=2
    )
    pipeline: str = flag(
        "fast",
        "fast: workers decode and crop, the device augments; timm: all by timm in the workers; same distribution",
        choices=("timm", "fast"),
    )
    root: str = flag("", "root folder of hfds/ tfds/ torch/ data sets (their cache)", harmless=True)
    train_split: str = flag("", "name of the training split for timm's readers; empty: train")
    val_split: str = flag("", "name of the validation split for timm's readers; empty: validation")
    min_scale: float = flag(0.08, "smallest share of the image's area in RandomResizedCrop", above=0, at_most=1)
    flip: float = flag(0.5, "probability of a horizontal flip (published code, basic: 0)", at_least=0, at_most=1)
    max_bad_images: int = flag(
        100, "undecodable images met in one epoch before training stops", at_least=0, harmless=True
    )


@dataclass(frozen=True, kw_only=True)
class LRConfig:
    """Learning rate."""

    lr: float = flag(1e-3, "peak learning rate; not scaled with the batch size", above=0)
    lr_schedule_type: str = flag("cosine", "shape by epoch", choices=("cosine", "step", "cyclic"))
    lr_peak_epoch: int = flag(10, "epoch at which cosine and cyclic reach the peak", at_least=0)
    step_ratio: float = flag(0.1, "step: factor every step_length epochs", above=0)
    step_length: int = flag(30, "step: epochs between two factors", at_least=1)


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is written, where and how often."""

    folder: str = flag("runs", "run folders are made in this folder", harmless=True)
    log_level: int = flag(
        1, "per step: 0 nothing, 1 epoch, step, shape and lr, 2 also the loss", at_least=0, at_most=2, harmless=True
    )
    save_freq: int = flag(
        2, "epochs between two saved weights; the last epoch is always saved", at_least=1, harmless=True
    )
    addendum: str = flag("", "appended to the run's name")
    keep: int = flag(
        5, "saved epochs that are kept (raw and EMA each), oldest deleted first; 0: all", at_least=0, harmless=True
    )
    ckpt_minutes: float = flag(
        15.0, "minutes between two saved training states; 0: none by time", at_least=0, harmless=True
    )
    ckpt_steps: int = flag(0, "steps between two saved training states; 0: none by steps", at_least=0, harmless=True)


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Validation during and after training."""

    batch_size: int = flag(64, "images a process", at_least=1, harmless=True)
    resolution: int = flag(224, "image size in pixels", at_least=8, harmless=True)
    lr_tta: bool = flag(False, "1: add the logits of the mirrored image", harmless=True)
    precision: str = flag("fp16", "autocast of validation", choices=PRECISIONS, harmless=True)
    freq: int = flag(1, "epochs between two validations; the last epoch is always validated", at_least=1, harmless=True)
    adv_n_ex: int = flag(
        512, "images of the quick adversarial validation, spread over the set; 0: none", at_least=0, harmless=True
    )
    adv_n_iter: int = flag(10, "APGD updates of the quick adversarial validation", at_least=1, harmless=True)
    crop_pct: float = flag(0.875, "centre crop after resizing to size/crop_pct; 1 for small images", above=0, at_most=1)
    stop_on_overfitting: bool = flag(
        False,
        "1: stop when robustness to the training attack rises while that to a stronger one is lost",
        harmless=True,
    )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Optimisation."""

    eval_only: bool = flag(False, "1: validate the weights and stop")
    batch_size: int = flag(512, "images of one process in one forward pass", at_least=1)
    optimizer: str = flag("adamw", "AdamW with betas (0.9, 0.95), or SGD", choices=("adamw", "sgd"))
    momentum: float = flag(0.9, "momentum of SGD", at_least=0, at_most=1)
    weight_decay: float = flag(0.05, "decoupled (AdamW) or coupled (SGD) weight decay", at_least=0)
    epochs: int = flag(100, "passes over the training images", at_least=1)
    label_smoothing: float = flag(0.1, "with mixup: 0 off, 1 on (0.1), between: the value", at_least=0, at_most=1)
    distributed: bool = flag(False, "1: dist.world_size processes; implied under torchrun", harmless=True)
    use_blurpool: bool = flag(False, "1: blur before strided convolutions of at least 16 channels")
    precision: str = flag(
        "fp16",
        "arithmetic of attack and training: fp16 (loss scaling) and bf16 by autocast, tf32 on a GPU only",
        choices=PRECISIONS,
    )
    grad_clip: float = flag(0.0, "largest L2 norm of the gradient; 0: no clipping", at_least=0)
    grad_accum: int = flag(1, "forward passes summed into one optimiser step", at_least=1)
    resume: str = flag(
        "auto",
        "auto: go on from the run folder's state, if any; none: start anew; or a run folder, or state file",
        harmless=True,
    )
    resume_force: bool = flag(False, "1: go on although flags that alter the numbers have changed", harmless=True)
    max_bad_steps: int = flag(
        20,
        "steps skipped in a row (loss or gradient not finite) before the run ends with status 3",
        at_least=1,
        harmless=True,
    )
    deterministic: bool = flag(False, "1: only deterministic algorithms, for exact resume on a GPU")
    grad_checkpointing: bool = flag(
        False, "1: keep less for the backward pass and compute it again: less memory, more time", harmless=True
    )
    compile: str = flag(
        "auto",
        "torch.compile for attack and training; auto: 1 on a GPU, 0 on a CPU; changes rounding only",
        choices=("auto", "0", "1"),
        harmless=True,
    )
    trim_last_block: bool = flag(
        True,
        "1: the last block computes only what the head reads (class token, mean over positions); changes rounding only",
        harmless=True,
    )
    reuse_forward: str = flag(
        "auto",
        "APGD's last forward pass is that of training; auto: 1 on a CPU, 0 on a GPU; changes rounding only",
        choices=("auto", "0", "1"),
        harmless=True,
    )


@dataclass(frozen=True, kw_only=True)
class DistConfig:
    """Processes of training.distributed=1; under torchrun its own settings hold."""

    world_size: int = flag(1, "number of processes; a resumed run keeps its global batch", at_least=1, harmless=True)
    address: str = flag("localhost", "address of the first process", harmless=True)
    port: int = flag(12355, "port of the first process; 0: a free one", at_least=0, at_most=65535, harmless=True)
    timeout_minutes: float = flag(
        10.0, "longest wait of a process for the others; then the run ends", above=0, harmless=True
    )
    end_margin_minutes: float = flag(
        3.0, "minutes before the end of a Slurm job to save and stop", at_least=0, harmless=True
    )


@dataclass(frozen=True, kw_only=True)
class AdvConfig:
    """The attack trained against."""

    attack: str = flag("none", "none: clean training", choices=("none", "apgd", "fgsm"))
    norm: str = flag("Linf", "threat model", choices=NORMS)
    eps: float | None = flag(None, "radius, fractions allowed; unset: 4/255 (Linf), 2 (L2), 75 (L1)", above=0)
    n_iter: int = flag(2, "updates of APGD", at_least=1)
    verbose: bool = flag(
        False, "1: log loss and accuracy of every attack step (synchronises with the GPU)", harmless=True
    )
    noise_level: float = flag(1.0, "FGSM: random start in units of eps", at_least=0)
    skip_projection: bool = flag(False, "FGSM: 1 leaves the result outside ball and box")
    alpha: float = flag(1.0, "FGSM: step in units of eps", above=0)
    eps_warmup_epochs: float = flag(0.0, "epochs over which eps grows linearly from 0", at_least=0)


@dataclass(frozen=True, kw_only=True)
class MiscConfig:
    """The rest."""

    notes: str = flag("", "free text, kept with the run", harmless=True)
    use_channel_last: bool = flag(True, "1: channels_last memory format")


def _check_radius(name: str, norm: str, eps: float, *, size: int) -> None:
    """Refuse a ball that holds every image; `size` in pixels."""
    numbers = 3 * size**2
    largest = {"Linf": 1.0, "L2": numbers**0.5, "L1": float(numbers)}[norm]
    if eps > largest:
        hint = f" (did you mean {eps:g}/255?)" if norm == "Linf" else ""
        raise UserError(
            f"{name}: pixels are in [0, 1], so at {size} px an {norm} radius is at most {largest:g}; got {eps:g}{hint}."
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything `train.py` needs."""

    model: ModelConfig
    resolution: ResolutionConfig
    data: DataConfig
    lr: LRConfig
    logging: LoggingConfig
    validation: ValidationConfig
    training: TrainingConfig
    dist: DistConfig
    adv: AdvConfig
    misc: MiscConfig

    def __post_init__(self) -> None:
        if self.adv.eps is None:
            object.__setattr__(self, "adv", dataclasses.replace(self.adv, eps=DEFAULT_EPS[self.adv.norm]))
        _check_radius("adv.eps", self.adv.norm, self.adv.eps, size=self.resolution.min_res)
        if self.adv.attack == "fgsm" and self.adv.norm != "Linf":
            raise UserError(
                f"adv.norm: adv.attack=fgsm is defined for Linf only, got {self.adv.norm!r}; use adv.attack=apgd."
            )
        if self.data.augmentations == 1 and self.training.batch_size % 2:
            raise UserError(
                "training.batch_size: data.augmentations=1 mixes pairs of images and needs an even batch, "
                f"got {self.training.batch_size}."
            )
        if self.resolution.end_ramp < self.resolution.start_ramp:
            raise UserError(
                f"resolution.end_ramp: expected at least resolution.start_ramp={self.resolution.start_ramp}, "
                f"got {self.resolution.end_ramp}."
            )
        if self.resolution.max_res < self.resolution.min_res:
            raise UserError(
                f"resolution.max_res: expected at least resolution.min_res={self.resolution.min_res}, "
                f"got {self.resolution.max_res}."
            )
        if self.training.resume == "":
            raise UserError("training.resume: expected auto, none or a path, got nothing (an unset shell variable?).")
        if self.training.eval_only and self.training.resume not in ("auto", "none"):
            raise UserError(
                "training.resume: training.eval_only=1 trains nothing that could be resumed; give the weights to validate as "
                "model.ckpt_path (a run folder will do)."
            )
        if self.dist.world_size > 1 and not self.training.distributed:
            raise UserError(
                f"dist.world_size: {self.dist.world_size} processes were asked for, but training.distributed is 0; "
                "give --training.distributed=1."
            )

    @property
    def label_smoothing(self) -> float:
        """Smoothing inside mixup: the published switch 1 stands for 0.1."""
        return 0.1 if self.training.label_smoothing == 1 else self.training.label_smoothing

    @property
    def run_name(self) -> str:
        """Name of the run's folder: the flags that matter most, a digest of all that alter the result, and the addendum.

        It holds no time, so that the same command line finds the same folder again.
        """
        stem = "_cvst" if self.model.not_original else ""
        parts = [self.model.arch.replace("/", "-") + stem]
        if self.adv.attack != "none":
            steps = self.adv.n_iter if self.adv.attack == "apgd" else ""
            parts.append(f"{self.adv.attack}{steps}_{self.adv.norm}_{self.adv.eps:.4g}")
        else:
            parts.append("clean")
        parts.append(("basic", "heavy", "plain")[self.data.augmentations])
        parts.append(f"{self.training.epochs}ep_{self.resolution.max_res}px_seed{self.data.seed}")
        parts.append(_digest(self))
        if self.logging.addendum:
            parts.append("".join(c if c.isalnum() or c in "-_.=" else "-" for c in self.logging.addendum))
        return "_".join(parts)

    @property
    def run_folder(self) -> Path:
        """Where the run leaves everything."""
        return Path(self.logging.folder) / self.run_name


@dataclass(frozen=True, kw_only=True)
class EvalModelConfig:
    """The network to evaluate; unset values come from the run's params.json next to the weights, else the default in brackets."""

    arch: str | None = flag(None, "architecture, as in training [found in the weights]")
    not_original: bool | None = flag(None, "1: ConvStem [found in the weights]")
    add_normalization: bool | None = flag(None, "1: the normaliser is inside the model [found in the weights]")
    updated: bool | None = flag(None, "1: convnext_iso with stem and width 432 [found in the weights]")
    num_classes: int | None = flag(None, "number of classes of the head [found in the weights]", at_least=2)
    use_blurpool: bool | None = flag(None, "1: trained with training.use_blurpool=1 [0]")


@dataclass(frozen=True, kw_only=True)
class EvalDataConfig:
    """The images to attack."""

    val_dataset: str = flag(REQUIRED, "validation images: folder, tar, digits, or hfds/… wds/… tfds/… torch/…")
    root: str = flag("", "root folder of hfds/ tfds/ torch/ data sets (their cache)")
    val_split: str = flag("", "name of the split for timm's readers; empty: validation")
    num_workers: int = flag(0, "decoding processes of each worker; 0: the worker decodes itself", at_least=0)


@dataclass(frozen=True, kw_only=True)
class AttackConfig:
    """AutoAttack, its threat models, and the devices it runs on."""

    model_in: tuple[str, ...] = flag((), "weights files, run folders, published names or RobustBench ids, by commas")
    models: str = flag("", "YAML file: a list of weights files, run folders, or {model_in: …, name: …, arch: …}")
    fullaa: bool = flag(True, "1: APGD-CE, APGD-T, FAB-T, Square; 0: the first two")
    norms: tuple[str, ...] = flag(("Linf",), "threat models, separated by commas", choices=NORMS)
    eps: tuple[float, ...] | None = flag(None, "radius of each norm, fractions allowed; unset: 4/255, 2, 75", above=0)
    ids: str = flag("auto", "robustbench: its 5,000 images; auto: those if val_dataset is ImageNet", choices=IMAGE_IDS)
    n_ex: int = flag(5000, "number of images, the first ones; 0: all", at_least=0)
    batch_size: int = flag(100, "images attacked together: a chunk; part of the result's identity", at_least=1)
    img_size: tuple[int, ...] = flag((224,), "image sizes in pixels, separated by commas", at_least=8)
    crop_pct: float = flag(
        0.875, "centre crop after resizing to img_size/crop_pct; 1 for small images", above=0, at_most=1
    )
    seed: int = flag(0, "seed of AutoAttack", at_least=0, at_most=2**32 - 1)
    out: str = flag("", "folder of state and reports; empty: eval/ beside the weights")
    save_adv: bool = flag(False, "1: keep the adversarial images (float32, npz), one file a chunk")
    precision: str = flag(
        "fp32", "tf32: faster on a GPU; what it breaks is confirmed in fp32", choices=("fp32", "tf32")
    )
    compile: bool = flag(False, "1: torch.compile the attacked model; what it breaks is confirmed uncompiled")
    channels_last: bool | None = flag(None, "1: channels_last memory format; unset: 1 on a GPU, 0 on a CPU")
    gpus: str = flag("auto", "auto: every free GPU; 0,1: these; none: the CPU. Under torchrun each process has its own")
    gpu_max_load: float = flag(0.5, "auto: a GPU with a larger load (share of time) is not free", at_least=0, at_most=1)
    gpu_max_memory: float = flag(0.5, "auto: a GPU with more of its memory in use is not free", at_least=0, at_most=1)
    gpu_wait: float = flag(0.0, "auto: minutes to wait for a free GPU; 0: do not wait", at_least=0)
    workers: int = flag(0, "processes on a CPU; 0: as many as eval.threads leaves cores for", at_least=0)
    threads: int = flag(1, "threads of one process on a CPU; part of the result's identity", at_least=1)


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """One network to evaluate: weights file or run folder, its name in tables ("": made of the path), and what flags say of it."""

    model_in: str
    name: str
    model: EvalModelConfig


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Everything `runner_aa_eval.py` needs."""

    model: EvalModelConfig
    data: EvalDataConfig
    eval: AttackConfig

    def __post_init__(self) -> None:
        settings = self.eval
        norms, eps = settings.norms, settings.eps
        for name, values in (("norms", norms), ("img_size", settings.img_size), ("model_in", settings.model_in)):
            if len(set(values)) != len(values):
                raise UserError(f"eval.{name}: expected each value once, got {','.join(map(str, values))}.")
        if "" in settings.model_in:
            raise UserError("eval.model_in: expected a file, folder or name, got nothing (an unset shell variable?).")
        if not settings.model_in and not settings.models:
            raise UserError("eval.model_in: required, but neither it nor eval.models is given.")
        if eps is None:
            eps = tuple(DEFAULT_EPS[n] for n in norms)
            object.__setattr__(self, "eval", dataclasses.replace(settings, eps=eps))
        elif len(eps) != len(norms):
            raise UserError(
                f"eval.eps: expected one radius for each of eval.norms={','.join(norms)}, separated by commas, got {len(eps)}."
            )
        for norm, radius in zip(norms, eps):
            _check_radius("eval.eps", norm, radius, size=min(settings.img_size))
        if settings.gpus not in ("auto", "none") and not re.fullmatch(r"\d+(,\d+)*", settings.gpus):
            raise UserError(f"eval.gpus: expected auto, none, or GPU numbers such as 0,1; got {settings.gpus!r}.")

    def networks(self) -> list[ModelEntry]:
        """The networks of `eval.model_in`, then those of the file `eval.models`; `model.*` flags hold where an entry says nothing.

        Raises:
            UserError: the file is missing, not YAML, or has unknown keys or values.
        """
        entries = [ModelEntry(model_in=path, name="", model=self.model) for path in self.eval.model_in]
        return entries + (_read_models_file(Path(self.eval.models), self.model) if self.eval.models else [])


ConfigT = TypeVar("ConfigT", TrainConfig, EvalConfig)


# --- values -----------------------------------------------------------------------------------------------------------


def _number(text: Any) -> float:
    if isinstance(text, bool):
        raise ValueError
    value = float(Fraction(text.replace(" ", ""))) if isinstance(text, str) and "/" in text else float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _integer(text: Any) -> int:
    if isinstance(text, (bool, float)):
        raise ValueError
    return int(text)


def _switch(text: Any) -> bool:
    return {"0": False, "1": True, "false": False, "true": True}[str(text).lower()]


def _string(text: Any) -> str:
    if isinstance(text, (bool, dict, list)):
        raise ValueError
    return str(text)


_SCALARS = {
    int: (_integer, "an integer"),
    float: (_number, "a number or a fraction such as 4/255"),
    bool: (_switch, "0 or 1"),
    str: (_string, "text"),
}


class _FlagChecker(fastargs.validation.Checker):
    """A flag's check in fastargs' form: converts text or YAML values to the field's type and holds its bounds."""

    def __init__(self, annotation: Any, meta: typing.Mapping[str, Any]) -> None:
        options = [a for a in typing.get_args(annotation) if a is not types.NoneType]
        if isinstance(annotation, types.UnionType):
            annotation = options[0]
        self.many = typing.get_origin(annotation) is tuple
        self.convert, self.kind = _SCALARS[typing.get_args(annotation)[0] if self.many else annotation]
        self.meta = meta

    def check(self, value: Any) -> Any:
        if not self.many:
            return self._check_one(value)
        items = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
        return tuple(self._check_one(item.strip() if isinstance(item, str) else item) for item in items)

    def _check_one(self, value: Any) -> Any:
        meta = self.meta
        result = self.convert(value)
        if meta["choices"] is not None and result not in meta["choices"]:
            raise ValueError
        if meta["at_least"] is not None and result < meta["at_least"]:
            raise ValueError
        if meta["at_most"] is not None and result > meta["at_most"]:
            raise ValueError
        if meta["above"] is not None and result <= meta["above"]:
            raise ValueError
        return result

    def help(self) -> str:
        meta = self.meta
        words = [f"one of {', '.join(meta['choices'])}" if meta["choices"] else self.kind]
        words += [f"{word} {meta[key]:g}" for key, word in _BOUND_WORDS.items() if meta[key] is not None]
        return ("a comma-separated list, each " if self.many else "") + ", ".join(words)


_BOUND_WORDS = {"above": "above", "at_least": "at least", "at_most": "at most"}


# --- reading ----------------------------------------------------------------------------------------------------------


def load_config(
    config_class: type[ConfigT], argv: Sequence[str], *, switches: argparse.ArgumentParser | None = None
) -> ConfigT:
    """Read a command line (without the program's name) and the config files it names.

    `switches`: options that the caller has read; `--help` lists them too.

    Raises:
        UserError: unknown flag or key, missing required flag, wrong type or range, unreadable file.
        SystemExit: status 0 after `--help`.
    """
    parser = _parser(config_class, [] if switches is None else [switches])
    arguments = vars(_parse(parser, argv))
    files = arguments.pop("config_file")
    known = list(arguments)
    config = _fastargs_config(config_class)
    for path in files:
        config.collect(_read_config_file(Path(path), known))
    config.collect({name: value for name, value in arguments.items() if value is not None})
    return _build(config_class, config)


def config_to_dict(config: Any) -> dict[str, dict[str, Any]]:
    """Sections → flags → plain values, as written to params.json and accepted as a config file."""
    return {name: dict(section) for name, section in dataclasses.asdict(config).items()}


def harmless_flags() -> frozenset[str]:
    """Dotted names of the training flags that cannot change the trained weights."""
    return frozenset(
        f"{section}.{f.name}"
        for section, cls in _sections(TrainConfig)
        for f in dataclasses.fields(cls)
        if f.metadata["harmless"]
    )


def _digest(config: TrainConfig) -> str:
    """Six hexadecimal digits over all flags that can change the trained weights."""
    harmless = harmless_flags() | {"logging.addendum"}
    values = {
        f"{section}.{name}": value
        for section, flags in config_to_dict(config).items()
        for name, value in flags.items()
        if f"{section}.{name}" not in harmless
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:6]


def _sections(config_class: type) -> list[tuple[str, type]]:
    return list(typing.get_type_hints(config_class).items())


def _fastargs_config(config_class: type) -> fastargs.Config:
    config = fastargs.Config()
    for name, cls in _sections(config_class):
        hints = typing.get_type_hints(cls)
        params = {
            f.name: fastargs.Param(
                _FlagChecker(hints[f.name], f.metadata),
                f.metadata["help"],
                default=None if f.default is REQUIRED else f.default,
                required=f.default is REQUIRED,
            )
            for f in dataclasses.fields(cls)
        }
        fastargs.Section(name, cls.__doc__, config_descriptor=config).params(**params)
    return config


def _build(config_class: type[ConfigT], config: fastargs.Config) -> ConfigT:
    missing = sorted(
        ".".join(p) for p, param in config.entries.items() if param.required and config.content.get(p) is None
    )
    if missing:
        raise UserError(f"{', '.join(missing)}: required, but neither given as a flag nor in a config file.")
    for path in config.validate(mode="errordict"):
        raise UserError(
            f"{'.'.join(path)}: expected {config.entries[path].checker.help()}, got {config.content[path]!r}"
            f"{_nearest_choice(config.entries[path].checker, config.content[path])}."
        )
    sections = {}
    for name, cls in _sections(config_class):
        sections[name] = cls(**{f.name: config[(name, f.name)] for f in dataclasses.fields(cls)})
    return config_class(**sections)


def _nearest_choice(checker: _FlagChecker, value: Any) -> str:
    near = difflib.get_close_matches(str(value), checker.meta["choices"] or (), n=1, cutoff=0.3)
    return f" (did you mean {near[0]}?)" if near else ""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"command line: {message}.")


def _parser(config_class: type, parents: list[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = _Parser(
        usage="%(prog)s [--config-file FILE] [--section.name=value …]",
        description=config_class.__doc__,
        allow_abbrev=False,
        parents=parents,
    )
    parser.add_argument(
        "--config-file",
        "-C",
        action="append",
        default=[],
        metavar="FILE",
        help="YAML or JSON file of flags; may be repeated",
    )
    for name, cls in _sections(config_class):
        group = parser.add_argument_group(name, cls.__doc__)
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            default = "required" if f.default is REQUIRED else f"default {_shown(f.default)}"
            text = f"{f.metadata['help']} ({_FlagChecker(hints[f.name], f.metadata).help()}; {default})".replace(
                "%", "%%"
            )
            group.add_argument(f"--{name}.{f.name}", metavar="V", help=text)
    return parser


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return str(int(default))
    if isinstance(default, tuple):
        return ",".join(map(str, default)) or "empty"
    return (
        {None: "unset", "": "empty"}.get(default, default) if isinstance(default, (str, type(None))) else str(default)
    )


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    arguments, unknown = parser.parse_known_args(list(argv))
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        raise UserError(f"command line: unknown flag {unknown[0]!r}{_did_you_mean(unknown[0].split('=')[0], known)}.")
    return arguments


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; the nearest known one is {near[0]!r}" if near else ""


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader, which refuses a key given twice instead of taking the last, and what contains itself."""

    def construct_document(self, node: yaml.Node) -> Any:
        self.deep_construct = True  # else a list or mapping may become an item of itself
        return super().construct_document(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for i, key in enumerate(keys) if key in keys[:i]]
        if twice:
            raise yaml.YAMLError(f"the key {twice[0]!r} is given twice")
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: Path, flag: str) -> Any:
    """A YAML or JSON file's content; a UserError, which begins with `flag`, where it cannot be read or gives a key twice."""
    try:
        return yaml.load(path.read_text(), _UniqueKeys)
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be read ({error.strerror}).") from error
    except RecursionError as error:
        raise UserError(f"{flag} {path}: expected YAML or JSON; it is nested too deeply.") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, or a date such as 2024-13-01
        raise UserError(f"{flag} {path}: expected YAML or JSON; {' '.join(str(error).split())}.") from error


def _read_config_file(path: Path, known: Sequence[str]) -> dict[str, Any]:
    """Dotted flag names → values of a YAML or JSON file; nested sections and dotted keys are both allowed."""
    content = read_yaml(path, "--config-file")
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"--config-file {path}: expected sections with flags, got {type(content).__name__}.")
    content.pop(PROVENANCE_KEY, None)
    values: dict[str, Any] = {}
    for section, flags in content.items():
        if flags is None and any(name.startswith(f"{section}.") for name in known):
            continue  # a section whose flags are all commented out
        values.update(
            {f"{section}.{k}": v for k, v in flags.items()} if isinstance(flags, dict) else {str(section): flags}
        )
    for name in values:
        if name not in known:
            raise UserError(f"--config-file {path}: unknown key {name!r}{_did_you_mean(name, known)}.")
        if values[name] is None and name not in OPTIONAL or isinstance(values[name], dict):
            raise UserError(f"--config-file {path}: {name} has no value; expected one, or no such line.")
    return values


def _read_models_file(path: Path, flags: EvalModelConfig) -> list[ModelEntry]:
    """A list of paths, or of mappings with `model_in`, perhaps `name`, and fields of `EvalModelConfig`."""
    content = read_yaml(path, "eval.models:")
    if not isinstance(content, list) or not content:
        found = "an empty one" if content == [] else type(content).__name__
        raise UserError(f"eval.models: expected a list of networks in {path}, got {found}.")
    hints = typing.get_type_hints(EvalModelConfig)
    checks = {f.name: _FlagChecker(hints[f.name], f.metadata) for f in dataclasses.fields(EvalModelConfig)}
    entries = []
    for number, item in enumerate(content, 1):
        where = f"eval.models: {path}, network {number}"
        item = {"model_in": item} if isinstance(item, str) else item
        if not isinstance(item, dict) or not isinstance(item.get("model_in"), str):
            raise UserError(f"{where}: expected a path, or a mapping with model_in, got {item!r}.")
        given = dict(item)
        model_in, name, values = given.pop("model_in"), given.pop("name", ""), {}
        if not isinstance(name, str):
            raise UserError(f"{where}: name: expected text, got {name!r}.")
        for key, value in given.items():
            if key not in checks:
                raise UserError(f"{where}: unknown key {key!r}{_did_you_mean(str(key), list(checks))}.")
            try:
                values[key] = checks[key].check(value)
            except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
                raise UserError(f"{where}: {key}: expected {checks[key].help()}, got {value!r}.") from error
        entries.append(ModelEntry(model_in=model_in, name=name, model=dataclasses.replace(flags, **values)))
    return entries
