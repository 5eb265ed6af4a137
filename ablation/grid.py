"""Grids of trainings: arms (sets of flags) × seeds, their evaluations, and comparisons between them.

A grid is a YAML file. Every key except `seeds` is optional:

    extends: other.yaml            # base grid in the same folder; mappings merge, other values replace
    config: configs/base.yaml      # config files of train.py, in this order
    train: {training.epochs: 2}    # flags of train.py for every arm; sections may be nested
    axes:                          # every combination of values becomes an arm
      adv.n_iter: [1, 2, 3]        #   values of one flag, or
      stem: {patch: {model.not_original: 0}, conv: {model.not_original: 1}}   # named sets of flags
    arms:                          # single arms: flags, and
      clean: {evaluate: false}     #   evaluate: false, or flags of runner_aa_eval.py for this arm only
      robust: {from: clean, adv.attack: apgd}     # from: the arm whose weights it starts from (same seed)
    seeds: [0, 1, 2]
    evaluate: {eval.norms: "Linf,L2", eval.img_size: 32}     # flags of runner_aa_eval.py
    variants:                      # further evaluations of an arm's weights
      robust_raw: {of: robust, weights: raw}      # of: arm; weights: raw or ema (default: ema, if available); flags
    compare:                       # paired differences b − a; default: along each axis, and every arm against the first
      - [robust_raw, robust]
    claims: claims.yaml            # file in the same folder with a paper's claims (see ablation.evidence)
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from common.errors import UserError, blame
from common.flags import load_config, read_yaml
from common.provenance import PROJECT
from evaluation.config import EvalConfig
from training.config import TrainConfig
from training.identity import find_folder

GRID_KEYS = {"extends", "config", "train", "axes", "arms", "seeds", "evaluate", "variants", "compare", "claims"}
NETWORKS = ("raw", "ema")
# Flags that the grid sets itself, and the option that determines each.
DECIDED = {
    "data.seed": "seeds (--seeds)",
    "logging.folder": "--out",
    "eval.model_in": "arms and variants",
    "eval.models": "arms and variants",
    "eval.out": "--out",
    "eval.gpus": "--jobs",
    "eval.workers": "--threads",
}
NAME = re.compile(r"(?!train$)[A-Za-z0-9][\w.=+-]*")  # evaluations name files; train.out is the output of the training


@dataclass(frozen=True)
class Arm:
    """A set of flags that is trained with every seed.

    Attributes:
        name: name in tables and of the folder.
        flags: flags of train.py, by dotted name.
        start: the arm whose weights it starts from, "" for none.
        evaluate: flags of runner_aa_eval.py for this arm only; None: the arm is not evaluated.
        at: axis → value, for arms generated from axes.
    """

    name: str
    flags: Mapping[str, str]
    start: str = ""
    evaluate: Mapping[str, str] | None = field(default_factory=dict)
    at: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """A row of the results: an arm with one evaluation. `weights` is "", "raw" or "ema"."""

    name: str
    arm: str
    weights: str
    flags: Mapping[str, str]


@dataclass(frozen=True)
class Grid:
    """A whole grid (format: see the module). `out` contains one folder per cell, and the summary."""

    name: str
    out: Path
    config: tuple[str, ...]
    train: Mapping[str, str]
    arms: Mapping[str, Arm]
    entries: Mapping[str, Entry]
    seeds: tuple[int, ...]
    compare: tuple[tuple[str, str], ...]
    claims: Path | None
    extra: tuple[str, ...] = ()

    @cached_property
    def cells(self) -> list[Cell]:
        """All cells, arm by arm: the first arms finish first."""
        return [Cell(self, arm, seed) for arm in self.arms.values() for seed in self.seeds]

    def cells_of(self, arms: Sequence[str]) -> list[Cell]:
        """Return the cells of these arms and of the arms they start from, in the grid's order; all cells if `arms` is empty.

        Raises:
            UserError: unknown arm.
        """
        if unknown := [name for name in arms if name not in self.arms]:
            raise UserError(f"--arms: expected some of {', '.join(self.arms)}; got {unknown[0]!r}.")
        wanted = set(arms or self.arms)
        for name in arms:
            while name := self.arms[name].start:
                wanted.add(name)
        return [cell for cell in self.cells if cell.arm.name in wanted]

    def cell(self, arm: str, seed: int) -> Cell:
        """Return the cell of an arm and a seed."""
        return self.cells[list(self.arms).index(arm) * len(self.seeds) + self.seeds.index(seed)]


@dataclass(frozen=True)
class Cell:
    """A cell of the grid: the training of one arm with one seed."""

    grid: Grid
    arm: Arm
    seed: int

    def __str__(self) -> str:
        return f"{self.arm.name}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        """Folder with the run folder, its evaluations, their output, and record.json."""
        return self.grid.out / self.arm.name / f"seed{self.seed}"

    @property
    def parent(self) -> Cell | None:
        return self.grid.cell(self.arm.start, self.seed) if self.arm.start else None

    def train_argv(self) -> list[str]:
        """Return the command line of train.py, without the program's name."""
        argv = [f"--config-file={path}" for path in self.grid.config]
        argv += [f"--{name}={value}" for name, value in {**self.grid.train, **self.arm.flags}.items()]
        argv += [*self.grid.extra, f"--data.seed={self.seed}", f"--logging.folder={self.folder}"]
        if self.parent:
            argv.append(f"--model.ckpt_path={self.parent.run_folder}")
        return argv

    @cached_property
    def config(self) -> TrainConfig:
        """All flags of the training."""
        return load_config(TrainConfig, self.train_argv())

    @cached_property
    def run_folder(self) -> Path:
        return find_folder(self.config)[0]

    def entries(self) -> list[Entry]:
        return [entry for entry in self.grid.entries.values() if entry.arm == self.arm.name]

    def weights_kind(self, entry: Entry) -> str:
        """Return which weights an entry evaluates: raw or ema."""
        return entry.weights or ("ema" if self.config.model.model_ema else "raw")

    def weights(self, entry: Entry) -> Path:
        """Return the path of the weights that an entry evaluates; the file need not exist yet."""
        ema = "_ema" if self.weights_kind(entry) == "ema" else ""
        return self.run_folder / f"weights{ema}_{self.config.training.epochs}.pt"

    def eval_folder(self, entry: Entry) -> Path:
        """Return the folder with the reports of an entry."""
        return Path(self.eval_argv(entry)[-1].partition("=")[2])

    def eval_argv(self, entry: Entry) -> list[str]:
        """Return the command line of runner_aa_eval.py, without the flags of devices."""
        data = self.config.data
        flags = {"data.val_dataset": data.val_dataset, "data.root": data.root, "data.val_split": data.val_split}
        flags = {name: value for name, value in flags.items() if value} | dict(entry.flags)
        argv = [f"--{name}={value}" for name, value in flags.items()]
        argv.append(f"--eval.model_in={self.weights(entry)}")
        digest = hashlib.sha256(json.dumps(argv).encode()).hexdigest()[:6]
        return [*argv, f"--eval.out={self.folder / f'eval_{entry.name}_{digest}'}"]


