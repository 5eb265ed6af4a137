"""The state of one evaluation on disk: its identity, and one record for each finished chunk.

    <folder>/identity.json      everything the verdicts depend on
    <folder>/chunks/00012.json  verdicts of chunk 12, written atomically
    <folder>/chunks/00012.npz   its adversarial images, if saved
    <folder>/lock               locked by the run that uses the folder; the system releases it however that run ends

A written record never changes, so a run can end at any moment and another run can resume.
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
NOTHING = "nothing"  # shown for a value that one of two identities lacks
# Required keys of a record; those of `LISTS` have one entry per image.
LISTS = ("positions", "labels", "clean_pred", "broken_by")
LATER_LISTS = ("adv_pred",)  # records of earlier versions lack them
RECORD_KEYS = {*LISTS, "chunk", "unreadable", "attack_seconds", "rejoined", "check", "images_kept"}
RECORD_KEYS |= {"seconds", "started", "device"}


class StateFolder:
    """The records of one evaluation; one run at a time uses the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._chunks = folder / "chunks"
        self._lock: BinaryIO | None = None

    def open(self, identity: Mapping[str, Any]) -> None:
        """Lock the folder for this run; create it, or resume from its records.

        Raises:
            UserError: another run uses the folder, it holds another evaluation, or it cannot be written.
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
        """Unlock the folder for other runs."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write(self, record: Mapping[str, Any]) -> None:
        """Write the record of a finished chunk. Raises OSError if it cannot be written."""
        file = self._chunks / f"{record['chunk']:05d}.json"
        write_atomically(file, lambda f: f.write(json.dumps(record).encode()))

    def read(self, chunks: int, *, with_images: bool = False) -> dict[int, dict[str, Any]]:
        """Return the records by chunk; `chunks`: number of chunks. A damaged record is renamed with a warning; its chunk is open.

        With `with_images`, a chunk whose adversarial images were not saved is open, too.
        """
        records = {}
        for file in sorted(self._chunks.glob("*.json")):
            try:
                record = json.loads(file.read_bytes())
                _check(record, file.stem, chunks)
            except (OSError, ValueError) as error:
                aside = set_aside(file)
                print_warning(f"{file} is damaged ({error}); it is renamed to {aside.name} and its chunk runs again.")
                continue
            kept, shown = record["images_kept"], len(record["positions"])
            if not with_images or not shown or (kept == shown and self.images_file(record["chunk"]).exists()):
                records[record["chunk"]] = record
        return records

    def images_file(self, chunk: int) -> Path:
        """Return the path of a chunk's adversarial images."""
        return self._chunks / f"{chunk:05d}.npz"

    def _compare(self, file: Path, identity: Mapping[str, Any]) -> None:
        try:
            there = json.loads(file.read_bytes())
        except ValueError as error:
            raise UserError(
                f"eval.out: {file} is damaged ({error}). Give another eval.out, or remove the folder."
            ) from error
        found, wanted = _flat(there), _flat(json.loads(json.dumps(identity)))  # JSON turns tuples into lists
        differ = [name for name in {**found, **wanted} if found.get(name, NOTHING) != wanted.get(name, NOTHING)]
        if differ:
            texts = [f"{n}: {found.get(n, NOTHING)} there, {wanted.get(n, NOTHING)} here" for n in differ]
            more = f"; and {len(texts) - SHOWN_DIFFERENCES} more" if len(texts) > SHOWN_DIFFERENCES else ""
            raise UserError(
                f"eval.out: {self.folder} holds another evaluation; its chunks cannot be mixed with the new ones. Differences: "
                f"{'; '.join(texts[:SHOWN_DIFFERENCES])}{more}. Give another eval.out."
            )


def _check(record: Any, stem: str, chunks: int) -> None:
    """Raise ValueError if this is not a record of the chunk in its file name."""
    if not isinstance(record, dict) or not RECORD_KEYS <= record.keys():
        raise ValueError("not a record of a chunk")
    number = record["chunk"]
    if type(number) is not int or not 0 <= number < chunks or f"{number:05d}" != stem:
        raise ValueError("not a record of this chunk")
    lists = [record[name] for name in (*LISTS, *LATER_LISTS) if name in record]
    if not all(isinstance(values, list) and len(values) == len(lists[0]) for values in lists):
        raise ValueError("its lists have different lengths")


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten a tree: dotted names → leaves."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    return {
        k: v for name, sub in tree.items() for k, v in _flat(sub, f"{prefix}.{name}" if prefix else str(name)).items()
    }
