"""runner_aa_eval.py from its command line: many evaluations at once, restarts, reports, and what it refuses."""

from __future__ import annotations

import csv
import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import evaluation.evaluate
import evaluation.worker
import runner_aa_eval
from common.errors import UserError
from common.flags import load_config
from common.processes import Processes
from common.provenance import PROJECT
from common.tables import markdown_table
from evaluation.autoattack import attack_chunk
from evaluation.board import Board
from evaluation.config import ATTACKS, EvalConfig
from evaluation.plan import default_folder, folder_name, image_lists, make_plan, show_eps
from evaluation.records import StateFolder
from evaluation.report import summarise, warnings_of
from evaluation.stopping import half_width
from evaluation.worker import Task, _Worker, fast_copy, setup
from tests.data import write_folder
from tests.evaluation.helpers import shorten_evaluations
from tests.training.helpers import base_flags, run
from utils_architecture import get_new_model
from zoo.description import Preprocessing
from zoo.runs import load_trained

EPS = {"Linf": 0.1, "L2": 4.0}
PNG = b"\x89PNG"


@pytest.fixture(scope="module", autouse=True)
def short():
    with pytest.MonkeyPatch.context() as patch:
        shorten_evaluations(patch)
        yield


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """A run of two saved epochs, good enough that some images stand and some fall at these radii."""
    flags = base_flags(images, tmp_path_factory.mktemp("runs"))
    return run(flags | {"training.epochs": 2, "model.not_original": 1, "logging.save_freq": 1, "lr.lr": 2e-3})


def argv(trained, images, out, *flags):
    """Command line of a small evaluation; a flag given twice counts the last time."""
    base = [f"--eval.model_in={trained.folder}", f"--data.val_dataset={images}", f"--eval.out={out}", "--eval.fullaa=0"]
    base += ["--eval.img_size=32", "--eval.crop_pct=1", "--eval.batch_size=3", "--eval.workers=2", "--eval.eps=0.1"]
    return [*base, *flags]


def evaluate(trained, images, out, *flags):
    return runner_aa_eval.main(argv(trained, images, out, *flags))


def only(out: Path, name: str) -> Path:
    """The one file of that name below `out`."""
    (found,) = out.rglob(name)
    return found


