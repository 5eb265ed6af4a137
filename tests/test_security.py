"""Files that the project reads can neither run code nor write outside their folder.

Related tests near the code: hostile shares in zoo/test_download.py, files that are no weights in zoo/test_loading.py, links in
archives of images in data/test_datasets.py, names of evaluations in evaluation/test_runner.py, open ports in
common/test_distributed.py.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import common.flags
import runner_aa_eval
import train
import utils_architecture
from common.errors import UserError
from common.flags import load_config
from data.datasets import open_source
from tests.training.helpers import base_flags
from training.checkpoint import LAST, StateFiles, read_state
from training.config import TrainConfig

PROJECT = Path(__file__).resolve().parents[1]


class Mark:
    """Object that runs a command when it is unpickled; the command creates a file."""

    def __init__(self, file: Path) -> None:
        self.file, self.command = file, f"touch '{file}'"

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)

    def works(self, read: Callable) -> None:
        """Check that the command runs with an unsafe reader, and delete its file."""
        with contextlib.suppress(Exception):  # errors after the command do not matter
            read()
        self.file.unlink()


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Mark]:
    """Fail the test if the command has run at its end."""
    mark = Mark(tmp_path / "executed")
    yield mark
    assert not mark.file.exists()


def snapshot(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def refused(main: Callable[[list[str]], int], flags: dict, capsys: pytest.CaptureFixture, *words: str) -> str:
    """Check that `main` exits with a one-paragraph error that contains all the words, and return it."""
    assert main([f"--{name}={value}" for name, value in flags.items()]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert all(word in message for word in words), message
    return message


# --- files of weights and states --------------------------------------------------------------------------------------


def in_zip(content: object, path: Path) -> None:
    torch.save(content, path)


def legacy(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def bare(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


def in_tar(content: object, path: Path) -> None:
    """Write the oldest format of torch.save."""
    with tarfile.open(path, "w") as archive:
        for name, member in (("storages", content), ("tensors", 0), ("pickle", 0)):
            data, info = pickle.dumps(member, protocol=2), tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def numpy_objects(content: object, path: Path) -> None:
    with open(path, "wb") as file:
        np.save(file, np.array([content]), allow_pickle=True)


FORMATS = [in_zip, legacy, bare, in_tar, numpy_objects]


@pytest.fixture(params=FORMATS, ids=lambda write: write.__name__)
def crafted(request: pytest.FixtureRequest, mark: Mark, tmp_path: Path) -> Path:
    """Return a file that runs a command in unsafe readers."""
    path = tmp_path / "crafted.pt"
    # It also contains weights and a whole training state, so that no reader has another reason to reject the file.
    content = {"step": 1, "format": 1, "model": {"weight": torch.zeros(2)}, "more": mark}
    request.param(content, path)
    reader = np.load if request.param is numpy_objects else torch.load
    mark.works(lambda: reader(path, **{"allow_pickle" if reader is np.load else "weights_only": reader is np.load}))
    return path


def test_weights_to_start_from(crafted, images, tmp_path, capsys):
    flags = base_flags(images, tmp_path / "runs") | {"model.ckpt_path": crafted}
    refused(train.main, flags, capsys, "model.ckpt_path", str(crafted))


def test_state_to_resume_from(crafted, images, tmp_path, capsys):
    flags = base_flags(images, tmp_path / "runs") | {"training.resume": crafted}
    refused(train.main, flags, capsys, str(crafted), "expected a", "training state")


@pytest.mark.parametrize("resume", ["auto", "the folder"])
def test_state_in_a_run_folder(crafted, images, tmp_path, capsys, resume):
    flags = base_flags(images, tmp_path / "runs")
    folder = load_config(TrainConfig, [f"--{name}={value}" for name, value in flags.items()]).run_folder
    folder.mkdir(parents=True)
    crafted.rename(folder / LAST)
    flags |= {"training.resume": "auto" if resume == "auto" else folder}
    refused(train.main, flags, capsys, LAST, "expected a", "training state")


def test_weights_to_evaluate(crafted, images, tmp_path, capsys):
    flags = {"eval.model_in": crafted, "data.val_dataset": images, "eval.out": tmp_path / "out"}
    refused(runner_aa_eval.main, flags, capsys, "eval.model_in", str(crafted))
    assert not (tmp_path / "out").exists()


def test_published_weights_of_timm(mark, tmp_path, monkeypatch):
    """Some of timm's weights are pickles on the Hub, which timm loads without restrictions."""
    path = tmp_path / "open_clip_pytorch_model.bin"
    torch.save({"weight": torch.zeros(2), "more": mark}, path)
    mark.works(lambda: torch.load(path, weights_only=False))
    monkeypatch.setattr(utils_architecture, "hf_hub_download", lambda repository, file: str(path.with_name(file)))
    with pytest.raises(UserError, match=r"^pretrained: .*Python objects or code"):
        utils_architecture.get_new_model("timm_vit_base_patch32_clip_224.laion2b", pretrained=True)


