"""Robust ImageNet models known by name: description, published accuracies, links of the weights.

The tables and their sources are in published.yaml.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml

from zoo.description import CLIP_PREFIX, ROBUSTBENCH_PREFIX, Preprocessing

SHARES = "https://nc.mlcloud.uni-tuebingen.de/index.php/s/"
PREFIXES = {"robustbench": ROBUSTBENCH_PREFIX, "open_clip": CLIP_PREFIX}  # of `arch`, by kind of link
EPS = {"Linf": 4 / 255, "L2": 2.0, "L1": 75.0}  # radii of the published accuracies


class Accuracies(NamedTuple):
    """Accuracies in %; None: not published."""

    clean: float | None
    autoattack: float | None


@dataclass(frozen=True, kw_only=True)
class Published:
    """A robust ImageNet model. Unless stated otherwise, empty or None means unknown or not existing."""

    name: str  # this project's name; for models of the paper also the file name of the config
    title: str  # published name, or architecture in words
    by: str = "paper"  # publication: "paper" for README's table, else a section of published.yaml
    family: str = ""  # "ConvNeXt", "ConvNeXt-iso" or "ViT"
    arch: str  # this and the next three: as the flags `model.*`
    not_original: bool = False
    updated: bool = False
    add_normalization: bool | None = (
        None  # whether the weights need or contain an input normaliser; None: inferred from the file
    )
    epochs: int | None = None  # of adversarial training, as in the config
    results: Mapping[int, Accuracies | None]  # by image size in pixels, AutoAttack at Linf 4/255
    other_norms: Mapping[str, float] = field(
        default_factory=dict
    )  # AutoAttack accuracy in % at L2 2 and L1 75, at the model's own image size
    links: tuple[str, ...]  # of the weights, newest first; see `zoo.download.download` and `zoo.clip`
    params: float | None = None  # in millions
    gflops: float | None = None  # multiply-adds of a forward pass of one 224 px image, in billions
    robustbench_id: str | None = None  # RobustBench id of the same weights
    robustbench: Accuracies | None = None  # accuracies measured by RobustBench at 224 px
    external: float | None = None  # lower accuracy in % under a stronger or adaptive attack
    unlike: str = ""  # why evaluations cannot be compared with the published numbers; empty: they can
    note: str = ""  # a footnote
    note_on: str = ""  # column of README's table for the footnote
    # Preprocessing of the published evaluation; None: defined by the weights' configuration.
    preprocessing: Preprocessing | None = Preprocessing(source="the published table")
    sha256: Mapping[str, str] = field(default_factory=dict)  # by file name in the share

    @property
    def config(self) -> str | None:
        """Path of the config, relative to the project."""
        return f"configs/{self.name}.yaml" if self.by == "paper" else None

    @property
    def description(self) -> dict[str, Any]:
        """Arguments of the network, by the names of the flags `model.*`."""
        return {flag: getattr(self, flag) for flag in ("arch", "not_original", "updated", "add_normalization")}

    def autoattack(self, norm: str, eps: float, img_size: int) -> float | None:
        """Return the published accuracy in % under AutoAttack in this threat model; None: not published."""
        if abs(eps - EPS[norm]) > 1e-9:
            return None
        numbers = self.results.get(img_size)
        return None if numbers is None else numbers.autoattack if norm == "Linf" else self.other_norms.get(norm)


def _read_tables() -> Iterator[Published]:
    tables = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    for row in tables.pop("paper"):
        row["results"] = {size: pair and Accuracies(*pair) for size, pair in row["results"].items()}
        row["links"] = tuple(SHARES + token for token in row.pop("shares"))
        if "robustbench" in row:
            row["robustbench"] = Accuracies(*row["robustbench"])
        yield Published(**row)
    for by, table in tables.items():
        for row in _rows_of_files(table) if "files" in table else table["models"]:
            row = {"by": by, **table.get("all", {}), **row}
            row["links"] = tuple(row.pop("links", [f"robustbench:{row['name']}"]))
            if by == "RobustBench":
                row["robustbench_id"] = row["name"]
            kind, _, name = row["links"][0].partition(":")
            row.setdefault("arch", PREFIXES.get(kind, "") + name)
            row["preprocessing"] = used = _preprocessing(row.pop("images", None), by)
            numbers = Accuracies(row.pop("clean", None), row.pop("autoattack", None))
            yield Published(results={used.img_size if used else 224: numbers}, **row)


def _rows_of_files(table: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a row for each radius of each architecture; each has its own file."""
    for kind, arch in table["files"].items():
        for norm, clean_of in table["clean"][kind].items():
            for radius, clean in clean_of.items():
                name = f"{kind}_{norm}_eps{radius}"
                title = f"{kind}, {norm.capitalize()} {radius}{'/255' if norm == 'linf' else ''}"
                links = [f"{table['at']}{name}.ckpt"]
                yield {"name": name, "title": title, "arch": arch, "clean": clean, "links": links}


def _preprocessing(images: str | Mapping[str, Any] | None, by: str) -> Preprocessing | None:
    """Parse RobustBench's name of a preprocessing, such as BicubicRes256Crop224, or the fields of a `Preprocessing`."""
    if not isinstance(images, str):
        return images if images is None else Preprocessing(**images, source=by)
    found = re.fullmatch(r"(Bicubic)?(?:Res(\d+))?(?:Crop(\d+))?", images)
    interpolation, resized, crop = "bicubic" if found[1] else "bilinear", int(found[2] or 0), int(found[3] or 0)
    if resized and crop:
        return Preprocessing(crop, crop / resized, interpolation, source=by)
    return Preprocessing(resized or crop, 1.0, interpolation, "squash" if resized else "crop", source=by)


# All models by name, and the models of README's table.
KNOWN = MappingProxyType({model.name: model for model in _read_tables()})
PUBLISHED = MappingProxyType({name: model for name, model in KNOWN.items() if model.by == "paper"})
_ALIASES = {model.title.casefold(): model for model in PUBLISHED.values()}
_ALIASES |= {model.robustbench_id.casefold(): model for model in KNOWN.values() if model.robustbench_id}
_ALIASES |= {name.casefold(): model for name, model in KNOWN.items()}


def find_published(name: str) -> Published | None:
    """Return the model with this name, published name or RobustBench id, ignoring case; None if there is none."""
    return _ALIASES.get(name.casefold())


def nearest_published(name: str) -> str | None:
    """Return the name of the model whose name, title or RobustBench id is most similar to `name`; None if none is close."""
    nearest = difflib.get_close_matches(name.casefold(), _ALIASES, n=1)
    return _ALIASES[nearest[0]].name if nearest else None