# ------------------------------------------------------------------------------------------------------ reading
def load_grid(path: Path, *, out: Path | None = None, seeds: Sequence[int] = (), extra: Sequence[str] = ()) -> Grid:
    """Read a grid and check the command lines of all its runs.

    Args:
        path: the YAML file.
        out: output folder; None: runs/ablations/<name of the file>.
        seeds: replace the seeds of the file.
        extra: flags of train.py that override all others, such as the location of the data on this machine.

    Raises:
        UserError: unreadable file, unknown key or flag, wrong value, or unknown arm.
    """
    _refuse_decided((flag.removeprefix("--").partition("=")[0] for flag in extra), "command line")
    content = _read(path)
    arms = _arms(content, path)
    grid = Grid(
        name=path.stem,
        out=out or Path("runs") / "ablations" / path.stem,
        config=tuple(map(_config_file, _list(content.get("config", []), f"{path}: config"))),
        train=_flags(content.get("train", {}), f"{path}: train"),
        arms=arms,
        entries=_entries(content, arms, path),
        seeds=_seeds(list(seeds) or content.get("seeds"), path),
        compare=(),
        claims=content.get("claims"),
        extra=tuple(extra),
    )
    grid = dataclasses.replace(grid, compare=_comparisons(content.get("compare"), grid, path))
    _check(grid, path)
    return grid


