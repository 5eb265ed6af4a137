"""Robust CLIP models as zero-shot classifiers: the image tower of open_clip, and a linear head computed from class names.

The package open_clip_torch is optional. The text tower computes the head once. Head and image tower are then stored in a folder
in the export format, so the classifier loads like any other network.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import safetensors.torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from torch import Tensor, nn

from common.errors import UserError
from common.files import write_atomically
from utils_architecture import normalize_model
from zoo.description import CLIP_PREFIX, EXPORT_KEY, EXPORTED
from zoo.reading import read_content

# Configuration of a text tower that is not used.
SMALL_TEXT = {"context_length": 1, "vocab_size": 1, "width": 64, "heads": 1, "layers": 1}


class ZeroShotClassifier(nn.Module):
    """Normalised images (B, 3, H, W) → logits (B, num_classes): cosine similarities with class embeddings × logit scale."""

    def __init__(self, visual: nn.Module, width: int, num_classes: int) -> None:
        super().__init__()
        self.visual = visual
        self.head = nn.Linear(width, num_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.normalize(self.visual(x), dim=-1))


def import_open_clip() -> ModuleType:
    """Import the package; raise UserError if it is not installed."""
    try:
        return importlib.import_module("open_clip")
    except ImportError as error:
        raise UserError(
            f"CLIP models need the package open_clip_torch ({error}). Try: pip install 'open_clip_torch<3' (3 needs timm 1.0.17)."
        ) from error


def clip_architecture(name: str, num_classes: int = 1000) -> ZeroShotClassifier:
    """Build the classifier with random weights; `name`: an open_clip model, or hf-hub:<repository> (downloads its config).

    Raises:
        UserError: open_clip is not installed or does not know the name, or the repository cannot be reached.
    """
    open_clip = import_open_clip()
    if name.startswith("hf-hub:"):
        try:
            file = hf_hub_download(name.removeprefix("hf-hub:"), "open_clip_config.json")
            cfg = json.loads(Path(file).read_text(encoding="utf-8"))["model_cfg"]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{name}: its open_clip_config.json cannot be downloaded ({error}).") from error
    elif (cfg := open_clip.get_model_config(name)) is None:
        raise UserError(f"open_clip has no model {name!r}; open_clip.list_models() lists its models.")
    model = open_clip.CLIP(cfg["embed_dim"], cfg["vision_cfg"], SMALL_TEXT, cfg.get("quick_gelu", False))
    return ZeroShotClassifier(model.visual, cfg["embed_dim"], num_classes)


def write_zero_shot(name: str, folder: Path, *, pretrained: str | None = None, tower: Path | None = None) -> Path:
    """Write a CLIP model as zero-shot ImageNet classifier into `folder` and return the weights file.

    The head is the mean over OpenAI's 80 templates in open_clip, as in its own zero-shot evaluation.

    Args:
        name: as in `clip_architecture`; for a repository of the Hub, both towers are downloaded.
        folder: folder for model.safetensors and config.json.
        pretrained: open_clip's weights tag, such as openai, for a model that is not on the Hub.
        tower: file with other weights for the image tower, such as those of FARE.

    Raises:
        UserError: open_clip is not installed or cannot load the model, or `tower` does not fit.
    """
    open_clip = import_open_clip()
    try:
        model, _, _ = open_clip.create_model_and_transforms(name, pretrained=pretrained)
        tokenizer = open_clip.get_tokenizer(name)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{name}: open_clip cannot load it ({error}).") from error
    model = model.float().eval()
    if tower is not None:
        try:
            model.visual.load_state_dict(read_content(tower)[0])
        except (RuntimeError, TypeError, AttributeError) as error:
            raise UserError(f"{tower} does not fit the image tower of {name}: {error}.") from error
    classes = open_clip.IMAGENET_CLASSNAMES
    embeddings = open_clip.build_zero_shot_classifier(model, tokenizer, classes, open_clip.OPENAI_IMAGENET_TEMPLATES)
    used = model.visual.preprocess_cfg
    classifier = ZeroShotClassifier(model.visual, len(embeddings), len(classes))
    network = normalize_model(classifier, used["mean"], used["std"])
    classifier.head.weight.data = (model.logit_scale.exp() * embeddings).T.detach()
    size = used["size"] if isinstance(used["size"], int) else used["size"][0]
    content = {
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "interpolation": used["interpolation"],
            "crop_pct": 1.0,
            "crop_mode": "squash" if used["resize_mode"] == "squash" else "center",
        },
        EXPORT_KEY: {"model": {"arch": CLIP_PREFIX + name, "num_classes": len(classes), "add_normalization": True}},
    }
    weights = {key: value.contiguous() for key, value in network.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "config.json", lambda file: file.write(json.dumps(content, indent=2).encode()))
    write_atomically(folder / EXPORTED, lambda file: file.write(safetensors.torch.save(weights, {"format": "pt"})))
    return folder / EXPORTED
