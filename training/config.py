"""The flags of `train.py`. The 55 flags of the published system keep their names, defaults and meaning (docs/differences.md)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attacks.norms import DEFAULT_EPS, NORMS, check_radius
from attacks.registry import ATTACKS
from common.errors import Problems, blame
from common.flags import REQUIRED, Config, config_to_dict, flag, sections_of
from training.idle import attacks_that, idle_flags
from training.schedule import SCHEDULES

# Of torch.compile. The modes `reduce-overhead` and `max-autotune` record CUDA graphs.
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
# fp64 is for comparing runs to the last digits, not for training.
PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "fp64")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network that is trained."""

    arch: str = flag("convnext_tiny", "architecture: a name of utils_architecture.ARCHITECTURES or timm_<timm name>")
    pretrained: bool = flag(True, "1: start from timm's pretrained weights (downloaded)")
    ckpt_path: str = flag(
        "", "start weights: file, run folder or published model (NAME: clean weights, NAME:robust: robust weights)"
    )
    new_head: bool = flag(False, "1: load model.ckpt_path except its head; the new head fits other classes")
    add_normalization: bool = flag(True, "1: ImageNet mean/std normalisation inside the model")
    not_original: bool = flag(False, "1: replace the PatchStem by a ConvStem")
    updated: bool = flag(False, "1: convnext_iso with stem and width 432")
    model_ema: bool = flag(False, "1: keep, save and validate an exponential moving average (EMA) of the weights")
    freeze_some: bool = flag(False, "1: train only some parameters, chosen by model.early")
    early: bool = flag(True, "with freeze_some: 1 trains only parameters named *stem*, 0 freezes only those")
    num_classes: int = flag(1000, "number of classes of the head", at_least=2)
    drop_path: float | None = flag(None, "stochastic depth rate; unset: timm's default", at_least=0, at_most=0.95)
    ema_decay: float = flag(0.9999, "decay of the EMA per optimiser step", at_least=0, at_most=1)
    ema_warmup: bool = flag(False, "1: decay min(ema_decay, (1 + step) / (10 + step)), for short runs")


