"""From a name to weights: files, run folders, published models from a share on this machine, and what is none of them."""

from __future__ import annotations

import dataclasses
import http.server
import io
import json
import subprocess
import sys
import threading
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

import runner_aa_eval
import train
import zoo.names
from common.errors import UserError
from common.provenance import PROJECT
from tests.evaluation.helpers import shorten_evaluations
from tests.training.helpers import base_flags, run
from utils_architecture import get_new_model, normalize_model
from zoo.__main__ import main
from zoo.description import NetworkDescription, Preprocessing
from zoo.download import download
from zoo.loading import has_normalizer
from zoo.names import _kind, _share_name, choose, locate, split_kind
from zoo.published import PUBLISHED, Accuracies, Published
from zoo.robust import load_robust_model

NAME = "convnext_micro_cvst"


def weights_file(arch="convnext_micro", seed=0, *, prefix="", normalized=False):
    """A file's bytes: random weights of a network with ConvStem and four classes."""
    torch.manual_seed(seed)
    network = get_new_model(arch, not_original=True, num_classes=4)
    model = normalize_model(network) if normalized else network
    stream = io.BytesIO()
    torch.save({prefix + name: value for name, value in model.state_dict().items()}, stream)
    return stream.getvalue()


@pytest.fixture(scope="module")
def files():
    """A share that holds two published models, as the real one does."""
    return {
        "micro/convnext_robust.pt": weights_file(prefix="module."),
        "micro/vit_robust.pt": weights_file("vit_micro"),
        "micro/convnext_clean_init.pt": weights_file(seed=1),
        "micro/log.txt": b"robust accuracy: 25.0%",
    }


