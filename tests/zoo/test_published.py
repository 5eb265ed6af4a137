"""The table of published models against the paper's numbers, the configs, RobustBench's package, the built models, and README."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import zoo.names
from data.transforms import eval_transform
from utils_architecture import ARCHITECTURES
from zoo.__main__ import main
from zoo.inference import _NumbersOnCPU, check_description
from zoo.loading import parse_weights
from zoo.models import build_model
from zoo.names import load_named
from zoo.published import KNOWN, PUBLISHED, Published, find_published, nearest_published
from zoo.robustbench import import_robustbench

PROJECT = Path(__file__).resolve().parents[2]
NAMES = list(PUBLISHED)

# Title: epochs (None: not published), {px: (clean, AutoAttack)}, tokens of the shares, copied from the paper and its code's README.
PAPER = {
    "ConvNeXt-iso-CvSt": (300, {224: (70.2, 45.9)}, ["HpNbkLTNTBiaeo8"]),
    "ViT-S": (300, {224: (69.2, 44.0)}, ["XLLnoCnJxp74Zqn"]),
    "ViT-S-CvSt": (300, {224: (72.5, 48.1)}, ["agtDw3D7QXbDCmw", "Gbi6KP67xdR2rEA"]),
    "ConvNeXt-T": (300, {224: (72.4, 48.6)}, ["XLLnoCnJxp74Zqn"]),
    "ConvNeXt-T-CvSt": (300, {224: (72.7, 49.5)}, ["BFLoMrMdn8iBk7Y"]),
    "ViT-M-CvSt": (50, {224: (72.4, 48.8)}, ["q2mkEYtq5Zjpa4e"]),
    "ConvNeXt-S-CvSt": (50, {224: (74.4, 52.4)}, ["m3bAwNg4CJY4jrp"]),
    "ViT-B": (50, {224: (73.3, 50.0)}, ["XLLnoCnJxp74Zqn"]),
    "ConvNeXt-B": (50, {224: (75.6, 54.3)}, ["XLLnoCnJxp74Zqn"]),
    "ViT-B-CvSt": (250, {224: (76.3, 54.7)}, ["SbN5AJAicdZJXyr", "sjo7XPXzS5J4oWB"]),
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
            assert "this project's own" in row.note and row.note_on == "epochs"
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
    says = re.search(r"released \S+ with ConvStem have no|released \S+ has the|RobustBench's definition", text)
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


def test_entries_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        PUBLISHED["new"] = PUBLISHED["vit_s"]
    with pytest.raises(AttributeError):
        PUBLISHED["vit_s"].epochs = 1
    assert all(isinstance(row, Published) and row.sha256 == {} for row in PUBLISHED.values())


# --- everybody's models -------------------------------------------------------------------------------------------------


def robustbenchs() -> dict[str, dict]:
    """RobustBench's own list for ImageNet and Linf."""
    import_robustbench()
    enums = importlib.import_module("robustbench.model_zoo.enums")
    models = importlib.import_module("robustbench.model_zoo").model_dicts
    return models[enums.BenchmarkDataset.imagenet][enums.ThreatModel.Linf]


def test_ids_are_robustbenchs() -> None:
    ids = [model.robustbench_id for model in KNOWN.values() if model.robustbench_id]
    assert robustbenchs().keys() - set(ids) == {"Standard_R50"}  # not a robust one
    assert len(ids) == len(set(ids)) == 29


