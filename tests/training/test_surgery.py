"""What training changes of a network beside its weights."""

from __future__ import annotations

import pytest
from timm.layers import DropPath

from common.errors import UserError
from training.surgery import freeze_parameters
from utils_architecture import ConvStem, get_new_model, normalize_model

MICRO = ["convnext_micro", "convnext_iso_micro", "vit_micro"]


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("name", MICRO)
def test_freeze_parameters(name: str, early: bool) -> None:
    model = normalize_model(get_new_model(name, not_original=True, num_classes=10, drop_path=0.3))
    stem_names = {name for name, _ in model.named_parameters() if "stem." in name}
    modules = {module for frozen in freeze_parameters(model, early=early) for module in frozen.modules()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    others = {name for name, _ in model.named_parameters()} - trained
    assert (trained if early else others) == stem_names != set()
    for name, module in model.named_modules():
        inside = {path for path, _ in model.named_parameters() if path.startswith(f"{name}." if name else "")}
        if inside:
            assert (module in modules) == (not inside & trained), name
        elif isinstance(module, DropPath):  # of the body
            assert (module in modules) == early


@pytest.mark.parametrize("early", [True, False])
def test_freeze_needs_a_stem(early: bool) -> None:
    with pytest.raises(UserError, match="model.freeze_some"):
        freeze_parameters(get_new_model("vit_micro"), early=early)


def test_freeze_leaves_something_to_train() -> None:
    with pytest.raises(UserError, match="model.freeze_some"):
        freeze_parameters(ConvStem((8,), (2,)), early=False)