# --- YAML -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", ["object/apply:os.system", "object/new:os.system"])
@pytest.mark.parametrize("place", ["--config-file", "eval.models"])
def test_yaml_that_calls_functions(mark, images, tmp_path, capsys, tag, place):
    file = tmp_path / "crafted.yaml"
    file.write_text(f'- {{model_in: x, name: !!python/{tag} ["{mark.command}"]}}\n')
    if "new" not in tag:
        mark.works(lambda: yaml.unsafe_load(file.read_text()))
    if place == "--config-file":
        refused(train.main, {"config-file": file}, capsys, str(file), "expected YAML or JSON", "os.system")
    else:
        flags = {"eval.models": file, "data.val_dataset": images, "eval.out": tmp_path / "out"}
        refused(runner_aa_eval.main, flags, capsys, str(file), "expected YAML or JSON", "os.system")


# --- data sets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["wds/pipe:{command} #", "wds/pipe:{command};echo "])
def test_data_set_that_is_a_command(mark, tmp_path, monkeypatch, spec):
    """A foreign config file may contain one: WebDataset runs the command after `pipe:`."""
    webdataset = pytest.importorskip("webdataset")
    monkeypatch.chdir(tmp_path)
    mark.works(lambda: webdataset.gopen(f"pipe:{mark.command}").read())
    with pytest.raises(UserError, match="^cannot open split train of wds/pipe"):
        open_source(spec.format(command=mark.command), split="train")


def test_shards_that_are_commands_or_hold_pickles(mark, images, tmp_path, monkeypatch):
    """Covers the folder's list of shards, and members with suffixes that WebDataset unpickles."""
    pytest.importorskip("webdataset")
    monkeypatch.chdir(tmp_path)
    folder, image = tmp_path / "shards", next(images.rglob("*.png")).read_bytes()
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as shard:
        for end, data in (
            ("png", image),
            ("cls", b"0"),
            *((end, pickle.dumps(mark)) for end in ("pyd", "pkl", "pickle", "pth")),
        ):
            info = tarfile.TarInfo(f"0.{end}")
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))
    reader = {"training": False, "batch_size": 1, "seed": 0, "rank": 0, "world_size": 1, "num_workers": 1}
    for place in (folder, folder.name):
        for name in (f"pipe:{mark.command}", f"pipe:{mark.command};cat "):
            split = {"name": "train", "num_samples": 2, "filenames": ["a.tar", name], "shard_lengths": [1, 1]}
            (folder / "_info.json").write_text(json.dumps({"num_classes": 1, "splits": {"train": split}}))
            samples = open_source(f"wds/{place}", split="train").samples(**reader)
            assert next(samples)[0].size == (20, 20)
            with pytest.raises(UserError, match="No such file"):  # the command is treated as a missing shard
                next(samples)


