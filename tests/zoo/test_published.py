"""The table of published models against the paper's numbers, the configs, RobustBench's package, the built models, and README."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from matplotlib.image import imread
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from common.errors import UserError
from data.transforms import eval_transform
from utils_architecture import ARCHITECTURES
from zoo import published
from zoo.__main__ import main
from zoo.models import build_model
from zoo.published import (
    BEGIN,
    DRAWN_KEY,
    END,
    LISTED,
    PUBLISHED,
    Published,
    draw_all,
    draw_published,
    drawn_bars,
    drawn_points,
    find_published,
    nearest_published,
    readme_section,
    readme_table,
    stem_pairs,
    update_readme,
)
from zoo.robustbench import import_robustbench

PROJECT = Path(__file__).resolve().parents[2]
NAMES = list(PUBLISHED)

# Title: epochs (None: not published), {px: (clean, AutoAttack)}, tokens of the shares, copied from the paper and its code's README.
PAPER = {
    "ConvNeXt-iso-CvSt": (300, {224: (70.2, 45.9)}, ["HpNbkLTNTBiaeo8"]),
    "ViT-S": (300, {224: (69.2, 44.0)}, ["XLLnoCnJxp74Zqn"]),
    "ViT-S-CvSt": (300, {224: (72.5, 48.1)}, ["agtDw3D7QXbDCmw"]),
    "ConvNeXt-T": (300, {224: (72.4, 48.6)}, ["XLLnoCnJxp74Zqn"]),
    "ConvNeXt-T-CvSt": (300, {224: (72.7, 49.5)}, ["BFLoMrMdn8iBk7Y"]),
    "ViT-M-CvSt": (50, {224: (72.4, 48.8)}, ["q2mkEYtq5Zjpa4e"]),
    "ConvNeXt-S-CvSt": (50, {224: (74.4, 52.4)}, ["m3bAwNg4CJY4jrp"]),
    "ViT-B": (50, {224: (73.3, 50.0)}, ["XLLnoCnJxp74Zqn"]),
    "ConvNeXt-B": (50, {224: (75.6, 54.3)}, ["XLLnoCnJxp74Zqn"]),
    "ViT-B-CvSt": (250, {224: (76.3, 54.7)}, ["SbN5AJAicdZJXyr"]),
    "ConvNeXt-B-CvSt": (250, {224: (75.9, 56.1), 256: (76.9, 57.3)}, ["RQBEXagC7R7XweX"]),
    "ConvNeXt-L-CvSt": (100, {224: (77.0, 57.7), 320: (78.2, 59.4)}, ["YzBpeHRrRQzHBDz", "LeYdmW9DMAr8zws"]),
    "fine-tuned to Linf 8/255": (None, {224: None}, ["FiTToeo4RKY896P"]),
}
# RobustBench's leaderboard, ImageNet, Linf 4/255: clean, AutoAttack.
ROBUSTBENCH = {
    "Singh2023Revisiting_ViT-S-ConvStem": ("vit_s_cvst", 72.56, 48.08),
    "Singh2023Revisiting_ViT-B-ConvStem": ("vit_b_cvst", 76.30, 54.66),
    "Singh2023Revisiting_ConvNeXt-T-ConvStem": ("convnext_tiny_cvst", 72.72, 49.46),
    "Singh2023Revisiting_ConvNeXt-S-ConvStem": ("convnext_small_cvst", 74.10, 52.42),
    "Singh2023Revisiting_ConvNeXt-B-ConvStem": ("convnext_base_cvst", 75.90, 56.14),
    "Singh2023Revisiting_ConvNeXt-L-ConvStem": ("convnext_large_cvst", 77.00, 57.70),
}
FAMILIES = {"convnext": "ConvNeXt", "convnext_iso": "ConvNeXt-iso", "vit": "ViT"}


# ------------------------------------------------------------------------------------------------------ the entries
def test_numbers_and_links_are_the_published_ones() -> None:
    assert [row.title for row in PUBLISHED.values()] == list(PAPER)
    for row in PUBLISHED.values():
        epochs, results, tokens = PAPER[row.title]
        assert {px: found and tuple(found) for px, found in row.results.items()} == results
        assert list(row.links) == [f"https://nc.mlcloud.uni-tuebingen.de/index.php/s/{token}" for token in tokens]
        if epochs is None:
            assert "ours" in row.note and row.note_on == "epochs"
        else:
            assert row.epochs == epochs


def test_robustbench_numbers() -> None:
    found = {r.robustbench_id: (r.name, *r.robustbench) for r in PUBLISHED.values() if r.robustbench_id}
    assert found == ROBUSTBENCH
    assert all((row.robustbench is None) == (row.robustbench_id is None) for row in PUBLISHED.values())
    assert [row.name for row in PUBLISHED.values() if "RobustBench" in row.note] == ["convnext_small_cvst"]


@pytest.mark.parametrize("name", NAMES)
def test_entry_agrees_with_its_config(name: str) -> None:
    row = PUBLISHED[name]
    assert row.name == name and row.config == f"configs/{name}.yaml"
    text = (PROJECT / row.config).read_text()
    config = yaml.safe_load(text)
    model = config["model"]
    assert (row.arch, row.not_original, row.updated) == (
        model["arch"],
        bool(model["not_original"]),
        bool(model.get("updated", 0)),
    )
    assert row.description == {
        "arch": row.arch,
        "not_original": row.not_original,
        "updated": row.updated,
        "add_normalization": row.add_normalization,
    }
    assert row.epochs == config["training"]["epochs"]
    assert all(link in text for link in row.links[:1])
    assert row.family == FAMILIES[ARCHITECTURES[row.arch].family]
    assert row.title.endswith("-CvSt") == row.not_original or name == "convnext_base_cvst_ft8"


def test_every_published_config_has_an_entry() -> None:
    assert {p.stem for p in (PROJECT / "configs").glob("*.yaml") if not p.name.startswith(("demo_", "own_"))} == set(
        NAMES
    )


@pytest.mark.parametrize("name", NAMES)
def test_normaliser_is_known_where_the_header_of_the_config_knows_it(name: str) -> None:
    row = PUBLISHED[name]
    text = (PROJECT / row.config).read_text()
    says = re.search(r"released \S+ with ConvStem carry no|released \S+ carries the|RobustBench's definition", text)
    assert (row.add_normalization is not None) == (says is not None)
    if says is not None:
        assert row.add_normalization == bool(yaml.safe_load(text)["model"]["add_normalization"])


@functools.cache
def robustbench_text(module: str) -> str:
    """The source of a module of RobustBench, which is not imported: its import needs more than is installed."""
    spec = importlib.util.find_spec("robustbench")
    if spec is None:
        pytest.skip("the list is part of robustbench")
    return (Path(spec.submodule_search_locations[0]) / "model_zoo" / module).read_text()


def test_robustbench_ids_and_normalisers_are_those_of_its_package() -> None:
    entries = re.findall(
        r"\('(Singh2023Revisiting_[^']+)', \{\s*'model': lambda: get_convstem_models\('(\w+)'\)",
        robustbench_text("imagenet.py"),
    )
    assert {robustbench_id for robustbench_id, _ in entries} == ROBUSTBENCH.keys()
    definitions = robustbench_text("architectures/convstem_models.py")
    for robustbench_id, their_name in entries:
        definition = re.search(rf"modelname == ['\"]{their_name}['\"]:\n(.*?)\n    el", definitions, re.DOTALL)[1]
        row = find_published(robustbench_id)
        assert row.add_normalization == ("normalize_model(" in definition), robustbench_id


# ---------------------------------------------------------------------------------------- parameters, multiply-adds
@functools.cache
def measured(arch: str, not_original: bool, updated: bool) -> tuple[int, int]:
    """Parameters, and multiply-adds of an image of 224 px, of a model that has shapes but no numbers."""
    with pytest.MonkeyPatch.context() as patch:
        # timm reads the numbers of a linspace while building (drop path rates).
        patch.setattr(torch, "linspace", functools.partial(torch.linspace, device="cpu"))
        with torch.device("meta"):
            model = build_model(arch, not_original=not_original, updated=updated).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_multiply_adds_are_those_of_the_model(name: str) -> None:
    row = PUBLISHED[name]
    params, multiply_adds = measured(row.arch, row.not_original, row.updated)
    assert row.params == pytest.approx(params / 1e6, abs=0.006)
    assert row.gflops == pytest.approx(multiply_adds / 1e9, rel=0.01)


def test_multiply_adds_are_counted_as_in_the_papers_of_the_architectures() -> None:
    # Liu et al., "A ConvNet for the 2020s"; Touvron et al., "DeiT III".
    for name, gflops in {"convnext_tiny": 4.5, "convnext_base": 15.4, "vit_s": 4.6, "vit_b": 17.5}.items():
        assert PUBLISHED[name].gflops == pytest.approx(gflops, abs=0.07)


# ---------------------------------------------------------------------------------------------------------- by name
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("convnext_base_cvst", "convnext_base_cvst"),
        ("ConvNeXt_Base_CvSt", "convnext_base_cvst"),
        ("ConvNeXt-B-CvSt", "convnext_base_cvst"),
        ("convnext-b", "convnext_base"),
        ("Singh2023Revisiting_ConvNeXt-B-ConvStem", "convnext_base_cvst"),
        ("singh2023revisiting_vit-s-convstem", "vit_s_cvst"),
        ("fine-tuned to Linf 8/255", "convnext_base_cvst_ft8"),
        ("convnext", None),
        ("", None),
    ],
)
def test_find(name: str, expected: str | None) -> None:
    found = find_published(name)
    assert (found and found.name) == expected


def test_no_two_entries_share_a_name() -> None:
    aliases = [a.casefold() for r in PUBLISHED.values() for a in (r.name, r.title, r.robustbench_id) if a]
    assert len(set(aliases)) == len(aliases) == 2 * 13 + 6


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("convnext_bse_cvst", "convnext_base_cvst"),
        ("CONVNEXT_LARGE_CVS", "convnext_large_cvst"),
        ("ViT-M-ConvSt", "vit_m_cvst"),
        ("Singh2023_ViT-B-ConvStem", "vit_b_cvst"),
        ("qwertz", None),
    ],
)
def test_nearest(name: str, expected: str | None) -> None:
    assert nearest_published(name) == expected


# ----------------------------------------------------------------------------------------------------------- README
def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_readme_is_up_to_date() -> None:
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    section = text[text.index("## Published models") : text.index("## Flags")]
    assert readme_section("docs/published.png") in section, "run `python -m zoo readme`"


def test_table_holds_every_number_of_the_paper() -> None:
    head, _, *lines, _, footnotes = readme_table().splitlines()
    assert cells(head) == ["model", "epochs", "px", "clean", "AutoAttack", "command", "weights", "RobustBench"]
    rows = {cells(line)[0]: dict(zip(cells(head), cells(line))) for line in lines}
    assert rows.keys() == PAPER.keys()
    assert rows["ConvNeXt-B-CvSt"] == {
        "model": "ConvNeXt-B-CvSt",
        "epochs": "250",
        "px": "224 / 256",
        "clean": "75.9 / 76.9",
        "AutoAttack": "56.1 / 57.3",
        "command": "[`--config-file configs/convnext_base_cvst.yaml`](configs/convnext_base_cvst.yaml)",
        "weights": "[share](https://nc.mlcloud.uni-tuebingen.de/index.php/s/RQBEXagC7R7XweX)",
        "RobustBench": "`Singh2023Revisiting_ConvNeXt-B-ConvStem`",
    }
    assert rows["ConvNeXt-S-CvSt"]["clean"] == "74.4¹"
    assert "YzBpeHRrRQzHBDz" in rows["ConvNeXt-L-CvSt"]["weights"]
    tuned = rows["fine-tuned to Linf 8/255"]
    assert [tuned[key] for key in ("epochs", "clean", "AutoAttack", "RobustBench")] == ["20²", "–", "–", "–"]
    assert footnotes == "¹ RobustBench: 74.10. ² Recipe and architecture are ours."


def test_update_replaces_what_is_between_the_markers_alone(tmp_path: Path) -> None:
    readme, picture = tmp_path / "README.md", tmp_path / "pictures" / "published.png"
    readme.write_text(f"# Title\n\nBefore – ¹\n\n{BEGIN}\nold\n{END}\n\nAfter\n", encoding="utf-8")
    for _ in range(2):  # the second time there is nothing left to change
        update_readme(readme, picture)
        expected = f"# Title\n\nBefore – ¹\n\n{readme_section('pictures/published.png')}\n\nAfter\n"
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
        update_readme(readme, picture)
    assert readme.read_text() == text and not picture.exists()


def test_update_wants_a_readme(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a README"):
        update_readme(tmp_path / "README.md", tmp_path / "published.png")


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
    assert drawn == [list(point) for point in drawn_points()], "run `python -m zoo readme`"
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


def test_entries_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        PUBLISHED["new"] = PUBLISHED["vit_s"]
    with pytest.raises(AttributeError):
        PUBLISHED["vit_s"].epochs = 1
    assert all(isinstance(row, Published) and row.sha256 == {} for row in PUBLISHED.values())


# --- RobustBench's list -----------------------------------------------------------------------------------------------


def test_list_is_robustbenchs() -> None:
    """Same ids, preprocessing and kind of weights as the installed package."""
    import_robustbench()
    enums = importlib.import_module("robustbench.model_zoo.enums")
    theirs = importlib.import_module("robustbench.model_zoo").model_dicts
    theirs = theirs[enums.BenchmarkDataset.imagenet][enums.ThreatModel.Linf]
    assert theirs.keys() - LISTED.keys() == {"Standard_R50"}  # not a robust one
    for name, model in LISTED.items():
        assert theirs[name].get("preprocessing") == model.images, name
        assert (isinstance(theirs[name]["gdrive_id"], str) and bool(theirs[name]["gdrive_id"])) == model.alone, name


def test_preprocessing_of_the_list_is_robustbenchs(tmp_path: Path) -> None:
    transforms = importlib.import_module("robustbench.data").PREPROCESSINGS
    pixels = np.random.RandomState(0).randint(0, 256, (300, 410, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    for images in {model.images for model in LISTED.values()} - {None}:
        used = next(model for model in LISTED.values() if model.images == images).preprocessing
        ours = eval_transform(used.img_size, used.crop_pct, used.interpolation, used.crop_mode)
        assert torch.equal(ours(image), transforms[images](image)), images


def test_numbers_of_the_list_are_robustbenchs() -> None:
    for model in PUBLISHED.values():
        if model.robustbench_id:
            listed = LISTED[model.robustbench_id]
            assert (listed.clean, listed.autoattack) == model.robustbench
    assert (
        LISTED["Amini2024MeanSparse_Swin-L"].external
        == 58.92
        < LISTED["Amini2024MeanSparse_Swin-L"].autoattack
        == 62.12
    )


def test_list_and_picture_of_all(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["list", "--all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(PUBLISHED) + len(LISTED) - 6 + 1
    assert "Xu2024MIMIR_Swin-L" in lines[2] and "(Bai2024MixedNUTS)" in "".join(lines)
    draw_all(tmp_path / "all.png")
    for picture in (tmp_path / "all.png", PROJECT / "docs" / "robust_models.png"):
        with Image.open(picture) as image:
            assert json.loads(image.text[DRAWN_KEY]) == [list(bar) for bar in drawn_bars()]
