"""Runs of train.py: what training does, what it leaves behind, and several processes against one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

import train
import training.step
import training.trainer
from attacks.apgd import apgd
from attacks.losses import UnitGap
from attacks.registry import Attack
from common.errors import UserError
from common.flags import load_config
from common.processes import Processes, check_processes
from common.provenance import PROVENANCE_KEY
from data.datasets import open_source
from data.loader import EvalLoader, spread_indices
from tests.training.helpers import base_flags, largest_difference, read_outcome, run, write_images
from training.config import TrainConfig
from training.idle import idle_flags
from training.launch import launch
from training.status import read_status
from training.stop import STOPPED
from utils_architecture import get_new_model
from zoo.description import NetworkDescription
from zoo.runs import find_weights, load_trained

PROJECT = Path(training.__file__).resolve().parent.parent
APGD = {"adv.attack": "apgd", "adv.eps": "8/255"}


@pytest.mark.curves
def test_run_folder(images, tmp_path):
    outcome = run(base_flags(images, tmp_path) | APGD | {"model.model_ema": 1, "training.epochs": 2})
    assert {"params.json", "log", "curves.png", "weights_2.pt", "weights_ema_2.pt"} <= outcome.files
    assert any(f.startswith("events.out.tfevents") for f in outcome.files)
    facts = outcome.params[PROVENANCE_KEY]
    assert facts["global_batch"] == 8 and facts["steps_per_epoch"] == 3 and "torch" in facts["versions"]
    assert facts["commit"] and facts["devices"] and facts["command"]
    assert [r["epoch"] for r in outcome.epochs] == [1, 2] and len(outcome.steps) == 6
    assert {"top1", "loss", "ema_top1", "train_loss", "images_per_second", "lr", "eps"} <= set(outcome.epochs[0])


def test_params_json_is_a_config_file(images, tmp_path):
    outcome = run(base_flags(images, tmp_path) | APGD)
    again = load_config(TrainConfig, ["--config-file", str(outcome.folder / "params.json")])
    assert again.run_name == outcome.folder.name and again.adv.eps == 8 / 255


def test_same_command_twice_gives_the_same_weights_and_loses_nothing(images, tmp_path):
    flags = base_flags(images, tmp_path) | APGD | {"data.augmentations": 1, "model.drop_path": 0.3}
    first = run(flags)
    second = run(flags | {"data.num_workers": 2})
    assert first.folder == second.folder
    assert largest_difference(first.weights, second.weights) == 0
    earlier = read_outcome(first.folder.with_name(first.folder.name + ".1"))
    assert largest_difference(first.weights, earlier.weights) == 0


def test_training_learns(images, tmp_path):
    outcome = run(base_flags(images, tmp_path) | {"training.epochs": 15, "lr.lr": 3e-3})
    assert outcome.epochs[-1]["top1"] >= 0.75
    assert outcome.epochs[-1]["train_loss"] < 0.5 * outcome.epochs[0]["train_loss"]


def test_logged_accuracy_is_the_weights_accuracy(images, tmp_path):
    """An independent computation from the saved weights, each validation image once."""
    flags = base_flags(images, tmp_path) | APGD | {"validation.adv_n_ex": 8, "validation.adv_n_iter": 4}
    outcome = run(flags | {"training.epochs": 2, "validation.batch_size": 3})
    model = get_new_model("convnext_micro", num_classes=4).eval()
    model.load_state_dict(outcome.weights)
    source = open_source(str(images), split="val")
    (batch,) = EvalLoader(source, size=32, crop_pct=1.0, batch_size=8)
    with torch.no_grad():
        logits = model(batch.x)
    record = outcome.epochs[-1]
    assert record["top1"] == (logits.argmax(1) == batch.y).double().mean().item()
    assert record["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, batch.y).item(), rel=1e-5)
    with_both = [apgd(net, batch.x, batch.y, norm="Linf", eps=8 / 255, n_iter=4).acc for net in (model, UnitGap(model))]
    assert record["adv_top1"] == (with_both[0] & with_both[1]).double().mean().item()


def test_trains_on_the_attacked_images(images, tmp_path, monkeypatch):
    """The network is trained on what the attack returns, in train mode, at the scheduled eps."""
    seen, radii = [], []

    def attack(self, model, x, y, *, eps, **kwargs):
        radii.append(eps)
        return torch.full_like(x, 0.25)

    monkeypatch.setattr(Attack, "__call__", attack)
    original = training.step.cross_entropy
    monkeypatch.setattr(
        training.step, "cross_entropy", lambda logits, y: (seen.append(logits.detach()), original(logits, y))[1]
    )
    run(base_flags(images, tmp_path) | APGD | {"adv.eps_warmup_epochs": 1, "adv.eps": 0.3, "training.reuse_forward": 0})
    assert len(seen) == 3 and all(torch.allclose(logits, logits[:1].expand_as(logits), atol=1e-5) for logits in seen)
    assert radii == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_precisions_train(images, tmp_path, precision):
    flags = base_flags(images, tmp_path) | APGD | {"training.precision": precision, "validation.precision": precision}
    outcome = run(flags | {"training.epochs": 2, "lr.lr": 3e-3, "data.augmentations": 2})
    assert outcome.epochs[-1]["train_loss"] < outcome.epochs[0]["train_loss"]
    assert {v.dtype for v in outcome.weights.values()} == {torch.float32}


def test_grad_accumulation_equals_the_large_batch(images, tmp_path):
    flags = base_flags(images, tmp_path) | APGD | {"training.precision": "fp64", "validation.precision": "fp64"}
    whole = run(flags | {"training.batch_size": 8})
    parts = run(flags | {"training.batch_size": 4, "training.grad_accum": 2})
    assert largest_difference(whole.weights, parts.weights) < 1e-9


def test_grad_clip(images, tmp_path):
    flags = base_flags(images, tmp_path) | {"training.optimizer": "sgd", "training.momentum": 0, "lr.lr": 1.0}
    flags |= {"training.weight_decay": 0, "lr.lr_schedule_type": "step", "training.epochs": 1}
    start = run(flags | {"lr.lr": 1e-30, "validation.adv_n_ex": 0, "adv.attack": "none"}).weights
    moved = run(flags | {"training.grad_clip": 1e-3}).weights
    distance = sum((moved[n] - start[n]).double().square().sum() for n in start).sqrt().item()
    assert 1e-4 < distance <= 3e-3 * 1.01  # three steps of at most lr · 1e-3


def test_ema_and_its_warmup(images, tmp_path):
    flags = base_flags(images, tmp_path) | {"model.model_ema": 1}
    slow, fast = run(flags), run(flags | {"model.ema_warmup": 1})
    assert largest_difference(slow.weights, fast.weights) == 0
    averages = [torch.load(o.folder / "weights_ema_1.pt", weights_only=True) for o in (slow, fast)]
    raw = slow.weights
    assert largest_difference(averages[1], raw) < 0.9 * largest_difference(averages[0], raw)


def test_keep_deletes_the_oldest(images, tmp_path):
    flags = base_flags(images, tmp_path) | {"training.epochs": 4, "logging.save_freq": 1, "model.model_ema": 1}
    files = run(flags | {"logging.keep": 2}).files
    assert {f for f in files if f.startswith("weights") and "best" not in f} == {
        f"weights{ema}_{e}.pt" for ema in ("", "_ema") for e in (3, 4)
    }
    assert "weights_1.pt" in run(flags | {"logging.keep": 0}).files


def test_validation_freq(images, tmp_path):
    outcome = run(base_flags(images, tmp_path) | {"training.epochs": 5, "validation.freq": 2})
    assert [r["epoch"] for r in outcome.epochs] == [2, 4, 5]


def test_heavy_augmentation_gives_soft_labels_and_pixels_in_the_box(images, tmp_path, monkeypatch):
    seen = []
    original = Attack.__call__
    monkeypatch.setattr(Attack, "__call__", lambda s, m, x, y, **k: (seen.append((x, y)), original(s, m, x, y, **k))[1])
    run(base_flags(images, tmp_path) | {"data.augmentations": 1, "training.epochs": 3})
    assert len(seen) == 9
    for x, y in seen:
        assert y.shape == (8, 4) and torch.allclose(y.sum(1), torch.ones(8), atol=1e-5) and (y < 1).all()
        assert x.min() >= 0 and x.max() <= 1


def test_diverged_run_ends_with_status_3(images, tmp_path, capsys):
    flags = base_flags(images, tmp_path) | {"training.optimizer": "sgd", "lr.lr": 1e20, "training.epochs": 3}
    flags |= {"training.max_bad_steps": 4}
    with pytest.raises(SystemExit) as stop:
        run(flags)
    assert stop.value.code == 3 and "steps in a row were skipped" in capsys.readouterr().err
    (folder,) = Path(tmp_path).iterdir()
    for line in (folder / "log").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_undecodable_images_are_named_and_counted(tmp_path, capsys):
    images = write_images(tmp_path / "images")
    for name in ("0.png", "3.png"):
        (images / "train" / "red" / name).write_bytes(b"not an image")
    outcome = run(base_flags(images, tmp_path / "runs") | {"data.max_bad_images": 2})
    assert outcome.status == 0 and outcome.epochs[0]["bad_images"] == 2
    assert "red/0.png" in capsys.readouterr().err.replace(os.sep, "/")
    assert run(base_flags(images, tmp_path / "runs2") | {"data.max_bad_images": 1}).status == 2
    assert "data.max_bad_images" in capsys.readouterr().err


def test_spread_indices():
    assert spread_indices(10, 5) == [0, 2, 4, 6, 8]
    assert spread_indices(3, 10) == [0, 1, 2]
    assert spread_indices(50_000, 512)[-1] == 49_902 and spread_indices(5, 0) == []


# --- several processes --------------------------------------------------------------------------------------------------

FIVE_STEPS = APGD | {
    "lr.lr_schedule_type": "step",
    "training.epochs": 1,
    "validation.adv_n_ex": 8,
    "validation.adv_n_iter": 2,
    "model.model_ema": 1,
    "data.augmentations": 2,
}


@pytest.fixture(scope="module")
def forty_images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("forty"), train_images=10, val_images=3)


def processes(count):
    return {"training.distributed": 1, "dist.world_size": count}


@pytest.mark.parametrize(
    "arch,optimizer,precision,tolerance",
    [
        ("vit_micro", "adamw", "fp64", 1e-9),
        ("convnext_micro", "sgd", "fp32", 1e-5),
    ],
)
def test_two_processes_equal_one(forty_images, tmp_path, arch, optimizer, precision, tolerance):
    flags = base_flags(forty_images, tmp_path) | FIVE_STEPS
    flags |= {"model.arch": arch, "training.optimizer": optimizer, "training.precision": precision}
    flags |= {"validation.precision": precision, "lr.lr": 1e-3 if optimizer == "adamw" else 1e-2}
    one = run(flags | {"training.batch_size": 8})
    two = run(flags | processes(2) | {"training.batch_size": 4})
    assert len(one.steps) == len(two.steps) == 5
    start = run(flags | {"lr.lr": 1e-30, "validation.adv_n_ex": 0, "adv.attack": "none"}).weights
    assert largest_difference(one.weights, start) > 1e-3
    assert largest_difference(one.weights, two.weights) < tolerance
    # 12 validation images over two processes, batches of unequal size: still each counted once.
    for key in ("top1", "loss", "adv_top1", "ema_top1", "train_loss"):
        assert one.epochs[0][key] == pytest.approx(two.epochs[0][key], rel=1e-4), key


def test_two_runs_of_two_processes_at_once(images, tmp_path):
    """Without a port each takes a free one; their names are those that a given port would have."""
    flags = base_flags(images, tmp_path) | {"training.distributed": 1, "dist.world_size": 2}
    argv = [f"--{name}={value}" for name, value in flags.items()]
    runs = [
        subprocess.Popen([sys.executable, "train.py", *argv, f"--data.seed={seed}"], cwd=PROJECT) for seed in (1, 2)
    ]
    assert [process.wait(timeout=300) for process in runs] == [0, 0]
    for seed in (1, 2):
        given = load_config(TrainConfig, [*argv, f"--data.seed={seed}", "--dist.port=12355"])
        assert read_status(given.run_folder)["status"] == "finished"


def test_error_in_one_of_two_processes_is_said_once(images, tmp_path, capfd):
    flags = base_flags(images, tmp_path) | processes(2)
    assert run(flags | {"training.batch_size": 64}).status == 2
    errors = capfd.readouterr().err
    assert errors.count("error: ") == 1 and "training.batch_size" in errors


def test_find_weights_takes_the_newest_that_validated_better(images, tmp_path):
    """36 steps with a decay of 0.9999 leave the average where training began."""
    flags = base_flags(images, tmp_path) | {"training.epochs": 12, "logging.save_freq": 4, "model.model_ema": 1}
    outcome = run(flags | {"lr.lr": 3e-3})
    last = outcome.epochs[-1]
    assert last["ema_top1"] < last["top1"]
    assert find_weights(outcome.folder).name == "weights_12.pt"
    trained = load_trained(outcome.folder, NetworkDescription())
    assert trained.path.name == "weights_12.pt" and trained.run.beats_average and trained.notes == ()
    average = load_trained(outcome.folder / "weights_ema_12.pt", NetworkDescription())
    assert average.run.worse_than_raw and "raw weights of the same epoch had a better validation" in average.notes[0]
    (outcome.folder / "log").write_text("")  # nothing is known: the average
    trained = load_trained(outcome.folder, NetworkDescription())
    assert trained.path.name == "weights_ema_12.pt" and not trained.run.beats_average


# --- what only shows when it goes wrong -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "precision,dtype", [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_precision_covers_the_attack_and_scales_fp16_only(images, tmp_path, monkeypatch, precision, dtype):
    seen, original = [], Attack.__call__

    def look(attack, model, x, y, **kwargs):
        seen.append(model(x).dtype)
        return original(attack, model, x, y, **kwargs)

    scaled = []
    monkeypatch.setattr(Attack, "__call__", look)
    step = training.trainer.train_step
    monkeypatch.setattr(
        training.trainer,
        "train_step",
        lambda state, *a, **k: (scaled.append(state.scaler.is_enabled()), step(state, *a, **k))[1],
    )
    run(base_flags(images, tmp_path) | APGD | {"training.precision": precision})
    assert seen == [dtype] * 3 and scaled == [precision == "fp16"] * 3


def test_grad_clip_under_loss_scaling(images, tmp_path):
    """Clipping sees the true gradient, not the scaled one: fp16 moves as far as fp32."""
    flags = base_flags(images, tmp_path) | {"training.optimizer": "sgd", "training.momentum": 0, "lr.lr": 1e-2}
    flags |= {"training.weight_decay": 0, "lr.lr_schedule_type": "step", "training.grad_clip": 100}
    start = run(flags | {"lr.lr": 1e-30, "validation.adv_n_ex": 0, "adv.attack": "none"}).weights
    moves = []
    for precision in ("fp32", "fp16"):
        end = run(flags | {"training.precision": precision}).weights
        moves.append(sum((end[n] - start[n]).double().square().sum().item() for n in start) ** 0.5)
    assert moves[1] == pytest.approx(moves[0], rel=0.1)


def test_sizes_the_network_refuses(images, tmp_path, capsys):
    for change, flag in (
        ({"model.arch": "vit_micro", "resolution.min_res": 30, "resolution.max_res": 30}, "resolution.min_res"),
        ({"validation.resolution": 8}, "validation.resolution"),
    ):
        assert run(base_flags(images, tmp_path) | change).status == 2
        assert flag in capsys.readouterr().err and not list(Path(tmp_path).iterdir())


@pytest.mark.parametrize(
    "change,word",
    [
        ({}, None),
        ({"training.batch_size": 64}, "training.batch_size"),
        ({"model.pretrained": 1}, "model.pretrained"),
        ({"validation.resolution": 8}, "validation.resolution"),
        ({"model.num_classes": 10}, "model.num_classes"),
        ({"data.train_dataset": "nowhere"}, "data.train_dataset"),
        ({"data.train_dataset": ""}, "data.train_dataset"),
        ({"model.ckpt_path": "nowhere.pt"}, "model.ckpt_path"),
        ({"logging.folder": "/dev/null"}, "logging.folder"),
    ],
)
def test_check_finds_what_would_stop_the_run(images, tmp_path, capsys, change, word):
    flags = base_flags(images, tmp_path / "runs") | change
    status = train.main(["--check", *(f"--{name}={value}" for name, value in flags.items())])
    assert status == (2 if word else 0)
    out, err = capsys.readouterr()
    assert not word or word in err
    assert ("check passed" in out) == (not word)
    assert not list((tmp_path / "runs").glob("*"))


def test_drop_path_of_a_frozen_body_is_idle():
    def idle(*flags):
        given = ["--data.train_dataset=images", "--data.val_dataset=images", "--model.drop_path=0.1", *flags]
        return "model.drop_path" in idle_flags(load_config(TrainConfig, given))

    assert idle("--model.freeze_some=1") and idle("--lr.body_factor=0")
    assert not idle() and not idle("--model.freeze_some=1", "--model.early=0")


def test_help_names_the_switches_and_the_flags(capsys):
    with pytest.raises(SystemExit) as end:
        train.main(["--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and all(name in said for name in ("--check", "--where", "--adv.eps", "--config-file"))


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr("common.processes.usable_gpus", lambda: 2)
    assert check_processes(2) == 2
    with pytest.raises(UserError, match="^3 processes .*2 are visible"):
        check_processes(3)


def test_nothing_to_validate_on(tmp_path, capsys):
    images = write_images(tmp_path / "images")
    for file in (images / "val").rglob("*.png"):
        file.write_bytes(b"")
    assert run(base_flags(images, tmp_path / "runs")).status == 2
    assert "data.val_dataset" in capsys.readouterr().err


def test_bad_images_are_counted_over_processes_and_stop_all(tmp_path, capfd):
    images = write_images(tmp_path / "images", train_images=8)
    for name in ("0.png", "3.png"):
        for colour in ("red", "blue"):
            (images / "train" / colour / name).write_bytes(b"not an image")
    flags = base_flags(images, tmp_path / "runs") | processes(2) | {"training.batch_size": 4}
    assert run(flags).epochs[0]["bad_images"] == 4
    capfd.readouterr()
    assert run(flags | {"data.max_bad_images": 3}).status == 2
    assert capfd.readouterr().err.count("error: data.max_bad_images: 4 images") == 1


@pytest.fixture
def endless(images, tmp_path):
    """A run of two processes, each with a loader worker, that is training: its parent, and all other processes."""
    flags = base_flags(images, tmp_path / "runs") | processes(2) | {"training.epochs": 5000, "training.batch_size": 4}
    argv = [f"--{name}={value}" for name, value in (flags | {"data.num_workers": 1}).items()]
    with subprocess.Popen([sys.executable, "train.py", *argv], cwd=PROJECT, stderr=subprocess.DEVNULL) as parent:
        try:
            children = []
            # Two processes, a worker of each, the server that they come from, and multiprocessing's resource tracker.
            while len(children) < 6 or not list((tmp_path / "runs").glob("*/log")):
                assert parent.poll() is None
                time.sleep(0.1)
                children = psutil.Process(parent.pid).children(recursive=True)
            yield parent, children
        finally:
            parent.kill()


@pytest.mark.slow
def test_terminated_parent_stops_all_processes(endless):
    parent, children = endless
    parent.terminate()
    assert parent.wait(timeout=120) == STOPPED
    _, alive = psutil.wait_procs(children, timeout=5)
    assert alive == []


def test_killed_parent_leaves_no_process(endless):
    parent, children = endless
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=5)
    assert alive == []


def test_killed_loader_worker_ends_the_run_with_its_reason(endless, tmp_path):
    """The other process, and its worker, end with it."""
    parent, children = endless
    workers = [
        child for child in children if not child.children() and "resource_tracker" not in " ".join(child.cmdline())
    ]
    workers[0].kill()
    assert parent.wait(timeout=120) == 1
    _, alive = psutil.wait_procs(children, timeout=5)
    assert alive == []
    (folder,) = (tmp_path / "runs").iterdir()
    status = read_status(folder)
    assert status["status"] in ("failed", "running") and "DataLoader worker" in status["reason"]


@pytest.mark.slow
def test_no_thread_is_left_by_a_run_of_two_processes(images, tmp_path):
    """Thirty times, with two busy loops beside."""
    beside = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        for i in range(30):
            flags = base_flags(images, tmp_path / f"{i}") | processes(2) | {"training.batch_size": 4}
            argv = [f"--{name}={value}" for name, value in flags.items()]
            config = load_config(TrainConfig, argv)
            assert launch(train_and_count, config, world_size=2, address="localhost", port=0) == 0
            for rank in range(2):
                assert (tmp_path / f"{i}" / f"threads{rank}").read_text() == "['MainThread']"
            assert not [thread for thread in threading.enumerate() if not thread.daemon and thread.name != "MainThread"]
    finally:
        for process in beside:
            process.kill()
            process.wait()


def train_and_count(config: TrainConfig, processes: Processes) -> None:
    """A run, and the names of the threads that are left when it has ended."""
    train.run_process(config, processes)
    threads = [thread.name for thread in threading.enumerate()]
    Path(config.logging.folder, f"threads{processes.rank}").write_text(str(threads))


def test_three_flags_suffice_for_ones_own_images(tmp_path, capsys):
    """configs/own_data.yaml, on 36 images; without the flags, every problem is reported at once."""
    images = write_images(tmp_path / "images", train_images=9, val_images=2)
    own = ["--config-file", str(PROJECT / "configs/own_data.yaml"), f"--logging.folder={tmp_path / 'runs'}"]
    own += [f"--data.train_dataset={images}", f"--data.val_dataset={images}"]
    assert train.main([*own, "--training.batch_size=64"]) == 2
    problems = capsys.readouterr().err
    assert "2 problems:" in problems and "model.num_classes=4" in problems and "training.batch_size" in problems
    assert train.main(["--check", *own, "--model.num_classes=4"]) == 0
    assert train.main([*own, "--model.num_classes=4", "--training.epochs=5", "--validation.adv_n_iter=1"]) == 0


def test_all_problems_of_a_command_line_at_once(tmp_path, capsys):
    """Of single flags, of flags together, of files and names; nothing is written."""
    argv = [
        "--adv.attack=apgdd",
        "--training.epochs=5",
        "--model.arch=convnet_micro",
        "--no.such=1",
        "--dist.world_size=2",
    ]
    argv += [f"--data.{name}_dataset={tmp_path}/{name}" for name in ("train", "val")]
    for more in ([], ["--check"]):
        assert train.main([*argv, f"--logging.folder={tmp_path}/runs", *more]) == 2
        lines = capsys.readouterr().err.splitlines()
        named = [line.split(":")[0].strip() for line in lines[lines.index("error: 7 problems:") + 1 :]]
        flags = [
            "adv.attack",
            "lr.lr_peak_epoch",
            "dist.world_size",
            "model.arch",
            "data.train_dataset",
            "data.val_dataset",
        ]
        assert sorted(named) == sorted(["command line", *flags])
    assert not (tmp_path / "runs").exists()