def rows(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.fixture(scope="module")
def finished(trained, images, tmp_path_factory):
    """Two networks under two norms, and what was printed."""
    out = tmp_path_factory.mktemp("finished")
    networks = ",".join(str(trained.folder / f"weights_{epoch}.pt") for epoch in (1, 2))
    flags = [f"--eval.model_in={networks}", "--eval.norms=Linf,L2", "--eval.eps=0.1,4", "--eval.batch_size=5"]
    assert evaluate(trained, images, out, *flags) == 0
    return out, flags


def test_verdicts_are_those_of_each_chunk_alone(trained, images, finished):
    """Two workers, in whatever order, against the attacks called here, chunk by chunk."""
    out, flags = finished
    config = load_config(EvalConfig, argv(trained, images, out, *flags))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = {}
        network = load_trained(trained.folder / "weights_2.pt", config.model)
        listed = image_lists(config)(4, network.class_names)
        for norm, eps in EPS.items():
            for start in range(0, 8, 5):
                chunk = listed.read(list(range(start, min(start + 5, 8))), Preprocessing(32, 1))
                verdicts = attack_chunk(
                    network.model.requires_grad_(False),
                    chunk.x,
                    chunk.y,
                    norm=norm,
                    eps=eps,
                    seed=0,
                    attacks=ATTACKS[:2],
                    device=torch.device("cpu"),
                )
                found.setdefault(norm, []).extend(verdicts.broken_by)
    finally:
        torch.set_num_threads(threads)
    written = {
        norm: [row["broken_by"] for row in rows(next(out.glob(f"*weights_2/{norm}_*/verdicts.csv")))] for norm in EPS
    }
    assert written == found
    assert len({broken for verdicts in found.values() for broken in verdicts}) >= 3  # the comparison means something


def test_images_are_those_of_the_networks_own_validation(trained, images, tmp_path, capsys):
    """Trained and validated at 32 px: no flag is needed to evaluate there."""
    flags = [f"--eval.model_in={trained.folder}", f"--data.val_dataset={images}", f"--eval.out={tmp_path / 'out'}"]
    assert runner_aa_eval.main([*flags, "--eval.attacks=square,apgd-ce", "--eval.eps=0.1"]) == 0
    report = json.loads(only(tmp_path / "out", "report.json").read_text())
    assert report["data"]["img_size"] == 32 and report["attacks"] == ["apgd-ce", "square"]
    assert report["transform"] == {"resize": "bicubic", "crop_pct": 1.0, "from": "the run's params.json"}
    assert report["clean_acc"] == report["run"]["clean_acc"] == trained.epochs[-1]["top1"]
    assert "32 px, crop 1, bicubic (the run's params.json)" in capsys.readouterr().err


def test_too_few_classes_are_refused_before_anything_is_written(tmp_path, capsys):
    torch.manual_seed(0)
    torch.save(get_new_model("convnext_micro", num_classes=3).state_dict(), tmp_path / "w.pt")
    write_folder(tmp_path / "images", {"a": 2, "b": 2, "c": 2})
    flags = [f"--eval.model_in={tmp_path / 'w.pt'}", f"--data.val_dataset={tmp_path / 'images'}", "--eval.img_size=32"]
    assert runner_aa_eval.main(flags) == 2
    assert "eval.attacks: apgd-t needs at least 4 classes, got 3;" in capsys.readouterr().err
    assert not (tmp_path / "eval").exists()


def test_size_that_is_assumed_for_a_file_alone_is_a_warning(tmp_path, capsys):
    torch.save(get_new_model("convnext_micro", num_classes=4).state_dict(), tmp_path / "w.pt")
    write_folder(tmp_path / "images", dict.fromkeys("abcd", 1))
    flags = [f"--eval.model_in={tmp_path / 'w.pt'}", f"--data.val_dataset={tmp_path / 'images'}"]
    for more, warned in ([], True), (["--eval.img_size=32"], False):
        make_plan(load_config(EvalConfig, [*flags, *more]), on_gpu=False)
        assert ("so 224 px are assumed" in capsys.readouterr().err) == warned


def test_report(trained, images, finished):
    out, _ = finished
    folder = next(out.glob("*weights_2/Linf_*"))
    report, verdicts = json.loads((folder / "report.json").read_text()), rows(folder / "verdicts.csv")
    assert folder.name == "Linf_0.1_32px_n8_apgd"
    broken = [row["broken_by"] for row in verdicts]
    assert report["n"] == len(verdicts) == 8
    assert report["clean_acc"] == sum(row["label"] == row["clean_pred"] for row in verdicts) / 8
    assert report["robust_acc"] == broken.count("") / 8 == report["acc_after"]["apgd-t"]
    assert report["acc_after"]["apgd-ce"] == (broken.count("") + broken.count("apgd-t")) / 8
    low, high = report["robust_ci95"]
    assert 0 <= low < report["robust_acc"] < high <= 1
    assert report["check"] == dict.fromkeys(("outside_ball", "outside_box", "not_misclassified", "not_finite"), [])
    assert 0 < report["max_perturbation"] <= 0.1 * (1 + 1e-4) and 0 <= report["pixel_range"][0]
    assert len(report["network"]["sha256"]) == len(report["data"]["images"]) == 64
    assert report["flags"] == []
    assert report["network"]["arch"] == "convnext_micro" and report["engine"].startswith("pyautoattack")
    assert report["arithmetic"]["threads"] == 1 and report["devices"] == {"cpu": 2}
    assert 0 < report["seconds"] <= report["worker_seconds"] * 1.01 and report["gpu_seconds"] == 0
    assert sum(report["attack_seconds"].values()) < report["worker_seconds"]
    assert sorted(int(row["index"]) for row in verdicts) == list(range(8))
    assert all((images / "val" / row["path"]).is_file() for row in verdicts)
    log = (folder / "log.txt").read_text()
    assert (
        f"initial accuracy: {report['clean_acc']:.2%}" in log and f"robust accuracy: {report['robust_acc']:.2%}" in log
    )
    for name in ("accuracy.png", "examples.png"):
        assert (folder / name).read_bytes().startswith(PNG)


def test_table_and_union(finished):
    out, _ = finished
    table, notes = (part.splitlines() for part in (out / "table.md").read_text().split("\n\n"))
    assert len(table) == 2 + 4 + 2
    assert (
        "weights_1 gets images of 32 px, crop 1, bicubic (the run's params.json), not normalised, in [0, 1]."
        in notes[0]
    )
    summary = json.loads((out / "summary.json").read_text())
    assert len(summary["evaluations"]) == 4 and (out / "accuracy.png").read_bytes().startswith(PNG)
    for epoch, union in zip((1, 2), summary["unions"]):
        standing = [
            {
                row["index"]
                for row in rows(next(out.glob(f"*weights_{epoch}/{norm}_*/verdicts.csv")))
                if not row["broken_by"]
            }
            for norm in EPS
        ]
        assert union["robust_acc"] == len(standing[0] & standing[1]) / 8
    assert table[2].split("|")[1].strip().endswith("/weights_1") and "Linf ∪ L2" in table[-1]


def test_finished_evaluations_are_skipped(trained, images, finished, capsys):
    out, flags = finished
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*/*/report.json")}
    assert evaluate(trained, images, out, *flags, "--eval.workers=1") == 0
    assert capsys.readouterr().err.count("skipped") == 4
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*/*/report.json")} == before


def test_only_open_chunks_run_again(trained, images, tmp_path, capsys):
    assert evaluate(trained, images, tmp_path, "--eval.eps=0.5") == 0
    verdicts, report = only(tmp_path, "verdicts.csv").read_bytes(), only(tmp_path, "report.json")
    records = sorted(tmp_path.rglob("chunks/*.json"))
    records[1].write_text(records[1].read_text()[:40])  # a damaged record counts as none
    records[2].unlink()
    report.unlink()
    kept = records[0].stat().st_mtime_ns
    assert evaluate(trained, images, tmp_path, "--eval.eps=0.5", "--eval.workers=1") == 0
    assert "damaged" in capsys.readouterr().err
    assert only(tmp_path, "verdicts.csv").read_bytes() == verdicts and report.exists()
    assert records[0].stat().st_mtime_ns == kept


def test_records_of_earlier_versions_go_on(trained, images, tmp_path):
    assert evaluate(trained, images, tmp_path, "--eval.eps=0.5") == 0
    written = rows(only(tmp_path, "verdicts.csv"))
    for row in written:
        assert (row["adv_pred"] == row["label"]) == (row["broken_by"] == "")
        assert row["broken_by"] != "clean" or row["adv_pred"] == row["clean_pred"]
    record = sorted(tmp_path.rglob("chunks/*.json"))[1]  # of the images 3, 4 and 5
    record.write_text(json.dumps({k: v for k, v in json.loads(record.read_text()).items() if k != "adv_pred"}))
    only(tmp_path, "report.json").unlink()
    before = record.stat().st_mtime_ns
    assert evaluate(trained, images, tmp_path, "--eval.eps=0.5") == 0
    assert record.stat().st_mtime_ns == before
    expected = [row | ({"adv_pred": ""} if row["index"] in ("3", "4", "5") else {}) for row in written]
    assert rows(only(tmp_path, "verdicts.csv")) == expected


def test_another_evaluation_in_the_folder_is_refused(trained, images, tmp_path, capsys):
    assert evaluate(trained, images, tmp_path, "--eval.n_ex=2") == 0
    capsys.readouterr()
    assert evaluate(trained, images, tmp_path, "--eval.n_ex=2", "--eval.seed=1", "--eval.batch_size=2") == 2
    error = capsys.readouterr().err
    assert "attack.seed: 0 there, 1 here" in error and "attack.batch_size: 3 there, 2 here" in error
    assert "network" not in error.split("Differences:")[1]
    with open(only(tmp_path, "lock"), "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert evaluate(trained, images, tmp_path, "--eval.n_ex=2") == 2
    assert "another run" in capsys.readouterr().err


def test_signs_of_masked_gradients_are_said(trained, images, tmp_path, capsys):
    """Logits so large that the softmax saturates: the cross-entropy of what is classified right has no gradient any more."""
    weights = torch.load(trained.folder / "weights_2.pt", weights_only=True)
    weights |= {name: 1e6 * weights[name] for name in ("head.fc.weight", "head.fc.bias") if name in weights}
    torch.save(weights, tmp_path / "large.pt")
    flags = [f"--eval.model_in={tmp_path / 'large.pt'}", "--eval.attacks=apgd-ce", "--model.num_classes=4"]
    assert evaluate(trained, images, tmp_path / "out", *flags) == 0
    report = json.loads(only(tmp_path / "out", "report.json").read_text())
    right, (sentence,) = round(report["clean_acc"] * 8), report["flags"]
    assert sentence.startswith(f"the gradient of the cross-entropy is exactly 0 on {right} of 8 clean images")
    assert f"px: {sentence}." in capsys.readouterr().err


@pytest.fixture(scope="module")
def three_classes(images, tmp_path_factory):
    """The validation images without those of the class 1, green."""
    folder = tmp_path_factory.mktemp("three") / "val"
    shutil.copytree(images / "val", folder, ignore=shutil.ignore_patterns("green"))
    return folder


def test_predictions_among_the_classes_of_the_data_set(trained, three_classes, tmp_path, capsys):
    flags = ["--eval.attacks=apgd-ce,square", "--eval.save_adv=1", "--eval.eps=0.3"]
    network = load_trained(trained.folder / "weights_2.pt", load_config(EvalConfig, argv(trained, "", "")).model).model
    for choice, classes in (("all", [0, 1, 2, 3]), ("dataset", [0, 2, 3])):
        assert evaluate(trained, three_classes, tmp_path, *flags, f"--eval.among={choice}") == 0
        said = f"the images have 3 of the network's 4 classes; predictions are among {'all' if choice == 'all' else 'these'}"
        assert said in capsys.readouterr().err
        folder = next(tmp_path.rglob("*_among3" if choice == "dataset" else "*_apgd-ce+square"))
        report = json.loads((folder / "report.json").read_text())
        identity = json.loads((folder / "identity.json").read_text())
        assert ("among" in identity) == (choice == "dataset") and report["among"] == choice
        assert report["classes"] == {"network": 4, "dataset": 3, "among": len(classes)}
        assert report["check"]["not_misclassified"] == report["flags"] == []
        written = {int(row["index"]): row for row in rows(folder / "verdicts.csv")}
        for file in sorted(folder.glob("chunks/*.npz")):
            with np.load(file) as kept, torch.no_grad():
                for name, column in (("x", "clean_pred"), ("x_adv", "adv_pred")):
                    predicted = network(torch.from_numpy(kept[name]))[:, classes].argmax(1)
                    found = [int(written[position][column]) for position in kept["positions"].tolist()]
                    assert found == [classes[i] for i in predicted]
        assert {row["label"] for row in written.values()} == {"0", "2", "3"}
        assert {row["broken_by"] for row in written.values()} & {"apgd-ce", "square"}


def test_too_few_classes_of_the_data_set_are_refused(trained, three_classes, tmp_path, capsys):
    assert evaluate(trained, three_classes, tmp_path / "out", "--eval.among=dataset") == 2
    assert "apgd-t needs at least 4 classes, got 3; give --eval.attacks=apgd-ce,fab" in capsys.readouterr().err
    one = Path(shutil.copytree(three_classes / "red", tmp_path / "one" / "red")).parent
    assert evaluate(trained, one, tmp_path / "out", "--eval.among=dataset") == 2
    assert "apgd-ce needs at least 2 classes, got 1." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_list_of_networks_in_a_file(trained, images, tmp_path):
    bare = tmp_path / "bare.pt"
    bare.write_bytes((trained.folder / "weights_1.pt").read_bytes())
    flags = {"arch": "convnext_micro", "not_original": 1, "num_classes": 4}
    networks = [str(trained.folder), {"model_in": str(bare), "name": "../ours, epoch 1", **flags}]
    (tmp_path / "networks.yaml").write_text(yaml.safe_dump(networks))
    flags = [f"--eval.models={tmp_path / 'networks.yaml'}", "--eval.n_ex=3", "--eval.eps=0.5"]
    command = [flag for flag in argv(trained, images, tmp_path / "out", *flags) if "model_in" not in flag]
    assert runner_aa_eval.main(command) == 0
    names = [r["network"]["name"] for r in json.loads((tmp_path / "out/summary.json").read_text())["evaluations"]]
    assert names == [f"{trained.folder.name}/weights_2", "../ours, epoch 1"]
    assert {p.name for p in (tmp_path / "out").iterdir() if p.is_dir()} == {folder_name(name) for name in names}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a: 1", "expected a list of networks"),
        ("[]", "got an empty list"),
        ("- {name: x}", "network 1: expected a path, or a mapping with model_in"),
        ("- {model_in: w.pt, arc: vit_s}", "unknown key 'arc'; the nearest known one is 'arch'"),
        ("- {model_in: w.pt, num_classes: many}", "num_classes: expected an integer, at least 2, got 'many'"),
        ("- [", "expected YAML"),
        ("- !!python/object/apply:os.system [ls]", "expected YAML"),
    ],
)
def test_a_wrong_list_is_refused(trained, images, tmp_path, capsys, content, words):
    (tmp_path / "networks.yaml").write_text(content)
    assert evaluate(trained, images, tmp_path / "out", f"--eval.models={tmp_path / 'networks.yaml'}") == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--eval.model_in=nowhere.pt"], "eval.model_in: expected a weights file"),
        (["--data.val_dataset=nowhere"], "data.val_dataset"),
        (["--model.not_original=0"], "does not fit"),
        (["--model.num_classes=5"], "does not fit"),
        (["--model.arch=convnext_mikro"], "convnext_micro"),
        (["--eval.norms=L7"], "eval.norms"),
        (["--eval.norms=Linf,L2"], "one radius for each"),
        (["--eval.eps=8"], "did you mean 8/255?"),
        (["--eval.norms=L1", "--eval.eps=4000"], "at 32 px an L1 radius is at most 3072"),
        (["--eval.img_size=32,32"], "expected each value once"),
        (["--eval.model_in="], "got an empty value"),
        (["--eval.seed=99999999999999999999"], "eval.seed: expected an integer, at least 0, at most"),
        (["--eval.gpus=first"], "expected auto, none, or GPU numbers"),
        (["--eval.gpus=0,1"], "eval.gpus"),
        (["--eval.precision=tf32"], "needs a GPU"),
        (["--data.classes=index", "--data.labels=l.csv"], "expected at most one of data.classes=index, data.labels;"),
        (["--data.labels=nowhere.csv"], f"data.labels: cannot read {Path('nowhere.csv').absolute()} (No such file"),
        (["--eval.ids=robustbench"], "data.val_dataset: expected the folders of all 1000 classes"),
    ],
)
def test_refused(trained, images, tmp_path, capsys, flags, words, monkeypatch):
    monkeypatch.setattr("evaluation.gpus.usable_gpus", lambda: 0)
    assert evaluate(trained, images, tmp_path / "out", *flags) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_network_is_tried_before_the_work_begins(images, tmp_path, capsys):
    """Image sizes it cannot take, and logits that mean nothing."""
    flags = base_flags(images, tmp_path / "runs") | {"model.arch": "vit_micro"}
    trained = run(flags)
    assert evaluate(trained, images, tmp_path / "out", "--eval.img_size=32,30") == 2
    assert "does not accept images of 30 pixels" in capsys.readouterr().err
    weights = torch.load(trained.folder / "weights_1.pt", weights_only=True)
    weights["head.bias"] = weights["head.bias"] * float("nan")
    torch.save(weights, trained.folder / "weights_1.pt")
    assert evaluate(trained, images, tmp_path / "out") == 2
    assert "not finite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_full_disk_loses_nothing(trained, images, tmp_path, capsys, monkeypatch):
    """Nothing can be written for a while, neither records nor the report."""
    write, failures = StateFolder.write, iter(range(4))

    def full(*arguments):
        if next(failures, None) is not None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*arguments)

    monkeypatch.setattr(StateFolder, "write", full)
    monkeypatch.setattr(evaluation.evaluate, "SAVE_AGAIN_SECONDS", 0.1)
    assert evaluate(trained, images, tmp_path, "--eval.eps=0.5") == 0
    error = capsys.readouterr().err
    assert "No space left on device" in error and "kept in memory" in error
    assert len(rows(only(tmp_path, "verdicts.csv"))) == 8


