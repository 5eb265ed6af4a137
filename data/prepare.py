"""Write WebDataset shards from a folder, tar or other source of images.

    python -m data.prepare IMAGES FOLDER --split train [--short-side 512 --quality 90] [--workers 8] [--estimate]
    python -m data.prepare --verify FOLDER

IMAGES: as for `data.train_dataset`. Train with `--data.train_dataset=wds/FOLDER` afterwards. The command first estimates
space and time from 64 images (`--estimate`: nothing more). Shards appear whole or not at all. After an interruption the
same command resumes; it also replaces shards that are missing or have another size. Images are shuffled once, so that
reading the shards in order shows all classes. A file whose shorter side is at most `--short-side`, and every file without
that option, is copied byte by byte. Larger ones are rotated upright, resized (bicubic) and written as JPEG. Files that
are not images are skipped and listed in the manifest; a file that cannot be read ends the command.

Exit status: 0; 1 with --verify if something differs from what was written; 2 for wrong input; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from common.errors import UserError, blame
from common.files import read_json, sha256, take_folder, writable, write_atomically
from common.forkserver import end_with_parent
from data.datasets import open_source
from data.decoding import DECODE_ERRORS, decode
from data.loader import dead_worker
from data.shards import INFO, SHARDS_FORMAT, file_size, index_path, manifest_path, read_manifest
from data.source import Source, encoded, some

_ENDINGS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # file extensions that timm's reader accepts
_PROBED = 64  # images for the estimate
_SPLITS = {"train": "train", "val": "validation"}


@dataclass(frozen=True)
class Settings:
    """Settings that determine the content of the shards; the number of workers does not."""

    short_side: int
    quality: int
    per_shard: int
    seed: int


def encode(data: bytes, settings: Settings) -> tuple[bytes, str]:
    """Return a file's new content and extension. Raises one of `DECODE_ERRORS`."""
    image = Image.open(io.BytesIO(data))
    large = settings.short_side and min(image.size) > settings.short_side
    if not large and image.format in _ENDINGS:
        return data, _ENDINGS[image.format]
    image = decode(data)
    if large:
        scale = settings.short_side / min(image.size)
        image = image.resize([max(round(side * scale), 1) for side in image.size], Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=settings.quality)
    return file.getvalue(), "jpg"


def _encoded(source: Source, i: int, settings: Settings) -> tuple[bytes, str]:
    """Return `encode` of image i. Raises UserError for an unreadable file, which may be readable later, unlike a broken image."""
    try:
        data = encoded(source, i)
    except OSError as error:
        if error.errno is None:  # from Pillow, in a source that decodes
            raise
        raise UserError(
            f"IMAGES: cannot read {source.name(i)} ({error.strerror or error}). Make it readable and run the same command again."
        ) from error
    return encode(data, settings)


