"""Export of a trained network: safetensors and config.json in the layout of timm's models on the Hugging Face Hub.

timm loads the folder if the architecture is timm's (`timm.create_model("hf-hub:<repository>", pretrained=True)`).
`load_robust_model` always loads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors.torch
from timm.models import split_model_name_tag
from torch import nn

from common.errors import UserError
from common.files import writable, write_atomically
from common.provenance import PROVENANCE_KEY
from utils_architecture import ARCHITECTURES, TIMM_PREFIX
from zoo.description import DESCRIPTION, EXPORT_KEY, EXPORTED
from zoo.inference import FC_NORM
from zoo.loading import has_normalizer
from zoo.runs import TrainedModel

CONFIG, CARD = "config.json", "README.md"


def export(
    trained: TrainedModel, folder: Path, *, img_size: int | None = None, crop_pct: float | None = None, card: str = ""
) -> None:
    """Write model.safetensors (the bare network), config.json and README.md into `folder`.

    timm's models get normalised images. So a normaliser becomes `mean` and `std` of config.json; without one, they are 0 and 1.

    Args:
        folder: created if needed; files of these names are replaced.
        img_size, crop_pct: evaluation settings for config.json; None: the network's own.
        card: text for README.md, such as a table of results.

    Raises:
        UserError: the folder cannot be written.
    """
    network = trained.model.model if has_normalizer(trained.model) else trained.model
    weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    used = trained.preprocessing
    content = config(trained, network, img_size=img_size or used.img_size, crop_pct=crop_pct or used.crop_pct)
    with writable("--to", folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / EXPORTED, lambda f: f.write(safetensors.torch.save(weights, {"format": "pt"})))
        write_atomically(folder / CONFIG, lambda f: f.write(json.dumps(content, indent=2).encode()))
        write_atomically(folder / CARD, lambda f: f.write(model_card(trained.description, content, card).encode()))


def config(trained: TrainedModel, network: nn.Module, *, img_size: int, crop_pct: float) -> dict[str, Any]:
    """Return the content of config.json: timm's keys, and the keys from which `load_trained` builds the network."""
    description, mean, std = trained.description, [0.0] * 3, [1.0] * 3
    if has_normalizer(trained.model):
        normalize = trained.model.normalize
        mean, std = (
            [float(str(v)) for v in values.flatten().float().numpy()] for values in (normalize.mean, normalize.std)
        )
    sections: dict[str, dict[str, Any]] = {PROVENANCE_KEY: {"classes": trained.class_names}}
    for name, (section, _) in DESCRIPTION.items():
        sections.setdefault(section, {})[name] = description[name]
    timm_cfg = getattr(network, "pretrained_cfg", None) or {}
    pool = {"global_pool": "avg"} if FC_NORM in network.state_dict() else {}
    return {
        "architecture": timm_name(description) or description["arch"],
        "num_classes": description["num_classes"],
        **({"label_names": trained.class_names} if trained.class_names else {}),
        "pretrained_cfg": {
            "input_size": [3, img_size, img_size],
            "fixed_input_size": False,
            "interpolation": trained.preprocessing.interpolation,
            "crop_pct": crop_pct,
            "crop_mode": trained.preprocessing.crop_mode,
            "mean": mean,
            "std": std,
            "num_classes": description["num_classes"],
            **{key: timm_cfg[key] for key in ("first_conv", "classifier", "pool_size") if key in timm_cfg},
        },
        EXPORT_KEY: sections,
    } | ({"model_args": pool, **pool} if pool else {})


def timm_name(description: Mapping[str, Any]) -> str | None:
    """Return timm's name of the architecture; None if it is not timm's (ConvStem, blurpool, or not in timm)."""
    arch, entry = description["arch"], ARCHITECTURES.get(description["arch"])
    if description["not_original"] or description["updated"] or description["use_blurpool"]:
        return None
    if entry is None:
        return split_model_name_tag(arch.removeprefix(TIMM_PREFIX))[0] if arch.startswith(TIMM_PREFIX) else None
    return split_model_name_tag(entry.builder)[0] if isinstance(entry.builder, str) and not entry.options else None


def model_card(description: Mapping[str, Any], content: Mapping[str, Any], card: str) -> str:
    """Return README.md of the folder, with the header of the Hub."""
    cfg, stem = content["pretrained_cfg"], " with ConvStem" if description["not_original"] else ""
    loader = 'load_robust_model("<folder>")  # this architecture is not in timm'
    if timm_name(description):
        loader = 'timm.create_model("hf-hub:<repository>", pretrained=True)'
    return (
        "---\nlibrary_name: timm\npipeline_tag: image-classification\ntags: [adversarial-robustness]\n---\n"
        f"# {description['arch']}{stem}, adversarially trained\n\n"
        f"Images in [0, 1], normalised with mean {cfg['mean']} and std {cfg['std']}.\n\n"
        f"```python\n{loader}\n```\n\n{card}\n"
    )


def push(folder: Path, repository: str) -> str:
    """Upload the folder to a Hugging Face Hub repository, created if needed; return its URL.

    Raises:
        UserError: not logged in, the owner does not exist, or no connection.
    """
    api = huggingface_hub.HfApi()
    try:
        address = api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=[EXPORTED, CONFIG, CARD])
    except Exception as error:  # huggingface_hub and its HTTP library raise many types
        raise UserError(f"--push: cannot upload to {repository} ({error}). Try `hf auth login`.") from error
    return str(address)
