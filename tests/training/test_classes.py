"""Which number a class has in training, if folder names are numbers and weights come with a head."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import train
import training.build
from common.errors import UserError
from common.flags import load_config
from data.imagenet_ids import imagenet_classes
from data.source import Source
from evaluation.config import EvalDataConfig
from evaluation.images import open_images
from tests.data import write_folder
from tests.training.helpers import base_flags, run
from training.build import head_notes, input_note, open_sources, source_problems
from training.config import TrainConfig
from utils_architecture import get_new_model
from zoo.loading import read_weights

NUMBERS = [str(i) for i in range(12)]


def arguments(folder: Path, **flags: object) -> list[str]:
    flags = base_flags(folder, folder.parent / "runs") | {"model.num_classes": 12} | flags
    return [f"--{name}={value}" for name, value in flags.items()]


def config(folder: Path, **flags: object) -> TrainConfig:
    return load_config(TrainConfig, arguments(folder, **flags))


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    """Folders 0 to 11, sorted as names 0, 1, 10, 11, 2 …; for validation some of them."""
    write_folder(tmp_path / "set" / "train", dict.fromkeys(NUMBERS, 1))
    write_folder(tmp_path / "set" / "val", dict.fromkeys(["2", "10"], 1))
    return tmp_path / "set"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Weights of twelve classes, whose run says nothing of these."""
    torch.save(get_new_model("convnext_micro", num_classes=12).state_dict(), path := tmp_path / "weights.pt")
    return path


def record(path: Path, names: list[str]) -> None:
    (path.parent / "params.json").write_text(json.dumps({"provenance": {"classes": names}}))


@pytest.mark.parametrize(
    ("name", "content", "normalized", "said"),
    [
        ("params.json", {"model": {"add_normalization": False}}, 1, "images were not normalised"),
        ("params.json", {"model": {"add_normalization": False}}, 0, None),
        ("params.json", {"model": {"add_normalization": True}}, 0, "give --model.add_normalization=1"),
        ("config.json", {"mean": [0.0] * 3, "std": [1.0] * 3}, 1, "give --model.add_normalization=0"),
        ("config.json", {"mean": [0.5] * 3, "std": [0.5] * 3}, 1, "normalised with mean [0.5, 0.5, 0.5]"),
        ("config.json", {"input_size": [3, 32, 32]}, 1, None),
        ("other", {}, 1, None),
    ],
)
def test_images_that_the_weights_were_not_trained_on(tmp_path, name, content, normalized, said):
    path = tmp_path / "pytorch_model.bin"
    torch.save(get_new_model("convnext_micro", num_classes=12).state_dict(), path)
    (tmp_path / name).write_text(json.dumps(content))
    found = input_note(path, read_weights(path), str(path), normalized=bool(normalized))
    assert (said is None and found == []) or said in found[0]


def test_a_published_model_of_images_that_are_not_normalised(weights):
    (note,) = input_note(weights, read_weights(weights), "convnext_tiny_cvst", normalized=True)
    assert "the table of published models" in note and "--model.add_normalization=0" in note
    assert input_note(weights, read_weights(weights), "convnext_tiny_cvst", normalized=False) == []


@pytest.mark.parametrize("base", [0, 1])
@pytest.mark.parametrize("in_memory", [0, 1])
def test_folder_k_is_class_k(tmp_path, base, in_memory):
    names = [str(i + base) for i in range(12)]
    folder = write_folder(tmp_path / "set" / "train", dict.fromkeys(names, 1)).parent
    write_folder(folder / "val", dict.fromkeys(names[9:], 1))
    sources = open_sources(config(folder, **{"data.classes": "index", "data.in_memory": in_memory}))
    for source in sources:
        assert source.class_names == names and source.num_classes == 12
        assert all(source.key(i).split("/")[0] == names[label] for i, label in enumerate(source.labels))
    assert sorted(sources[1].labels.tolist()) == [9, 10, 11]


@pytest.mark.parametrize("names", [["0", "1", "3"], ["ant", "bee"], ["2", "3"]])
def test_index_needs_all_numbers(tmp_path, names):
    write_folder(tmp_path / "set", dict.fromkeys(names, 1))
    with pytest.raises(UserError, match="^data.classes: expected class folders (from|named by)"):
        open_sources(config(tmp_path / "set", **{"data.classes": "index"}))