@pytest.fixture
def published(files, monkeypatch, tmp_path):
    """A published model whose share is served here, with downloads in a folder of the test."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests.append(self.path)
            known = self.path == "/s/token/download"
            body = stream.getvalue() if known else b"<html>gone</html>"
            self.send_response(200 if known else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    root = f"http://127.0.0.1:{server.server_port}/s/"
    model = Published(
        name=NAME,
        title="ConvNeXt-micro-CvSt",
        family="ConvNeXt",
        arch="convnext_micro",
        not_original=True,
        epochs=1,
        results={32: Accuracies(50.0, 25.0)},
        links=(root + "moved", root + "token"),
        params=0.45,
        gflops=0.1,
    )
    entries = {NAME: model}
    monkeypatch.setattr(zoo.names, "find_published", entries.get)
    monkeypatch.setattr("zoo.published.find_published", entries.get)
    monkeypatch.setattr(zoo.names, "CHECKPOINTS", tmp_path / "checkpoints")
    yield server, model
    server.shutdown()


def same(path, content):
    return path.read_bytes() == content


def test_published_weights_are_those_of_the_model(published, files, tmp_path):
    """Of a share with several models, by what the files hold; the first link has moved."""
    server, model = published
    folder = tmp_path / "somewhere"
    robust, clean = (locate(NAME, kind=kind, folder=folder) for kind in ("robust", "clean"))
    assert same(robust.path, files["micro/convnext_robust.pt"]) and same(
        clean.path, files["micro/convnext_clean_init.pt"]
    )
    assert robust.published is model and robust.path.is_relative_to(folder / NAME)
    assert robust.describe(NetworkDescription(num_classes=4)).arch == "convnext_micro"
    assert server.requests.count("/s/token/download") == 1  # once for both


def test_a_share_without_the_model(published, tmp_path, monkeypatch):
    _, model = published
    lacking = dataclasses.replace(model, arch="convnext_tiny", links=model.links[1:])
    monkeypatch.setattr(zoo.names, "find_published", {NAME: lacking}.get)
    with pytest.raises(UserError, match="^http.*no file of the share matches: .*vit_robust.pt.*Give the path of one"):
        locate(NAME, folder=tmp_path / "somewhere")


def test_a_moved_share_says_what_to_try(published, tmp_path, monkeypatch):
    _, model = published
    gone = dataclasses.replace(model, links=model.links[:1])
    monkeypatch.setattr(zoo.names, "find_published", {NAME: gone}.get)
    with pytest.raises(UserError, match="does not exist .status 404.*Try .*path of a local file"):
        locate(NAME, folder=tmp_path / "somewhere")


def test_robustbenchs_copy_where_the_share_cannot_be_had(published, files, tmp_path, monkeypatch, capsys):
    _, model = published
    gone = dataclasses.replace(model, links=model.links[:1], robustbench_id="Some2023Model")
    monkeypatch.setattr(zoo.names, "find_published", {NAME: gone}.get)

    def download_copy(link, folder, *, name, **options):
        if not link.startswith("robustbench:"):
            return download(link, folder, name=name, **options)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.pt").write_bytes(files["micro/convnext_robust.pt"])
        return [folder / f"{name}.pt"]

    monkeypatch.setattr(zoo.names, "download", download_copy)
    found = locate(NAME, folder=tmp_path / "somewhere")
    assert found.path.name == "Some2023Model.pt" and "Some2023Model" in capsys.readouterr().err


def test_evaluation_by_name_compares_with_the_published_number(published, images, tmp_path, capsys, monkeypatch):
    shorten_evaluations(monkeypatch)
    flags = [f"--data.val_dataset={images}", "--eval.img_size=32", "--eval.crop_pct=1", "--eval.workers=1"]
    assert runner_aa_eval.main([NAME, *flags, f"--eval.out={tmp_path / 'out'}"]) == 0
    assert (
        f"{NAME}: not compared with the published number (25.0 %), because of other images than"
        in capsys.readouterr().out
    )
    (report,) = (json.loads(file.read_text()) for file in tmp_path.rglob("report.json"))
    assert "difference" not in report["published"] and report["published"]["autoattack"] == 25.0
    assert report["transform"] == {"resize": "bicubic", "crop_pct": 1.0, "from": "the flags"}
    assert report["network"]["name"] == NAME


def test_training_starts_from_a_published_clean_model(published, images, tmp_path):
    server, _ = published
    flags = base_flags(images, tmp_path / "runs") | {"model.not_original": 1, "training.eval_only": 1}
    argv = [f"--{name}={value}" for name, value in (flags | {"model.ckpt_path": NAME}).items()]
    assert train.main(["--check", *argv]) == 0
    assert server.requests == []  # a check downloads nothing
    by_name = run(flags | {"model.ckpt_path": NAME})
    (clean,) = (tmp_path / "checkpoints").rglob("convnext_clean_init.pt")
    by_path, robust = (run(flags | {"model.ckpt_path": path}) for path in (clean, f"{NAME}:robust"))
    assert by_path.log[0]["loss"] == by_name.log[0]["loss"] != robust.log[0]["loss"]


def test_ready_model(published, tmp_path):
    model = load_robust_model(NAME, img_size=32, folder=tmp_path / "somewhere")
    with torch.no_grad():
        assert model(torch.rand(2, 3, 32, 32)).shape == (2, 4)


def test_exports_are_for_the_images_of_the_publication(published, tmp_path, monkeypatch):
    _, model = published
    images = Preprocessing(64, 0.9, "bilinear", "squash", "its paper")
    monkeypatch.setattr(zoo.names, "find_published", {NAME: dataclasses.replace(model, preprocessing=images)}.get)
    assert main(["export", NAME, "--to", str(tmp_path / "out")]) == 0
    cfg = json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]
    assert (cfg["input_size"], cfg["crop_pct"]) == ([3, 64, 64], 0.9)
    assert (cfg["interpolation"], cfg["crop_mode"]) == ("bilinear", "squash")


def test_a_downloads_folder_does_not_hide_its_name(published, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["download", NAME, "--to", "."]) == 0
    assert same(locate(NAME, folder=tmp_path).path, files["micro/convnext_robust.pt"])


def test_robustbenchs_copy_is_used_again_without_asking_the_share(published, tmp_path, monkeypatch):
    server, model = published
    monkeypatch.setattr(zoo.names, "find_published", {NAME: dataclasses.replace(model, robustbench_id="A2023B")}.get)
    monkeypatch.setattr(zoo.names, "download", lambda link, folder, name: [folder / f"{name}.pt"])
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "A2023B.pt").touch()
    assert locate(NAME, folder=tmp_path).path.name == "A2023B.pt" and server.requests == []


def test_models_of_one_share_have_one_folder():
    names = {_share_name(PUBLISHED[name]) for name in ("vit_s", "convnext_tiny", "vit_b", "convnext_base")}
    assert len(names) == 1 and _share_name(PUBLISHED["vit_s_cvst"]) == "vit_s_cvst"


def test_download_from_the_command_line(published, files, tmp_path, capsys):
    assert main(["download", NAME, "--to", str(tmp_path / "here"), "--clean"]) == 0
    assert same(next((tmp_path / "here").rglob("convnext_clean_init.pt")), files["micro/convnext_clean_init.pt"])
    assert main(["verify", capsys.readouterr().out.strip().splitlines()[-1]]) == 0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere.pt", "expected a weights file"),
        ("runs/nowhere", "expected a weights file"),
        ("é" * 300, "neither a file or run folder"),
        ("convnext_base_cvts", "did you mean convnext_base_cvst?"),
        ("Nobody2099Nothing", "RobustBench has no ImageNet model"),
    ],
)
def test_unknown_names(name, words, tmp_path):
    with pytest.raises(UserError, match=f"{words.replace('?', '[?]')}"):
        locate(name, folder=tmp_path)


def test_kinds():
    assert split_kind("vit_s") == ("vit_s", "clean") == split_kind("vit_s:clean")
    assert split_kind("vit_s:robust") == ("vit_s", "robust")
    assert split_kind("a:b.pt") == ("a:b.pt", "clean")


def test_a_normaliser_outside_is_asked_for_not_guessed(tmp_path):
    (tmp_path / "w.pt").write_bytes(weights_file())
    with pytest.warns(
        UserWarning, match="w.pt contains no input normaliser, so the network gets images without normalisation"
    ):
        bare = load_robust_model(str(tmp_path / "w.pt"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        normalized = load_robust_model(str(tmp_path / "w.pt"), add_normalization=True)
        assert not has_normalizer(load_robust_model(str(tmp_path / "w.pt"), add_normalization=False))
    assert has_normalizer(normalized) and not has_normalizer(bare)


def test_torch_hub_from_another_folder(tmp_path):
    """`source="local"` needs nothing of the project on the path."""
    (tmp_path / "w.pt").write_bytes(weights_file())
    code = f"""