def test_images_are_robustbenchs() -> None:
    transforms = importlib.import_module("robustbench.data").PREPROCESSINGS
    pixels = np.random.RandomState(0).randint(0, 256, (300, 410, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    for name, entry in robustbenchs().items():
        if name == "Standard_R50":  # not a robust one
            continue
        used = find_published(name).preprocessing
        ours = eval_transform(used.img_size, used.crop_pct, used.interpolation, used.crop_mode)
        if entry.get("preprocessing"):
            assert torch.equal(ours(image), transforms[entry["preprocessing"]](image)), name
        else:  # XCiT: RobustBench goes by the configuration of its timm model
            assert used.crop_pct == 1.0 and used.interpolation == "bicubic", name


def test_numbers_of_others() -> None:
    sparse = KNOWN["Amini2024MeanSparse_Swin-L"]
    assert sparse.external == 58.92 < sparse.autoattack("Linf", 4 / 255, 224) == 62.12
    giant = KNOWN["advxl_vit_g14"]
    assert [giant.autoattack(norm, eps, 336) for norm, eps in (("Linf", 4 / 255), ("L2", 2), ("L1", 75))] == [
        71.0,
        70.4,
        46.7,
    ]
    assert giant.autoattack("L2", 0.5, 336) is giant.autoattack("Linf", 4 / 255, 224) is None
    assert KNOWN["resnet50_l2_eps3"].results[224].clean == 62.83
    assert sum(model.by == "robustness" for model in KNOWN.values()) == 67


def test_list_of_all(capsys: pytest.CaptureFixture) -> None:
    assert main(["list", "--all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(KNOWN)
    assert "advxl_vit_g14" in lines[2] and "Bai2024MixedNUTS" in "".join(lines)


NETWORKS = {model.arch: model for model in KNOWN.values() if not model.arch.startswith(("robustbench_", "open_clip_"))}


@pytest.mark.parametrize("arch", NETWORKS)
def test_network_of_a_known_model_is_recognised(arch: str) -> None:
    """Weights of its names and shapes are what its row says, by the row's own description."""
    model = NETWORKS[arch]
    kind = "avg" if arch.startswith(("timm_vit_huge", "timm_vit_giant")) else None
    with torch.device("meta"), _NumbersOnCPU():
        network = build_model(arch, not_original=model.not_original, updated=model.updated, global_pool=kind)
    weights = parse_weights({f"module.{name}": value for name, value in network.state_dict().items()}, source="file")
    found = check_description(weights, model.description | {"add_normalization": None}, source="file")
    assert (found.arch, found.num_classes, found.global_pool) == (arch, 1000, kind)


def layout(name: str, state: dict[str, torch.Tensor]) -> dict:
    """The content of a file of this model's source, with these weights of its network."""
    if KNOWN[name].by != "robustness":
        return state
    copies = {f"module.{at}model.{key}": value for at in ("", "attacker.") for key, value in state.items()}
    for at in ("", "attacker."):
        copies |= {f"module.{at}normalizer.new_mean": MEAN, f"module.{at}normalizer.new_std": STD}
    return {"model": copies, "epoch": 7}


MEAN, STD = (torch.tensor(three).view(3, 1, 1) for three in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


@pytest.mark.parametrize(
    "name",
    ["Debenedetti2022Light_XCiT-S12", "mimir_vit_s", "ares_vit_s", "resnet18_l2_eps3", "shufflenet_l2_eps3"],
)
def test_known_model_loads_by_its_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From random weights in the layout of its source: logits are those of the source's network, twice."""
    model, asked = KNOWN[name], []
    kind = "avg" if model.by == "MIMIR" else None
    network = build_model(model.arch, global_pool=kind).double().eval()
    for value in network.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) * 0.04)

    def fake(link: str, folder: Path, *, name: str, **_: object) -> list[Path]:
        asked.append(link)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(layout(name, network.state_dict()), folder / f"{name}.pt")
        return [folder / f"{name}.pt"]

    monkeypatch.setattr(zoo.names, "download", fake)
    x = torch.rand(2, 3, 224, 224, dtype=torch.float64)
    seen = (x - MEAN) / STD if model.by in ("ARES", "robustness") else x
    with torch.no_grad():
        expected = network(seen)
    for _ in range(2):
        trained = load_named(name, folder=tmp_path)
        with torch.no_grad():
            assert torch.allclose(trained.model.double()(x), expected, rtol=1e-5)
        assert trained.preprocessing == model.preprocessing and trained.notes == ()
    assert set(asked) == set(model.links)
