"""Which folder a command line means, and which flags and images make another run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from common.flags import config_to_dict, load_config
from training.config import TrainConfig
from training.identity import changed_flags, find_folder, other_images


def config(folder: Path, *flags: str) -> TrainConfig:
    given = ["--data.train_dataset=images", "--data.val_dataset=images", f"--logging.folder={folder}"]
    return load_config(TrainConfig, [*given, *flags])


def leave(
    folder: Path, config: TrainConfig, *, status: str = "stopped", step: int = 5, batch: int = 512, **provenance
) -> Path:
    """A run's folder, as a start with these flags leaves it."""
    folder.mkdir()
    params = config_to_dict(config) | {"provenance": {"global_batch": batch} | provenance}
    (folder / "params.json").write_text(json.dumps(params))
    (folder / "status.json").write_text(json.dumps({"status": status, "step": step, "epoch": 0, "reason": ""}))
    return folder


def test_new_run_has_the_folder_of_its_name(tmp_path):
    asked = config(tmp_path)
    assert find_folder(asked) == (asked.run_folder, "")


@pytest.mark.parametrize("status", ["stopped", "finished"])
def test_folder_of_another_name_with_the_same_flags_is_found(tmp_path, status):
    elsewhere = ("--data.train_dataset=/scratch/1/images", "--validation.freq=3", "--data.num_workers=1")
    old = leave(tmp_path / "as_it_was_called", config(tmp_path, *elsewhere), status=status, images=8)
    leave(tmp_path / "other", config(tmp_path, "--lr.lr=0.5"))
    leave(tmp_path / "as_it_was_called.1", config(tmp_path))  # put aside by a later start
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "params.json").write_text("{")
    folder, note = find_folder(config(tmp_path))
    assert folder == old and "earlier version" in note
    for flags in (["--training.resume=none"], ["--lr.lr=0.2"], ["--logging.addendum=b"], ["--model.ckpt_path=w.pt"]):
        asked = config(tmp_path, *flags)
        assert find_folder(asked) == (asked.run_folder, "")
    asked.run_folder.mkdir()
    config(tmp_path).run_folder.mkdir()
    assert find_folder(config(tmp_path))[0] == config(tmp_path).run_folder  # its own name comes first


def test_run_of_an_earlier_version_is_that_of_the_same_images(tmp_path):
    """Its name depended on their path, and it did not record their number."""
    ours = leave(tmp_path / "a_0123ab", config(tmp_path, "--data.train_dataset=images/"))
    leave(tmp_path / "b_0123ab", config(tmp_path, "--data.train_dataset=other"), status="finished")
    assert find_folder(config(tmp_path))[0] == ours


def test_the_original_comes_before_a_copy_by_another_name(tmp_path):
    original = leave(tmp_path / "convnext_tiny_a_0123ab", config(tmp_path))
    copy = leave(tmp_path / "backup_convnext_tiny_a_0123ab", config(tmp_path))
    assert find_folder(config(tmp_path))[0] == original
    os.utime(copy / "params.json", (0, 2**31))
    assert find_folder(config(tmp_path))[0] == original
    for folder in (original, copy):
        params = json.loads((folder / "params.json").read_text())
        params["provenance"]["folder"] = "kept_20261129"
        (folder / "params.json").write_text(json.dumps(params))
    kept = original.rename(tmp_path / "kept_20261129")
    assert find_folder(config(tmp_path))[0] == kept


@pytest.mark.parametrize("addendum", ["", "v1.0", "x_y"])
@pytest.mark.parametrize("more", [".1", "_backup", "-old", " copy"])
def test_copies_are_not_found(tmp_path, addendum, more):
    asked = config(tmp_path, f"--logging.addendum={addendum}")
    named = asked.run_folder.name
    leave(tmp_path / f"{named}{more}", asked, status="finished")
    assert find_folder(asked) == (asked.run_folder, "")
    earlier = leave(tmp_path / named.replace("_batch512", ""), asked)
    assert find_folder(asked)[0] == earlier


def test_run_that_begins_at_anothers_state_has_its_folder(tmp_path):
    other = leave(tmp_path / "other_0123ab", config(tmp_path), batch=1024)
    begun = config(tmp_path, f"--training.resume={tmp_path}/elsewhere/last.pt")
    assert find_folder(begun)[0] == begun.run_folder and find_folder(config(tmp_path))[0] == other
    for own in (other, f"{other}/", other / "last.pt"):
        assert find_folder(config(tmp_path, f"--training.resume={own}"))[0] == other
    moved = leave(tmp_path / "begun_0123ab", begun, batch=1024, origin=begun.training.resume)
    assert find_folder(begun)[0] == moved
    assert find_folder(config(tmp_path, f"--training.resume={tmp_path}/elsewhere/last.pt/"))[0] == moved


