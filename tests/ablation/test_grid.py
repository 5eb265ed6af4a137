"""Grids in YAML: their runs, and rejected files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from ablation.__main__ import main
from ablation.evidence import read_claims
from ablation.grid import Grid, load_grid
from common.errors import UserError
from common.provenance import PROJECT

GRIDS = sorted((PROJECT / "configs" / "ablations").glob("grid_*_*.yaml"))
TRAIN = {"data": {"train_dataset": "digits", "val_dataset": "digits", "num_workers": 0, "in_memory": 0}}


def grid_of(tmp_path: Path, content: dict, **arguments) -> Grid:
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump({"train": TRAIN, "seeds": [0], **content}, sort_keys=False))
    return load_grid(path, out=tmp_path / "out", **arguments)


def test_axes_make_a_product_compared_along_each_axis(tmp_path: Path) -> None:
    stems = {"patch": {"model.not_original": 0}, "conv": {"model": {"not_original": 1}}}
    grid = grid_of(tmp_path, {"axes": {"adv.eps": ["4/255", "8/255"], "stem": stems}, "seeds": [3, 5]})
    assert list(grid.arms) == [
        "eps=4-255+stem=patch",
        "eps=4-255+stem=conv",
        "eps=8-255+stem=patch",
        "eps=8-255+stem=conv",
    ]
    assert [
        (cell.config.adv.eps * 255, cell.config.model.not_original, cell.config.data.seed) for cell in grid.cells[:4]
    ] == [
        (4, False, 3),
        (4, False, 5),
        (4, True, 3),
        (4, True, 5),
    ]
    names = list(grid.arms)
    assert set(grid.compare) == {(names[0], names[1]), (names[0], names[2]), (names[1], names[3]), (names[2], names[3])}
    assert len({cell.run_folder for cell in grid.cells}) == 8


def test_an_arm_starts_from_anothers_weights_of_the_same_seed(tmp_path: Path) -> None:
    arms = {"clean": {"evaluate": False}, "robust": {"from": "clean", "adv.attack": "apgd"}}
    grid = grid_of(tmp_path, {"arms": arms, "seeds": [1, 2]})
    clean, robust = grid.cell("clean", 2), grid.cell("robust", 2)
    assert robust.config.model.ckpt_path == str(clean.run_folder) and clean.config.data.seed == 2
    assert list(grid.entries) == ["robust"] and grid.compare == ()


def test_selected_arms_include_the_arms_they_start_from(tmp_path: Path, capsys) -> None:
    arms = {"clean": {}, "other": {}, "middle": {"from": "clean"}, "robust": {"from": "middle"}}
    grid = grid_of(tmp_path, {"arms": arms, "seeds": [0, 1]})
    assert [str(cell) for cell in grid.cells_of(["robust"])] == [
        f"{arm}, seed {seed}" for arm in ("clean", "middle", "robust") for seed in (0, 1)
    ]
    assert grid.cells_of([]) == grid.cells
    assert main([str(tmp_path / "grid.yaml"), "--arms=middle", "--check"]) == 0
    listed = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == [f"{arm}, seed {seed}" for arm in ("clean", "middle") for seed in (0, 1)]


def test_evaluations(tmp_path: Path) -> None:
    """Check the order of flags (grid, arm, variant), the kind of weights, and that each evaluation has a separate folder."""
    content = {
        "arms": {"a": {"model.model_ema": 1, "evaluate": {"eval.n_ex": 7}}, "b": {}},
        "evaluate": {"eval": {"norms": "Linf,L2", "n_ex": 5}},
        "variants": {"a_raw": {"of": "a", "weights": "raw", "eval.norms": "Linf"}},
    }
    grid = grid_of(tmp_path, content)
    flags = {name: set(grid.cell(entry.arm, 0).eval_argv(entry)) for name, entry in grid.entries.items()}
    assert {"--eval.n_ex=7", "--eval.norms=Linf,L2", "--data.val_dataset=digits"} <= flags["a"]
    assert {"--eval.n_ex=7", "--eval.norms=Linf"} <= flags["a_raw"] and "--eval.n_ex=5" in flags["b"]
    names = {name: grid.cell(entry.arm, 0).weights(entry).name for name, entry in grid.entries.items()}
    assert names == {"a": "weights_ema_100.pt", "a_raw": "weights_100.pt", "b": "weights_100.pt"}
    content["evaluate"]["eval"]["n_ex"] = 6
    other = grid_of(tmp_path, content)
    assert other.cell("b", 0).eval_folder(other.entries["b"]) != grid.cell("b", 0).eval_folder(grid.entries["b"])
    assert other.cell("b", 0).run_folder == grid.cell("b", 0).run_folder


def test_extends_merges_and_the_command_line_wins(tmp_path: Path) -> None:
    base = {"train": TRAIN | {"training.epochs": 4}, "arms": {"a": {"lr.lr": 1}, "b": {}}, "seeds": [0, 1, 2]}
    (tmp_path / "below").mkdir()
    (tmp_path / "below/base.yaml").write_text(yaml.safe_dump(base | {"claims": "c.yaml"}))
    (tmp_path / "more.yaml").write_text(
        "extends: below/base.yaml\ntrain: {training.epochs: 5}\narms: {a: {lr.lr_peak_epoch: 2}, b: {lr.lr_peak_epoch: 1}}\n"
    )
    config = load_grid(tmp_path / "more.yaml").cell("a", 2).config
    assert (config.training.epochs, config.lr.lr, config.lr.lr_peak_epoch) == (5, 1, 2)
    assert load_grid(tmp_path / "more.yaml").claims == tmp_path / "below/c.yaml"
    grid = load_grid(tmp_path / "more.yaml", seeds=[7], extra=["--training.epochs=6"])
    assert grid.seeds == (7,) and grid.cell("a", 7).config.training.epochs == 6


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_grids_of_the_project(path: Path) -> None:
    """Every arm except the start arms differs from `base` in one flag; all command lines are valid."""
    grid = load_grid(path)
    assert len(grid.seeds) >= 3 and read_claims(grid.claims, grid)[1]
    base = grid.arms["base"]
    for name in ("random_init", "fgsm", "apgd1", "apgd3", "heavy", "eps_warmup", "patch"):
        arm = grid.arms[name]
        changed = {flag for flag in {**arm.flags, **base.flags} if arm.flags.get(flag) != base.flags.get(flag)}
        assert len(changed) == (name != "random_init") and (arm.start == base.start or name in ("random_init", "patch"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"arm": {}}, "unknown key 'arm'"),
        ({"seeds": []}, "seeds: expected a list of different whole numbers"),
        ({"seeds": [0, 0]}, "seeds: expected"),
        ({"seeds": None}, "seeds: expected"),
        ({"train": {"lr.rl": 1}}, "unknown flag '--lr.rl=1'"),
        ({"train": {"lr": {"lr": None}}}, "train: lr.lr: expected a value"),
        ({"train": TRAIN | {"training.epochs": "many"}}, "training.epochs: expected an integer"),
        ({"arms": {"a": {"from": "c"}}}, "from: expected one of a; got 'c'"),
        ({"arms": {"a": {"from": "b"}, "b": {"from": "a"}}}, "leads to a cycle (a → b → a)"),
        ({"arms": {"a,b": {}}}, "expected a name of letters"),
        ({"arms": {"../a": {}}}, "expected a name of letters"),
        ({"arms": {"train": {}}}, "other than train"),
        ({"arms": ["a"]}, "arms: expected a mapping"),
        ({"axes": {"adv.n_iter": []}}, "expected at least one value"),
        ({"evaluate": {"eval.steps": 3}}, "unknown flag '--eval.steps=3'"),
        ({"variants": {"x": {"of": "y"}}}, "of: expected one of run; got 'y'"),
        ({"variants": {"x": {"of": "run", "weights": "best"}}}, "weights: expected ema, raw"),
        ({"variants": {"x": {"of": "run", "weights": "ema"}}}, "needs model.model_ema=1"),
        ({"variants": {"x": {"of": ["run"]}}}, "of: expected one of run; got ['run']"),
        ({"compare": [["run", "nothing"]]}, "compare: expected pairs of run"),
        ({"compare": [[["run"], "run"]]}, "compare: expected pairs of run; got [['run'], 'run']"),
        ({"train": {"data.seed": 7}}, "train: data.seed is set by seeds"),
        ({"arms": {"a": {"logging": {"folder": "x"}}}}, "arms: a: logging.folder is set by --out"),
        ({"axes": {"data.seed": [1, 2]}}, "data.seed is set by seeds"),
        ({"evaluate": {"eval.model_in": "x"}}, "evaluate: eval.model_in is set by arms and variants"),
        ({"arms": {"a": {"evaluate": {"eval.gpus": 1}}}}, "eval.gpus is set by --jobs"),
        ({"variants": {"x": {"of": "run", "eval.out": "x"}}}, "variants: x: eval.out is set by --out"),
        ({"arms": {"a": {}, "b": {"from": "a", "model.ckpt_path": "x"}}}, "from or model.ckpt_path, got both"),
        ({"axes": {"training.epochs": [1, "1"]}}, "training.epochs: expected different values, got 1, 1"),
        ({"extends": "grid.yaml"}, "leads to a cycle"),
        ({"extends": "none.yaml"}, "cannot be read"),
    ],
)
def test_rejected_grids(tmp_path: Path, capsys, content: dict, words: str) -> None:
    with pytest.raises(UserError) as error:
        grid_of(tmp_path, content)
    assert words in str(error.value)
    assert main([str(tmp_path / "grid.yaml"), f"--out={tmp_path / 'out'}"]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["none.yaml"], "none.yaml: cannot be read"),
        (["{grid}", "--lr.lr"], "expected further flags as --section.name=value"),
        (["{grid}", "--quick"], "got '--quick'"),
        (["{grid}", "--lr.lr=fast"], "lr.lr: expected a number"),
        (["{grid}", "--data.seed=5"], "command line: data.seed is set by seeds (--seeds)"),
        (["{grid}", "--arms=run,other", "--check"], "--arms: expected some of run; got 'other'"),
        (["{grid}", "--logging.folder=/x"], "command line: logging.folder is set by --out"),
    ],
)
def test_wrong_command_lines(tmp_path: Path, capsys, argv: list[str], words: str) -> None:
    grid_of(tmp_path, {})
    assert main([word.format(grid=tmp_path / "grid.yaml") for word in argv]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    ["[", "- a", "seeds: [0]\nseeds: [1]", "train: {a.b: &x [*x]}", pytest.param("[" * 3000, id="deep")],
)
def test_files_that_are_not_grids(tmp_path: Path, text: str) -> None:
    (tmp_path / "grid.yaml").write_text(text)
    with pytest.raises(UserError, match="grid.yaml"):
        load_grid(tmp_path / "grid.yaml")


def test_config_is_found_below_the_current_folder_then_below_the_project(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid.yaml").write_text(
        "{config: configs/demo_robust.yaml, train: {data.train_dataset: digits, data.val_dataset: digits}, seeds: [0]}"
    )
    assert load_grid(tmp_path / "grid.yaml").config == (str(PROJECT / "configs" / "demo_robust.yaml"),)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo_robust.yaml").write_text("training: {epochs: 20}")
    assert load_grid(tmp_path / "grid.yaml").config == ("configs/demo_robust.yaml",)


def test_the_readmes_grid(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(# grid\.yaml.*?)```", (PROJECT / "docs" / "ablations.md").read_text(), re.DOTALL)
    assert len(text.splitlines()) <= 10
    (tmp_path / "grid.yaml").write_text(text)
    grid = load_grid(tmp_path / "grid.yaml")
    assert len(grid.cells) == 12 and len(grid.compare) == 4
