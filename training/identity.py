"""Which run a command line means: the folder it works in, and whether a training state belongs to it."""

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

# Flags that only the very beginning of a run uses, and its name.
BEGINNING = {"model.ckpt_path", "model.new_head", "model.pretrained", "logging.addendum"}
PRECISION = "training.precision"  # the one flag whose default is the device's


def find_folder(config: TrainConfig) -> tuple[Path, str]:
    """The run's folder, and a sentence for the user where it has another name than `config.run_folder`.

    That is a folder of the same flags that an earlier version of the project named, or of a run on another number of processes: an
    unfinished one, whose global batch these can share, or one that as many processes have taken part in. A run that begins at
    another's state has a folder of its own, or that in which it has begun so; unless that state is the folder's own.
    """
    named, note = config.run_folder, ""
    if named.exists() or config.training.resume == "none" or config.training.eval_only:
        return named, ""
    for folder, params in _runs_of_these_flags(config):
        run = params[PROVENANCE_KEY]
        batch = run["global_batch"]
        state = Path(asked := config.training.resume.rstrip("/")).resolve()
        if asked not in ("auto", run.get("origin")) and folder.resolve() not in (state, state.parent):
            continue
        if batch == config.global_batch:
            return (
                folder,
                f"{folder} holds this run, under a name that an earlier version of the project, or you, gave it",
            )
        shared = batch % (config.training.batch_size * config.dist.processes) == 0
        if is_finished(folder):
            if shared and config.dist.processes in [start["processes"] for start in run.get("resumed", [])]:
                return folder, ""
        elif (read_status(folder) or {}).get("step", 0) > 0:
            if shared:
                return folder, (
                    f"{folder} holds this run, begun on another number of processes; it keeps its {batch} images a step, and "
                    f"--training.resume=none starts one of {config.global_batch}"
                )
            note = (
                f"{folder} holds an unfinished run of these flags with {batch} images a step, which {config.dist.processes} "
                f"processes cannot share; this is another run, of {config.global_batch}"
            )
    return named, note


def shorter_run(config: TrainConfig) -> tuple[Path, int, int] | None:
    """A run that differs in `training.epochs` alone, and has fewer: its folder, its epochs, and those done.

    Of several the one that has come farthest, of those whose global batch these processes can share.
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
    """Folders in `logging.folder` whose runs differ in the global batch, and the flags `but`, at most, with their params.json.

    First those that have the name with which their run began, or begin as the run's own would; then the newest first.
    """
    found = []
    for path in Path(config.logging.folder).glob("*/params.json"):
        # A copy, or one that was set aside: more follows on the name's digest, and addendum.
        if re.search(r"_[0-9a-f]{6}[^0-9A-Za-z].*$|\.\d+$", path.parent.name.removesuffix(f"_{config.addendum}")):
            continue
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # damaged, or no run's
            params, written = json.loads(path.read_text()), path.stat().st_mtime
            run = params[PROVENANCE_KEY]
            # What was not given is the device's, not the run's; but who asks for the same means the same.
            if PRECISION not in run.get("given", [PRECISION]) and PRECISION not in config.given:
                params["training"]["precision"] = default_values(config.adv.norm)[PRECISION]
            # Earlier versions named a run by the place of its images, and did not note how many they were.
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
    """ "flag: old → new" for each flag that alters the numbers.

    Args:
        saved: flags of a run, by section; one that it does not know had its default.
        config: flags of this start.
        global_batch: of the run; micro-batches that make the same one are no change.
        beginning: flags that only the beginning of a run uses count too.
        but: flags that do not count.
    """
    ignored = config.uncounted() | but | (set() if beginning else BEGINNING)
    if global_batch == config.global_batch:
        ignored |= {"training.grad_accum"}
    if PRECISION not in config.given and not beginning:
        ignored |= {PRECISION}  # it goes on with that of the run
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
    """Differences between the training images of a run and those of this start.

    Both are of `data.source.facts_of`; None, or no such key, where something is not known.
    """
    differences = []
    before, images = run.get("images"), now["images"]
    if before is not None and before != images:
        differences.append(f"data.train_dataset had {before} images and has {images}")
    old, new = run.get("classes"), now["classes"]
    if old is not None and new is not None and list(old) != list(new):
        other = next((pair for pair in zip(old, new) if pair[0] != pair[1]), None)
        what = f"{other[0]!r} is now {other[1]!r}" if other else f"they were {len(old)} and are {len(new)}"
        differences.append(f"data.train_dataset has other classes: {what}")
    before, sample = run.get("sample"), now.get("sample")
    if not differences and None not in (before, sample) and before != sample:
        differences.append("data.train_dataset has other images (as a sample of their files shows)")
    return differences
