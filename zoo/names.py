"""Resolution of network names: weights file, run folder, published name, or RobustBench id."""

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
# Words in file names of weights. Those of `TRAINED` also occur for clean models, so they count only if no other word matches.
CLEAN = re.compile(r"clean|pretrain|standard|(?<![a-z])init")
ROBUST = re.compile(r"robust|linf|(?<![a-z])adv")
TRAINED = re.compile(r"(?<![a-z])(ema|full)(?![a-z])|(?<!\d)(50|100|250|300)(?!\d)")


@dataclass(frozen=True)
class Located:
    """Weights on this machine, the network description that their name implies, and their published model, if any."""

    path: Path
    description: Mapping[str, Any]
    published: Published | None = None

    @property
    def preprocessing(self) -> Preprocessing | None:
        """Preprocessing of a published model's images; None if the weights or their run define it."""
        return self.published and self.published.preprocessing

    def describe(self, asked: NetworkDescription) -> NetworkDescription:
        """Complete the requested description by the one that the name implies."""
        unset = {name: value for name, value in self.description.items() if getattr(asked, name) is None}
        return replace(asked, **unset)


def locate(name: str, *, kind: str = "robust", folder: Path | None = None, force: bool = False) -> Located:
    """Find the weights `name`; those of a published model are downloaded if needed.

    Args:
        name: weights file, run folder, published name or title, RobustBench ImageNet id.
        kind: "robust", or "clean" for the initialisation of a published model.
        folder: parent of one download folder per model; default: `checkpoints` in the project.
        force: download a published model's share again, and accept changed content.

    Raises:
        UserError: the name is unknown, or the download fails.
    """
    path, folder = Path(name).expanduser(), folder or CHECKPOINTS
    published, is_id = find_published(name), ROBUSTBENCH_ID.fullmatch(name) is not None
    if os.path.exists(path):  # Path.exists fails for names too long
        try:
            return Located(find_weights(path), {})
        except UserError:
            if published is None and not is_id:  # else it is a download folder with the model's name
                raise
    if published is not None:
        weights = _published_weights(published, folder / _share_name(published), kind=kind, force=force)
        return Located(weights, published.description, published)
    if "/" in name or path.suffix:
        raise UserError(f"expected a weights file, found nothing at {path.absolute()}.")
    if is_id:  # not in the table, because it is newer
        if kind == "clean":
            raise UserError(f"RobustBench has no clean initialisation of {name}.")
        (weights,) = download(f"robustbench:{name}", folder / name, name=name, force=force)
        return Located(weights, {"arch": ROBUSTBENCH_PREFIX + name})
    hint = f" (did you mean {near}?)" if (near := nearest_published(name)) else ""
    raise UserError(f"{name!r} is neither a file or run folder, nor a published name{hint}; see `python -m zoo list`.")


def load_named(name: str, asked: NetworkDescription | None = None, *, folder: Path | None = None) -> TrainedModel:
    """Load the network that `locate` finds, with the preprocessing of its publication, if stated there."""
    located = locate(name, folder=folder)
    trained = load_trained(located.path, located.describe(asked or NetworkDescription()))
    return replace(trained, preprocessing=located.preprocessing or trained.preprocessing)


def _share_name(published: Published) -> str:
    """Return the folder name for a model's share: the model's name, or the share's if it contains several models."""
    several = sum(model.links == published.links for model in KNOWN.values()) > 1
    return published.links[0].rsplit("/", 1)[-1] if several else published.name


def split_kind(name: str) -> tuple[str, str]:
    """Split `NAME:clean` or `NAME:robust` into name and kind of weights; default kind: "clean", the start of training."""
    model, colon, kind = name.rpartition(":")
    return (model, kind) if colon and kind in ("clean", "robust") and not Path(name).exists() else (name, "clean")


def _published_weights(published: Published, folder: Path, *, kind: str, force: bool) -> Path:
    """Return the share's file; for robust weights RobustBench's copy if the share is not available."""
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
    if copy and not force and (folder / f"{copy}.pt").exists():  # downloaded earlier, when the share was not available
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
    """Return the file of `kind` ("robust" or "clean") that `fits` the model; a share may contain files of several models.

    Weights whose names imply no kind count as robust if no others fit.

    Raises:
        UserError: no file or several files match.
    """
    weights = [path for path in files if path.suffix.lower() in WEIGHT_SUFFIXES]
    found = [path for path in weights if _kind(path.name) == kind and fits(path)]
    if not found and kind == "robust":
        found = [path for path in weights if _kind(path.name) is None and fits(path)]
    if len(found) == 1:
        return found[0]
    problem = "several files match" if found else "no file of the share matches"
    problem += ": " + (", ".join(map(str, found or weights)) or "no weights at all")
    raise UserError(f"expected one file of {kind} weights for this model, but {problem}. Give the path of one.")


def _kind(name: str) -> str | None:
    name = name.lower()
    clean, robust = CLEAN.search(name), ROBUST.search(name)
    if clean:
        return None if robust else "clean"
    return "robust" if robust or TRAINED.search(name) else None