def test_evaluation_matches_the_names_of_such_a_run(numbered, capsys):
    flags = base_flags(numbered, numbered.parent / "runs") | {"model.num_classes": 12}
    by_name, by_index = (run(flags | {"data.classes": value}) for value in ("name", "index"))
    assert by_name.folder != by_index.folder and run(flags).folder == by_name.folder
    assert by_index.params["provenance"]["classes"] == NUMBERS
    assert by_name.params["provenance"]["classes"] == sorted(NUMBERS)
    for asked in ("name", "index"):
        data = EvalDataConfig(val_dataset=str(numbered), classes=asked)
        for names in (NUMBERS, sorted(NUMBERS)):
            found = open_images(data, ids="auto", n_ex=0, num_classes=12, class_names=names)
            assert all(names[label] == key.split("/")[0] for key, label in zip(found.keys, found.labels))
    # The weights of one are no start for the other, but for its own.
    for begun, other in ((by_name, "index"), (by_index, "name")):
        own = "name" if other == "index" else "index"
        more = {"model.ckpt_path": begun.folder, "training.eval_only": 1}
        assert run(flags | more | {"data.classes": own}).status == 0
        assert run(flags | more | {"data.classes": other}).status == 2
        assert f"give --data.classes={own}" in capsys.readouterr().err


def test_classes_of_a_validation_alone_are_what_it_validates(numbered):
    names = {config(numbered, **{"training.eval_only": 1, "data.classes": c}).run_name for c in ("name", "index")}
    assert len(names) == 2


@pytest.mark.parametrize("kind", ["file", "run folder", "pretrained"])
@pytest.mark.parametrize("eval_only", [0, 1])
def test_numbers_for_a_head_that_is_kept(numbered, weights, tmp_path, capsys, monkeypatch, kind, eval_only):
    start = {"model.ckpt_path": weights, "training.eval_only": eval_only}
    if kind == "run folder":
        record(weights, [f"n{i:08d}" for i in range(12)])
    elif kind == "pretrained":
        monkeypatch.setattr("training.build.CLASSES", 12)
        monkeypatch.setattr("training.build.imagenet_classes", lambda: [f"n{i:08d}" for i in range(12)])
        start |= {"model.arch": "timm_resnet10t", "model.ckpt_path": "", "model.pretrained": 1}
    new = "--model.pretrained=0" if kind == "pretrained" else "--model.new_head=1"
    for check in (["--check"],) if kind == "pretrained" else ([], ["--check"]):  # else it would be downloaded
        assert train.main([*check, *arguments(numbered, **start)]) == 2
        said = capsys.readouterr().err
        assert "data.train_dataset: expected its classes in the order of the head" in said
        assert "numbers, sorted as names (0, 1, 10, 11, 2, " in said and "give --data.classes=index if" in said
        assert (new in said) != bool(eval_only)
    ways_out = [{"data.classes": "index"}]
    if not eval_only:
        ways_out.append({"model.pretrained": 0} if kind == "pretrained" else {"model.new_head": 1})
    for way_out in ways_out:
        asked = config(numbered, **start | way_out)
        assert head_notes(asked, open_sources(asked)[0]) == []


def test_a_run_that_started_this_way_resumes(numbered, weights, capsys):
    """Earlier versions let it begin; its names are recorded."""
    flags = base_flags(numbered, numbered.parent / "runs") | {"model.num_classes": 12, "training.resume": "auto"}
    flags |= {"model.ckpt_path": weights}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.build.head_notes", lambda *_: [])
        begun = run(flags)
    status = json.loads((begun.folder / "status.json").read_text())
    (begun.folder / "status.json").write_text(json.dumps(status | {"status": "stopped"}))
    argv = [f"--{name}={value}" for name, value in flags.items()]
    assert train.main(["--check", *argv]) == train.main(argv) == 0


def named(names: list[str]) -> Source:
    return Source(range(len(names)), names)


ANIMALS = [f"animal {i}" for i in range(12)]


