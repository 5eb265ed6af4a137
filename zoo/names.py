"""From what a user calls a network to its weights: a file, a run folder, a published name, or a RobustBench id."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import EvalModelConfig
from common.errors import UserError
from common.provenance import PROJECT
from zoo.download import ShareUnavailable, choose, download_robustbench, download_share
from zoo.inference import describe_weights
from zoo.loading import read_weights
from zoo.models import ROBUSTBENCH_PREFIX
from zoo.published import Published, find_published, nearest_published
from zoo.runs import find_weights

CHECKPOINTS = PROJECT / "checkpoints"
ROBUSTBENCH_ID = re.compile(r"[A-Z][A-Za-z]+\d{4}\S+")  # first author, year, first word of the title


@dataclass(frozen=True)
class Located:
    """Weights on this machine, what their name says of the network, and the published model they are, if any."""

    path: Path
    description: Mapping[str, Any]
    published: Published | None = None

    def describe(self, asked: EvalModelConfig) -> EvalModelConfig:
        """What was asked for, completed by what the name says."""
        unset = {name: value for name, value in self.description.items() if getattr(asked, name) is None}
        return dataclasses.replace(asked, **unset)


def locate(name: str, *, flag: str, kind: str = "robust", folder: Path | None = None, force: bool = False) -> Located:
    """Find the weights called `name`; a published one is downloaded where it is not there yet.

    Args:
        name: weights file, run folder, published name or title, RobustBench ImageNet id.
        flag: name of the flag it came from, for errors.
        kind: "robust", or "clean" for the initialisation of a published model.
        folder: where downloads go, in a folder for each model; by default `checkpoints` in the project.
        force: download a published model's share again, and accept other content than the first time.

    Raises:
        UserError: nothing is called so, or it cannot be downloaded.
    """
    path, folder = Path(name).expanduser(), folder or CHECKPOINTS
    if path.exists():
        return Located(find_weights(path, flag=flag), {})
    published = find_published(name)
    if published is not None:
        return Located(
            _published_weights(published, folder / published.name, kind=kind, flag=flag, force=force),
            published.description,
            published,
        )
    if "/" in name or path.suffix:
        raise UserError(f"{flag}: expected a file of weights, got {name!r}, which does not exist.")
    if ROBUSTBENCH_ID.fullmatch(name):
        if kind == "clean":
            raise UserError(f"{flag}: RobustBench has no clean initialisation of {name}.")
        return Located(download_robustbench(name, folder / name), {"arch": ROBUSTBENCH_PREFIX + name})
    near = nearest_published(name)
    hint = f" (did you mean {near}?)" if near else ""
    raise UserError(
        f"{flag}: {name!r} is neither a file or run folder, nor a published model's name{hint}; `python -m zoo list` lists them."
    )


def split_kind(name: str) -> tuple[str, str]:
    """`NAME:clean` and `NAME:robust` as a name and a kind of weights; "clean", training's start, where nothing is said."""
    model, colon, kind = name.rpartition(":")
    return (model, kind) if colon and kind in ("clean", "robust") and not Path(name).exists() else (name, "clean")


def _published_weights(published: Published, folder: Path, *, kind: str, flag: str, force: bool) -> Path:
    """The share's file; of robust weights RobustBench's copy where the share cannot be had."""

    def fits(path: Path) -> bool:
        try:
            found = describe_weights(read_weights(path, flag=flag))
        except UserError:
            return False
        return published.arch in found.candidates and found.not_original == published.not_original

    problems = []
    for link in published.links:
        share = {"name": published.name, "hint": published.robustbench_id or "", "known": published.sha256}
        try:
            content = download_share(link, folder, force=force, **share)
        except ShareUnavailable as error:
            problems.append(str(error))
            continue
        try:
            return choose(content, kind, fits)
        except UserError as error:
            raise UserError(f"{flag}: {link}: {error}") from error
    if published.robustbench_id and kind == "robust":
        print(f"{problems[-1]} Trying RobustBench's copy, {published.robustbench_id}.", file=sys.stderr)
        return download_robustbench(published.robustbench_id, folder)
    raise UserError(f"{flag}: {' '.join(problems)}")