def test_a_disk_that_stays_full_ends_the_run(trained, images, tmp_path, capsys, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(StateFolder, "write", full)
    monkeypatch.setattr(evaluation.evaluate, "SAVE_AGAIN_SECONDS", 0.1)
    monkeypatch.setattr(evaluation.evaluate, "GIVE_UP_SECONDS", 0.5)
    assert evaluate(trained, images, tmp_path, "--eval.eps=0.5", "--eval.n_ex=3") == 2
    assert "chunks are lost" in capsys.readouterr().err


def test_broken_images_are_left_out_and_named(trained, images, tmp_path, capsys):
    copy = tmp_path / "images"
    for name in ("blue", "green", "grey", "red"):
        (copy / "val" / name).mkdir(parents=True)
        for file in (images / "val" / name).iterdir():
            (copy / "val" / name / file.name).write_bytes(file.read_bytes() if file.name != "1.png" else b"no image")
    flags = ["--eval.eps=0.5", "--eval.batch_size=1", "--eval.save_adv=1"]
    assert evaluate(trained, copy, tmp_path / "out", *flags) == 0
    report = json.loads(only(tmp_path / "out", "report.json").read_text())
    assert report["n"] == 4 and len(report["data"]["unreadable"]) == 4 and report["data"]["n"] == 8
    assert {row["path"].split("/")[1] for row in rows(only(tmp_path / "out", "verdicts.csv"))} == {"0.png"}
    assert "4 images could not be decoded" in capsys.readouterr().err
    assert evaluate(trained, copy, tmp_path / "out", *flags) == 0
    assert "already finished, skipped" in capsys.readouterr().err  # chunks without an image have none to keep


def test_adversarial_images_are_kept_on_demand(trained, images, tmp_path):
    assert evaluate(trained, images, tmp_path, "--eval.save_adv=1", "--eval.eps=0.25") == 0
    kept = [np.load(file) for file in sorted(tmp_path.rglob("chunks/*.npz"))]
    x, x_adv = (np.concatenate([arrays[name] for arrays in kept]) for name in ("x", "x_adv"))
    broken_by = np.concatenate([arrays["broken_by"] for arrays in kept])
    assert x.shape == (8, 3, 32, 32) and x.dtype == x_adv.dtype == np.float32
    assert broken_by.tolist() == [row["broken_by"] for row in rows(only(tmp_path, "verdicts.csv"))]
    assert np.abs(x_adv - x).max() <= 0.25 + 1e-6
    network = load_trained(trained.folder, load_config(EvalConfig, argv(trained, images, "")).model).model
    with torch.no_grad():
        wrong = network(torch.from_numpy(x_adv)).argmax(1).numpy() != np.concatenate([arrays["y"] for arrays in kept])
    assert wrong.tolist() == [bool(broken) for broken in broken_by]


def test_odd_names_and_missing_results(trained, images, tmp_path):
    """A file name that is not UTF-8, a network name like mathematics, and deleted results."""
    copy = tmp_path / "images"
    shutil.copytree(images, copy)
    os.rename(copy / "val" / "red" / "0.png", os.fsencode(copy / "val" / "red") + b"/im\xff3.png")
    networks = [{"model_in": str(trained.folder), "name": "_cost $\\frac{1$ | x"}]
    (tmp_path / "networks.yaml").write_text(yaml.safe_dump(networks))
    flags = [f"--eval.models={tmp_path / 'networks.yaml'}", "--eval.eps=0.5,50", "--eval.norms=Linf,L2"]
    command = [flag for flag in argv(trained, copy, tmp_path / "out", *flags) if "model_in" not in flag]
    assert runner_aa_eval.main(command) == 0
    first, second = sorted((tmp_path / "out").rglob("verdicts.csv"))
    written = first.read_bytes()
    assert b"red/im\xff3.png" in written
    first.unlink()
    (second.parent / "report.json").write_text("[]")
    assert runner_aa_eval.main(command) == 0
    assert first.read_bytes() == written and json.loads((second.parent / "report.json").read_text())["n"] == 8


def test_default_folder(tmp_path):
    def place(*files):
        return default_folder([tmp_path / file for file in files])

    assert place("a/w.pt") == place("a/w.pt", "a/v.pt") == tmp_path / "a" / "eval"
    assert place("a/w.pt", "b/w.pt") == tmp_path / "eval"
    with pytest.raises(UserError, match="eval.out: required"):
        place("a/w.pt", "b/c/w.pt")


def test_images_asked_for_later_are_made_then(trained, images, tmp_path):
    assert evaluate(trained, images, tmp_path, "--eval.eps=0.25") == 0
    verdicts = only(tmp_path, "verdicts.csv").read_bytes()
    assert len(list(tmp_path.rglob("chunks/*.npz"))) == 1
    assert evaluate(trained, images, tmp_path, "--eval.eps=0.25", "--eval.save_adv=1") == 0
    kept = sorted(tmp_path.rglob("chunks/*.npz"))
    kept[1].unlink()
    assert evaluate(trained, images, tmp_path, "--eval.eps=0.25", "--eval.save_adv=1") == 0
    assert sorted(tmp_path.rglob("chunks/*.npz")) == kept and len(kept) == 3
    assert only(tmp_path, "verdicts.csv").read_bytes() == verdicts


@pytest.fixture
def script(tmp_path):
    """runner_aa_eval.py with the short attacks of this module."""
    file = tmp_path / "runner.py"
    file.write_text("""if __name__ == "__main__":
        import sys, pytest, runner_aa_eval
        from tests.evaluation.helpers import shorten_evaluations
        shorten_evaluations(pytest.MonkeyPatch())
        sys.exit(runner_aa_eval.main(sys.argv[1:]))""")
    return file


def test_two_processes_share_the_work_and_the_first_one_prints(
    trained, images, tmp_path, finished, script, monkeypatch, capfd
):
    """Where torchrun's environment says so; the first one is this process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    command = argv(trained, images, tmp_path / "out", "--eval.batch_size=5", "--eval.workers=1")
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "RANK": "1", "LOCAL_RANK": "1"}
    second = subprocess.Popen([sys.executable, script, *command], cwd=PROJECT, env=environment, stdout=subprocess.PIPE)
    try:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("LOCAL_RANK", "0")
        assert runner_aa_eval.main(command) == 0
        printed, _ = second.communicate(timeout=120)
    finally:
        second.kill()
        second.wait()
    assert second.returncode == 0, capfd.readouterr().err
    assert capfd.readouterr().out.count("| Linf") == 1 and b"| Linf" not in printed
    (same,) = finished[0].glob("*weights_2/Linf_*/verdicts.csv")
    assert only(tmp_path / "out", "verdicts.csv").read_bytes() == same.read_bytes()
    assert json.loads(only(tmp_path / "out", "report.json").read_text())["devices"] == {"cpu": 2}  # both chunks


@pytest.mark.slow
def test_processes_of_torchrun_share_the_work(trained, images, tmp_path, finished, script):
    out, _ = finished
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
    ]
    command = [*torchrun, *argv(trained, images, tmp_path, "--eval.batch_size=5")]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| Linf") == 1  # the first process prints
    (same,) = out.glob("*weights_2/Linf_*/verdicts.csv")
    assert only(tmp_path, "verdicts.csv").read_bytes() == same.read_bytes()


def test_a_network_that_cannot_be_compiled_runs_as_it_is(trained, images, tmp_path, capsys, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("no C++ compiler\nin /usr/bin")

    monkeypatch.setattr(torch, "compile", fail)
    config = load_config(EvalConfig, argv(trained, images, tmp_path, "--eval.compile=1"))
    network = load_trained(trained.folder, config.model).model
    assert fast_copy(network, config.eval, size=32, device=torch.device("cpu")) is None
    assert "running uncompiled: RuntimeError: no C++ compiler" in capsys.readouterr().err


@pytest.fixture
def worker(trained, images, tmp_path):
    """What a worker process has, for two networks that are compiled."""
    networks = ",".join(str(trained.folder / f"weights_{epoch}.pt") for epoch in (1, 2))
    config = load_config(EvalConfig, argv(trained, images, tmp_path, f"--eval.model_in={networks}", "--eval.compile=1"))
    plan = make_plan(config, on_gpu=False)
    return _Worker(torch.device("cpu"), config, plan.evaluations, plan.images)


def test_what_is_compiled_is_what_the_attacks_call(worker, monkeypatch):
    """With and without gradient, under their arithmetic; the compiler's limit on graphs is for each network."""
    seen = []

    def compiled(model, **options):
        def call(x):
            seen.append((x.requires_grad, torch.is_grad_enabled(), torch.backends.cudnn.allow_tf32))
            return model(x)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(torch._dynamo, "reset", lambda: seen.append("reset"))
    for number in (0, 0, 1):
        worker._load_network(worker.evaluations[number])
    assert seen == 2 * ["reset", (True, True, False), (False, False, False)]


def test_too_little_memory_is_said_with_its_remedy(worker, monkeypatch):
    def attack(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee documentation")

    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    monkeypatch.setattr(evaluation.worker, "attack_chunk", attack)
    with pytest.raises(
        RuntimeError, match=r"not enough memory for 3 images of 32 px .* smaller eval\.batch_size.*2 GiB"
    ):
        worker.run(Task(0, 0), print)
    monkeypatch.setattr(torch, "compile", attack)
    with pytest.raises(RuntimeError, match="smaller eval.batch_size"):  # not "running uncompiled"
        worker.run(Task(1, 0), print)


def test_a_gpu_is_deterministic(worker, monkeypatch):
    """As far as can be seen without one: what is asked of PyTorch."""
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    try:
        setup("cuda:0", worker.config, worker.evaluations, worker.images)
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cuda.mem_efficient_sdp_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.enable_mem_efficient_sdp(True)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def test_a_process_without_the_gpu_that_the_first_one_has(worker, monkeypatch):
    monkeypatch.setattr(evaluation.evaluate, "find_devices", lambda settings, chunks: ["cuda:0"])
    board = Board(Processes.alone(), "test")
    with pytest.raises(UserError, match="the first process uses cpu, another process cuda; expected GPUs on all"):
        evaluation.evaluate._work(worker.config, board, worker.evaluations, [Task(0, 0)], None)
    assert "another process" in board.closed()


def test_a_finished_evaluation_needs_no_free_gpu(trained, images, finished, monkeypatch, capsys):
    def none_free(settings, chunks):
        raise UserError("eval.gpus: none of the 8 GPUs is free")

    monkeypatch.setattr(evaluation.evaluate, "find_devices", none_free)
    out, flags = finished
    assert evaluate(trained, images, out, *flags) == 0
    assert capsys.readouterr().out.count("| L2 ") == 2


def test_progress_is_lines_where_stderr_is_no_terminal(trained, images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluation.evaluate, "LINE_SECONDS", 0)
    assert evaluate(trained, images, tmp_path) == 0
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if "img" in line]
    assert any("8/8" in line and "robust" in line for line in lines) and any("at apgd-ce" in line for line in lines)
    assert "3 chunks to do; workers of this process: 2 × cpu" in error


def test_different_devices_are_said(finished):
    report = json.loads(next(finished[0].rglob("report.json")).read_text())
    report |= {"devices": {"NVIDIA H100": 3, "NVIDIA A100": 1}, "clean_acc": 1.0}
    assert list(warnings_of(report)) == [
        "chunks were computed on different devices (NVIDIA H100, NVIDIA A100), whose rounding differs"
    ]
    assert list(warnings_of(report | {"devices": {"NVIDIA H100": 4}})) == []


def test_seconds_count_overlapping_chunks_once(trained, images, finished):
    """Two workers at the same time, then a pause, then one."""
    record = {
        "broken_by": ["", "square"],
        "positions": [0, 1],
        "unreadable": [],
        "rejoined": 0,
        "images_kept": 0,
        "device": "NVIDIA",
    }
    check = {"max_perturbation": 0.1, "pixel_range": [0.0, 1.0], **dict.fromkeys(("outside_ball", "outside_box"), [])}
    record |= {"check": check | {"not_misclassified": [1], "not_finite": []}, "attack_seconds": {"square": 1.0}}
    records = [record | {"started": start, "seconds": 10.0} for start in (0, 5, 100)]
    config = load_config(EvalConfig, argv(trained, images, "", "--eval.fullaa=1"))
    (evaluation,) = make_plan(config, on_gpu=False).evaluations
    report = summarise(evaluation, records, config)
    assert report["seconds"] == 25 and report["worker_seconds"] == report["gpu_seconds"] == 30
    assert report["acc_after"] == {"apgd-ce": 1.0, "apgd-t": 1.0, "fab-t": 1.0, "square": 0.5}
    assert report["check"]["not_misclassified"] == [1, 1, 1]


def test_table_and_eps():
    table = markdown_table([{"a": 1, "bb": "x"}, {"a": 22, "bb": "y"}])
    assert table.splitlines() == ["| a  | bb |", "|----|----|", "| 1  | x  |", "| 22 | y  |"]
    assert [show_eps(e) for e in (4 / 255, 0.1, 2.0, 75)] == ["4/255", "0.1", "2", "75"]


@pytest.mark.parametrize(
    ("name", "folder"), [("a/b", "a__b"), ("../../x", "__..__x"), ("..", "network"), ("ü 1", "ü-1")]
)
def test_names_cannot_leave_their_folder(name, folder):
    assert folder_name(name) == folder


def test_stops_where_both_norms_are_known_well_enough(trained, images, tmp_path, capsys):
    """Both norms use the same number of images, in any order of completion; a larger request resumes."""
    out, flags = tmp_path / "out", ["--eval.norms=Linf,L2", "--eval.eps=0.1,4", "--eval.batch_size=1"]
    assert evaluate(trained, images, out, *flags, "--eval.ci=47") == 0
    reports = [json.loads(file.read_text()) for file in sorted(out.rglob("report.json"))]
    (n,) = {report["n"] for report in reports}
    assert (
        len(reports) == 2 and 1 < n < 8 and all(r["chunks"] == n and r["interval"].startswith("beta") for r in reports)
    )
    assert all(half_width(round(r["robust_acc"] * n), n, points=47) <= 47 for r in reports)
    assert f"{n} of 8 images are enough for ± 47 percentage points" in capsys.readouterr().err
    kept = {file: file.read_bytes() for file in out.rglob("chunks/*.json")}
    assert evaluate(trained, images, out, *flags, "--eval.ci=47") == 0
    assert capsys.readouterr().err.count("already finished, skipped") == 2
    assert evaluate(trained, images, out, *flags) == 0
    assert {json.loads(file.read_text())["n"] for file in out.rglob("report.json")} == {8}
    assert all(file.read_bytes() == content for file, content in kept.items())  # nothing is computed twice


def test_a_norm_that_is_added_later_stops_with_the_others(trained, images, tmp_path):
    """Linf is finished with all images; both norms are then reported on the images that are enough for both."""
    out = tmp_path / "out"
    assert evaluate(trained, images, out, "--eval.batch_size=1") == 0
    both = ["--eval.norms=Linf,L2", "--eval.eps=0.1,4", "--eval.batch_size=1", "--eval.ci=47"]
    assert evaluate(trained, images, out, *both) == 0
    summary = json.loads((out / "summary.json").read_text())
    (n,) = {report["n"] for report in summary["evaluations"]}
    assert n < 8 and summary["unions"][0]["n"] == n
    assert summary["unions"][0]["robust_acc"] <= min(report["robust_acc"] for report in summary["evaluations"])


def test_a_report_of_an_earlier_version_is_made_again(trained, images, tmp_path):
    assert evaluate(trained, images, tmp_path / "out") == 0
    file = only(tmp_path / "out", "report.json")
    report = json.loads(file.read_text())
    file.write_text(json.dumps({key: report[key] for key in report.keys() - {"run", "ci", "chunks", "interval"}}))
    assert evaluate(trained, images, tmp_path / "out") == 0
    assert json.loads(file.read_text()).keys() == report.keys()


def test_says_where_all_images_are_not_enough(trained, images, tmp_path, capsys):
    assert evaluate(trained, images, tmp_path / "out", "--eval.ci=1") == 0
    assert (
        "warning" in (said := capsys.readouterr().err)
        and "all 8 images of the evaluation (eval.n_ex) are not enough for ± 1 percentage points" in said
    )
