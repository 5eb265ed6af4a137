"""status.json of a run folder: the run's status, for launchers, grids and the next start."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import read_json, write_atomically

STATUS = "status.json"


def read_status(folder: Path) -> dict[str, Any] | None:
    """Return the content of status.json of a run folder; None if it is missing or not readable."""
    with suppress(UserError):
        return read_json(folder / STATUS)
    return None


def mark_status(folder: Path, status: str, reason: str = "") -> None:
    """Change the status of a run that already has one, without opening its folder; its step and epoch stay.

    An error of the disk is ignored here; it is reported when the folder is opened.
    """
    before = read_status(folder)
    if before is not None:
        with suppress(OSError):
            write_status(folder, before | {"status": status, "reason": reason})


def write_status(folder: Path, content: Mapping[str, Any]) -> None:
    """Write status.json, and add the time."""
    content = {**content, "time": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    write_atomically(folder / STATUS, lambda file: file.write(json.dumps(content, indent=2).encode()))


def read_log(path: Path, kind: str) -> list[dict[str, Any]]:
    """Return the records of one kind (start, step, epoch) of a run's log; damaged lines are skipped.

    Earlier versions wrote no kind.
    """
    records = []
    for line in path.read_text(errors="replace").splitlines():
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and record.get("kind", "epoch" if "top1" in record else "step") == kind:
                records.append(record)
    return records


def is_finished(folder: Path) -> bool:
    """Return whether the run is finished."""
    return (read_status(folder) or {}).get("status") == "finished"
