"""What is found out of a network before it is attacked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from data.datasets import open_source
from evaluation.images import ImageList
from evaluation.plan import _seen_both_ways, fed
from runner_aa_eval import with_flag
from utils_architecture import normalize_model
from zoo.description import Preprocessing

USED = Preprocessing(16, 1.0)


class Brightness(nn.Module):
    """Two classes: darker and brighter than `grey`."""

    def __init__(self, grey: float) -> None:
        super().__init__()
        self.grey = grey

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((1, 2, 3)) - self.grey
        return torch.stack([-mean, mean], dim=1)


@pytest.fixture
def images(tmp_path: Path) -> ImageList:
    """Eight dark and eight bright images."""
    folder = write_grey_images(tmp_path)
    source = open_source(str(folder), split="val")
    return ImageList(source, list(range(len(source))))


def write_grey_images(folder: Path) -> Path:
    from PIL import Image

    for name, level in (("bright", 180), ("dark", 60)):
        (folder / "val" / name).mkdir(parents=True)
        for number in range(8):
            Image.new("RGB", (16, 16), (level + number,) * 3).save(folder / "val" / name / f"{number}.png")
    return folder


class Flipped(Brightness):
    """Bright images are class 0."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flip(1)


def test_network_that_stood_behind_a_normaliser_is_noticed(images: ImageList) -> None:
    """Normalised grey images lie around zero; as they are, all of them are bright for this network."""
    text = _seen_both_ways(Flipped(0.0), images, USED)
    assert text.startswith(
        "of 16 clean images, 8 are correct if the input is not normalised, in [0, 1]; "
        "16 are correct if it is normalised with mean 0.485"
    )
    assert text.endswith("the second way: give --model.add_normalization=1")


def test_network_that_stood_behind_no_normaliser_is_noticed(images: ImageList) -> None:
    text = _seen_both_ways(normalize_model(Flipped(0.45), [0.9] * 3, [0.5] * 3), images, USED)
    assert text.startswith("of 16 clean images, 8 are correct if the input is normalised with mean 0.9, 0.9, 0.9")
    assert "16 are correct if it is not normalised, in [0, 1]" in text and text.endswith("--model.add_normalization=0")


def test_network_of_images_in_0_to_255_is_noticed(images: ImageList) -> None:
    assert _seen_both_ways(Flipped(120), images, USED).endswith(
        "--model.mean=0,0,0 --model.std=0.00392157,0.00392157,0.00392157"
    )


def test_network_that_sees_images_as_they_are_is_left_alone(images: ImageList) -> None:
    assert _seen_both_ways(Flipped(0.45), images, USED) == ""
    assert _seen_both_ways(normalize_model(Flipped(0.0)), images, USED) == ""


def test_what_the_network_sees_is_said() -> None:
    assert fed(Brightness(0.5)) == "not normalised, in [0, 1]"
    assert fed(normalize_model(Brightness(0.0), [0.5] * 3, [0.25] * 3)) == (
        "normalised with mean 0.5, 0.5, 0.5 and std 0.25, 0.25, 0.25"
    )


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["a", "--eval.fullaa=0"], ["--eval.model_in=a", "--eval.fullaa=0"]),
        (["runs/a", "runs/b", "--eval.eps", "0.1"], ["--eval.model_in=runs/a,runs/b", "--eval.eps", "0.1"]),
        (["--eval.eps", "0.1"], ["--eval.eps", "0.1"]),
        ([], []),
    ],
)
def test_words_before_the_first_flag_are_networks(argv: list[str], expected: list[str]) -> None:
    assert with_flag(argv) == expected
