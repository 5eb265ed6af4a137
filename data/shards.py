"""Random access to the shards that `python -m data.prepare` writes.

A folder of shards contains for each split: `<split>-00000.tar` … (WebDataset: `<key>.jpg`, `<key>.cls`),
`<split>.index.npz` (position of each image) and `<split>.manifest.json` (class names, settings, checksums). It also
contains `_info.json`, which describes all splits for timm's reader. With the index any image is one seek away. The
order is therefore a function of (seed, epoch), as for a folder, and a run resumes exactly, with any number of processes
and workers. Without an index, shards are read as a stream.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import read_json, sha256
from data.source import Request, Source, some

SHARDS_FORMAT = 1
INFO = "_info.json"
_MANIFEST = {
    "num_samples": int,
    "num_classes": int,
    "index_sha256": str,
    "shards": list,
    "left_out": list,
    "made_from": dict,
}
_SHARD = {"name": str, "sha256": str, "bytes": int, "samples": int}


def manifest_path(folder: Path, split: str) -> Path:
    return folder / f"{split}.manifest.json"


def index_path(folder: Path, split: str) -> Path:
    return folder / f"{split}.index.npz"


class ShardSource(Source):
    """The images of one split; `index` as `_finish` of `data.prepare` writes it."""

    def __init__(self, folder: Path, manifest: dict[str, Any], index: dict[str, np.ndarray]) -> None:
        super().__init__(index["label"], manifest["class_names"])
        self.num_classes = manifest["num_classes"]
        if not 0 <= self.labels.min() <= self.labels.max() < self.num_classes:
            raise ValueError(f"its labels are not below {self.num_classes}")
        if not 0 <= index["shard"].min() <= index["shard"].max() < len(manifest["shards"]):
            raise ValueError(f"its shards are not below {len(manifest['shards'])}")
        self._paths = [str(folder / shard["name"]) for shard in manifest["shards"]]
        self._shard, self._offset, self._size, self._keys = (index[k] for k in ("shard", "offset", "size", "key"))

    def image(self, i: int) -> bytes:
        with open(self._paths[self._shard[i]], "rb") as file:  # forked workers would share an open file's position
            file.seek(int(self._offset[i]))
            return file.read(self.size(i))

    def name(self, i: int) -> str:
        return f"{self._paths[self._shard[i]]}: {self.key(i)}"

    def key(self, i: int) -> str:
        return os.fsdecode(self._keys[i])

    def size(self, i: int) -> int:
        return int(self._size[i])


def read_manifest(folder: Path, split: str) -> dict[str, Any] | None:
    """Return a split's manifest; None if there is none.

    Raises:
        UserError: it is damaged or has another format.
    """
    path = manifest_path(folder, split)
    if (manifest := read_json(path)) is None:
        return None
    if manifest.get("format") != SHARDS_FORMAT:
        raise UserError(f"{path}: expected a manifest of format {SHARDS_FORMAT}, as python -m data.prepare writes it.")
    wrong = [name for name, kind in _MANIFEST.items() if not isinstance(manifest.get(name), kind)]
    names = manifest.get("class_names")
    if names is not None and not (
        isinstance(names, list)
        and all(isinstance(name, str) for name in names)
        and len(names) == manifest.get("num_classes")
    ):
        wrong.append("class_names")
    if "shards" not in wrong and not all(map(_is_shard, manifest["shards"])):
        wrong.append("shards")
    if not wrong and sum(shard["samples"] for shard in manifest["shards"]) != manifest["num_samples"]:
        wrong = ["num_samples", "shards"]
    if wrong:
        raise UserError(f"{path}: expected a manifest as python -m data.prepare writes it, damaged: {some(wrong)}.")
    return manifest


def _is_shard(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and all(isinstance(entry.get(name), kind) for name, kind in _SHARD.items())
        and Path(entry["name"]).name == entry["name"]  # a manifest from elsewhere must not point outside its folder
    )


def open_shards(folder: Path, request: Request) -> ShardSource | None:
    """Open the split's images by index; None if the folder has no manifest of the split.

    Raises:
        UserError: shards are missing or have another size, or manifest or index are damaged.
    """
    manifest = read_manifest(folder, request.split_name)
    if manifest is None:
        return None
    wrong = [shard["name"] for shard in manifest["shards"] if file_size(folder / shard["name"]) != shard["bytes"]]
    if wrong:
        raise UserError(
            f"expected the {len(manifest['shards'])} shards of {folder} as in its manifest, but these are missing or have another "
            f"size: {some(wrong)}. Run python -m data.prepare again, or copy them again."
        )
    path = index_path(folder, request.split_name)
    try:
        if sha256(path) != manifest["index_sha256"]:
            raise ValueError("its checksum differs from the manifest's")
        with np.load(path) as file:  # no pickles
            return ShardSource(folder, manifest, dict(file))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path} ({error}).") from error


def file_size(path: Path) -> int | None:
    """Return a file's size in bytes; None if there is no such file."""
    try:
        return path.stat().st_size
    except OSError:
        return None
