"""What a report says of its numbers: beside the published ones, beside those of the network's own run, beside guessing."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from evaluation.config import ATTACKS
from evaluation.report import compare_with_published, comparison_text, warnings_of
from zoo.description import Preprocessing
from zoo.published import KNOWN, PUBLISHED

MODEL = PUBLISHED["vit_s_cvst"]  # 72.5 % clean, 48.1 % robust
NETWORK = {"num_classes": 1000, "use_blurpool": False} | MODEL.description
AS_PUBLISHED = Preprocessing(224, 0.875, "bicubic")


def evaluation(**changed: Any) -> Any:
    values = {"published": MODEL, "preprocessing": AS_PUBLISHED} | changed
    return SimpleNamespace(img_size=values["preprocessing"].img_size, **values)


class Images(list):
    """In the place of an `ImageList`."""

    def __init__(self, *, robustbench: bool = True, common_size: str | None = None) -> None:
        super().__init__([0] * 5000)
        self.robustbench, self.common_size = robustbench, common_size


def compared(evaluation: Any, report: dict[str, Any], images: Images | None = None) -> dict[str, Any] | None:
    return compare_with_published(evaluation, report, images or Images())


def report(**changed: Any) -> dict[str, Any]:
    numbers = {
        "n": 5000,
        "clean_acc": 0.7254,
        "robust_acc": 0.4808,
        "robust_ci95": [0.467, 0.495],
        "norm": "Linf",
        "eps": 4 / 255,
        "attacks": list(ATTACKS),
        "ci": None,
    }
    rest = {
        "data": {"unreadable": [], "img_size": 224},
        "network": NETWORK,
        "arithmetic": {"precision": "fp32", "compile": False},
        "devices": {"cpu": 1},
        "check": {},
        "flags": [],
        "classes": {"among": 1000},
    }
    transform = {"crop_pct": 0.875, "resize": "bicubic", "from": "the default"}
    run = {"norm": None, "eps": None, "clean_acc": None}
    return numbers | rest | {"transform": transform, "run": run} | changed


def text_of(found: Any, of: dict[str, Any]) -> str:
    return comparison_text(of | {"published": found})


def test_the_published_evaluation_is_compared() -> None:
    found = compared(evaluation(), report())
    assert found["differs"] == [] and found["suspicious"] is False
    assert (found["difference"], found["clean_difference"]) == (-0.02, 0.04)
    assert "AutoAttack 48.08 %, published 48.1 %: -0.02 points; clean 72.54 %" in text_of(found, report())


@pytest.mark.parametrize("changed", [{"robust_acc": 0.4845}, {"robust_acc": 0.477}, {"clean_acc": 0.73}])
def test_more_than_a_rounding_apart_is_suspicious(changed: dict[str, float]) -> None:
    """Although well inside the sampling interval: these are the same images."""
    found = compared(evaluation(), report(**changed))
    assert found["suspicious"] is True
    assert "SUSPICIOUS: more than 0.3 points apart on the same images. Check crop" in text_of(found, report(**changed))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"n": 5}, "5 of RobustBench's 5,000 images"),
        ({"norm": "L2", "eps": 2.0}, "L2 2 instead of Linf 4/255"),
        ({"eps": 8 / 255}, "Linf 8/255 instead of Linf 4/255"),
        ({"attacks": list(ATTACKS[:2])}, "without fab-t, square"),
        (Images(robustbench=False), "other images than RobustBench's 5,000"),
        (
            Images(common_size="224 × 224 px"),
            "images that are already resized to 224 × 224 px, as those of ImageNet-C",
        ),
        (Preprocessing(256, 0.875), "images 256 px, crop 0.875, bicubic (the default), published with 224 px,"),
        (Preprocessing(224, 1.0), "images 224 px, crop 1, bicubic (the default), published with 224 px,"),
        (Preprocessing(224, 0.875, "bilinear"), "crop 0.875, bilinear (the default), published with 224 px,"),
    ],
)
def test_what_is_not_as_published_is_said_instead(changed: Any, said: str) -> None:
    of = report(robust_acc=0.2, robust_ci95=[0.01, 0.72], **(changed if isinstance(changed, dict) else {}))
    used = changed if isinstance(changed, Preprocessing) else AS_PUBLISHED
    found = compared(evaluation(preprocessing=used), of, changed if isinstance(changed, Images) else None)
    assert len(found["differs"]) == 1 and said in found["differs"][0]
    assert "difference" not in found and "suspicious" not in found
    assert "not compared with the published number (48.1 %)" in text_of(found, of) and "1.0 – 72.0" in text_of(
        found, of
    )


def test_images_that_could_not_be_decoded_are_missing() -> None:
    of = report(n=4998, data={"unreadable": ["a", "b"], "img_size": 224})
    assert compared(evaluation(), of)["differs"] == ["2 images could not be decoded"]


def test_a_stronger_attacks_number_is_said() -> None:
    model = dataclasses.replace(MODEL, external=45.0)
    assert "published 48.1 % (45.0 % under a stronger attack)" in text_of(
        compared(evaluation(published=model), report()), report()
    )


def test_other_networks_have_nothing_to_compare_with() -> None:
    assert compared(evaluation(published=None), report()) is None
    assert text_of(None, report()) == ""


@pytest.mark.parametrize(
    ("clean", "n", "classes", "warned"),
    [
        (0.001, 5000, 1000, True),
        (0.01, 5000, 1000, False),
        (0.25, 8, 4, True),
        (0.5, 8, 4, False),
        (0.0, 5, 1000, True),
    ],
)
def test_the_accuracy_of_guessing(clean: float, n: int, classes: int, warned: bool) -> None:
    texts = list(warnings_of(report(clean_acc=clean, n=n, classes={"among": classes})))
    assert bool(texts) == warned
    assert all("is no better than guessing: most likely a missing or second normaliser" in text for text in texts)
    run = {"norm": None, "eps": None, "clean_acc": clean}
    texts = list(warnings_of(report(clean_acc=clean, n=n, classes={"among": classes}, run=run)))
    assert bool(texts) == warned and all(
        "guessing: the validation of the training run measured" in text for text in texts
    )


def test_far_below_the_own_run() -> None:
    run = {"norm": "Linf", "eps": 8 / 255, "clean_acc": 0.986}
    texts = list(warnings_of(report(clean_acc=0.05, run=run)))
    assert (
        "clean accuracy 5.0 %, but 98.6 % in the validation of the training run" in texts[0]
        and "224 px, crop 0.875" in texts[0]
    )
    assert texts[1:] == ["trained for Linf 8/255, attacked at 4/255"]
    assert list(warnings_of(report(clean_acc=0.8, run=run | {"eps": 4 / 255}))) == []
    assert list(warnings_of(report(clean_acc=0.8, run=run | {"norm": "L2"}))) == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"network": NETWORK | {"use_blurpool": True}}, "use_blurpool=1"),
        ({"network": NETWORK | {"not_original": False}}, "not_original=0"),
        ({"arithmetic": {"precision": "tf32", "compile": False}}, "attacked in tf32 or compiled"),
    ],
)
def test_another_network_or_arithmetic_is_not_compared(changed: dict[str, Any], said: str) -> None:
    assert compared(evaluation(), report(**changed))["differs"] == [said]


def test_what_is_published_for_other_images_is_not_compared() -> None:
    network = NETWORK | {"arch": "resnet50", "not_original": False, "add_normalization": True}
    found = compared(evaluation(published=KNOWN["ares_resnet50"]), report(network=network))
    assert found["differs"] == ["its accuracy was measured on 1,000 random images"]


@pytest.mark.parametrize(
    ("name", "norm", "eps", "published"),
    [
        ("Wong2020Fast", "Linf", 4 / 255, 26.24),
        ("Debenedetti2022Light_XCiT-S12", "Linf", 4 / 255, 41.78),
        ("advxl_vit_h14", "L2", 2.0, 69.8),
        ("advxl_vit_h14", "L1", 75.0, 46.0),
    ],
)
def test_others_are_compared_with_their_number_for_the_norm(name: str, norm: str, eps: float, published: float) -> None:
    model = KNOWN[name]
    network = NETWORK | model.description
    other = evaluation(published=model, preprocessing=model.preprocessing, norm=norm, eps=eps)
    found = compared(other, report(network=network, robust_acc=published / 100, norm=norm, eps=eps))
    assert (found["differs"], found["autoattack"], found["difference"]) == ([], published, 0.0)