@dataclass(frozen=True, kw_only=True)
class ResolutionConfig:
    """Training image size by epoch."""

    min_res: int = flag(160, "image size in pixels up to epoch start_ramp", at_least=8)
    max_res: int = flag(160, "image size in pixels from epoch end_ramp", at_least=8)
    start_ramp: int = flag(0, "epoch up to which min_res is used", at_least=0)
    end_ramp: int = flag(0, "epoch from which max_res is used; linear in between, in multiples of 32", at_least=0)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Sources of images, and their augmentation."""

    # The path of the images does not identify a run: a resumed run checks their number and classes instead.
    train_dataset: str = flag(
        REQUIRED, "training images: folder, tar, digits, or hfds/… wds/… tfds/… torch/…", harmless=True
    )
    val_dataset: str = flag(REQUIRED, "validation images, in the same forms", harmless=True)
    num_workers: int | None = flag(
        None,
        "loader workers per training process, and as many for validation; unset: its share of the cores, at most 12",
        at_least=0,
        harmless=True,
    )
    in_memory: bool = flag(False, "1: keep all encoded images in memory, shared by the workers", harmless=True)
    seed: int = flag(0, "seed of all random numbers", at_least=0)
    augmentations: int = flag(
        0, "0 basic (crop, flip), 1 heavy (RandAugment, erasing, mixup), 2 none", at_least=0, at_most=2
    )
    pipeline: str = flag(
        "fast",
        "fast: workers decode and crop, the device augments; timm: all by timm in the workers; same distribution",
        choices=("timm", "fast"),
    )
    root: str = flag("", "root folder (cache) of hfds/ tfds/ torch/ data sets", harmless=True)
    train_split: str = flag("", "name of the training split for timm's readers; empty: train")
    val_split: str = flag("", "name of the validation split for timm's readers; empty: validation", harmless=True)
    classes: str = flag(
        "name",
        "class numbers; name: position among the sorted names; index: folder k is class k, or k − 1 without a folder 0",
        choices=("name", "index"),
    )
    min_scale: float = flag(0.08, "smallest share of the image's area in RandomResizedCrop", above=0, at_most=1)
    flip: float = flag(0.5, "probability of a horizontal flip (published code, basic: 0)", at_least=0, at_most=1)
    max_bad_images: int = flag(100, "undecodable images in one epoch before training stops", at_least=0, harmless=True)


@dataclass(frozen=True, kw_only=True)
class LRConfig:
    """Learning rate."""

    lr: float = flag(1e-3, "highest learning rate; not scaled with the batch size", above=0)
    lr_schedule_type: str = flag(
        "cosine",
        "cosine: warm-up, then half a cosine; cyclic: warm-up, then linear to 0; step: factor every step_length epochs",
        choices=tuple(SCHEDULES),
    )
    lr_peak_epoch: int = flag(10, "epoch at which cosine and cyclic reach the peak", at_least=0)
    step_ratio: float = flag(0.1, "step: learning rate factor every step_length epochs", above=0)
    step_length: int = flag(30, "step: epochs between two reductions", at_least=1)
    body_factor: float = flag(
        1.0,
        "learning rate factor for all layers except the head; 0: train only the head (linear probing)",
        at_least=0,
    )


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is written, where and how often."""

    folder: str = flag("runs", "parent folder of the run folders", harmless=True)
    log_level: int = flag(
        1, "per step: 0 nothing, 1 epoch, step, shape and lr, 2 also the loss", at_least=0, at_most=2, harmless=True
    )
    save_freq: int = flag(
        2, "epochs between two saved weights files; the last epoch is always saved", at_least=1, harmless=True
    )
    addendum: str = flag("", "appended to the run's name")
    keep: int = flag(
        5, "saved epochs to keep (raw and EMA each), the oldest is deleted first; 0: all", at_least=0, harmless=True
    )
    ckpt_minutes: float = flag(
        15.0, "minutes between two saved training states; 0: not by time", at_least=0, harmless=True
    )
    ckpt_steps: int = flag(0, "steps between two saved training states; 0: not by steps", at_least=0, harmless=True)


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Validation during and after training."""

    batch_size: int = flag(64, "images per process", at_least=1, harmless=True)
    resolution: int = flag(224, "image size in pixels", at_least=8, harmless=True)
    lr_tta: bool = flag(False, "1: average the logits with those of the mirrored image", harmless=True)
    precision: str = flag("fp16", "autocast of validation", choices=PRECISIONS, harmless=True)
    freq: int = flag(1, "epochs between two validations; the last epoch is always validated", at_least=1, harmless=True)
    adv_n_ex: int = flag(
        512, "images of the quick adversarial validation, spread over the set; 0: none", at_least=0, harmless=True
    )
    adv_n_iter: int = flag(10, "APGD updates of the quick adversarial validation", at_least=1, harmless=True)
    crop_pct: float = flag(0.875, "centre crop after resizing to size/crop_pct; 1 for small images", above=0, at_most=1)
    stop_on_overfitting: bool = flag(
        False,
        "1: stop when robustness to the training attack rises while robustness to a stronger attack is lost",
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
        "precision of attack and training: fp16 (with loss scaling) and bf16 use autocast; tf32 needs a GPU",
        choices=PRECISIONS,
    )
    grad_clip: float = flag(0.0, "largest L2 norm of the gradient; 0: no clipping", at_least=0)
    grad_accum: int = flag(1, "forward passes summed into one optimiser step", at_least=1)
    global_batch: int = flag(
        0,
        "images per step that lr.lr is meant for; another number gives a warning at the start; 0: any",
        at_least=0,
        harmless=True,
    )
    resume: str = flag(
        "auto",
        "auto: resume from the run folder's state, if any; none: start from scratch; or a run folder or state file",
        harmless=True,
    )
    resume_force: bool = flag(False, "1: resume although flags that change the results differ", harmless=True)
    max_bad_steps: int = flag(
        20,
        "steps skipped in a row (loss or gradient not finite) before the run ends with status 3",
        at_least=1,
        harmless=True,
    )
    deterministic: bool = flag(False, "1: only deterministic algorithms, for exact resume on a GPU")
    grad_checkpointing: bool = flag(
        False, "1: store fewer activations and recompute them: less memory, more time", harmless=True
    )
    compile: str = flag(
        "auto",
        "torch.compile for attack and training, in one of its modes (1: default); auto: 1 on a GPU, 0 on a CPU; changes "
        "rounding only",
        choices=("auto", "0", "1", *COMPILE_MODES),
        harmless=True,
    )
    trim_last_block: str = flag(
        "auto",
        "1: the last block computes only what the head reads; auto: 1 on a CPU, 0 on a GPU; changes rounding only",
        choices=("auto", "0", "1"),
        harmless=True,
    )
    profile_steps: int = flag(
        0, "steps that the first process profiles, written to the run folder; 0: none", at_least=0, harmless=True
    )
    reuse_forward: str = flag(
        "auto",
        "1: use APGD's last forward pass also for training; auto: 1 on a CPU, 0 on a GPU; changes rounding only",
        choices=("auto", "0", "1"),
        harmless=True,
    )


@dataclass(frozen=True, kw_only=True)
class DistConfig:
    """Processes with training.distributed=1; torchrun uses its own settings instead."""

    world_size: int = flag(1, "number of processes; a resumed run keeps its global batch", at_least=1, harmless=True)
    address: str = flag("localhost", "address of the first process", harmless=True)
    port: int = flag(0, "port of the first process; 0: a free one", at_least=0, at_most=65535, harmless=True)
    timeout_minutes: float = flag(
        10.0, "longest time that a process waits for the others before the run ends", above=0, harmless=True
    )
    end_margin_minutes: float = flag(
        3.0, "minutes before the end of a Slurm job at which the run saves and stops", at_least=0, harmless=True
    )

    @property
    def processes(self) -> int:
        """Number of the run's processes; under torchrun the number that torchrun started."""
        return int(os.environ["WORLD_SIZE"]) if {"RANK", "WORLD_SIZE"} <= os.environ.keys() else self.world_size

    @property
    def processes_here(self) -> int:
        """Number of the run's processes on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.processes)) if "RANK" in os.environ else self.processes


@dataclass(frozen=True, kw_only=True)
class AdvConfig:
    """The attack used in training."""

    attack: str = flag("none", "none: clean training", choices=tuple(ATTACKS))
    norm: str = flag("Linf", "threat model", choices=NORMS)
    eps: float | None = flag(None, "radius; fractions are allowed; unset: 4/255 (Linf), 2 (L2), 75 (L1)", above=0)
    n_iter: int = flag(2, "updates of a multi-step attack", at_least=1)
    verbose: bool = flag(
        False, "1: log loss and accuracy of every attack step (synchronises with the GPU)", harmless=True
    )
    noise_level: float = flag(1.0, "FGSM: size of the random start in units of eps", at_least=0)
    skip_projection: bool = flag(False, "FGSM: 1 does not project the result onto ball and box")
    alpha: float = flag(1.0, "FGSM: step size in units of eps", above=0)
    eps_warmup_epochs: float = flag(0.0, "epochs over which eps grows linearly from 0", at_least=0)


@dataclass(frozen=True, kw_only=True)
class MiscConfig:
    """Other flags."""

    notes: str = flag("", "free text, stored with the run", harmless=True)
    use_channel_last: bool = flag(True, "1: channels_last memory format")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """All flags of `train.py`."""

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
        if self.data.num_workers is None:
            workers = min(12, max(1, len(os.sched_getaffinity(0)) // self.dist.processes_here))
            object.__setattr__(self, "data", dataclasses.replace(self.data, num_workers=workers))
        if self.adv.eps is None:
            object.__setattr__(self, "adv", dataclasses.replace(self.adv, eps=DEFAULT_EPS[self.adv.norm]))

    def problems(self) -> list[str]:
        problems = Problems()
        with problems.caught(), blame("adv.eps"):
            check_radius(self.adv.norm, self.adv.eps, size=self.resolution.min_res)
        if self.adv.norm not in (norms := ATTACKS[self.adv.attack].norms):
            problems.found.append(
                f"adv.norm: adv.attack={self.adv.attack} is defined only for {' and '.join(norms)}, got {self.adv.norm!r}; use "
                f"adv.attack={attacks_that(lambda entry: self.adv.norm in entry.norms)}."
            )
        if self.data.augmentations == 1 and self.training.batch_size % 2:
            problems.found.append(
                "training.batch_size: data.augmentations=1 mixes pairs of images, so expected an even number, "
                f"got {self.training.batch_size}."
            )
        if self.training.compile in CUDA_GRAPHS and self.training.grad_accum > 1:
            problems.found.append(
                f"training.compile: {self.training.compile} records CUDA graphs, whose gradients the next micro-batch overwrites, "
                f"but training.grad_accum is {self.training.grad_accum}; give default or max-autotune-no-cudagraphs."
            )
        if self.resolution.end_ramp < self.resolution.start_ramp:
            problems.found.append(
                f"resolution.end_ramp: expected at least resolution.start_ramp={self.resolution.start_ramp}, "
                f"got {self.resolution.end_ramp}."
            )
        if self.resolution.max_res < self.resolution.min_res:
            problems.found.append(
                f"resolution.max_res: expected at least resolution.min_res={self.resolution.min_res}, "
                f"got {self.resolution.max_res}."
            )
        if (
            "lr_peak_epoch" in SCHEDULES[self.lr.lr_schedule_type].flags
            and self.lr.lr_peak_epoch >= self.training.epochs
            and not (self.training.eval_only or self.training.resume_force)
        ):
            problems.found.append(
                f"lr.lr_peak_epoch: the learning rate would rise until the end of training; expected less than "
                f"training.epochs={self.training.epochs}, got {self.lr.lr_peak_epoch}. Give --lr.lr_peak_epoch="
                f"{self.training.epochs // 5}; a run that already started this way resumes with --training.resume_force=1."
            )
        if self.model.new_head and not self.model.ckpt_path:
            problems.found.append(
                "model.new_head: expected weights for the rest of the network in model.ckpt_path, got none; model.pretrained=1 "
                "gets a new head without this flag if model.num_classes differs from timm's weights."
            )
        if self.model.freeze_some and not self.lr.body_factor:
            problems.found.append(
                "lr.body_factor: 0 freezes all but the head, model.freeze_some=1 freezes another part; give only one of them."
            )
        if self.training.resume == "":
            problems.found.append(
                "training.resume: expected auto, none or a path, got an empty value (an unset shell variable?)."
            )
        if self.training.eval_only and self.training.resume not in ("auto", "none"):
            problems.found.append(
                "training.resume: training.eval_only=1 does not train, so there is nothing to resume; give the weights to validate "
                "as model.ckpt_path (a run folder is accepted)."
            )
        if self.dist.world_size > 1 and not self.training.distributed:
            problems.found.append(
                f"dist.world_size: {self.dist.world_size} processes are requested, but training.distributed is 0; "
                "give --training.distributed=1."
            )
        return problems.found

    @property
    def label_smoothing(self) -> float:
        """Label smoothing inside mixup; the published on/off value 1 means 0.1."""
        return 0.1 if self.training.label_smoothing == 1 else self.training.label_smoothing

    def on(self, device_type: str, *, begun_with: str | None = None) -> TrainConfig:
        """Return the flags for a device of this type: without a given precision, a CPU uses fp32.

        float16 is the published default, meant for GPUs. On CPUs it is five times slower.

        `begun_with`: training precision of the run that resumes; it is kept.
        """
        fitting = "fp32" if device_type == "cpu" else "fp16"
        chosen = {"validation": fitting, "training": begun_with or fitting}
        return dataclasses.replace(
            self,
            **{
                name: dataclasses.replace(getattr(self, name), precision=precision)
                for name, precision in chosen.items()
                if f"{name}.precision" not in self.given
            },
        )

    def uncounted(self) -> set[str]:
        """Return the flags that cannot change the results: the weights, or with eval_only the numbers of validation."""
        idle = idle_flags(self).keys()
        if self.training.eval_only:
            counted = ("model.", "validation.", "adv.", "data.val_", "data.seed", "misc.use_", "training.eval_only")
            counted += ("data.classes", "training.use_blurpool", "training.precision")
            return {name for name, _ in _fields() if not name.startswith(counted)} | idle
        harmless = {name for name, f in _fields() if f.metadata["harmless"]}
        return harmless | idle | ({"adv.norm", "adv.eps"} if self.adv.attack == "none" else set())

    @property
    def global_batch(self) -> int:
        """Images per optimiser step, over all processes."""
        return self.training.batch_size * self.training.grad_accum * self.dist.processes

    @property
    def run_name(self) -> str:
        """Name of the run's folder: the main flags, a digest of all flags that change the result, and the addendum.

        The name contains no time, so the same command line finds the same folder again. The digest covers only flags that differ
        from their defaults, so a flag added in a later version does not rename existing runs.
        """
        stem = "_cvst" if self.model.not_original else ""
        parts = [self.model.arch.replace("/", "-") + stem]
        if self.adv.attack != "none":
            steps = self.adv.n_iter if "n_iter" in ATTACKS[self.adv.attack].flags else ""
            parts.append(f"{self.adv.attack}{steps}_{self.adv.norm}_{self.adv.eps:.4g}")
        else:
            parts.append("clean")
        if self.training.eval_only:
            parts.append(f"eval_{self.validation.resolution}px_seed{self.data.seed}")
        else:
            parts.append(("basic", "heavy", "plain")[self.data.augmentations])
            parts.append(f"{self.training.epochs}ep_{self.resolution.max_res}px_seed{self.data.seed}")
            parts.append(f"batch{self.global_batch}")
        settings = json.dumps(self.settings(), sort_keys=True)
        parts.append(hashlib.sha256(settings.encode()).hexdigest()[:6])
        return "_".join([*parts, *filter(None, [self.addendum])])

    @property
    def addendum(self) -> str:
        """`logging.addendum` as it appears in the run's name."""
        return "".join(c if c.isalnum() or c in "-_.=" else "-" for c in self.logging.addendum)

    def settings(self) -> dict[str, Any]:
        """Return the settings that identify the run: flags (dotted names) that change its result and differ from their defaults.

        Flags without effect do not count, nor how a global batch is split into processes and micro-batches.
        """
        values = {
            f"{section}.{name}": v for section, flags in config_to_dict(self).items() for name, v in flags.items()
        }
        for path in ("model.ckpt_path", "data.val_dataset"):
            values[path] = values[path].rstrip("/")
        uncounted = self.uncounted() | {"logging.addendum", "training.grad_accum"}
        if "training.precision" not in self.given:  # the device decides
            uncounted |= {"training.precision"}
        defaults = default_values(self.adv.norm)
        return {name: v for name, v in values.items() if name not in uncounted and v != defaults[name]}

    @property
    def run_folder(self) -> Path:
        """Folder for all files of the run."""
        return Path(self.logging.folder) / self.run_name


def default_values(norm: str) -> dict[str, Any]:
    """Return dotted names and defaults of all training flags; the default radius depends on the norm."""
    return {name: f.default for name, f in _fields()} | {"adv.eps": DEFAULT_EPS[norm]}


def _fields() -> list[tuple[str, dataclasses.Field]]:
    return [(f"{section}.{f.name}", f) for section, cls in sections_of(TrainConfig) for f in dataclasses.fields(cls)]
