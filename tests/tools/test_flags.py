"""The page of all flags."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from common.flags import described, sections_of
from evaluation.config import EvalConfig
from tools import flags
from tools.flags import is_current, main, page
from training.config import TrainConfig


@pytest.mark.parametrize("config_class", [TrainConfig, EvalConfig])
def test_every_flag_is_described_once(config_class: type) -> None:
    names = [f"{section}.{f.name}" for section, cls in sections_of(config_class) for f in dataclasses.fields(cls)]
    assert [flag.name for flag in described(config_class)] == names


def test_description_of_a_flag() -> None:
    found = {flag.name: flag for flag in described(TrainConfig)}
    assert found["data.train_dataset"].default == "required"
    assert found["adv.eps"].default == "unset"
    assert found["logging.addendum"].default == "empty"
    assert found["data.pipeline"].values == "one of timm, fast"
    assert found["data.max_bad_images"].harmless and not found["data.seed"].harmless


def test_page_has_a_row_for_each_flag_with_three_cells() -> None:
    rows = [line for line in page().splitlines() if line.startswith("| `")]
    assert len(rows) == len([*described(TrainConfig), *described(EvalConfig)])
    assert all(len(re.split(r"(?<!\\)\|", row)) == 5 for row in rows)
    assert not re.search("<(?!!--)", page().split("## Flags of train.py")[1])


def test_headings_differ() -> None:
    headings = re.findall(r"^#+ .*", page(), re.MULTILINE)
    assert len(headings) == len(set(headings))


def test_check_writes_nothing_and_the_other_call_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "flags.md"
    monkeypatch.setattr(flags, "PAGE", file)
    assert main(["--check"]) == 1 and not file.exists()
    assert main([]) == 0 and is_current(file)
    assert main(["--check"]) == 0
    file.write_text(file.read_text() + "\n")
    assert main(["--check"]) == 1 and not is_current(file)
