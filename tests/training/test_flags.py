"""Every published flag, with and without it: something that a user can see differs."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch

import training.trainer
import training.validation
from common.files import sha256
from common.flags import sections_of
from tests.training.helpers import Outcome, base_flags, run, write_images
from training.config import TrainConfig
from utils_architecture import get_new_model

APGD = {"adv.attack": "apgd", "adv.eps": "8/255"}
FGSM = {"adv.attack": "fgsm", "adv.eps": "8/255"}


# Functions of an outcome; their values must differ.
def weights(o: Outcome):
    assert o.status == 0
    return torch.cat([v.flatten().double() for v in o.weights.values()]).tolist()


def names(o: Outcome):
    return sorted(o.weights)


def shapes(o: Outcome):
    return {name: tuple(v.shape) for name, v in o.weights.items()}


def files(o: Outcome):
    return sorted(f for f in o.files if not f.startswith("events"))


def status(o: Outcome):
    return o.status


def step_shapes(o: Outcome):
    return [tuple(r["shape"]) for r in o.steps]


def lrs(o: Outcome):
    return [r["lr"] for r in o.steps]


def validation_numbers(o: Outcome):
    return [(r["top1"], r["loss"]) for r in o.epochs]


def folder(o: Outcome):
    return o.folder


def log_keys(o: Outcome):
    return [sorted(r) for r in o.log]


def rendezvous(o: Outcome):
    return o.params["provenance"]["rendezvous"]


def processes(o: Outcome):
    return o.params["provenance"]["processes"]


# flag → value, flags common to both runs, what differs
CASES = {
    "model.arch": ("vit_micro", {}, names),
    "model.pretrained": (1, {}, status),  # convnext_micro has no pretrained weights to fetch
    "model.add_normalization": (1, {}, names),
    "model.not_original": (1, {}, names),
    "model.updated": (1, {"model.arch": "convnext_iso", "training.batch_size": 24}, shapes),
    "model.model_ema": (1, {}, files),
    "resolution.min_res": (40, {"training.epochs": 2, "resolution.max_res": 64, "resolution.end_ramp": 1}, step_shapes),
    "resolution.max_res": (64, {"training.epochs": 2, "resolution.end_ramp": 1}, step_shapes),
    "data.seed": (1, {}, weights),
    "data.augmentations": (0, {}, weights),
    "lr.lr": (5e-4, {}, lrs),
    "lr.lr_schedule_type": ("cyclic", {}, lrs),
    "lr.lr_peak_epoch": (1, {"training.epochs": 2}, lrs),
    "lr.step_ratio": (0.5, {"lr.lr_schedule_type": "step", "lr.step_length": 1, "training.epochs": 2}, lrs),
    "lr.step_length": (1, {"lr.lr_schedule_type": "step", "training.epochs": 2}, lrs),
    "logging.folder": (None, {}, folder),
    "logging.log_level": (1, {}, log_keys),
    "logging.save_freq": (1, {"training.epochs": 3}, files),
    "logging.addendum": ("second", {}, folder),
    "validation.lr_tta": (1, {}, validation_numbers),
    "validation.precision": ("bf16", {}, validation_numbers),
    "training.eval_only": (1, {}, files),
    "training.batch_size": (4, {}, step_shapes),
    "training.optimizer": ("sgd", {}, weights),
    "training.momentum": (0.5, {"training.optimizer": "sgd"}, weights),
    "training.weight_decay": (0.5, {}, weights),
    "training.epochs": (2, {}, files),
    "training.label_smoothing": (0, {"data.augmentations": 1}, weights),
    "training.use_blurpool": (1, {}, weights),
    "training.precision": ("bf16", {}, weights),
    "adv.attack": ("apgd", {}, weights),
    "adv.norm": ("L2", APGD, weights),
    "adv.eps": ("16/255", {"adv.attack": "apgd"}, weights),
    "adv.n_iter": (5, APGD, weights),
    "adv.verbose": (1, APGD, log_keys),
    "adv.noise_level": (0.5, FGSM, weights),
    "adv.skip_projection": (1, FGSM | {"adv.alpha": 2}, weights),
    "adv.alpha": (0.5, FGSM, weights),
}
# Flags with a test of their own below.
OWN = {
    "resolution.start_ramp",
    "resolution.end_ramp",
    "misc.notes",
    "model.ckpt_path",
    "model.freeze_some",
    "model.early",
    "data.train_dataset",
    "data.val_dataset",
    "data.num_workers",
    "data.in_memory",
    "validation.batch_size",
    "validation.resolution",
    "training.distributed",
    "dist.world_size",
    "dist.address",
    "dist.port",
    "misc.use_channel_last",
}


def test_every_published_flag_is_tested():
    all_flags = {f"{s}.{f.name}" for s, cls in sections_of(TrainConfig) for f in fields(cls)}
    assert len(set(CASES) | OWN) == 55 and set(CASES) | OWN <= all_flags


@pytest.fixture(scope="module")
def baseline(images, tmp_path_factory) -> Callable[..., Outcome]:
    """Trains with the base flags and these, once for each set of them and in a separate folder, which nothing else writes."""
    outcomes: dict[tuple, Outcome] = {}

    def trained(common: dict[str, Any] | None = None) -> Outcome:
        key = tuple(sorted((common or {}).items()))
        if key not in outcomes:
            outcomes[key] = run(base_flags(images, tmp_path_factory.mktemp("baseline")) | (common or {}))
        return outcomes[key]

    return trained


@pytest.mark.parametrize("name", [*CASES])
def test_flag_has_an_effect(name, images, tmp_path, capsys, baseline):
    value, common, inspect = CASES[name]
    flags = base_flags(images, tmp_path / "a") | common
    # If the folder itself is compared, both runs get the same one.
    before = inspect(run(flags) if inspect is folder else baseline(common))
    after = inspect(run(flags | ({name: value} if value is not None else {name: tmp_path / "b"})))
    assert before != after


def test_flags_of_the_baseline_repeated_have_no_effect(images, tmp_path, baseline):
    """So that what differs above comes from the flag, and not from the folder or from chance."""
    again = run(base_flags(images, tmp_path))
    for inspect in {inspect for _, common, inspect in CASES.values() if not common and inspect is not folder}:
        assert inspect(again) == inspect(baseline()), inspect.__name__


def test_resolution_follows_the_ramp(images, tmp_path):
    flags = base_flags(images, tmp_path) | {"resolution.min_res": 32, "resolution.max_res": 96, "training.epochs": 3}
    sizes = {}
    for start, end in ((0, 0), (0, 2), (1, 2)):
        outcome = run(flags | {"resolution.start_ramp": start, "resolution.end_ramp": end})
        sizes[start, end] = [shape[-1] for shape in step_shapes(outcome)[::3]]
    assert sizes == {(0, 0): [32, 96, 96], (0, 2): [32, 64, 96], (1, 2): [32, 32, 96]}


def test_notes_are_kept(images, tmp_path):
    with_notes = run(base_flags(images, tmp_path) | {"misc.notes": "a note"})
    assert with_notes.params["misc"]["notes"] == "a note"
    events = next(with_notes.folder.glob("events*")).read_bytes()
    assert b"a note" in events


def test_ckpt_path_starts_from_the_weights(images, tmp_path, baseline, capsys):
    flags = base_flags(images, tmp_path)
    first = baseline()
    path = first.folder / "weights_1.pt"
    validated = run(flags | {"model.ckpt_path": path, "training.eval_only": 1})
    assert validated.epochs[0]["loss"] == pytest.approx(first.epochs[-1]["loss"], rel=1e-6)
    digest = sha256(path)
    assert f"; starts from {path}, sha256 {digest[:12]}\n" in capsys.readouterr().out
    assert validated.params["provenance"]["first_weights"] == {"file": str(path), "key": "", "sha256": digest}
    run(flags | {"model.ckpt_path": first.folder, "training.eval_only": 1})
    assert f"; starts from {path}, sha256 {digest[:12]}\n" in capsys.readouterr().out
    assert run(flags | {"training.eval_only": 1, "data.seed": 3}).epochs[0]["loss"] != validated.epochs[0]["loss"]


def test_freeze_some_and_early(images, tmp_path):
    flags = base_flags(images, tmp_path) | {"model.not_original": 1, "lr.lr_schedule_type": "step"}
    start = run(flags | {"lr.lr": 1e-30, "training.weight_decay": 0}).weights
    changed = {}
    for freeze, early in ((0, 1), (1, 1), (1, 0)):
        outcome = run(flags | {"model.freeze_some": freeze, "model.early": early}).weights
        changed[freeze, early] = {name for name in start if (start[name] - outcome[name]).abs().max() > 1e-20}
    stem = {name for name in start if "stem" in name}
    assert changed[0, 1] == set(start)
    assert changed[1, 1] == stem
    assert changed[1, 0] == set(start) - stem


@pytest.mark.parametrize("early", [1, 0])
def test_statistics_of_what_is_frozen_stay(images, tmp_path, early):
    """A RegNet has batch normalisation in stem and body."""
    flags = base_flags(images, tmp_path) | {"model.arch": "timm_regnetx_002", "lr.lr_schedule_type": "step"}
    flags |= {"model.freeze_some": 1, "model.early": early}
    start = get_new_model("timm_regnetx_002", num_classes=4).state_dict()
    trained = run(flags).weights
    moved = {name for name in start if "running" in name and not torch.equal(trained[name], start[name])}
    assert moved and {"stem" in name for name in moved} == {bool(early)}


def test_train_and_val_dataset(images, tmp_path, baseline):
    other = write_images(tmp_path / "other", seed=1)
    flags = base_flags(images, tmp_path / "runs")
    base = baseline()
    trained = run(flags | {"data.train_dataset": other})
    validated = run(flags | {"data.val_dataset": other})
    assert weights(trained) != weights(base) == weights(validated)
    assert validation_numbers(validated) != validation_numbers(base)


@pytest.fixture
def during_steps(monkeypatch):
    """Lets a test inspect the run at every step: what it returns for (state, batches) is collected."""

    def install(inspect):
        seen, original = [], training.trainer.train_step

        def step(state, batches, **kwargs):
            seen.append(inspect(state, batches))
            return original(state, batches, **kwargs)

        monkeypatch.setattr(training.trainer, "train_step", step)
        return seen

    return install


def test_num_workers(images, tmp_path, during_steps):
    import multiprocessing

    before = set(multiprocessing.active_children())  # of other tests, such as loader workers that stay
    seen = during_steps(lambda state, batches: len(set(multiprocessing.active_children()) - before))
    flags = base_flags(images, tmp_path)
    run(flags)
    run(flags | {"data.num_workers": 2, "logging.addendum": "workers"})
    assert seen == [0, 0, 0, 2, 2, 2]


def test_pipeline(images, tmp_path, during_steps):
    """Of the fast one, levels come to the training step, which augments them."""
    seen = during_steps(lambda state, batches: (batches[0].x.dtype, batches[0].draws is not None))
    flags = base_flags(images, tmp_path) | {"data.augmentations": 1}
    fast, timm = (run(flags | {"data.pipeline": name}) for name in ("fast", "timm"))
    assert seen == [(torch.uint8, True)] * 3 + [(torch.float32, False)] * 3
    assert fast.status == timm.status == 0 and weights(fast) != weights(timm)


def test_in_memory_survives_the_loss_of_the_files(tmp_path, during_steps, capsys):
    for in_memory in (0, 1):
        folder = write_images(tmp_path / f"images{in_memory}")
        during_steps(lambda state, batches, folder=folder: shutil.rmtree(folder / "train", ignore_errors=True))
        flags = base_flags(folder, tmp_path / f"runs{in_memory}")
        outcome = run(flags | {"data.in_memory": in_memory, "training.epochs": 2, "data.max_bad_images": 0})
        assert outcome.status == (0 if in_memory else 2)


def test_validation_batch_size_and_resolution(images, tmp_path, monkeypatch):
    shapes, original = [], training.validation.on_device
    monkeypatch.setattr(
        training.validation,
        "on_device",
        lambda batch, *args: (shapes.append(tuple(batch.x.shape)), original(batch, *args))[1],
    )
    flags = base_flags(images, tmp_path) | {"training.eval_only": 1}
    run(flags)
    run(flags | {"validation.batch_size": 3})
    run(flags | {"validation.resolution": 64})
    assert shapes == [(8, 3, 32, 32), (3, 3, 32, 32), (3, 3, 32, 32), (2, 3, 32, 32), (8, 3, 64, 64)]


def test_use_channel_last(images, tmp_path, during_steps):
    seen = during_steps(
        lambda state, batches: (
            state.model.stages[1].downsample[1].weight.is_contiguous(memory_format=torch.channels_last)
        )
    )
    flags = base_flags(images, tmp_path)
    run(flags)
    run(flags | {"misc.use_channel_last": 0})
    assert seen == [True] * 3 + [False] * 3


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_distributed_world_size_address_and_port(images, tmp_path, capfd):
    flags = base_flags(images, tmp_path)
    alone = run(flags)
    two = flags | {"training.distributed": 1, "dist.world_size": 2, "dist.port": free_port()}
    outcome = run(two)
    assert (processes(alone), processes(outcome)) == (1, 2)
    assert outcome.params["provenance"]["global_batch"] == 16
    assert rendezvous(alone) is None and rendezvous(outcome).endswith(f":{two['dist.port']}")
    # Address and port are where the first process listens: on an address of another machine it cannot.
    assert run(two | {"dist.address": "192.0.2.1", "dist.port": free_port()}).status == 2
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert run(two | {"dist.address": "127.0.0.1", "dist.port": taken.getsockname()[1]}).status == 2
    errors = capfd.readouterr().err
    assert errors.count("error: dist.address, dist.port") == 2


def test_the_port_that_was_free_is_kept(images, tmp_path):
    two = base_flags(images, tmp_path) | {"training.distributed": 1, "dist.world_size": 2}
    host, _, port = rendezvous(run(two)).rpartition(":")
    assert host in ("127.0.0.1", "::1") and int(port) > 0


def test_distributed_without_processes_is_one_process(images, tmp_path):
    assert processes(run(base_flags(images, tmp_path) | {"training.distributed": 1})) == 1
    assert run(base_flags(images, tmp_path) | {"dist.world_size": 2}).status == 2
