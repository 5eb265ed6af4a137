"""One trained network, some images, one or more threat models → a report."""

from __future__ import annotations

import hashlib
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from common.config import EvalConfig
from common.errors import UserError
from common.provenance import installed_version, provenance
from data.datasets import StreamSource, open_source
from data.loader import EvalLoader, spread_indices
from evaluation.autoattack import ATTACKS, Verdicts, attack_chunk, package_name
from evaluation.report import summarise
from zoo.runs import TrainedModel


@dataclass(frozen=True)
class Images:
    """The images of an evaluation, on the host: x (N, 3, H, W) float32 in [0, 1], y (N,), and the files that could not be read."""

    x: Tensor
    y: Tensor
    unreadable: list[str]


def load_images(config: EvalConfig, trained: TrainedModel) -> Images:
    """`eval.n_ex` images, spread evenly over `data.val_dataset`, through the evaluation transform.

    Spread, because the first images of a folder are all of the first class. Labels are those of the network: matched by
    class name where the run recorded its classes; else the data set must have as many classes as the head, because class
    folders are numbered by their sorted names and a missing one would shift all that follow.

    Raises:
        UserError: no such data set, no readable image, or more classes than the head has.
    """
    data, settings = config.data, config.eval
    source = open_source(
        data.val_dataset,
        split="val",
        flag="data.val_dataset",
        root=data.root,
        split_name=data.val_split,
        class_names=trained.class_names,
    )
    head, found = trained.description["num_classes"], source.num_classes
    if found > head or (source.class_names is not None and found != head):
        raise UserError(
            f"model.num_classes: the head has {head} classes, data.val_dataset has {found}; class folders are numbered by "
            "their names, so every class needs one (an empty folder will do)."
        )
    if isinstance(source, StreamSource):
        raise UserError(
            f"data.val_dataset: {data.val_dataset} can only be read in order; expected a folder, tar, digits or hfds/…."
        )
    indices = spread_indices(len(source), settings.n_ex or len(source))
    loader = EvalLoader(
        source,
        size=settings.img_size,
        crop_pct=settings.crop_pct,
        batch_size=settings.batch_size,
        rank=0,
        world_size=1,
        num_workers=data.num_workers,
        indices=indices,
    )
    batches = list(loader)
    unreadable = [f"{name} ({reason})" for batch in batches for name, reason in batch.failures]
    for name in unreadable:
        print(f"warning: {name} cannot be decoded; it is left out of the evaluation.", file=sys.stderr)
    x = torch.cat([batch.x for batch in batches])
    if len(x) == 0:
        raise UserError(f"data.val_dataset: none of the {len(indices)} images of {data.val_dataset} can be decoded.")
    return Images(x=x, y=torch.cat([batch.y for batch in batches]), unreadable=unreadable)


def evaluate(
    trained: TrainedModel, images: Images, config: EvalConfig, *, device: torch.device
) -> tuple[dict[str, Any], dict[str, list[Verdicts]]]:
    """AutoAttack under every threat model of `eval.norms`.

    Returns:
        The report as plain values (accuracies are shares), and the verdicts of successive chunks by norm.
    """
    # Without this "float32" convolutions round their inputs to 10 bits on a GPU.
    torch.backends.cudnn.allow_tf32 = False
    settings = config.eval
    attacks = ATTACKS if settings.fullaa else ATTACKS[:2]
    model = trained.model.to(device).float().eval().requires_grad_(False)
    results, all_verdicts = [], {}
    for norm, eps in zip(settings.norms, settings.eps):
        begin, verdicts = time.perf_counter(), []
        with tqdm(
            total=len(images.x),
            desc=f"AutoAttack {norm}",
            unit="img",
            mininterval=0.5 if sys.stderr.isatty() else 60,
            leave=False,
        ) as bar:
            for x, y in zip(images.x.split(settings.batch_size), images.y.split(settings.batch_size)):
                chunk = attack_chunk(
                    model, x, y, norm=norm, eps=eps, seed=settings.seed, full=settings.fullaa, device=device
                )
                verdicts.append(chunk)
                standing = sum(v.broken_by.count("") for v in verdicts)
                bar.update(len(x))
                bar.set_postfix(robust=f"{100 * standing / bar.n:.1f}%")
        result = summarise(verdicts, images.x, norm=norm, eps=eps, attacks=attacks)
        results.append(result | {"seconds": round(time.perf_counter() - begin, 2)})
        all_verdicts[norm] = verdicts
    report = {
        "model": {"weights": str(trained.path), "sha256": sha256(trained.path), **trained.description},
        "data": asdict(config.data)
        | {"n": len(images.x), "labels": label_counts(images.y), "unreadable": images.unreadable},
        "eval": asdict(settings) | {"attacks": list(attacks), "engine": engine_version()},
        "results": results,
        "provenance": provenance(),
    }
    return report, all_verdicts


def label_counts(y: Tensor) -> dict[str, int]:
    """How many images of each class."""
    labels, counts = y.unique(return_counts=True)
    return {str(label): count for label, count in zip(labels.tolist(), counts.tolist())}


def engine_version() -> str:
    """The AutoAttack package in use and its version."""
    name = package_name()
    return f"{name} {installed_version(name) or '(unknown version)'}"


def sha256(path: Path) -> str:
    """Digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