def test_archive_of_images_with_members_outside_its_folder(images, tmp_path):
    """The archive is read in place; nothing is extracted."""
    image, folder = next(images.rglob("*.png")).read_bytes(), tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    with tarfile.open(folder / "images.tar", "w") as archive:
        for name in ("x/1.png", "../../y/2.png", "/z/3.png", "y/../../../4.png"):
            info = tarfile.TarInfo(name)
            info.size = len(image)
            archive.addfile(info, io.BytesIO(image))
        for kind in (tarfile.FIFOTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo(f"x/{kind.decode()}.png")
            info.type = kind
            archive.addfile(info)
    before = snapshot(tmp_path)
    source = open_source(str(folder / "images.tar"), split="train")
    assert [source.image(i) for i in range(len(source))] == [image] * 4
    assert snapshot(tmp_path) == before


# --- names and links --------------------------------------------------------------------------------------------------

OUT = ["../../x", "..", "/tmp/x", "a/../../../x", "..\\x", "x\n/../../y"]


@pytest.mark.parametrize("name", OUT)
@pytest.mark.parametrize("flag", ["logging.addendum", "model.arch"])
def test_run_names_do_not_leave_their_folder(images, tmp_path, capsys, flag, name):
    flags = base_flags(images, tmp_path / "a" / "runs")
    flags[flag] = f"timm_{name}" if flag == "model.arch" and name.startswith(".") else name
    argv = [f"--{name}={value}" for name, value in flags.items()]
    folder = load_config(TrainConfig, argv).run_folder
    assert Path(os.path.normpath(folder)).parent == folder.parent == tmp_path / "a" / "runs"
    if flag == "model.arch":
        assert train.main(argv) == 2
        assert "model.arch: expected one of" in capsys.readouterr().err
        assert snapshot(tmp_path) <= {tmp_path / "a", tmp_path / "a" / "runs"}


def test_flags_that_are_part_of_run_names_have_no_free_values(images, tmp_path, capsys):
    for flag in ("adv.norm", "adv.attack", "data.augmentations"):
        refused(train.main, base_flags(images, tmp_path / "runs") | {flag: "../../x"}, capsys, flag)
    assert snapshot(tmp_path) == set()


def test_states_behind_links_are_read_and_never_written(tmp_path):
    """Also if the run folder itself is a link."""
    for name in ("other", "own"):
        (tmp_path / name).mkdir()
    save(tmp_path / "other", 1)
    (tmp_path / "own" / LAST).symlink_to(tmp_path / "other" / LAST)
    (tmp_path / "link").symlink_to("own")
    assert read_state(tmp_path / "link" / LAST)["step"] == 1
    save(tmp_path / "link", 2)
    assert read_state(tmp_path / "own" / LAST)["step"] == 2 and not (tmp_path / "own" / LAST).is_symlink()
    assert read_state(tmp_path / "other" / LAST)["step"] == 1


def save(folder: Path, step: int) -> None:
    files = StateFiles(folder)
    files.save({"step": step})
    files.wait()
    assert [outcome.error for outcome in files.outcomes()] == [None]


@pytest.mark.parametrize("name", ["data", "zoo", "utils_architecture"])
def test_modules_of_another_program_are_not_mistaken_for_the_projects(tmp_path, name):
    """They are not run either: torch.hub loads the project into any program."""
    (tmp_path / f"{name}.py").touch()
    code = f"import {name}, torch; torch.hub.load({str(PROJECT)!r}, 'robust', 'w.pt', source='local')"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: expected the module {name} of {PROJECT}"), result.stderr
    assert last.endswith(f"{tmp_path / name}.py.")


# --- the source -------------------------------------------------------------------------------------------------------

# Functions that run their input, or write to paths in it.
FORBIDDEN = {
    *("eval", "exec", "compile", "os.system", "os.popen", "pickle.load", "pickle.loads", "pickle.Unpickler"),
    *("yaml.unsafe_load", "yaml.full_load", "torch.jit.load", "torch.package.PackageImporter", "joblib.load"),
    *("torch.hub.load", "torch.hub.load_state_dict_from_url", "shutil.unpack_archive"),
}


def sources() -> list[Path]:
    folders = ("ablation", "attacks", "benchmarks", "common", "data", "evaluation", "training", "zoo")
    return [*PROJECT.glob("*.py"), *(path for folder in folders for path in (PROJECT / folder).rglob("*.py"))]


def dangers(text: str) -> list[str]:
    """Return the unsafe calls that read files, as line and name."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        unsafe = (
            name in FORBIDDEN
            or name == "torch.load"
            and given.get("weights_only") != "True"
            or name == "yaml.load"
            and [ast.unparse(loader) for loader in node.args[1:]] != ["_UniqueKeys"]
            or name.split(".")[-1] in ("extract", "extractall")
            or given.get("shell", "False") != "False"
            or given.get("allow_pickle", "False") != "False"
            or "trust_remote_code" in given
        )
        if unsafe:
            found.append(f"{node.lineno}: {name}")
    return found


def test_no_reader_runs_its_input():
    assert {str(path): found for path in sources() if (found := dangers(path.read_text()))} == {}
    assert len(sources()) > 50 and issubclass(common.flags._UniqueKeys, yaml.SafeLoader)


@pytest.mark.parametrize(
    "call",
    [
        *("eval(x)", "torch.load(x)", "torch.load(x, weights_only=False)", "torch.load(x, weights_only=flag)"),
        *("yaml.load(x, yaml.Loader)", "tar.extractall(x)", "np.load(x, allow_pickle=True)", "run(x, shell=True)"),
        *("load_dataset(x, trust_remote_code=True)", "pickle.loads(x)"),
    ],
)
def test_unsafe_calls_are_found(call):
    assert len(dangers(f"y = {call}")) == 1