def _config_file(path: Any) -> str:
    """Return a config file of a grid: below the current folder, else below the project's root."""
    return str(path if Path(path).exists() or not (PROJECT / path).exists() else PROJECT / path)


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the content of a grid, merged into that of the grid it extends."""
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a grid with the keys {_words(GRID_KEYS)}; got {type(content).__name__}.")
    if unknown := [key for key in content if key not in GRID_KEYS]:
        raise UserError(f"{path}: unknown key {unknown[0]!r}; expected {_words(GRID_KEYS)}.")
    if content.get("claims"):
        content["claims"] = path.parent / str(content["claims"])
    if "extends" not in content:
        return content
    other = path.parent / str(content.pop("extends"))
    if other.resolve() in (path.resolve(), *above):
        raise UserError(f"{path}: extends: {other} leads to a cycle.")
    return _merged(_read(other, (*above, path.resolve())), content)


def _merged(base: Any, over: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    return {**base, **{key: _merged(base.get(key), value) for key, value in over.items()}}


def _arms(content: Mapping[str, Any], path: Path) -> dict[str, Arm]:
    where = f"{path}: arms"
    arms = {}
    for name, value in _mapping(content.get("arms", {}), where).items():
        arms[str(name)] = _arm(str(name), _mapping(value, f"{where}: {name}"), f"{where}: {name}")
    for arm in _axis_arms(content.get("axes"), path):
        if arm.name in arms:
            raise UserError(f"{path}: the arm {arm.name} is defined twice.")
        arms[arm.name] = arm
    if not arms:  # one set of flags with several seeds
        arms["run"] = Arm("run", {})
    for arm in arms.values():
        chain = [arm.name]
        while start := arms[chain[-1]].start:
            if start not in arms:
                raise UserError(f"{where}: {chain[-1]}: from: expected one of {_words(arms)}; got {start!r}.")
            if start in chain:
                raise UserError(f"{where}: {arm.name}: from leads to a cycle ({' → '.join([*chain, start])}).")
            chain.append(start)
    return arms


def _arm(name: str, value: Mapping[str, Any], where: str, at: Mapping[str, str] | None = None) -> Arm:
    if not NAME.fullmatch(name):
        raise UserError(f"{where}: expected a name of letters, digits and _ . = + -, other than train; got {name!r}.")
    flags = dict(value)
    start, evaluate = flags.pop("from", ""), flags.pop("evaluate", {})
    evaluate = None if evaluate is False else _flags({} if evaluate is True else evaluate, f"{where}: evaluate")
    flags = _flags(flags, where)
    if start and "model.ckpt_path" in flags:
        raise UserError(f"{where}: expected either from or model.ckpt_path, got both.")
    return Arm(name, flags, str(start or ""), evaluate, at or {})


def _axis_arms(axes: Any, path: Path) -> list[Arm]:
    """Return the arms of the product of all axes."""
    if not axes:
        return []
    choices: list[list[tuple[str, str, dict[str, Any]]]] = []
    for axis, values in _mapping(axes, f"{path}: axes").items():
        where = f"{path}: axes: {axis}"
        if isinstance(values, list):
            texts = [_text(value, where) for value in values]
            if len(set(texts)) != len(texts):
                raise UserError(f"{where}: expected different values, got {', '.join(texts)}.")
            values = {text: {axis: text} for text in texts}
        options = _mapping(values, where).items()
        if not options:
            raise UserError(f"{where}: expected at least one value.")
        choices.append([(str(axis), str(name), dict(_mapping(flags, f"{where}: {name}"))) for name, flags in options])
    arms = []
    for chosen in itertools.product(*choices):
        at = {axis: name for axis, name, _ in chosen}
        short = [f"{axis.rsplit('.', 1)[-1]}={name}" for axis, name in at.items()]
        name = re.sub(r"[^\w.=+-]", "-", "+".join(short))
        flags: dict[str, Any] = {}
        for _, _, more in chosen:
            flags.update(more)
        arms.append(_arm(name, flags, f"{path}: axes", at))
    return arms


def _entries(content: Mapping[str, Any], arms: Mapping[str, Arm], path: Path) -> dict[str, Entry]:
    common = _flags(content.get("evaluate", {}), f"{path}: evaluate")
    entries = {
        arm.name: Entry(arm.name, arm.name, "", {**common, **arm.evaluate})
        for arm in arms.values()
        if arm.evaluate is not None
    }
    for name, value in _mapping(content.get("variants", {}), f"{path}: variants").items():
        where = f"{path}: variants: {name}"
        flags = dict(_mapping(value, where))
        of, weights = flags.pop("of", None), str(flags.pop("weights", ""))
        if not is_one_of(of, arms):
            raise UserError(f"{where}: of: expected one of {_words(arms)}; got {of!r}.")
        if weights not in ("", *NETWORKS):
            raise UserError(f"{where}: weights: expected {_words(NETWORKS)}; got {weights!r}.")
        if str(name) in entries or not NAME.fullmatch(str(name)):
            raise UserError(f"{where}: expected a new name of letters, digits and _ . = + -.")
        entries[str(name)] = Entry(
            str(name), of, weights, {**common, **(arms[of].evaluate or {}), **_flags(flags, where)}
        )
    return entries


def _comparisons(pairs: Any, grid: Grid, path: Path) -> tuple[tuple[str, str], ...]:
    if pairs is None:
        return tuple(_default_comparisons(grid))
    found = []
    for pair in _list(pairs, f"{path}: compare"):
        if not isinstance(pair, list) or len(pair) != 2 or not all(is_one_of(name, grid.entries) for name in pair):
            raise UserError(f"{path}: compare: expected pairs of {_words(grid.entries)}; got {pair!r}.")
        found.append((pair[0], pair[1]))
    return tuple(found)


def _default_comparisons(grid: Grid) -> list[tuple[str, str]]:
    """Compare along each axis with its first value, other axes equal; compare arms without axes with the first of them."""
    shown = [arm for arm in grid.arms.values() if arm.name in grid.entries]
    plain = [arm for arm in shown if not arm.at]
    pairs = [(plain[0].name, arm.name) for arm in plain[1:]]
    for arm in shown:
        for axis in arm.at:
            same = [a for a in shown if a.at and {**a.at, axis: ""} == {**arm.at, axis: ""}]
            if same[0] is not arm:
                pairs.append((same[0].name, arm.name))
    return pairs


def _seeds(seeds: Any, path: Path) -> tuple[int, ...]:
    fine = isinstance(seeds, list) and seeds and all(type(seed) is int and seed >= 0 for seed in seeds)
    if not fine or len(set(seeds)) != len(seeds):
        raise UserError(f"{path}: seeds: expected a list of different whole numbers of at least 0; got {seeds!r}.")
    return tuple(seeds)


def _check(grid: Grid, path: Path) -> None:
    """Check the command lines for the first seed; those of other seeds differ only in the seed."""
    for cell in grid.cells[:: len(grid.seeds)]:
        with blame(f"{path}: {cell.arm.name}"):
            ema = cell.config.model.model_ema
            for entry in cell.entries():
                if entry.weights == "ema" and not ema:
                    raise UserError(f"variants: {entry.name}: weights: ema needs model.model_ema=1.")
                load_config(EvalConfig, cell.eval_argv(entry))


def _flags(value: Any, where: str) -> dict[str, str]:
    """Return flags as dotted name → text; sections in `value` may be nested."""
    flags = {}
    for name, content in _mapping(value, where).items():
        inner = content if isinstance(content, dict) else None
        for key, item in (inner or {}).items():
            flags[f"{name}.{key}"] = _text(item, f"{where}: {name}.{key}")
        if inner is None:
            flags[str(name)] = _text(content, f"{where}: {name}")
    _refuse_decided(flags, where)
    return flags


def _refuse_decided(names: Iterable[str], where: str) -> None:
    for name in names:
        if name in DECIDED:
            raise UserError(f"{where}: {name} is set by {DECIDED[name]}; remove this flag.")


def _text(value: Any, where: str) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, list):
        return ",".join(_text(item, where) for item in value)
    if value is None or isinstance(value, dict):
        raise UserError(f"{where}: expected a value, got {value!r}.")
    return str(value)


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a mapping, got {value!r}.")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise UserError(f"{where}: expected a list, got {value!r}.")
    return value


def is_one_of(name: Any, names: Container[str]) -> bool:
    """Return whether a YAML value of any type is one of the names."""
    return isinstance(name, str) and name in names


def _words(names: Any) -> str:
    return ", ".join(sorted(names))
