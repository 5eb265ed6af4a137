"""What an evaluation is: one network, one set of images at one size, one threat model. And the list of all that were asked for."""

from __future__ import annotations

import functools
import hashlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attacks.norms import check_radius, odd_radius
from common.errors import UserError, blame
from common.provenance import installed_version
from data.loader import print_warning, spread_indices
from evaluation.autoattack import check_classes, package_name
from evaluation.config import ATTACKS, EvalAttackConfig, EvalConfig, EvalModelConfig, ModelEntry
from evaluation.images import ImageList, open_images
from utils_architecture import IMAGENET_MEAN, IMAGENET_STD, normalize_model
from zoo.description import Preprocessing, RunFacts
from zoo.loading import has_normalizer
from zoo.names import Located, locate
from zoo.published import Published
from zoo.runs import TrainedModel, load_trained

TRIED, CLEAR_GAP = 16, 0.25  # clean images that are classified behind other normalisers; share that must gain
# What else images may be fed as: flags that ask for it → mean and std of the normaliser.
READINGS = {
    "--model.add_normalization=0": None,
    "--model.add_normalization=1": (IMAGENET_MEAN, IMAGENET_STD),
    "--model.mean=0.5,0.5,0.5 --model.std=0.5,0.5,0.5": ([0.5] * 3, [0.5] * 3),
    "--model.mean=0,0,0 --model.std=0.00392157,0.00392157,0.00392157": ([0.0] * 3, [1 / 255] * 3),
}
# Their versions can change pixels, logits or attacks.
PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow")


