"""Networks for use elsewhere: exported, loaded by timm and by ourselves, described for RobustBench."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace

import pytest
import safetensors.torch
import timm
import torch

from common.errors import UserError
from utils_architecture import get_new_model, normalize_model
from zoo.__main__ import main
from zoo.description import NetworkDescription, Preprocessing
from zoo.export import CARD, CONFIG, export, push
from zoo.robust import load_robust_model
from zoo.runs import EXPORTED, load_trained
from zoo.submission import check_report, form_text, model_info

ASKED = NetworkDescription()


def saved(folder, arch="convnext_tiny", *, num_classes=5, normalized=True, **options):
    """Random weights of a small head, saved, and loaded as a trained network."""
    torch.manual_seed(0)
    network = get_new_model(arch, num_classes=num_classes, **options)
    model = normalize_model(network) if normalized else network
    torch.save(model.state_dict(), folder / "weights.pt")
    return load_trained(folder / "weights.pt", NetworkDescription(arch=arch, num_classes=num_classes, **options))


@pytest.fixture
def hub(monkeypatch):
    """Makes timm find the files of a folder under hf-hub:me/model."""

    def serve(folder):
        monkeypatch.setattr(
            "timm.models._hub.hf_hub_download", lambda repo_id, filename, **_: str(folder / filename), raising=False
        )
        # timm 1.0.9 takes newer versions of huggingface_hub for none.
        monkeypatch.setattr("timm.models._hub._has_hf_hub", True)

    return serve


@pytest.mark.parametrize("normalized", [True, False])
def test_timm_loads_its_own_architectures(tmp_path, hub, normalized):
    trained = replace(saved(tmp_path, normalized=normalized), class_names=list("edcba"))
    export(trained, tmp_path / "out", img_size=64)
    hub(tmp_path / "out")
    theirs = timm.create_model("hf-hub:me/model", pretrained=True).eval()
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(theirs.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        assert torch.allclose(theirs((x - mean) / std), trained.model(x), atol=1e-5)
    assert theirs.pretrained_cfg["input_size"] == [3, 64, 64] and theirs.num_classes == 5
    assert theirs.pretrained_cfg["label_names"] == list("edcba")


@pytest.mark.parametrize(
    ("arch", "options"),
    [("convnext_micro", {"not_original": True}), ("vit_micro", {"not_original": True}), ("convnext_micro", {})],
)
def test_our_loader_loads_every_export(tmp_path, arch, options):
    trained = saved(tmp_path, arch, **options)
    export(trained, tmp_path / "out", img_size=32, crop_pct=1.0, card="| results |")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted([EXPORTED, CONFIG, CARD])
    assert "| results |" in (tmp_path / "out" / CARD).read_text()
    again = load_robust_model(str(tmp_path / "out"), img_size=32, crop_pct=1.0)
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again(x), trained.model(x))
    assert not again.training


def test_transform_goes_with_the_model(tmp_path, images):
    from PIL import Image

    saved(tmp_path, "convnext_micro")
    export(load_trained(tmp_path / "weights.pt", ASKED), tmp_path / "out")
    model = load_robust_model(str(tmp_path / "out"), img_size=32)
    x = model.transform(Image.open(next((images / "val").rglob("*.png"))))
    assert x.shape == (3, 32, 32) and 0 <= x.min() and x.max() <= 1


def test_another_normaliser_is_kept(tmp_path):
    trained = saved(tmp_path, "convnext_micro")
    trained.model.normalize.mean.fill_(0.25)
    export(trained, tmp_path / "out")
    again = load_trained(tmp_path / "out", NetworkDescription())
    assert again.model.normalize.mean.flatten().tolist() == [0.25] * 3 and again.notes == ()
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again.model(x), trained.model(x))


@pytest.mark.parametrize("old", [False, True])
def test_folder_as_timm_writes_it(tmp_path, old):
    """Normaliser, architecture and images are those of its config.json."""
    network = timm.create_model("resnet18", num_classes=5).eval()
    cfg = {"input_size": [3, 64, 64], "interpolation": "bilinear", "crop_pct": 0.9, "crop_mode": "squash"}
    cfg |= {"mean": [0.5] * 3, "std": [0.25] * 3}
    content = {"architecture": "resnet18", "num_classes": 5}
    (tmp_path / CONFIG).write_text(json.dumps(content | cfg if old else content | {"pretrained_cfg": cfg}))
    if old:
        torch.save(network.state_dict(), tmp_path / "pytorch_model.bin")
    else:
        safetensors.torch.save_file(network.state_dict(), tmp_path / EXPORTED)
    trained = load_trained(tmp_path, NetworkDescription())
    assert trained.description["arch"] == "timm_resnet18" and trained.description["add_normalization"]
    assert trained.preprocessing == Preprocessing(64, 0.9, "bilinear", "squash", "config.json next to the weights")
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(trained.model(x), network((x - 0.5) / 0.25), atol=1e-5)
    assert not load_trained(tmp_path, NetworkDescription(add_normalization=False)).description["add_normalization"]
    assert trained.class_names is None and not trained.sure_of_input


def test_what_a_configuration_asks_for_in_vain(tmp_path):
    network = timm.create_model("resnet18", num_classes=2)
    safetensors.torch.save_file(network.state_dict(), tmp_path / EXPORTED)
    cfg = {"input_size": [3, 64, 64], "interpolation": "lanczos", "crop_mode": "border"}
    cfg |= {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}  # of images in [0, 255]
    content = {"architecture": "resnet18", "num_classes": 2, "pretrained_cfg": cfg, "label_names": ["crane", "crane"]}
    (tmp_path / CONFIG).write_text(json.dumps(content))
    trained = load_trained(tmp_path, NetworkDescription())
    assert trained.preprocessing.source.endswith("instead of its 'lanczos' and 'border'")
    assert torch.allclose(trained.model.normalize.mean.flatten(), torch.tensor([0.485, 0.456, 0.406]))
    assert trained.class_names == ["crane (0)", "crane (1)"]


def test_names_of_classes_as_timm_writes_them(tmp_path):
    """Their order is that of the outputs, not that of sorted folders."""
    network = timm.create_model("resnet18", num_classes=3)
    safetensors.torch.save_file(network.state_dict(), tmp_path / EXPORTED)
    content = {"architecture": "resnet18", "num_classes": 3, "pretrained_cfg": {"input_size": [3, 64, 64]}}
    for key in ("label_names", "labels"):
        (tmp_path / CONFIG).write_text(json.dumps(content | {key: ["pear", "apple", "fig"]}))
        assert load_trained(tmp_path, NetworkDescription()).class_names == ["pear", "apple", "fig"]
    (tmp_path / CONFIG).write_text(json.dumps(content | {"label_names": ["pear", "apple"]}))
    with pytest.raises(UserError, match="a name for each of its 3 classes, but label_names has 2"):
        load_trained(tmp_path, NetworkDescription())


def test_upload(tmp_path, monkeypatch):
    calls = []

    class HfApi:
        def create_repo(self, repository, exist_ok):
            calls.append(("create", repository))
            return f"https://hub/{repository}"

        def upload_folder(self, *, repo_id, folder_path, allow_patterns):
            calls.append(("upload", repo_id, folder_path, sorted(allow_patterns)))

    monkeypatch.setattr("huggingface_hub.HfApi", HfApi)
    assert push(tmp_path, "me/model") == "https://hub/me/model"
    assert calls == [("create", "me/model"), ("upload", "me/model", tmp_path, sorted([EXPORTED, CONFIG, CARD]))]


def test_command_line(tmp_path, capsys):
    saved(tmp_path, "convnext_micro")
    assert main(["export", str(tmp_path / "weights.pt"), "--to", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["num_classes"] == 5
    assert main(["export", "nowhere", "--to", str(tmp_path / "other")]) == 2
    assert "neither a file or run folder" in capsys.readouterr().err and not (tmp_path / "other").exists()
    assert main(["verify", str(tmp_path / "weights.pt")]) == 0
    assert "convnext_micro" in capsys.readouterr().out
    assert main(["list"]) == 0 and "Singh2023Revisiting_ViT-S-ConvStem" in capsys.readouterr().out
    assert main(["show", "ViT-S-CvSt"]) == 0 and "48.1" in capsys.readouterr().out
    assert main(["show", "vit_s_cvts"]) == 2 and "did you mean vit_s_cvst?" in capsys.readouterr().err


REPORT = {
    "network": {"sha256": "ab" * 32, "arch": "convnext_base"},
    "norm": "Linf",
    "eps": 4 / 255,
    "seed": 0,
    "attacks": ["apgd-ce", "apgd-t", "fab-t", "square"],
    "engine": "pyautoattack 0.2.0",
    "n": 5000,
    "check": {"outside_ball": [], "not_misclassified": [17]},
    "clean_acc": 0.759,
    "robust_acc": 0.5614,
}


def test_submission():
    """The entry of the published ConvNeXt-B with ConvStem, made from a report with its numbers."""
    paper = Namespace(
        title="Revisiting …",
        link="https://arxiv.org/abs/2303.01870",
        authors="Naman D Singh, …",
        venue="NeurIPS 2023",
        checkpoint="",
        additional_data=False,
        architecture="ConvNeXt-B + ConvStem",
    )
    assert model_info(REPORT, paper) == {
        "link": "https://arxiv.org/abs/2303.01870",
        "name": "Revisiting …",
        "authors": "Naman D Singh, …",
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": "imagenet",
        "venue": "NeurIPS 2023",
        "architecture": "ConvNeXt-B + ConvStem",
        "eps": "4/255",
        "clean_acc": "75.90",
        "reported": "56.14",
        "autoattack_acc": "56.14",
        "unreliable": False,
    }
    text = form_text(REPORT, paper)
    assert "- **Robust accuracy**: 56.14%" in text and "- **Additional data**: false" in text and "ab" * 32 in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attacks": ["apgd-ce"]}, "all four attacks"),
        ({"attacks": None}, "all four attacks"),
        ({"norm": "L2", "eps": 2.0}, "Linf with radius 4/255, not L2 2"),
        ({"eps": 8 / 255}, "Linf with radius 4/255"),
        ({"check": {"outside_ball": [3]}}, "pass the final check"),
        ({"n": 100}, "5,000 images, not 100"),
    ],
)
def test_reports_that_robustbench_would_not_take(change, words, tmp_path, capsys):
    with pytest.raises(UserError, match=words):
        check_report(REPORT | change, "report.json")
    (tmp_path / "report.json").write_text(json.dumps(REPORT | change))
    assert main(["submit", str(tmp_path / "report.json")]) == 2
    (tmp_path / "report.json").write_text("[1]")
    assert main(["submit", str(tmp_path / "report.json")]) == 2
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    assert main(["submit", str(tmp_path / "report.json"), "--title=T"]) == 0
    out = capsys.readouterr().out
    assert all(
        words in out for words in ('"name": "T"', '"venue": "(to be filled in)"', '"architecture": "convnext_base"')
    )