def test_validation_alone_is_what_it_validates(tmp_path):
    def name(*flags):
        return config(tmp_path, "--training.eval_only=1", *flags).run_name

    assert name() == name("--data.val_dataset=images/") == name("--data.num_workers=7") == name("--lr.lr=0.5")
    assert name() == name("--training.epochs=7", "--training.distributed=1", "--dist.world_size=2")
    names = {name(), name("--data.val_dataset=other"), name("--adv.eps=0.5"), name("--validation.resolution=64")}
    assert len(names) == 4


@pytest.mark.parametrize(
    ("left", "flags", "found"),
    [
        ({"status": "stopped"}, [], True),
        ({"status": "running"}, [], True),
        ({"status": "finished"}, [], False),  # with the other batch, it is another result
        ({"status": "finished", "resumed": [{"processes": 1}]}, [], True),  # the same command, once more
        ({"status": "finished", "resumed": [{"processes": 2}]}, [], False),
        ({"status": "running", "step": 0}, [], False),  # nothing that could be resumed
        ({"batch": 768}, [], False),  # cannot be shared
        ({}, ["--training.grad_accum=2"], False),  # another batch was asked for
        ({}, ["--training.batch_size=256"], False),
    ],
)
def test_unfinished_run_of_another_number_of_processes_is_found(tmp_path, left, flags, found):
    old = leave(tmp_path / "old", config(tmp_path), **{"batch": 2048} | left)
    asked = config(tmp_path, *flags)
    folder, note = find_folder(asked)
    assert folder == (old if found else asked.run_folder)
    assert ("keeps 2048 images per step" in note) == (found and left.get("status") != "finished")
    assert ("separate run" in note) == ("batch" in left)


@pytest.mark.parametrize(
    ("left", "asked", "found"),
    [
        (("fp32", []), [], True),  # on a CPU, where none was given
        (("fp16", []), ["fp16"], True),
        (("fp32", []), ["fp32"], True),  # the same weights
        (("fp32", []), ["bf16"], False),
        (("fp32", ["training.precision"]), [], False),
        (("fp32", ["training.precision"]), ["fp32"], True),
        (("fp16", None), [], True),  # of an earlier version, which did not note it
        (("bf16", None), [], False),
        (("bf16", None), ["bf16"], True),
    ],
)
def test_precision_that_was_not_given_is_not_the_runs(tmp_path, left, asked, found):
    """`--where` on a login node finds what a CPU or a GPU has trained."""
    precision, given = left
    begun = config(tmp_path, f"--training.precision={precision}")
    old = leave(tmp_path / "old", begun, **({} if given is None else {"given": given}))
    now = config(tmp_path, *(f"--training.precision={value}" for value in asked))
    assert find_folder(now)[0] == (old if found else now.run_folder)


def test_radius_of_a_validation_alone_is_not_the_runs(tmp_path):
    clean = config(tmp_path, "--adv.attack=none", "--adv.eps=0.01")
    assert clean.run_name == config(tmp_path, "--adv.attack=none").run_name
    assert (
        config(tmp_path, "--adv.attack=apgd", "--adv.eps=0.01").run_name
        != config(tmp_path, "--adv.attack=apgd").run_name
    )


def test_training_resumes_in_its_precision(tmp_path):
    saved = config_to_dict(config(tmp_path, "--training.precision=fp16"))
    assert changed_flags(saved, config(tmp_path).on("cpu"), global_batch=512) == []
    assert config(tmp_path).on("cpu", begun_with="fp16").training.precision == "fp16"
    assert changed_flags(saved, config(tmp_path, "--training.precision=bf16"), global_batch=512) == [
        "training.precision: fp16 → bf16"
    ]


def test_micro_batches_of_the_same_global_batch_are_no_change(tmp_path):
    saved = config_to_dict(config(tmp_path))
    now = config(tmp_path, "--training.grad_accum=2", "--data.flip=0")
    assert changed_flags(saved, now, global_batch=1024) == ["data.flip: 0.5 → 0.0"]
    assert changed_flags(saved, now, global_batch=512)[1:] == ["training.grad_accum: 1 → 2"]
    assert changed_flags({}, config(tmp_path, "--adv.alpha=3"), global_batch=512) == []  # idle, and defaults


def test_other_images():
    run = {"sample": "1f", "images": 8, "classes": ["a", "b"]}
    assert other_images(run, run) == other_images({}, run) == other_images(run, run | {"classes": None}) == []
    assert other_images(run, {"images": 9, "classes": ["a", "b"]}) == ["data.train_dataset had 8 images and now has 9"]
    assert "other images" in other_images(run, run | {"sample": "2e"})[0]
    assert "'b' is now 'c'" in other_images(run, {"images": 8, "classes": ["a", "c"]})[0]
    assert "there were 2, now there are 3" in other_images(run, {"images": 8, "classes": ["a", "b", "c"]})[0]