@dataclass(frozen=True)
class Evaluation:
    """One network × image size × threat model; picklable, so that workers can do it.

    `network` is its name in tables, `description` the network that `weights` holds, complete; `class_names` those of its outputs,
    where known; `published` the published model it is, if any; `run` what its own run says of it; `preprocessing` what images go
    through, with their size, and `fed` how the network gets them, in words; `classes` the numbers of the classes that the data set
    has; `among` those that predictions are taken from, None for all of the network's; `n` the number of images; `batch_size` that
    of a chunk; `folder` has state and report; `identity` is everything the verdicts depend on, as plain values.
    """

    network: str
    weights: Path
    description: EvalModelConfig
    class_names: list[str] | None
    published: Published | None
    norm: str
    eps: float
    preprocessing: Preprocessing
    fed: str
    run: RunFacts
    classes: tuple[int, ...]
    among: tuple[int, ...] | None
    n: int
    batch_size: int
    folder: Path
    identity: Mapping[str, Any]

    @property
    def img_size(self) -> int:
        """Image side in pixels."""
        return self.preprocessing.img_size

    @property
    def group(self) -> tuple[str, int]:
        """The same for all threat models of a network at one size."""
        return self.network, self.img_size

    @property
    def outputs(self) -> int:
        """How many classes predictions are taken from."""
        return self.description.num_classes if self.among is None else len(self.among)

    @property
    def choice(self) -> str:
        """What predictions are taken from where the data set has not all classes; else nothing."""
        if len(self.classes) == self.description.num_classes:
            return ""
        return (
            f"; the images have {len(self.classes)} of the network's {self.description.num_classes} classes, predictions are among "
            f"{'all' if self.among is None else 'these'} (eval.among={'all' if self.among is None else 'dataset'})"
        )

    @property
    def chunks(self) -> int:
        return -(-self.n // self.batch_size)

    def positions(self, chunk: int) -> list[int]:
        """Places of a chunk's images in the list."""
        return list(range(chunk * self.batch_size, min((chunk + 1) * self.batch_size, self.n)))

    def __str__(self) -> str:
        return f"{self.network}, {self.norm} {show_eps(self.eps)}, {self.img_size} px"


@dataclass(frozen=True)
class Plan:
    """All evaluations of one call, the folder that holds theirs, and the images by network."""

    evaluations: list[Evaluation]
    root: Path
    images: dict[str, ImageList]


def make_plan(config: EvalConfig, *, on_gpu: bool) -> Plan:
    """Every network × image size × norm, in that order. Each network is loaded, and tried at each size, on the CPU.

    Prints what images go through, and what a user should know of a network.

    Raises:
        UserError: what would stop the evaluation later: weights, images, image sizes.
    """
    settings = config.eval
    if settings.precision == "tf32" and not on_gpu:
        raise UserError(
            "eval.precision: TensorFloat-32 needs a GPU, and this evaluation runs on the CPU; expected fp32."
        )
    entries = config.networks()
    with blame("eval.model_in"):
        located = [locate(entry.model_in) for entry in entries]
    paths = [found.path for found in located]
    plan = Plan([], Path(settings.out) if settings.out else default_folder(paths), {})
    open_for, numbers = image_lists(config), _numbers(settings, on_gpu=on_gpu)
    for entry, found, name in zip(entries, located, network_names(entries, located)):
        with blame("eval.model_in"):
            trained = load_trained(found.path, found.describe(entry.model))
        check_classes(trained.description["num_classes"], settings.chosen)
        plan.images[name] = open_for(trained.description["num_classes"], trained.class_names)
        plan.evaluations.extend(_plan_network(settings, name, found, trained, plan, numbers))
        beats = "; these weights validated better than their moving average" if trained.run.beats_average else ""
        own = {f"{e.preprocessing}{e.choice}": e.preprocessing for e in plan.evaluations if e.network == name}
        for text in own:
            print(f"{name}: {text}, {fed(trained.model)}{beats}", file=sys.stderr)
        radii = [(e.norm, e.eps, e.img_size) for e in plan.evaluations if e.network == name]
        notes = [*trained.notes, *(odd_radius(norm, eps, size=size) for norm, eps, size in radii)]
        if not trained.sure_of_input and found.published is None:
            notes.append(_seen_both_ways(trained.model, plan.images[name], next(iter(own.values()))))
        for note in filter(None, notes):
            print_warning(f"{name}: {note}.")
    return plan


def fed(model: nn.Module) -> str:
    """What a network gets to see, in words."""
    if not has_normalizer(model):
        return "as they are, in [0, 1]"
    mean, std = (
        ", ".join(f"{v:.4g}" for v in values.flatten()) for values in (model.normalize.mean, model.normalize.std)
    )
    return f"normalised with mean {mean} and std {std}"


def _seen_both_ways(model: nn.Module, images: ImageList, used: Preprocessing) -> str:
    """A sentence where many more of a few clean images are right without a normaliser, or behind a usual one; else empty."""
    bare = model.model if has_normalizer(model) else model
    others = {flags: bare if pair is None else normalize_model(bare, *pair) for flags, pair in READINGS.items()}
    chunk = images.read(spread_indices(len(images), TRIED), used)
    with torch.no_grad():
        right = {
            flags: (net(chunk.x).argmax(1) == chunk.y).sum().item() for flags, net in {"": model, **others}.items()
        }
    flags = max(others, key=right.__getitem__)
    if right[flags] - right[""] < max(CLEAR_GAP * len(chunk.y), 2):
        return ""
    return (
        f"of {len(chunk.y)} clean images {right['']} are right {fed(model)}, and {right[flags]} {fed(others[flags])}; the network "
        f"was most likely trained that way: {flags}"
    )


def _plan_network(
    settings: EvalAttackConfig, name: str, found: Located, trained: TrainedModel, plan: Plan, numbers: Mapping[str, Any]
) -> Iterator[Evaluation]:
    """The evaluations of one network; `numbers` completes their identities."""
    images, own = plan.images[name], found.preprocessing or trained.preprocessing
    version = {ATTACKS: "aa", ATTACKS[:2]: "apgd"}.get(settings.chosen, "+".join(settings.chosen))
    classes, among, restricted = images.classes, None, {}
    if settings.among == "dataset" and len(classes) < trained.description["num_classes"]:
        check_classes(len(classes), settings.chosen)
        among, version = classes, f"{version}_among{len(classes)}"
        restricted = {"among": {"classes": len(classes), "sha256": hashlib.sha256(repr(classes).encode()).hexdigest()}}
    for size in settings.img_size or (own.img_size,):
        crop = {} if settings.crop_pct is None else {"crop_pct": settings.crop_pct, "crop_mode": "center"}
        used = replace(own, img_size=size, **crop)
        if used != own:
            used = replace(used, source="the flags")
        try_size(trained.model, size, name=name)
        data = {"images": images.digest(), "n": len(images), "img_size": size, "pixels": images.probe(used)}
        transform = {"resize": used.interpolation, "crop_pct": used.crop_pct}
        if used.crop_mode != "center":
            transform["crop_mode"] = used.crop_mode
        for norm, eps in zip(settings.norms, settings.eps):
            with blame("eval.eps"):
                check_radius(norm, eps, size=size)
            folder = f"{norm}_{show_eps(eps).replace('/', 'of')}_{size}px_n{len(images)}_{version}"
            yield Evaluation(
                network=name,
                weights=trained.path,
                description=EvalModelConfig(**trained.description),
                class_names=trained.class_names,
                published=found.published,
                norm=norm,
                eps=eps,
                preprocessing=used,
                fed=fed(trained.model),
                run=trained.run,
                classes=classes,
                among=among,
                n=len(images),
                batch_size=settings.batch_size,
                folder=plan.root / folder_name(name) / folder,
                identity={
                    "network": {"sha256": trained.sha256, **trained.description},
                    "data": data,
                    "transform": transform,
                    **restricted,
                    **numbers,
                    "attack": {"norm": norm, "eps": eps, **numbers["attack"]},
                },
            )


def _numbers(settings: EvalAttackConfig, *, on_gpu: bool) -> dict[str, Any]:
    """What all verdicts of a call depend on: the attack, the arithmetic, the packages."""
    package = package_name()
    return {
        "attack": {
            "seed": settings.seed,
            "attacks": list(settings.chosen),
            "batch_size": settings.batch_size,
            "engine": f"{package} {installed_version(package) or '(unknown version)'}",
        },
        "arithmetic": {
            "precision": settings.precision,
            "compile": settings.compile,
            "channels_last": on_gpu if settings.channels_last is None else settings.channels_last,
            **({"device": "cuda"} if on_gpu else {"device": "cpu", "threads": settings.threads}),
        },
        "versions": {name: installed_version(name) for name in PACKAGES},
    }


def default_folder(paths: Sequence[Path]) -> Path:
    """`eval/` beside the weights; beside their folders, where those lie in one.

    Raises:
        UserError: they lie in different places.
    """
    folders = {path.absolute().parent for path in paths}
    if len(folders) == 1:
        return folders.pop() / "eval"
    parents = {folder.parent for folder in folders}
    if len(parents) > 1:
        raise UserError("eval.out: required, because the networks lie in different places.")
    return parents.pop() / "eval"


def open_planned_images(config: EvalConfig, evaluations: Sequence[Evaluation]) -> dict[str, ImageList]:
    """The images by network, on a machine that did not make the plan.

    Raises:
        UserError: the images there are not those of the plan.
    """
    open_for, by_network = image_lists(config), {}
    for evaluation in evaluations:
        images = open_for(evaluation.description.num_classes, evaluation.class_names)
        by_network[evaluation.network] = images
        if images.digest() != evaluation.identity["data"]["images"]:
            raise UserError(f"data.val_dataset: {config.data.val_dataset} is not the same on all machines.")
    return by_network


def image_lists(config: EvalConfig) -> Callable[[int, Sequence[str] | None], ImageList]:
    """A function from a network's number of classes and their names, where known, to the images labelled for it.

    Networks with the same classes share one list. Raises as `open_images`.
    """
    settings = config.eval

    @functools.cache
    def open_once(num_classes: int, class_names: tuple[str, ...] | None) -> ImageList:
        names = None if class_names is None else list(class_names)
        return open_images(
            config.data, ids=settings.ids, n_ex=settings.n_ex, num_classes=num_classes, class_names=names
        )

    return lambda num_classes, names: open_once(num_classes, None if names is None else tuple(names))


def network_names(entries: Sequence[ModelEntry], located: Sequence[Located]) -> list[str]:
    """A short name for each network: as given, the published one, else the file's, with its folder's if that is not enough.

    Raises:
        UserError: two networks have the same name.
    """
    names = []
    for entry, found in zip(entries, located):
        of_run = re.fullmatch(r"weights(_ema)?_\d+|model", found.path.stem) is not None
        not_alone = sum(other.path.stem == found.path.stem for other in located) > 1
        own = f"{found.path.resolve().parent.name}/{found.path.stem}" if of_run or not_alone else found.path.stem
        names.append(entry.name or (own if found.published is None else found.published.name))
    folders = [folder_name(name) for name in names]
    for name, folder in zip(names, folders):
        if folders.count(folder) > 1:
            raise UserError(
                f"eval.model_in: two networks are called {name!r}; list them in eval.models, each with a name."
            )
    return names


def folder_name(name: str) -> str:
    """A network's name as that of a folder, which cannot lead out of its place."""
    return re.sub(r"[^\w.=+-]+", "-", name.replace("/", "__")).strip(".-") or "network"


def try_size(model: nn.Module, size: int, *, name: str) -> None:
    """One forward of a black image, so that a size the network refuses shows at the start."""
    try:
        with torch.no_grad():
            logits = model(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"eval.img_size: {name} cannot take images of {size} pixels: {reason}") from error
    if not torch.isfinite(logits).all():
        raise UserError(f"eval.model_in: the logits of {name} are not finite; its accuracy means nothing.")


def show_eps(eps: float) -> str:
    """eps as a small multiple of 1/255 where it is one, else as a number."""
    steps = eps * 255
    return f"{steps:.0f}/255" if steps < 32.5 and abs(steps - round(steps)) < 1e-6 else f"{eps:g}"