class _Shards(Dataset):
    """Data set whose items are shards: reading an item writes it and its record, and returns its number of images or an error."""

    def __init__(
        self,
        source: Source,
        folder: Path,
        split: str,
        settings: Settings,
        order: np.ndarray,
        expected: list[str] | None,
    ) -> None:
        """Store the arguments; `expected`: the SHA-256 of each shard if all were finished before, else None."""
        self._source, self._folder, self._split, self._settings = source, folder, split, settings
        self._order, self._expected = order, expected

    def __getitem__(self, number: int) -> int | OSError | UserError:
        try:
            return self._write(number)
        except (OSError, UserError) as error:
            return error  # if raised in a worker, its message would contain a traceback

    def _write(self, number: int) -> int:
        rows, left_out, archive = [], [], io.BytesIO()
        first = number * self._settings.per_shard
        with tarfile.open(fileobj=archive, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for i in self._order[first : first + self._settings.per_shard].tolist():
                try:
                    data, ending = _encoded(self._source, i, self._settings)
                except DECODE_ERRORS as error:
                    left_out.append([self._source.key(i), f"{type(error).__name__}: {error}"])
                    continue
                label = int(self._source.labels[i])
                _add(tar, f"{i:09d}.{ending}", data)
                rows.append([self._source.key(i), tar.offset - _padded(len(data)), len(data), label])
                _add(tar, f"{i:09d}.cls", str(label).encode())
        content, path = archive.getbuffer(), self._folder / f"{self._split}-{number:05d}.tar"
        shard = {"name": path.name, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        if self._expected is not None and shard["sha256"] != self._expected[number]:
            raise UserError(
                f"FOLDER: {path} is missing or has another size, and cannot be made again as it was: its images or Pillow have "
                "changed. Copy it again, or delete the folder and make all shards again."
            )
        write_atomically(path, lambda file: file.write(content))
        record = {"shard": shard | {"samples": len(rows)}, "rows": rows, "left_out": left_out}
        write_atomically(record_path(path), lambda file: file.write(json.dumps(record).encode()))
        return len(rows) + len(left_out)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # without time and owner, so that the same images give the same bytes
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def record_path(shard: Path) -> Path:
    """Return the path of the record beside a finished shard, which exists until all shards are finished."""
    return shard.with_suffix(".record.json")


def read_record(shard: Path) -> dict[str, Any] | None:
    """Return a finished shard's record; None if the record or the shard is missing or incomplete."""
    try:
        record = json.loads(record_path(shard).read_text())
        return record if shard.stat().st_size == record["shard"]["bytes"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class Estimate:
    """Estimated cost of all images: bytes, and seconds of one core."""

    size: int
    seconds: float


def estimate(source: Source, settings: Settings) -> Estimate:
    """Estimate the cost from a few images, spread over all."""
    count = min(_PROBED, len(source))
    begin, size = time.perf_counter(), 0
    for k in range(count):
        try:
            data, _ = _encoded(source, k * len(source) // count, settings)
        except DECODE_ERRORS:
            continue
        size += _padded(len(data)) + 3 * tarfile.BLOCKSIZE  # two headers and a label
    factor = len(source) / count
    return Estimate(round(size * factor), (time.perf_counter() - begin) * factor)


def prepare(
    source: Source, folder: Path, split: str, settings: Settings, *, workers: int, progress: bool
) -> dict[str, Any]:
    """Write, resume or repair the shards of a split in a folder that no other process writes to, and return its manifest.

    Raises:
        UserError: the folder contains shards of other images, settings or classes; an image cannot be read, or no image of a
            class can be decoded; a worker died.
        OSError: the folder cannot be written.
    """
    for part in folder.glob(f".{split}*.part"):  # of a killed process; only this one uses the folder
        part.unlink(missing_ok=True)
    facts = {"images": len(source), "classes": source.class_names, "settings": asdict(settings)}
    facts["images_sha256"] = _digest(source)
    order = np.random.RandomState(settings.seed).permutation(len(source))
    numbers = range(-(-len(source) // settings.per_shard))
    paths = [folder / f"{split}-{number:05d}.tar" for number in numbers]
    _read_info(folder)  # may fail: before hours of work rather than after
    _check_other_split(folder, split, source)
    begun = begun_path(folder, split)
    manifest = read_manifest(folder, split)
    if manifest is not None:
        _check_same(folder, manifest["made_from"], facts)
        if not _is_whole(manifest, folder, split, paths):
            manifest = None  # all shards are made again
    elif (before := read_begun(folder, split)) is not None:
        _check_same(folder, before, facts)
    if manifest is None:
        write_atomically(begun, lambda file: file.write(json.dumps(facts).encode()))
        expected = None
        todo = [number for number in numbers if read_record(paths[number]) is None]
    else:
        expected = [shard["sha256"] for shard in manifest["shards"]]
        todo = [n for n, shard in enumerate(manifest["shards"]) if file_size(paths[n]) != shard["bytes"]]
    shards = _Shards(source, folder, split, settings, order, expected)
    loader = DataLoader(
        shards,
        sampler=todo,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=1 if workers else None,
        worker_init_fn=partial(_start_worker, os.getpid()),
    )
    done = len(source) - sum(len(order[n * settings.per_shard : (n + 1) * settings.per_shard]) for n in todo)
    with tqdm(total=len(source), initial=done, unit=" images", desc=split, disable=not progress) as bar:
        try:
            for count in loader:
                if isinstance(count, Exception):
                    raise count
                bar.update(count)
        except RuntimeError as error:
            if (reason := dead_worker(error)) is None:
                raise
            raise UserError(
                f"{reason}. The usual cause is a lack of memory: use a smaller --workers, now {workers}. The same "
                "command resumes."
            ) from error
    if manifest is None:
        _check_classes(source, paths)
        manifest = _finish(source, folder, split, facts, [read_record(path) for path in paths])
    for path in [begun, *map(record_path, paths)]:
        path.unlink(missing_ok=True)
    return manifest


def _start_worker(parent: int, _: int) -> None:
    end_with_parent(parent)


def begun_path(folder: Path, split: str) -> Path:
    """Return the path of the file that says what an unfinished split is made from."""
    return folder / f"{split}.begun.json"


def read_begun(folder: Path, split: str) -> dict[str, Any] | None:
    """Return what an unfinished split is made from; None if it has not been started or is finished."""
    return read_json(begun_path(folder, split))


def _class_names(folder: Path, split: str) -> list[str] | None:
    """Return the class names of a split in `folder`, finished or not; None if there is no such split or it has no names."""
    if (manifest := read_manifest(folder, split)) is not None:
        return manifest["class_names"]
    return (read_begun(folder, split) or {}).get("classes")


def _check_other_split(folder: Path, split: str, source: Source) -> None:
    other = next(name for name in _SPLITS.values() if name != split)
    names = _class_names(folder, other)
    if None not in (names, source.class_names) and names != source.class_names:
        raise UserError(
            f"FOLDER: {folder} contains the split {other} with the classes {some(names)}; expected the same classes, but "
            f"{split} has {some(source.class_names)}. When shards are read as a stream, the labels would differ. Write train "
            "first, so that val gets its class numbers, or give each split its own folder."
        )


def _is_whole(manifest: dict[str, Any], folder: Path, split: str, paths: list[Path]) -> bool:
    """Return whether the manifest lists all shards and the index is unchanged."""
    path = index_path(folder, split)
    listed = [shard["name"] for shard in manifest["shards"]]
    return listed == [path.name for path in paths] and path.is_file() and sha256(path) == manifest["index_sha256"]


def _digest(source: Source) -> str:
    """Return a digest of all names and labels in order, because an equal number of images may be other images."""
    digest = hashlib.sha256()
    for i, label in enumerate(source.labels.tolist()):
        digest.update(os.fsencode(source.key(i)) + b"\0%d\0" % label)
    return digest.hexdigest()


def _check_same(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    different = [name for name in now if before.get(name) != now[name]]
    if different == ["images_sha256"]:
        raise UserError(
            f"{folder} contains shards made from other images: their number is equal, but names or labels differ (or an earlier "
            "version wrote them, which did not record these). Give another folder, or delete this one."
        )
    if different:
        shown = ", ".join(
            f"{name} (were {_short(before.get(name))}, are {_short(now[name])})"
            for name in different
            if name != "images_sha256"
        )
        raise UserError(f"{folder} contains shards made from other {shown}. Give another folder, or delete this one.")


def _short(value: Any) -> str:
    return some(value) if isinstance(value, list) else str(value)


def _check_classes(source: Source, paths: list[Path]) -> None:
    """Raise UserError if a class has no decodable image; the shards with skipped images will then be written again."""
    records = {path: read_record(path) for path in paths}
    left = {label for record in records.values() for *_, label in record["rows"]}
    if not (empty := sorted(set(source.labels.tolist()) - left)):
        return
    left_out = [entry for record in records.values() for entry in record["left_out"]]
    for path, record in records.items():
        if record["left_out"]:
            record_path(path).unlink()
    names = empty if source.class_names is None else [source.class_names[label] for label in empty]
    raise UserError(
        f"IMAGES: expected at least one image that can be decoded in each class, found none in {some(names)} "
        f"({len(left_out)} skipped in total, such as {': '.join(left_out[0])}). Repair them and run the same command again."
    )


def _read_info(folder: Path) -> dict[str, Any]:
    """Read timm's info file of all splits."""
    info = read_json(folder / INFO)
    if info is None:
        return {"splits": {}}
    if not isinstance(info.get("splits"), dict):
        raise UserError(
            f"{folder / INFO}: expected splits as python -m data.prepare writes them, found none. Give another folder."
        )
    return info


def _finish(
    source: Source, folder: Path, split: str, facts: dict[str, Any], records: list[dict[str, Any]]
) -> dict[str, Any]:
    """Write the index, timm's info file, and last the manifest, which marks the split as complete; return the manifest."""
    rows = [(number, *row) for number, record in enumerate(records) for row in record["rows"]]
    shard, key, offset, size, label = zip(*rows)
    index = {name: np.array(v, np.int64) for name, v in {"offset": offset, "size": size, "label": label}.items()}
    index |= {"shard": np.array(shard, np.int32), "key": np.array([os.fsencode(k) for k in key])}
    write_atomically(index_path(folder, split), lambda file: np.savez(file, **index))
    shards = [record["shard"] for record in records]
    info = _read_info(folder)
    others = info.get("num_classes") if set(info["splits"]) - {split} else 0
    # The numbers of the splits differ only if classes have no names.
    info["num_classes"] = max(source.num_classes, others) if isinstance(others, int) else source.num_classes
    info["splits"][split] = {
        "name": split,
        "num_samples": len(rows),
        "filenames": [s["name"] for s in shards],
        "shard_lengths": [s["samples"] for s in shards],
    }
    write_atomically(folder / INFO, lambda file: file.write(json.dumps(info, indent=1).encode()))
    manifest = {
        "format": SHARDS_FORMAT,
        "split": split,
        "num_samples": len(rows),
        "num_classes": source.num_classes,
        "class_names": source.class_names,
        "index_sha256": sha256(index_path(folder, split)),
        "shards": shards,
        "left_out": [entry for record in records for entry in record["left_out"]],
        "made_from": facts,
    }
    write_atomically(manifest_path(folder, split), lambda file: file.write(json.dumps(manifest, indent=1).encode()))
    return manifest


def verify(folder: Path) -> list[str]:
    """Return the names of missing or changed shards and indices, of shards in no manifest, and of unfinished splits.

    Raises:
        UserError: there is no manifest.
    """
    wrong, found = [], False
    for split in _SPLITS.values():
        if (manifest := read_manifest(folder, split)) is None:
            if begun_path(folder, split).exists():
                found = True
                wrong.append(f"{split} (not finished)")
            continue
        found = True
        sums = {shard["name"]: shard["sha256"] for shard in manifest["shards"]}
        sums[index_path(folder, split).name] = manifest["index_sha256"]
        wrong += [
            name for name, digest in sums.items() if not (folder / name).is_file() or sha256(folder / name) != digest
        ]
        shards = sorted(path.name for path in folder.glob(f"{split}-*.tar"))
        wrong += [f"{name} (not in the manifest)" for name in shards if name not in sums]
    if not found:
        raise UserError(
            f"FOLDER: expected a manifest ({' or '.join(_SPLITS.values())}.manifest.json), found none in {folder}."
        )
    return wrong


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m data.prepare", description="Write WebDataset shards of images.")
    parser.add_argument("images", nargs="?", help="folder, tar, hfds/NAME, … (as data.train_dataset)")
    parser.add_argument("folder", help="folder for the shards")
    parser.add_argument("--split", choices=list(_SPLITS), default="train")
    parser.add_argument("--short-side", type=int, default=0, metavar="N", help="resize larger images to N px; 0: never")
    parser.add_argument("--quality", type=int, default=90, metavar="Q", help="JPEG quality of resized images")
    parser.add_argument("--per-shard", type=int, default=1000, metavar="N", help="images per shard")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order in the shards")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="number of processes")
    parser.add_argument("--root", default="", help="as data.root")
    parser.add_argument("--estimate", action="store_true", help="only print the estimated space and time")
    parser.add_argument("--verify", action="store_true", help="compare the shards of FOLDER with their checksums")
    arguments = parser.parse_args(argv)
    for name, lowest in (("short_side", 0), ("quality", 1), ("per_shard", 1), ("workers", 0), ("seed", 0)):
        if getattr(arguments, name) < lowest:
            parser.error(f"--{name.replace('_', '-')}: expected at least {lowest}, got {getattr(arguments, name)}")
    for name, highest in (("quality", 100), ("seed", 2**32 - 1)):
        if getattr(arguments, name) > highest:
            parser.error(f"--{name}: expected at most {highest}, got {getattr(arguments, name)}")
    if not arguments.folder.strip():
        parser.error("FOLDER: expected a folder, got nothing (an unset shell variable?)")
    if arguments.verify == (arguments.images is not None):
        parser.error("expected IMAGES and FOLDER, or --verify and FOLDER")
    return arguments


def run(arguments: argparse.Namespace) -> int:
    folder = Path(arguments.folder)
    if arguments.verify:
        wrong = verify(folder)
        print(
            f"not as they were written: {some(wrong)}. Delete files that differ or are not in the manifest. The command that "
            "wrote the shards then makes missing ones again."
            if wrong
            else "all shards are as they were written"
        )
        return int(bool(wrong))
    images = Path(arguments.images).expanduser()
    if images.is_dir() and Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(images)):
        raise UserError(f"FOLDER: expected a folder outside the images' folder {images}, got {folder}.")
    split = _SPLITS[arguments.split]
    # timm's reader knows no class names: the labels in the shards must be the training set's numbers.
    names = _class_names(folder, "train") if split != "train" else None
    with blame("IMAGES"):
        source = open_source(arguments.images, split=arguments.split, root=arguments.root, class_names=names)
    if not isinstance(source, Source):
        raise UserError(f"IMAGES: expected images that can be read in any order, got the stream {arguments.images}.")
    settings = Settings(arguments.short_side, arguments.quality, arguments.per_shard, arguments.seed)
    expected = estimate(source, settings)
    with writable("FOLDER", folder):
        folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    minutes = expected.seconds / max(arguments.workers, 1) / 60
    print(
        f"{len(source)} images in {source.num_classes} classes: about {expected.size / 1e9:.2f} GB ({free / 1e9:.2f} GB are free "
        f"in {folder}) and {minutes:.1f} minutes with {arguments.workers} workers are needed."
    )
    if arguments.estimate:
        return 0
    present = sum(path.stat().st_size for path in folder.glob(f"{split}-*.tar"))
    if expected.size - present > free:
        raise UserError(
            f"FOLDER: about {expected.size / 1e9:.2f} GB are needed in {folder}, but {free / 1e9:.2f} GB are free."
        )
    with blame("FOLDER"):
        lock = take_folder(folder)
    with writable("FOLDER", folder), lock:
        manifest = prepare(source, folder, split, settings, workers=arguments.workers, progress=True)
    for name, reason in manifest["left_out"][:20]:
        print(f"skipped: {name} ({reason})", file=sys.stderr)
    left_out = f"; {len(manifest['left_out'])} skipped, listed in the manifest" if manifest["left_out"] else ""
    size = sum(shard["bytes"] for shard in manifest["shards"])
    print(f"{manifest['num_samples']} images in {len(manifest['shards'])} shards, {size / 1e9:.2f} GB{left_out}.")
    return 0


def main(argv: list[str]) -> int:
    try:
        return run(parse(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command resumes", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