import torch
model = torch.hub.load({str(PROJECT)!r}, "robust", "w.pt", source="local", img_size=32, crop_pct=1)
print(*model(torch.zeros(2, 3, 32, 32)).shape)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.stdout.split() == ["2", "4"], result.stderr


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ConvNeXt_T_CvSt_robust.pt", "robust"),
        ("clean_init.pt", "clean"),
        ("ViT-S-PreTrained.pth", "clean"),
        ("standard.pth.tar", "clean"),
        ("init_model.safetensors", "clean"),
        ("adv_trained.ckpt", "robust"),
        ("weights_ema_300.pt", "robust"),
        ("convnext_linf4.pt", "robust"),
        ("full_model.pt", "robust"),
        ("clean_ema_300.pt", "clean"),
        ("definite.pt", None),
        ("schema.pt", None),
        ("vit_3000.pt", None),
        ("clean_to_robust.pt", None),
    ],
)
def test_names_tell_files_apart(name, kind):
    assert _kind(name) == kind


def paths(*names):
    return [Path(name) for name in names]


def test_choose_one_of_several_models():
    files = paths("vit_s_robust.pt", "vit_b_robust.pt", "vit_s_clean.pt", "vit_b_clean.pt", "robust_log.txt")
    assert choose(files, "robust", lambda path: "vit_b" in path.name) == files[1]
    assert choose(files, "clean", lambda path: "vit_s" in path.name) == files[2]
    with pytest.raises(UserError, match="robust weights.*several files match: vit_s_robust.pt, vit_b_robust.pt[.]"):
        choose(files, "robust")
    with pytest.raises(UserError, match="no file of the share matches: .*vit_b_robust.pt.*vit_s_clean.pt"):
        choose(files, "robust", lambda path: False)


def test_choose_among_names_that_say_nothing():
    files = paths("vit_s.pt", "vit_b.pt", "README.md")
    assert choose(files, "robust", lambda path: "vit_b" in path.name) == files[1]
    assert choose(paths("net.pt", "clean.pt", "a.txt"), "robust") == Path("net.pt")
    assert choose(paths("net.pt", "robust.pt"), "robust") == Path("robust.pt")
    with pytest.raises(UserError, match="several files"):
        choose(files, "robust")
    with pytest.raises(UserError, match="clean weights"):
        choose(files, "clean", lambda path: "vit_b" in path.name)
    with pytest.raises(UserError, match="no weights at all"):
        choose([], "robust")
