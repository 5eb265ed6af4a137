"""The tables of published models and the pictures of docs/ compared with the table of the zoo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.image import imread
from PIL import Image

from common.errors import UserError
from common.provenance import PROJECT
from tests.zoo.test_published import FAMILIES, PAPER
from tools import published
from tools.published import (
    BEGIN,
    DRAWN_KEY,
    END,
    draw_all,
    draw_published,
    drawn_bars,
    drawn_points,
    full_table,
    section,
    short_table,
    stem_pairs,
    update_page,
)
from zoo.published import PUBLISHED


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize(
    "page, picture, table",
    [("README.md", "docs/published.png", short_table()), ("docs/models.md", "published.png", full_table("../"))],
)
def test_tables_are_up_to_date(page: str, picture: str, table: str) -> None:
    text = (PROJECT / page).read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    assert section(picture, table) in text, "run `python -m tools.published`"


def test_table_holds_every_number_of_the_paper() -> None:
    head, _, *lines, _, footnotes = full_table("").splitlines()
    assert cells(head) == ["model", "epochs", "px", "clean", "AutoAttack", "config", "weights", "RobustBench"]
    rows = {cells(line)[0]: dict(zip(cells(head), cells(line))) for line in lines}
    assert rows.keys() == PAPER.keys()
    assert rows["ConvNeXt-B-CvSt"] == {
        "model": "ConvNeXt-B-CvSt",
        "epochs": "250",
        "px": "224 / 256",
        "clean": "75.9 / 76.9",
        "AutoAttack": "56.1 / 57.3",
        "config": "[`convnext_base_cvst`](configs/convnext_base_cvst.yaml)",
        "weights": "[share](https://nc.mlcloud.uni-tuebingen.de/index.php/s/RQBEXagC7R7XweX)",
        "RobustBench": "`Singh2023Revisiting_ConvNeXt-B-ConvStem`",
    }
    assert rows["ConvNeXt-S-CvSt"]["clean"] == "74.4¹"
    assert "YzBpeHRrRQzHBDz" in rows["ConvNeXt-L-CvSt"]["weights"]
    tuned = rows["fine-tuned to Linf 8/255"]
    assert [tuned[key] for key in ("epochs", "clean", "AutoAttack", "RobustBench")] == ["20²", "–", "–", "–"]
    assert footnotes == "¹ RobustBench: 74.10. ² Recipe and architecture are this project's own."


def test_update_replaces_what_is_between_the_markers_alone(tmp_path: Path) -> None:
    readme, picture = tmp_path / "README.md", tmp_path / "pictures" / "published.png"
    readme.write_text(f"# Title\n\nBefore – ¹\n\n{BEGIN}\nold\n{END}\n\nAfter\n", encoding="utf-8")
    for _ in range(2):  # the second time there is nothing left to change
        update_page(readme, picture, "table")
        expected = f"# Title\n\nBefore – ¹\n\n{section('pictures/published.png', 'table')}\n\nAfter\n"
        assert readme.read_text(encoding="utf-8") == expected
    assert picture.is_file()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["README.md", "pictures", "published.png"]


@pytest.mark.parametrize(
    "text", ["", "no marker\n", f"{BEGIN}\n", f"{END}\n{BEGIN}\n", f"{BEGIN}{END}{BEGIN}{END}", f"{BEGIN}{END}{END}"]
)
def test_update_wants_each_marker_once_and_in_order(tmp_path: Path, text: str) -> None:
    readme, picture = tmp_path / "README.md", tmp_path / "published.png"
    readme.write_text(text)
    with pytest.raises(UserError, match="README.md: expected <!-- published: begin -->"):
        update_page(readme, picture, "table")
    assert readme.read_text() == text and not picture.exists()


def test_update_wants_a_readme(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a page"):
        update_page(tmp_path / "README.md", tmp_path / "published.png", "table")


# ---------------------------------------------------------------------------------------------------------- picture
def test_points_are_the_twelve_with_a_result_at_224_px() -> None:
    points = {PUBLISHED[p.name].title: p for p in drawn_points()}
    assert {title: p.autoattack for title, p in points.items()} == {
        title: results[224][1] for title, (_, results, _) in PAPER.items() if results[224] is not None
    }
    assert len(points) == 12
    for point in points.values():
        row = PUBLISHED[point.name]
        assert (point.params, point.gflops) == (row.params, row.gflops)


def test_pairs_are_joined() -> None:
    assert {(patch.title, conv.title) for patch, conv in stem_pairs()} == {
        ("ViT-S", "ViT-S-CvSt"),
        ("ConvNeXt-T", "ConvNeXt-T-CvSt"),
        ("ViT-B", "ViT-B-CvSt"),
        ("ConvNeXt-B", "ConvNeXt-B-CvSt"),
    }


def test_committed_picture_shows_the_table_as_it_is() -> None:
    file = PROJECT / "docs" / "published.png"
    with Image.open(file) as image:
        drawn = json.loads(image.text[DRAWN_KEY])
    assert drawn == [list(point) for point in drawn_points()], "run `python -m tools.published`"
    assert file.stat().st_size < 100_000


def test_picture_has_two_panels_with_a_marker_and_a_label_for_each_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    panels = {}
    draw_panel = published._draw_panel

    def kept(axes, attribute, **options):
        draw_panel(axes, attribute, **options)
        panels[attribute] = axes

    monkeypatch.setattr(published, "_draw_panel", kept)
    draw_published(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert imread(tmp_path / "picture.png").shape[1] > 600
    assert panels.keys() == {"params", "gflops"}
    markers = set()
    for attribute, axes in panels.items():
        expected = [(getattr(point, attribute), point.autoattack) for point in drawn_points()]
        assert [tuple(c.get_offsets()[0]) for c in axes.collections] == expected
        assert [text.get_text() for text in axes.texts] == [PUBLISHED[p.name].title for p in drawn_points()]
        assert len(axes.lines) == 4
        low, high = axes.get_xlim()
        bottom, top = axes.get_ylim()
        assert all(low < x < high and bottom < y < top for x, y in expected)
        # No label is over another one or over the edge of its panel.
        boxes = [text.get_window_extent() for text in axes.texts]
        assert not [1 for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
        frame = axes.get_window_extent()
        assert all(frame.x0 < box.x0 and box.x1 < frame.x1 for box in boxes)
        markers |= {
            (PUBLISHED[p.name].family, c.get_paths()[0].vertices.tobytes())
            for p, c in zip(drawn_points(), axes.collections)
        }
    assert len(markers) == len({shape for _, shape in markers}) == len(FAMILIES)


def test_picture_of_all(tmp_path: Path) -> None:
    draw_all(tmp_path / "all.png")
    for picture in (tmp_path / "all.png", PROJECT / "docs" / "robust_models.png"):
        with Image.open(picture) as image:
            assert json.loads(image.text[DRAWN_KEY]) == [list(bar) for bar in drawn_bars()]
    assert drawn_bars()[-1].name == "advxl_vit_g14" and len(drawn_bars()) > 40
