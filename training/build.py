"""Build the parts of a run: images, loader, network, optimiser. Wrong flags and files are found here, before training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch

from common.errors import Problems, UserError, blame, blame_arguments
from common.processes import Processes
from common.seeding import derive_seed
from data.datasets import open_source
from data.imagenet_ids import CLASSES, imagenet_classes
from data.labels import named_by_numbers, number_by_index
from data.loader import TrainLoader
from data.memory import Once, alone
from data.source import Source, StreamSource, some
from data.transforms import Mixup
from training.config import TrainConfig
from training.ema import EMA
from training.optim import build_optimizer
from training.schedule import resolution_at_epoch
from training.shortcuts import asked_for, trim_last_block
from training.state import TrainState
from training.step import image_dtype
from training.surgery import checkpoint_blocks, freeze_body, freeze_parameters, head_names
from utils_architecture import IMAGENET_MEAN, IMAGENET_STD
from zoo.description import DESCRIPTION
from zoo.loading import Weights, load_weights, read_weights
from zoo.models import build_model
from zoo.names import locate, split_kind
from zoo.published import find_published
from zoo.runs import recorded_classes, recorded_input

AnySource = Source | StreamSource
# Argument of a network → the flag that sets it.
MODEL_FLAGS = {name: f"{section}.{name}" for name, (section, _) in DESCRIPTION.items()}
MODEL_FLAGS |= {name: f"model.{name}" for name in ("pretrained", "drop_path")}


@dataclass(frozen=True)
class Parts:
    """The parts of a run."""

    train_source: AnySource
    val_source: AnySource
    loader: TrainLoader
    state: TrainState
    notes: list[str]  # sentences for the user


def build_parts(
    config: TrainConfig,
    processes: Processes,
    *,
    accum: int | None = None,
    initial: bool = True,
    once: Once = alone,
) -> Parts:
    """Build all parts of a run.

    Args:
        accum: replaces `training.grad_accum`.
        initial: as in `build_state`.
        once: as in `open_source`, for `data.in_memory`.

    Raises:
        UserError: flags, images or weights do not fit; the error lists all problems.
    """
    problems = Problems()
    train = val = loader = state = None
    notes = []
    with problems.caught():
        train, val = open_sources(config, once=once, progress=processes.is_first)
    if train is not None and val is not None:
        problems.found += source_problems(config, train, val)
        if initial:
            with problems.caught():
                notes += head_notes(config, train)
        with problems.caught():
            loader = build_train_loader(config, train, processes, accum=accum)
    with problems.caught():
        state = build_state(config, processes, initial=initial, notes=notes)
        check_image_sizes(state.model, config)
    problems.report()
    return Parts(train, val, loader, state, notes)


def open_sources(config: TrainConfig, *, once: Once = alone, progress: bool = False) -> tuple[AnySource, AnySource]:
    """Open training and validation images, and check that their classes match; `once` is as in `open_source`."""
    data, problems = config.data, Problems()
    opened = partial(open_source, root=data.root, in_memory=data.in_memory, once=once, progress=progress)
    train = val = None
    with problems.caught(), blame("data.train_dataset"):
        train = opened(data.train_dataset, split="train", split_name=data.train_split)
    by_index = data.classes == "index"
    if by_index and train is not None:
        with problems.caught(), blame("data.classes"):
            number_by_index(train)
    with problems.caught(), blame("data.val_dataset"):
        names = train and train.class_names
        val = opened(data.val_dataset, split="val", split_name=data.val_split, class_names=names)
        if by_index and names is None:
            number_by_index(val)
    problems.report()
    return train, val


def source_problems(config: TrainConfig, train: AnySource, val: AnySource) -> list[str]:
    """Return a sentence for each conflict between images and flags."""
    m, problems = config.model, []
    if isinstance(val, StreamSource) and config.validation.adv_n_ex:
        problems.append(
            "validation.adv_n_ex: the quick adversarial validation picks images by index, but "
            f"{config.data.val_dataset} can only be read in order; give --validation.adv_n_ex=0 or another kind of data set."
        )
    for flag, source in (("data.train_dataset", train), ("data.val_dataset", val)):
        if source.num_classes not in (None, m.num_classes):
            kept = m.ckpt_path and not (m.new_head or config.training.eval_only)
            new = ", and --model.new_head=1 if the weights of model.ckpt_path have another number" if kept else ""
            problems.append(
                f"model.num_classes: the head has {m.num_classes} classes, but {flag} has {source.num_classes}; "
                f"give --model.num_classes={source.num_classes}{new}."
            )
            break
    if train.class_names is None and named_by_numbers(val, m.num_classes):
        problems.append(
            "data.val_dataset: expected classes numbered like those of the training set, which has no class names, got numbers "
            f"sorted as names ({some(val.class_names)}); give --data.classes=index."
        )
    return problems


def head_notes(config: TrainConfig, train: AnySource) -> list[str]:
    """Return a note if the head at the start of training has other class names than `train`.

    Raises:
        UserError: the head has the same names in another order, or the names of `train` are numbers sorted as text.
    """
    m, names, by_index = config.model, train.class_names, config.data.classes == "index"
    kept = not m.new_head if m.ckpt_path else m.pretrained and m.num_classes == CLASSES
    if not kept or names is None or len(names) != m.num_classes:
        return []
    known = recorded_classes(split_kind(m.ckpt_path)[0]) if m.ckpt_path else None
    if known is None and train.of_folders and m.num_classes == CLASSES:
        known = imagenet_classes()
    if known == names or (known is not None and len(known) != len(names)):
        return []
    numbers = not by_index and named_by_numbers(train, m.num_classes)
    same = known is not None and set(known) == set(names)
    if numbers and not same:
        found = f"numbers, sorted as names ({some(names)})"
    elif known is not None:
        found = next(f"{own!r} in the place of {other!r}" for own, other in zip(names, known) if own != other)
    flag, new = ("model.ckpt_path", "model.new_head=1") if m.ckpt_path else ("model.pretrained", "model.pretrained=0")
    if numbers or same:
        remedies = ["--data.classes=index if folder k is class k"] * numbers + ["--data.classes=name"] * by_index
        remedies += [f"--{new}"] * (not config.training.eval_only)
        raise UserError(
            f"data.train_dataset: expected its classes in the order of the head of {flag}, got {found}; give "
            f"{', or '.join(remedies) or 'the classes of these weights'}."
        )
    if known is None or by_index:
        return []
    other = "the measured accuracy is meaningless" if config.training.eval_only else f"give --{new}"
    return [f"{flag}: the head is kept, but data.train_dataset has {found}; if these are other classes, {other}"]


def build_train_loader(
    config: TrainConfig, source: AnySource, processes: Processes, *, accum: int | None = None
) -> TrainLoader:
    """Build the loader of training batches for this process; `accum` replaces `training.grad_accum`."""
    flags = {"batch_size": "training.batch_size", "num_workers": "data.num_workers"}
    with blame_arguments(flags):
        return TrainLoader(
            source,
            augmentation=config.data.augmentations,
            pipeline=config.data.pipeline,
            # eval_only trains on no image, so it accepts any batch size.
            batch_size=1 if config.training.eval_only else config.training.batch_size,
            accum=accum or config.training.grad_accum,
            seed=config.data.seed,
            rank=processes.rank,
            world_size=processes.world_size,
            num_workers=config.data.num_workers,
            min_scale=config.data.min_scale,
            flip=config.data.flip,
            crop_pct=config.validation.crop_pct,
            pin_memory=processes.device.type != "cpu",
        )


def build_mixup(config: TrainConfig) -> Mixup | None:
    """Build the mixup with soft labels; return None without `data.augmentations=1`."""
    if config.data.augmentations != 1:
        return None
    return Mixup(num_classes=config.model.num_classes, label_smoothing=config.label_smoothing)


def input_note(path: Path, weights: Weights, name: str, *, normalized: bool) -> list[str]:
    """Return a note if the input normalisation of this run differs from that of the weights.

    `name`: the weights as the user gave them; it can be the name of a published model.
    """
    recorded = recorded_input(path, weights.arguments)
    if recorded is None and (known := find_published(name)) is not None and "add_normalization" in known.description:
        pair = {"mean": torch.tensor(IMAGENET_MEAN), "std": torch.tensor(IMAGENET_STD)}
        recorded = pair if known.description["add_normalization"] else None, "the table of published models"
    if recorded is None or weights.normalizer is not None:
        return []
    pair, source = recorded
    own = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD} if normalized else None
    same = (
        all(torch.allclose(pair[key].flatten(), torch.tensor(own[key]), atol=1e-3) for key in own)
        if own and pair
        else own == pair
    )
    if same:
        return []
    mean_std = pair and " and ".join(f"{key} {[round(v, 4) for v in pair[key].flatten().tolist()]}" for key in pair)
    was = f"normalised with {mean_std}" if pair else "not normalised"
    now = "normalised with ImageNet's" if own else "not normalised"
    remedy = "" if own and pair else f"; give --model.add_normalization={int(pair is not None)}"
    return [f"model.ckpt_path: images were {was} for these weights ({source}), but are {now} in this run{remedy}"]


def build_state(
    config: TrainConfig, processes: Processes, *, initial: bool = True, notes: list[str] | None = None
) -> TrainState:
    """Build network (its initial weights depend on `data.seed` only), EMA, optimiser and loss scaler on the device.

    `initial`: load the start weights; a run that resumes from a training state does not need them. Sentences for the user are
    added to `notes`.
    """
    torch.manual_seed(derive_seed("init", config.data.seed))
    m, training = config.model, config.training
    if training.precision == "tf32" and not torch.cuda.is_available():  # --check builds on the CPU
        raise UserError("training.precision: tf32 needs an NVIDIA GPU, but there is none; give fp32 or bf16.")
    build = partial(
        build_model,
        m.arch,
        not_original=m.not_original,
        updated=m.updated,
        drop_path=m.drop_path,
        use_blurpool=training.use_blurpool,
        add_normalization=m.add_normalization,
    )
    with blame_arguments(MODEL_FLAGS):
        # Do not download weights that ckpt_path replaces.
        model = build(num_classes=m.num_classes, pretrained=initial and m.pretrained and not m.ckpt_path)

    @cache
    def head() -> set[str]:
        try:
            return head_names(model, build(num_classes=m.num_classes + 1))
        except UserError as error:
            raise UserError(
                "model.new_head, lr.body_factor: expected an architecture with a free number of classes, got "
                f"{m.arch} ({error})"
            ) from error

    first_weights = None
    if initial and m.ckpt_path:
        with blame("model.ckpt_path"):
            name, kind = split_kind(m.ckpt_path)
            # The first process of each machine downloads a published model, while the others wait.
            path = Path(processes.once_here("weights", lambda: str(locate(name, kind=kind).path)))
            weights = read_weights(path)
            if notes is not None:
                notes += input_note(path, weights, name, normalized=m.add_normalization)
            first_weights = {"file": str(path), "key": weights.key, "sha256": weights.sha256}
            try:
                load_weights(model, weights, source=path, keep=head() if m.new_head else ())
            except UserError as error:
                if m.new_head or not fits_but_for_head(model, weights, head):
                    raise
                raise UserError(f"{error} Only the head differs: --model.new_head=1 starts with a new head.") from error
    factor, frozen = config.lr.body_factor, []
    if m.freeze_some:
        frozen = freeze_parameters(model, early=m.early)
    elif factor == 0:
        frozen = freeze_body(model, head())
    if asked_for(training.trim_last_block, processes.device) and not training.eval_only:
        trim_last_block(model)
    if training.grad_checkpointing:
        checkpoint_blocks(model)
    memory_format = torch.channels_last if config.misc.use_channel_last else torch.contiguous_format
    model = model.to(processes.device, image_dtype(training.precision), memory_format=memory_format)
    return TrainState(
        model=model,
        optimizer=build_optimizer(
            model, arch=m.arch, training=training, head=head() if factor != 1 else frozenset(), body_factor=factor
        ),
        scaler=torch.amp.GradScaler(processes.device.type, enabled=training.precision == "fp16"),
        ema=EMA(model, decay=m.ema_decay, warmup=m.ema_warmup) if m.model_ema else None,
        frozen=frozen,
        first_weights=first_weights,
    )


def fits_but_for_head(model: torch.nn.Module, weights: Weights, head: Callable[[], set[str]]) -> bool:
    """Load the weights except the tensors of `head`; return whether the rest fits."""
    try:
        load_weights(model, weights, source="", keep=head())
    except UserError:
        return False
    return True


def check_image_sizes(model: torch.nn.Module, config: TrainConfig) -> None:
    """Check every image size of the run with one forward pass of a black image, so that a wrong size fails at the start."""
    sizes = [("validation.resolution", config.validation.resolution)]
    if not config.training.eval_only:
        epochs = range(config.training.epochs)
        trained = {resolution_at_epoch(epoch, resolution=config.resolution) for epoch in epochs}
        sizes += [("resolution.min_res, resolution.max_res", size) for size in sorted(trained)]
    parameter = next(model.parameters())
    model.eval()
    # For example, interpolated position embeddings have no deterministic gradient on a GPU.
    with_gradient = config.training.deterministic and not config.training.eval_only
    for flag, size in sizes:
        try:
            with torch.set_grad_enabled(with_gradient):
                logits = model(torch.zeros(1, 3, size, size, device=parameter.device, dtype=parameter.dtype))
            if with_gradient:
                logits.sum().backward()
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"{flag}: {config.model.arch} does not accept images of {size} pixels: {reason}") from error
        finally:
            model.zero_grad()
