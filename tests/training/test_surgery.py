"""What training changes of a network beside its weights."""

from __future__ import annotations

import pytest

from common.errors import UserError
from training.surgery import freeze_parameters
from utils_architecture import ConvStem, get_new_model, normalize_model

MICRO = ["convnext_micro", "convnext_iso_micro", "vit_micro"]


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("name", MICRO)
def test_freeze_parameters(name: str, early: bool) -> None:
    model = normalize_model(get_new_model(name, not_original=True, num_classes=10))
    stem_names = {name for name, _ in model.named_parameters() if "stem." in name}
    frozen = freeze_parameters(model, early=early)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert (trained if early else set(frozen)) == stem_names != set()
    assert trained | set(frozen) == {name for name, _ in model.named_parameters()}
    assert not trained & set(frozen)


@pytest.mark.parametrize("early", [True, False])
def test_freeze_needs_a_stem(early: bool) -> None:
    with pytest.raises(UserError, match="model.freeze_some"):
        freeze_parameters(get_new_model("vit_micro"), early=early)


def test_freeze_leaves_something_to_train() -> None:
    with pytest.raises(UserError, match="model.freeze_some"):
        freeze_parameters(ConvStem((8,), (2,)), early=False)
