"""From what a user calls a network to its weights: a file, a run folder, a published name, or a RobustBench id."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.provenance import PROJECT
from zoo.clip import write_zero_shot
from zoo.description import CLIP_PREFIX, EXPORTED, ROBUSTBENCH_PREFIX, NetworkDescription, Preprocessing
from zoo.download import WEIGHT_SUFFIXES, ShareUnavailable, download
from zoo.inference import describe_weights
from zoo.loading import read_weights
from zoo.published import KNOWN, Published, find_published, nearest_published
from zoo.runs import TrainedModel, find_weights, load_trained

CHECKPOINTS = PROJECT / "checkpoints"
ROBUSTBENCH_ID = re.compile(r"[A-Z][A-Za-z]+\d{4}\S+")  # first author, year, first word of the title
# Words in the names of weights. Those of `TRAINED` also describe how a clean model was trained, and count where no other does.
CLEAN = re.compile(r"clean|pretrain|standard|(?<![a-z])init")
ROBUST = re.compile(r"robust|linf|(?<![a-z])adv")
TRAINED = re.compile(r"(?<![a-z])(ema|full)(?![a-z])|(?<!\d)(50|100|250|300)(?!\d)")


@dataclass(frozen=True)
class Located:
    """Weights on this machine, what their name says of the network, and the published model they are, if any."""

    path: Path
    description: Mapping[str, Any]
    published: Published | None = None

    @property
    def preprocessing(self) -> Preprocessing | None:
        """What a published model's images went through; None where the weights or their run have to say."""
        return self.published and self.published.preprocessing

    def describe(self, asked: NetworkDescription) -> NetworkDescription:
        """What was asked for, completed by what the name says."""
        unset = {name: value for name, value in self.description.items() if getattr(asked, name) is None}
        return replace(asked, **unset)


def locate(name: str, *, kind: str = "robust", folder: Path | None = None, force: bool = False) -> Located:
    """Find the weights called `name`; a published one is downloaded where it is not there yet.

    Args:
        name: weights file, run folder, published name or title, RobustBench ImageNet id.
        kind: "robust", or "clean" for the initialisation of a published model.
        folder: where downloads go, in a folder for each model; by default `checkpoints` in the project.
        force: download a published model's share again, and accept other content than the first time.

    Raises:
        UserError: nothing is called so, or it cannot be downloaded.
    """
    path, folder = Path(name).expanduser(), folder or CHECKPOINTS
    published, is_id = find_published(name), ROBUSTBENCH_ID.fullmatch(name) is not None
    if os.path.exists(path):  # Path.exists fails for names too long
        try:
            return Located(find_weights(path), {})
        except UserError:
            if published is None and not is_id:  # else it is the folder of a download, which bears the model's name
                raise
    if published is not None:
        weights = _published_weights(published, folder / _share_name(published), kind=kind, force=force)
        return Located(weights, published.description, published)
    if "/" in name or path.suffix:
        raise UserError(f"expected a file of weights, got {name!r}, which does not exist.")
    if is_id:  # newer than the table
        if kind == "clean":
            raise UserError(f"RobustBench has no clean initialisation of {name}.")
        (weights,) = download(f"robustbench:{name}", folder / name, name=name, force=force)
        return Located(weights, {"arch": ROBUSTBENCH_PREFIX + name})
    hint = f" (did you mean {near}?)" if (near := nearest_published(name)) else ""
    raise UserError(f"{name!r} is neither a file or run folder, nor a published name{hint}; see `python -m zoo list`.")


def load_named(name: str, asked: NetworkDescription | None = None, *, folder: Path | None = None) -> TrainedModel:
    """The network of the weights that `locate` finds, with the images of its publication where that says them."""
    located = locate(name, folder=folder)
    trained = load_trained(located.path, located.describe(asked or NetworkDescription()))
    return replace(trained, preprocessing=located.preprocessing or trained.preprocessing)


def _share_name(published: Published) -> str:
    """Name of the folder for a model's share: the model's, or the share's where several models lie in it."""
    several = sum(model.links == published.links for model in KNOWN.values()) > 1
    return published.links[0].rsplit("/", 1)[-1] if several else published.name


def split_kind(name: str) -> tuple[str, str]:
    """`NAME:clean` and `NAME:robust` as a name and a kind of weights; "clean", training's start, where nothing is said."""
    model, colon, kind = name.rpartition(":")
    return (model, kind) if colon and kind in ("clean", "robust") and not Path(name).exists() else (name, "clean")


def _published_weights(published: Published, folder: Path, *, kind: str, force: bool) -> Path:
    """The share's file; of robust weights RobustBench's copy where the share cannot be had."""
    if kind == "clean" and published.by != "paper":
        raise UserError(f"no clean initialisation of {published.name} is published.")
    if published.arch.startswith(CLIP_PREFIX):
        if force or not (folder / EXPORTED).exists():
            write_zero_shot(published.arch.removeprefix(CLIP_PREFIX), folder)
        return folder / EXPORTED
    unreadable = []

    def fits(path: Path) -> bool:
        try:
            found = describe_weights(read_weights(path))
        except UserError as error:
            unreadable.append(str(error))
            return False
        return published.arch in found.candidates and found.not_original == published.not_original

    copy = published.robustbench_id if kind == "robust" and published.by == "paper" else None
    if copy and not force and (folder / f"{copy}.pt").exists():  # downloaded before, when the share could not be had
        return download(f"robustbench:{copy}", folder, name=copy)[0]
    problems = []
    for link in published.links:
        share = {"name": published.name, "hint": copy or "", "known": published.sha256}
        try:
            files = download(link, folder, force=force, **share)
        except ShareUnavailable as error:
            problems.append(str(error))
            continue
        if published.by != "paper":
            return files[0]
        try:
            return choose(files, kind, fits)
        except UserError as error:
            raise UserError(" ".join([f"{link}: {error}", *unreadable])) from error
    if copy:
        print(f"{problems[-1]} Trying RobustBench's copy, {copy}.", file=sys.stderr)
        return download(f"robustbench:{copy}", folder, name=copy, force=force)[0]
    raise UserError(" ".join(problems))


def choose(files: Iterable[Path], kind: str, fits: Callable[[Path], bool] = lambda path: True) -> Path:
    """The one of a share's files of `kind` ("robust" or "clean") that `fits` the model; a share may hold several models'.

    Weights whose names say nothing are taken for robust ones where no others fit.

    Raises:
        UserError: none, or more than one.
    """
    weights = [path for path in files if path.suffix.lower() in WEIGHT_SUFFIXES]
    found = [path for path in weights if _kind(path.name) == kind and fits(path)]
    if not found and kind == "robust":
        found = [path for path in weights if _kind(path.name) is None and fits(path)]
    if len(found) == 1:
        return found[0]
    problem = "several files could be it" if found else "no file of the share is it"
    problem += ": " + (", ".join(map(str, found or weights)) or "no weights at all")
    raise UserError(f"expected one file of {kind} weights for this model, but {problem}. Give one by its path.")


def _kind(name: str) -> str | None:
    name = name.lower()
    clean, robust = CLEAN.search(name), ROBUST.search(name)
    if clean:
        return None if robust else "clean"
    return "robust" if robust or TRAINED.search(name) else None
