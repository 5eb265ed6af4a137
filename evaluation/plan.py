"""Plan of a call: its evaluations, each with one network, one set of images at one size, and one threat model."""

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

TRIED, CLEAR_GAP = 16, 0.25  # clean images tried with other normalisers; share of them that must improve for a warning
# Other normalisations to try: flags that select them → mean and std of the normaliser (None: no normaliser).
READINGS = {
    "--model.add_normalization=0": None,
    "--model.add_normalization=1": (IMAGENET_MEAN, IMAGENET_STD),
    "--model.mean=0.5,0.5,0.5 --model.std=0.5,0.5,0.5": ([0.5] * 3, [0.5] * 3),
    "--model.mean=0,0,0 --model.std=0.00392157,0.00392157,0.00392157": ([0.0] * 3, [1 / 255] * 3),
}
# Packages whose versions can change pixels, logits or attacks.
PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow")


@dataclass(frozen=True)
class Evaluation:
    """One network × image size × threat model; picklable, because it is sent to the workers.

    `network`: name in tables; `description`: complete description of the network in `weights`; `class_names`: names of its
    outputs, if known; `published`: the published model that it is, if any; `run`: facts recorded by its training run;
    `preprocessing`: transform of the images, with their size; `fed`: the normalisation in words; `classes`: class numbers of the
    data set; `among`: classes that predictions are taken from (None: all); `n`: number of images; `batch_size`: images per chunk;
    `folder`: folder of state and report; `identity`: everything that the verdicts depend on, as plain values.
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
        """Key shared by all threat models of a network at one size."""
        return self.network, self.img_size

    @property
    def outputs(self) -> int:
        """Number of classes that predictions are taken from."""
        return self.description.num_classes if self.among is None else len(self.among)

    @property
    def choice(self) -> str:
        """Text on the classes of predictions if the data set does not have all classes of the network; else empty."""
        if len(self.classes) == self.description.num_classes:
            return ""
        return (
            f"; the images have {len(self.classes)} of the network's {self.description.num_classes} classes; predictions are among "
            f"{'all' if self.among is None else 'these'} (eval.among={'all' if self.among is None else 'dataset'})"
        )

    @property
    def chunks(self) -> int:
        return -(-self.n // self.batch_size)

    def positions(self, chunk: int) -> list[int]:
        """Return the indices of a chunk's images in the list."""
        return list(range(chunk * self.batch_size, min((chunk + 1) * self.batch_size, self.n)))

    def __str__(self) -> str:
        return f"{self.network}, {self.norm} {show_eps(self.eps)}, {self.img_size} px"


@dataclass(frozen=True)
class Plan:
    """All evaluations of one call, the parent of their folders, and the images by network."""

    evaluations: list[Evaluation]
    root: Path
    images: dict[str, ImageList]


