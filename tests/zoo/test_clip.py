"""Zero-shot classifiers of open_clip against its own way to classify, with small towers of random weights."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from common.errors import UserError
from zoo.__main__ import main
from zoo.clip import import_open_clip, write_zero_shot
from zoo.description import NetworkDescription
from zoo.names import locate
from zoo.published import KNOWN
from zoo.runs import load_trained

TEMPLATES = [lambda name: f"a photo of a {name}.", lambda name: f"art of the {name}."]
CONFIG = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture
def open_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The package, with a model `Tiny` whose weights are the same whenever it is made, five classes and two templates."""
    package = pytest.importorskip("open_clip", reason="needs the optional package open_clip_torch")
    (tmp_path / "Tiny.json").write_text(json.dumps(CONFIG))
    package.add_model_config(tmp_path / "Tiny.json")
    create = package.create_model_and_transforms

    def seeded(*arguments, **options):
        torch.manual_seed(0)
        return create(*arguments, **options)

    monkeypatch.setattr(package, "create_model_and_transforms", seeded)
    monkeypatch.setattr(
        package, "IMAGENET_CLASSNAMES", ["tench", "goldfish", "great white shark", "tiger shark", "hen"]
    )
    monkeypatch.setattr(package, "OPENAI_IMAGENET_TEMPLATES", TEMPLATES)
    return package


def logits_of_open_clip(open_clip, model, x: torch.Tensor) -> torch.Tensor:
    """As its README classifies."""
    tokenizer, embeddings = open_clip.get_tokenizer("Tiny"), []
    for name in open_clip.IMAGENET_CLASSNAMES:
        texts = F.normalize(model.encode_text(tokenizer([template(name) for template in TEMPLATES])), dim=-1)
        embeddings.append(F.normalize(texts.mean(0), dim=-1))
    mean, std = (
        torch.tensor(three).view(1, 3, 1, 1) for three in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    images = F.normalize(model.encode_image((x - mean) / std), dim=-1)
    return model.logit_scale.exp() * images @ torch.stack(embeddings).T


def test_classifier_is_open_clips(open_clip, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["zero-shot", "Tiny", "--to", str(tmp_path / "tiny")]) == 0
    file = Path(capsys.readouterr().out.strip())
    trained = load_trained(file, NetworkDescription())
    model, _, _ = open_clip.create_model_and_transforms("Tiny")
    x = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        expected = logits_of_open_clip(open_clip, model.eval(), x)
        assert torch.allclose(trained.model(x), expected, atol=1e-4) and expected.std() > 0.1
    assert trained.description["arch"] == "open_clip_Tiny" and trained.description["num_classes"] == 5
    used = trained.preprocessing
    assert (used.img_size, used.crop_pct, used.interpolation, used.crop_mode) == (32, 1.0, "bicubic", "center")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_trained(file.parent, NetworkDescription()).sha256 == trained.sha256


def test_other_weights_for_the_tower(open_clip, tmp_path: Path) -> None:
    """FARE and TeCoA publish files of nothing but that."""
    model, _, _ = open_clip.create_model_and_transforms("Tiny")
    tower = {name: value + 0.01 for name, value in model.visual.state_dict().items()}
    torch.save(tower, tmp_path / "fare.pt")
    trained = load_trained(write_zero_shot("Tiny", tmp_path / "a", tower=tmp_path / "fare.pt"), NetworkDescription())
    assert torch.equal(trained.model.model.visual.class_embedding, tower["class_embedding"])
    torch.save({"other": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="other.pt does not fit the image tower of Tiny"):
        write_zero_shot("Tiny", tmp_path / "b", tower=tmp_path / "other.pt")
    assert not (tmp_path / "b").exists()


def test_known_name_makes_the_classifier_once(open_clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(
        "zoo.names.write_zero_shot", lambda name, folder: made.append(name) or write_zero_shot("Tiny", folder)
    )
    for _ in range(2):
        found = locate("fare4_clip", folder=tmp_path)
        assert found.path == tmp_path / "fare4_clip" / "model.safetensors" and found.preprocessing is None
    assert made == ["hf-hub:chs20/fare4-clip"] and found.description["arch"] == "open_clip_hf-hub:chs20/fare4-clip"


def test_model_that_open_clip_cannot_have(open_clip, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["zero-shot", "NoSuchModel", "--to", str(tmp_path / "x")]) == 2
    assert "MODEL: NoSuchModel: open_clip cannot load it" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UserError, match="need the package open_clip_torch.*pip install 'open_clip_torch<3'"):
        import_open_clip()
    with pytest.raises(UserError, match="pip install 'open_clip_torch<3'"):
        locate("delta_clip_h14_336", folder=tmp_path)
    assert sum(model.by == "CLIP" for model in KNOWN.values()) == 7
