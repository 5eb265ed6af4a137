"""Find the run that a command line belongs to: its folder, and whether a training state fits it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Set
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.flags import config_to_dict
from common.provenance import PROVENANCE_KEY
from training.config import TrainConfig, default_values
from training.status import is_finished, read_status

# Flags that only the start of a run uses, and part of its name.
BEGINNING = {"model.ckpt_path", "model.new_head", "model.pretrained", "logging.addendum"}
PRECISION = "training.precision"  # the only flag whose default depends on the device


def find_folder(config: TrainConfig) -> tuple[Path, str]:
    """Return the run's folder, and a sentence for the user if its name differs from `config.run_folder`.

    The name differs for a run of the same flags by an earlier version of the project, or on another number of processes. In the
    latter case these processes can share its global batch, and it is unfinished or once resumed on this number of processes. A run
    that starts from another run's state gets a new folder, or the folder in which it already started from this state. It keeps
    the folder of the state if that folder is its own.
    """
    default, note = config.run_folder, ""
    if default.exists() or config.training.resume == "none" or config.training.eval_only:
        return default, ""
    for folder, params in _runs_of_these_flags(config):
        run = params[PROVENANCE_KEY]
        batch = run["global_batch"]
        state = Path(asked := config.training.resume.rstrip("/")).resolve()
        if asked not in ("auto", run.get("origin")) and folder.resolve() not in (state, state.parent):
            continue
        if batch == config.global_batch:
            return (
                folder,
                f"{folder} contains this run, under a name from an earlier version of the project, or renamed by you",
            )
        shared = batch % (config.training.batch_size * config.dist.processes) == 0
        if is_finished(folder):
            if shared and config.dist.processes in [start["processes"] for start in run.get("resumed", [])]:
                return folder, ""
        elif (read_status(folder) or {}).get("step", 0) > 0:
            if shared:
                return folder, (
                    f"{folder} contains this run, started on another number of processes; it keeps {batch} images per step; "
                    f"--training.resume=none starts a run with {config.global_batch}"
                )
            note = (
                f"{folder} contains an unfinished run of these flags with {batch} images per step, which {config.dist.processes} "
                f"processes cannot share; this is a separate run with {config.global_batch}"
            )
    return default, note


def shorter_run(config: TrainConfig) -> tuple[Path, int, int] | None:
    """Return a run with fewer `training.epochs` and otherwise equal flags: its folder, its epochs, and its finished epochs.

    Only runs whose global batch these processes can share count. Of several, return the one with the most steps.
    """
    found = []
    for folder, params in _runs_of_these_flags(config, but=frozenset({"training.epochs"})):
        status = read_status(folder) or {}
        done, epochs, together = status.get("epoch", 0), params["training"]["epochs"], config.training.batch_size
        shared = params[PROVENANCE_KEY]["global_batch"] % (together * config.dist.processes) == 0
        if status.get("step", 0) > 0 and shared and epochs < config.training.epochs:
            found.append((status["step"], folder, epochs, done))
    return max(found)[1:] if found else None


def _runs_of_these_flags(config: TrainConfig, *, but: Set[str] = frozenset()) -> list[tuple[Path, Mapping[str, Any]]]:
    """Return run folders in `logging.folder` with their params.json; they may differ only in the global batch and flags `but`.

    Folders that kept their original name come first, then those whose name starts like this run's name, then the newest.
    """
    found = []
    for path in Path(config.logging.folder).glob("*/params.json"):
        # Skip a copy, or a folder that was set aside: its name continues after the digest and addendum.
        if re.search(r"_[0-9a-f]{6}[^0-9A-Za-z].*$|\.\d+$", path.parent.name.removesuffix(f"_{config.addendum}")):
            continue
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # damaged, or not of a run
            params, written = json.loads(path.read_text()), path.stat().st_mtime
            run = params[PROVENANCE_KEY]
            # If neither start gave a precision, the device decides it, and it does not identify the run.
            if PRECISION not in run.get("given", [PRECISION]) and PRECISION not in config.given:
                params["training"]["precision"] = default_values(config.adv.norm)[PRECISION]
            # Earlier versions used the path of the images in the name, and did not record their number.
            moved = os.path.normpath(params["data"]["train_dataset"]) != os.path.normpath(config.data.train_dataset)
            if moved and "images" not in run:
                continue
            if not changed_flags(params, config, global_batch=run["global_batch"], beginning=True, but=but):
                name, arch = path.parent.name, config.run_name.split("_")[0]
                found.append(((name == run.get("folder"), name.startswith(arch), written), path.parent, params))
    return [(folder, params) for _, folder, params in sorted(found, key=lambda entry: entry[0], reverse=True)]


def changed_flags(
    saved: Mapping[str, Mapping[str, Any]],
    config: TrainConfig,
    *,
    global_batch: int,
    beginning: bool = False,
    but: Set[str] = frozenset(),
) -> list[str]:
    """Return "flag: old → new" for each changed flag that affects the results.

    Args:
        saved: flags of a run, by section; a missing flag had its default.
        config: flags of this start.
        global_batch: of the run; other micro-batches with the same global batch are no change.
        beginning: also count flags that only the start of a run uses.
        but: flags that do not count.
    """
    ignored = config.uncounted() | but | (set() if beginning else BEGINNING)
    if global_batch == config.global_batch:
        ignored |= {"training.grad_accum"}
    if PRECISION not in config.given and not beginning:
        ignored |= {PRECISION}  # it keeps the precision of the run
    defaults, changed = default_values(config.adv.norm), []
    for section, flags in config_to_dict(config).items():
        for name, value in flags.items():
            flag = f"{section}.{name}"
            before = saved.get(section, {}).get(name, defaults[flag])
            if flag == "model.ckpt_path":
                before, value = before.rstrip("/"), value.rstrip("/")
            if flag not in ignored and before != value:
                changed.append(f"{flag}: {before} → {value}")
    return changed


def other_images(run: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the differences between the training images of a run and those of this start.

    Both arguments come from `data.source.facts_of`; an unknown value is None or missing.
    """
    differences = []
    before, images = run.get("images"), now["images"]
    if before is not None and before != images:
        differences.append(f"data.train_dataset had {before} images and now has {images}")
    old, new = run.get("classes"), now["classes"]
    if old is not None and new is not None and list(old) != list(new):
        other = next((pair for pair in zip(old, new) if pair[0] != pair[1]), None)
        what = f"{other[0]!r} is now {other[1]!r}" if other else f"there were {len(old)}, now there are {len(new)}"
        differences.append(f"data.train_dataset has other classes: {what}")
    before, sample = run.get("sample"), now.get("sample")
    if not differences and None not in (before, sample) and before != sample:
        differences.append("data.train_dataset has other images (according to a sample of its files)")
    return differences
