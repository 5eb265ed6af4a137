"""The state of one evaluation on disk: what it is, and one record for each finished chunk.

    <folder>/identity.json      everything the verdicts depend on
    <folder>/chunks/00012.json  verdicts of chunk 12, written whole or not at all
    <folder>/chunks/00012.npz   its adversarial images, where kept
    <folder>/lock               held by the run that works here; the system frees it when that run ends, however it ends

A record never changes once it is there, so a run can end at any moment and another can go on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import UserError, blame
from common.files import set_aside, take_folder, writable, write_atomically
from data.loader import print_warning

SHOWN_DIFFERENCES = 6
NOTHING = "nothing"  # in the place of a value that one of two identities lacks
# What a record must hold to count as one; those of `LISTS` an entry for each image.
LISTS = ("positions", "labels", "clean_pred", "broken_by")
LATER_LISTS = ("adv_pred",)  # records of earlier versions lack them
RECORD_KEYS = {*LISTS, "chunk", "unreadable", "attack_seconds", "rejoined", "check", "images_kept"}
RECORD_KEYS |= {"seconds", "started", "device"}


class StateFolder:
    """The records of one evaluation; one run at a time works on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._chunks = folder / "chunks"
        self._lock: BinaryIO | None = None

    def open(self, identity: Mapping[str, Any]) -> None:
        """Take the folder for this run: make it, or go on with what is there.

        Raises:
            UserError: another run is using it, it holds another evaluation, or it cannot be written.
        """
        with writable("eval.out", self.folder):
            self._chunks.mkdir(parents=True, exist_ok=True)
            with blame("eval.out"):
                self._lock = take_folder(self.folder)
            for half_written in [*self.folder.glob(".*.part"), *self._chunks.glob(".*.part")]:
                half_written.unlink()
            file = self.folder / "identity.json"
            if file.exists():
                self._compare(file, identity)
            else:
                write_atomically(file, lambda f: f.write(json.dumps(identity, indent=2).encode()))

    def close(self) -> None:
        """Let other runs use the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write(self, record: Mapping[str, Any]) -> None:
        """Keep the record of a finished chunk. Raises OSError where it cannot be written."""
        file = self._chunks / f"{record['chunk']:05d}.json"
        write_atomically(file, lambda f: f.write(json.dumps(record).encode()))

    def read(self, chunks: int, *, with_images: bool = False) -> dict[int, dict[str, Any]]:
        """The records by chunk, of `chunks`. One that cannot be read is renamed, with a warning, and its chunk is open again.

        So is, `with_images`, a chunk whose adversarial images were not kept.
        """
        records = {}
        for file in sorted(self._chunks.glob("*.json")):
            try:
                record = json.loads(file.read_bytes())
                _check(record, file.stem, chunks)
            except (OSError, ValueError) as error:
                aside = set_aside(file)
                print_warning(f"{file} is damaged ({error}); renamed to {aside.name}, its chunk runs again.")
                continue
            kept, shown = record["images_kept"], len(record["positions"])
            if not with_images or not shown or (kept == shown and self.images_file(record["chunk"]).exists()):
                records[record["chunk"]] = record
        return records

    def images_file(self, chunk: int) -> Path:
        """Where a chunk's adversarial images go."""
        return self._chunks / f"{chunk:05d}.npz"

    def _compare(self, file: Path, identity: Mapping[str, Any]) -> None:
        try:
            there = json.loads(file.read_bytes())
        except ValueError as error:
            raise UserError(
                f"eval.out: {file} is damaged ({error}); give another eval.out, or remove the folder."
            ) from error
        found, wanted = _flat(there), _flat(json.loads(json.dumps(identity)))  # as JSON has it: tuples are lists
        differ = [name for name in {**found, **wanted} if found.get(name, NOTHING) != wanted.get(name, NOTHING)]
        if differ:
            texts = [f"{n}: {found.get(n, NOTHING)} there, {wanted.get(n, NOTHING)} here" for n in differ]
            more = f"; and {len(texts) - SHOWN_DIFFERENCES} more" if len(texts) > SHOWN_DIFFERENCES else ""
            raise UserError(
                f"eval.out: {self.folder} holds another evaluation, whose chunks cannot be mixed with this one's. What differs: "
                f"{'; '.join(texts[:SHOWN_DIFFERENCES])}{more}. Give another eval.out."
            )


def _check(record: Any, stem: str, chunks: int) -> None:
    """Raise ValueError if this is no record of the chunk that its file is named after."""
    if not isinstance(record, dict) or not RECORD_KEYS <= record.keys():
        raise ValueError("not a record of a chunk")
    number = record["chunk"]
    if type(number) is not int or not 0 <= number < chunks or f"{number:05d}" != stem:
        raise ValueError("not a record of this chunk")
    lists = [record[name] for name in (*LISTS, *LATER_LISTS) if name in record]
    if not all(isinstance(values, list) and len(values) == len(lists[0]) for values in lists):
        raise ValueError("its lists are not equally long")


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names → leaves."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    return {
        k: v for name, sub in tree.items() for k, v in _flat(sub, f"{prefix}.{name}" if prefix else str(name)).items()
    }