@pytest.mark.parametrize(
    ("recorded", "names", "said"),
    [
        (ANIMALS, ANIMALS, None),
        (None, ANIMALS, None),
        (ANIMALS[:7], ANIMALS, None),  # refused elsewhere, by the shapes
        (NUMBERS, NUMBERS, None),
        (sorted(NUMBERS), sorted(NUMBERS), None),
        (ANIMALS, [*ANIMALS[:11], "zebra"], "'zebra' in the place of 'animal 11'; .* give --model.new_head=1"),
        (NUMBERS, [f"{i:02d}" for i in range(12)], "'00' in the place of '0'"),
    ],
)
def test_names_that_the_weights_were_trained_with(numbered, weights, recorded, names, said):
    if recorded is not None:
        record(weights, recorded)
    flags = {"model.ckpt_path": weights}
    notes = head_notes(config(numbered, **flags), named(names))
    assert len(notes) == (said is not None)
    if said is not None:
        assert re.search(said, notes[0])
        assert "is meaningless" in head_notes(config(numbered, **flags, **{"training.eval_only": 1}), named(names))[0]
        for more in ({"data.classes": "index"}, {"model.new_head": 1}):
            assert head_notes(config(numbered, **flags, **more), named(names)) == []


def test_the_same_classes_in_another_order(numbered, weights):
    record(weights, ANIMALS)
    with pytest.raises(UserError, match="got 'animal 11' in the place of 'animal 0'; give --model.new_head=1.$"):
        head_notes(config(numbered, **{"model.ckpt_path": weights}), named(ANIMALS[::-1]))


def test_a_warning_is_among_the_runs_notes(images, tmp_path, capsys):
    flags = base_flags(images, tmp_path / "runs")
    begun = run(flags)
    params = json.loads((begun.folder / "params.json").read_text())
    params["provenance"]["classes"][3] = "rosso"
    (begun.folder / "params.json").write_text(json.dumps(params))
    tuned = run(flags | {"model.ckpt_path": begun.folder})
    assert "warning: model.ckpt_path: the head is kept, but data.train_dataset has 'red' in" in capsys.readouterr().err
    assert any("'red' in the place of 'rosso'" in note for note in tuned.params["provenance"]["notes"])


def test_imagenets_classes_are_those_of_a_head_for_as_many(numbered):
    asked = config(numbered, **{"model.num_classes": 1000, "model.pretrained": 1, "model.arch": "convnext_tiny"})
    wnids, source = imagenet_classes(), named(imagenet_classes())
    source.of_folders = True
    assert head_notes(asked, source) == []
    source.class_names = ["abacus", *wnids[1:]]
    (note,) = head_notes(asked, source)
    assert "'abacus' in the place of 'n01440764'" in note and "--model.pretrained=0" in note
    source.of_folders = False  # as of torch/ImageNet, which has its classes in the same order under other names
    assert head_notes(asked, source) == []


def test_a_part_of_the_classes_takes_a_new_head(numbered, weights):
    flags = {"model.num_classes": 20, "model.ckpt_path": weights}
    (problem,) = source_problems(config(numbered, **flags), named(ANIMALS), named(ANIMALS))
    assert (
        "give --model.num_classes=12, and --model.new_head=1 if the weights of model.ckpt_path have another number"
        in problem
    )
    (problem,) = source_problems(config(numbered, **{"model.num_classes": 20}), named(ANIMALS), named(ANIMALS))
    assert problem.endswith("give --model.num_classes=12.")


def test_validation_images_for_classes_without_names(numbered, monkeypatch):
    opened = training.build.open_source

    def nameless(spec: str, *, split: str, **options: object) -> Source:
        return Source(range(12), None) if split == "train" else opened(spec, split="train", **options)

    monkeypatch.setattr(training.build, "open_source", nameless)
    asked = config(numbered)
    (problem,) = source_problems(asked, *open_sources(asked))
    assert "data.val_dataset: " in problem and "give --data.classes=index" in problem
    asked = config(numbered, **{"data.classes": "index"})
    train, val = open_sources(asked)
    assert source_problems(asked, train, val) == [] and val.class_names == NUMBERS
