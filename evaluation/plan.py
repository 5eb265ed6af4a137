"""What an evaluation is: one network, one set of images at one size, one threat model. And the list of all that were asked for."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.config import EvalConfig, EvalModelConfig, ModelEntry
from common.errors import UserError
from common.provenance import installed_version
from evaluation.autoattack import ATTACKS, package_name
from evaluation.images import ImageList, open_images
from zoo.runs import find_weights, load_trained

# Their versions can change pixels, logits or attacks.
PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow")


@dataclass(frozen=True)
class Evaluation:
    """One network × image size × threat model; picklable, so that workers can do it.

    Attributes:
        network: its name in tables.
        weights: the file.
        description: the network it holds, complete.
        class_names: of its outputs, where known.
        norm, eps, img_size: threat model, and image size in pixels.
        attacks: names, in order.
        n: number of images.
        batch_size: images of a chunk.
        folder: of its state and report.
        identity: everything its verdicts depend on, as plain values.
    """

    network: str
    weights: Path
    description: EvalModelConfig
    class_names: list[str] | None
    norm: str
    eps: float
    img_size: int
    attacks: tuple[str, ...]
    n: int
    batch_size: int
    folder: Path
    identity: Mapping[str, Any]

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
    images: Mapping[str, ImageList]


def make_plan(config: EvalConfig, *, on_gpu: bool) -> Plan:
    """Every network × image size × norm, in that order. Each network is loaded, and tried at each size, on the CPU.

    Raises:
        UserError: what would stop the evaluation later: weights, images, image sizes.
    """
    if config.eval.precision == "tf32" and not on_gpu:
        raise UserError(
            "eval.precision: TensorFloat-32 needs a GPU, and this evaluation runs on the CPU; expected fp32."
        )
    entries = config.networks()
    paths = [find_weights(Path(entry.model_in), flag="eval.model_in") for entry in entries]
    root = (
        Path(config.eval.out)
        if config.eval.out
        else Path(os.path.commonpath([p.resolve().parent for p in paths])) / "eval"
    )
    by_network: dict[str, ImageList] = {}
    opened: dict[Any, ImageList] = {}  # by the classes the labels are numbered for
    probes: dict[Any, str] = {}
    evaluations = []
    for entry, path, name in zip(entries, paths, network_names(entries, paths)):
        trained = load_trained(path, entry.model, flag="eval.model_in")
        classes = (trained.description["num_classes"], tuple(trained.class_names or ()))
        if classes not in opened:
            opened[classes] = open_network_images(config, trained.description["num_classes"], trained.class_names)
        images = by_network[name] = opened[classes]
        network = {"sha256": sha256(path), **trained.description}
        for size in config.eval.img_size:
            try_size(trained.model, size, name=name)
            if (classes, size) not in probes:
                probes[classes, size] = images.probe(size=size, crop_pct=config.eval.crop_pct)
            data = {"images": images.digest(), "n": len(images), "img_size": size, "pixels": probes[classes, size]}
            for norm, eps in zip(config.eval.norms, config.eval.eps):
                version = "aa" if config.eval.fullaa else "apgd"
                part = f"{norm}_{show_eps(eps).replace('/', 'of')}_{size}px_n{len(images)}_{version}"
                evaluation = Evaluation(
                    network=name,
                    weights=path,
                    description=EvalModelConfig(**trained.description),
                    class_names=trained.class_names,
                    norm=norm,
                    eps=eps,
                    img_size=size,
                    attacks=ATTACKS if config.eval.fullaa else ATTACKS[:2],
                    n=len(images),
                    batch_size=config.eval.batch_size,
                    folder=root / folder_name(name) / part,
                    identity={"network": network, "data": data, **_numbers(config, norm, eps, on_gpu=on_gpu)},
                )
                evaluations.append(evaluation)
    return Plan(evaluations, root, by_network)


def open_network_images(config: EvalConfig, num_classes: int, class_names: list[str] | None) -> ImageList:
    """The images of `config`, labelled for a network with these outputs; see `open_images`."""
    settings = config.eval
    return open_images(
        config.data, ids=settings.ids, n_ex=settings.n_ex, num_classes=num_classes, class_names=class_names
    )


def open_planned_images(config: EvalConfig, evaluations: Sequence[Evaluation]) -> dict[str, ImageList]:
    """The images by network, on a machine that did not make the plan.

    Raises:
        UserError: the images there are not those of the plan.
    """
    by_network: dict[str, ImageList] = {}
    opened: dict[Any, ImageList] = {}
    for evaluation in evaluations:
        classes = (evaluation.description.num_classes, tuple(evaluation.class_names or ()))
        if classes not in opened:
            opened[classes] = open_network_images(config, evaluation.description.num_classes, evaluation.class_names)
        by_network[evaluation.network] = opened[classes]
        if opened[classes].digest() != evaluation.identity["data"]["images"]:
            raise UserError(f"data.val_dataset: {config.data.val_dataset} is not the same on all machines.")
    return by_network


def network_names(entries: Sequence[ModelEntry], paths: Sequence[Path]) -> list[str]:
    """A short name for each network: as given, else the file's, with its folder's where that is a run's or two are the same.

    Raises:
        UserError: two networks have the same name.
    """
    names = []
    for entry, path in zip(entries, paths):
        of_run = re.fullmatch(r"weights(_ema)?_\d+", path.stem) is not None
        not_alone = sum(other.stem == path.stem for other in paths) > 1
        names.append(entry.name or (f"{path.resolve().parent.name}/{path.stem}" if of_run or not_alone else path.stem))
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


def sha256(path: Path) -> str:
    """Digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def engine_version() -> str:
    """The AutoAttack package in use and its version."""
    name = package_name()
    return f"{name} {installed_version(name) or '(unknown version)'}"


def _numbers(config: EvalConfig, norm: str, eps: float, *, on_gpu: bool) -> dict[str, Any]:
    """What else verdicts depend on: the attack, the arithmetic, the packages."""
    settings = config.eval
    device = {"device": "cuda"} if on_gpu else {"device": "cpu", "threads": settings.threads}
    return {
        "transform": {"resize": "bicubic", "crop_pct": settings.crop_pct},
        "attack": {
            "norm": norm,
            "eps": eps,
            "seed": settings.seed,
            "attacks": list(ATTACKS if settings.fullaa else ATTACKS[:2]),
            "batch_size": settings.batch_size,
            "engine": engine_version(),
        },
        "arithmetic": {
            "precision": settings.precision,
            "compile": settings.compile,
            "channels_last": on_gpu if settings.channels_last is None else settings.channels_last,
            **device,
        },
        "versions": {name: installed_version(name) for name in PACKAGES},
    }