def make_plan(config: EvalConfig, *, on_gpu: bool) -> Plan:
    """Plan every network × image size × norm, in that order. Each network is loaded and tried at each size on the CPU.

    Prints the preprocessing of the images and warnings on a network.

    Raises:
        UserError: weights, images or image sizes with which the evaluation would fail later.
    """
    settings = config.eval
    if settings.precision == "tf32" and not on_gpu:
        raise UserError(
            "eval.precision: TensorFloat-32 needs a GPU, but this evaluation runs on the CPU; expected fp32."
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
        beats = "; these raw weights had a better validation than their EMA" if trained.run.beats_average else ""
        own = {f"{e.preprocessing}{e.choice}": e.preprocessing for e in plan.evaluations if e.network == name}
        for text in own:
            print(f"{name}: {text}, {fed(trained.model)}{beats}", file=sys.stderr)
        radii = [(e.norm, e.eps, e.img_size) for e in plan.evaluations if e.network == name]
        notes = [*trained.notes, *(odd_radius(norm, eps, size=size) for norm, eps, size in radii)]
        if not trained.sure_of_input and found.published is None:
            notes.append(_seen_both_ways(trained.model, plan.images[name], next(iter(own.values()))))
        if not settings.img_size and any(used.source == Preprocessing.source for used in own.values()):
            notes.append(
                f"no record says at which size the network was trained, so {Preprocessing.img_size} px are assumed; if that is "
                "wrong, give --eval.img_size and --eval.crop_pct"
            )
        for note in filter(None, notes):
            print_warning(f"{name}: {note}.")
    return plan


def fed(model: nn.Module) -> str:
    """Return the normalisation of a network's inputs, in words."""
    if not has_normalizer(model):
        return "not normalised, in [0, 1]"
    mean, std = (
        ", ".join(f"{v:.4g}" for v in values.flatten()) for values in (model.normalize.mean, model.normalize.std)
    )
    return f"normalised with mean {mean} and std {std}"


def _seen_both_ways(model: nn.Module, images: ImageList, used: Preprocessing) -> str:
    """Return a warning if another common normalisation, or none, classifies many more clean images correctly; else ""."""
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
        f"of {len(chunk.y)} clean images, {right['']} are correct if the input is {fed(model)}; {right[flags]} are correct "
        f"if it is {fed(others[flags])}. The network was most likely trained the second way: give {flags}"
    )


def _plan_network(
    settings: EvalAttackConfig, name: str, found: Located, trained: TrainedModel, plan: Plan, numbers: Mapping[str, Any]
) -> Iterator[Evaluation]:
    """Yield the evaluations of one network; `numbers` completes their identities."""
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
    """Return the common part of all identities of a call: attack, arithmetic, package versions."""
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
    """Return `eval/` next to the weights; for weights in sibling folders, next to these folders.

    Raises:
        UserError: the weights are in unrelated folders.
    """
    folders = {path.absolute().parent for path in paths}
    if len(folders) == 1:
        return folders.pop() / "eval"
    parents = {folder.parent for folder in folders}
    if len(parents) > 1:
        raise UserError("eval.out: required, because the networks are in different folders.")
    return parents.pop() / "eval"


def open_planned_images(config: EvalConfig, evaluations: Sequence[Evaluation]) -> dict[str, ImageList]:
    """Open the images of each network on a machine other than that of the plan.

    Raises:
        UserError: the images are not those of the plan.
    """
    open_for, by_network = image_lists(config), {}
    for evaluation in evaluations:
        images = open_for(evaluation.description.num_classes, evaluation.class_names)
        by_network[evaluation.network] = images
        if images.digest() != evaluation.identity["data"]["images"]:
            raise UserError(f"data.val_dataset: {config.data.val_dataset} is not the same on all machines.")
    return by_network


def image_lists(config: EvalConfig) -> Callable[[int, Sequence[str] | None], ImageList]:
    """Return a function (number of classes, class names if known) → images labelled for such a network.

    Networks with the same classes share one list. The function raises as `open_images`.
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
    """Return a short name for each network: the given or published name, else the file name, with its folder if needed.

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
    """Return a network's name as a folder name that cannot point outside its parent."""
    return re.sub(r"[^\w.=+-]+", "-", name.replace("/", "__")).strip(".-") or "network"


def try_size(model: nn.Module, size: int, *, name: str) -> None:
    """Check an image size with one forward pass of a black image."""
    try:
        with torch.no_grad():
            logits = model(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"eval.img_size: {name} does not accept images of {size} pixels: {reason}") from error
    if not torch.isfinite(logits).all():
        raise UserError(f"eval.model_in: the logits of {name} are not finite, so its accuracy is meaningless.")


def show_eps(eps: float) -> str:
    """Return eps as text: n/255 if it is a small multiple of 1/255, else a number."""
    steps = eps * 255
    return f"{steps:.0f}/255" if steps < 32.5 and abs(steps - round(steps)) < 1e-6 else f"{eps:g}"
