"""A grid of trainings as data: arms (sets of flags) × seeds, how they are evaluated, and what is compared.

A grid is a YAML file; every key but `seeds` may be missing:

    extends: other.yaml            # a grid to start from, beside this file; mappings merge, the rest replaces
    config: configs/base.yaml      # config files of train.py, in order
    train: {training.epochs: 2}    # flags of train.py for every arm; sections may be nested
    axes:                          # every combination of their values is an arm
      adv.n_iter: [1, 2, 3]        #   the values of one flag, or
      stem: {patch: {model.not_original: 0}, conv: {model.not_original: 1}}   # named sets of flags
    arms:                          # or arms one by one: flags, and
      clean: {evaluate: false}     #   evaluate: false, or flags of runner_aa_eval.py for this arm
      robust: {from: clean, adv.attack: apgd}     # from: the arm whose weights it starts from, with the same seed
    seeds: [0, 1, 2]
    evaluate: {eval.norms: "Linf,L2", eval.img_size: 32}     # flags of runner_aa_eval.py
    variants:                      # further evaluations of what was trained for an arm
      robust_raw: {of: robust, weights: raw}      # of: arm; weights: raw or ema (default: ema where there is one); flags
    compare:                       # differences b − a, seed by seed; without it: along each axis, and of arms to the first
      - [robust_raw, robust]
    claims: claims.yaml            # beside this file: what the comparisons say of a paper's claims (see ablation.evidence)
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
# Flags that every run and evaluation gets from the grid, and what decides on them.
DECIDED = {
    "data.seed": "seeds (--seeds)",
    "logging.folder": "--out",
    "eval.model_in": "arms and variants",
    "eval.models": "arms and variants",
    "eval.out": "--out",
    "eval.gpus": "--jobs",
    "eval.workers": "--threads",
}
NAME = re.compile(r"(?!train$)[A-Za-z0-9][\w.=+-]*")  # files are named after evaluations, and train.out after none


@dataclass(frozen=True)
class Arm:
    """One set of flags, trained with every seed.

    Attributes:
        name: in tables; also a folder's name.
        flags: of train.py, by dotted name.
        start: the arm whose weights it starts from, "" for none.
        evaluate: flags of runner_aa_eval.py for this arm alone; None: it is not evaluated.
        at: axis → value, for arms made of axes.
    """

    name: str
    flags: Mapping[str, str]
    start: str = ""
    evaluate: Mapping[str, str] | None = field(default_factory=dict)
    at: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """One row of the results: an arm under one evaluation. `weights` is "", "raw" or "ema"."""

    name: str
    arm: str
    weights: str
    flags: Mapping[str, str]


@dataclass(frozen=True)
class Grid:
    """A whole grid; see the module. `out` holds a folder for each cell, and the summary."""

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
        """Arm by arm, so that what is named first is whole first."""
        return [Cell(self, arm, seed) for arm in self.arms.values() for seed in self.seeds]

    def cells_of(self, arms: Sequence[str]) -> list[Cell]:
        """The trainings of these arms and of those they start from, in the grid's order; all for no names.

        Raises:
            UserError: no such arm.
        """
        if unknown := [name for name in arms if name not in self.arms]:
            raise UserError(f"--arms: expected some of {', '.join(self.arms)}; got {unknown[0]!r}.")
        wanted = set(arms or self.arms)
        for name in arms:
            while name := self.arms[name].start:
                wanted.add(name)
        return [cell for cell in self.cells if cell.arm.name in wanted]

    def cell(self, arm: str, seed: int) -> Cell:
        """The training of an arm with a seed."""
        return self.cells[list(self.arms).index(arm) * len(self.seeds) + self.seeds.index(seed)]


@dataclass(frozen=True)
class Cell:
    """One training: an arm with one seed."""

    grid: Grid
    arm: Arm
    seed: int

    def __str__(self) -> str:
        return f"{self.arm.name}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        """Holds the run's folder, its evaluations, what they print, and record.json."""
        return self.grid.out / self.arm.name / f"seed{self.seed}"

    @property
    def parent(self) -> Cell | None:
        return self.grid.cell(self.arm.start, self.seed) if self.arm.start else None

    def train_argv(self) -> list[str]:
        """Command line of train.py, without the program's name."""
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
        """Which weights an entry evaluates: raw or ema."""
        return entry.weights or ("ema" if self.config.model.model_ema else "raw")

    def weights(self, entry: Entry) -> Path:
        """The file an entry evaluates; its name is known before it is there."""
        ema = "_ema" if self.weights_kind(entry) == "ema" else ""
        return self.run_folder / f"weights{ema}_{self.config.training.epochs}.pt"

    def eval_folder(self, entry: Entry) -> Path:
        """Where the reports of an entry are."""
        return Path(self.eval_argv(entry)[-1].partition("=")[2])

    def eval_argv(self, entry: Entry) -> list[str]:
        """Command line of runner_aa_eval.py, but for devices."""
        data = self.config.data
        flags = {"data.val_dataset": data.val_dataset, "data.root": data.root, "data.val_split": data.val_split}
        flags = {name: value for name, value in flags.items() if value} | dict(entry.flags)
        argv = [f"--{name}={value}" for name, value in flags.items()]
        argv.append(f"--eval.model_in={self.weights(entry)}")
        digest = hashlib.sha256(json.dumps(argv).encode()).hexdigest()[:6]
        return [*argv, f"--eval.out={self.folder / f'eval_{entry.name}_{digest}'}"]


# ------------------------------------------------------------------------------------------------------ reading
def load_grid(path: Path, *, out: Path | None = None, seeds: Sequence[int] = (), extra: Sequence[str] = ()) -> Grid:
    """Read a grid, and look at every command line it stands for.

    Args:
        path: the YAML file.
        out: folder of the grid's runs; None: runs/ablations/<file's name>.
        seeds: instead of the file's.
        extra: flags of train.py that override all others, such as the data's place on this machine.

    Raises:
        UserError: unreadable file, unknown key or flag, wrong value, an arm that is not there.
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
    """A grid's keys, with those of the grid it extends."""
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
        raise UserError(f"{path}: extends: {other} leads back to itself.")
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
            raise UserError(f"{path}: the arm {arm.name} is given twice.")
        arms[arm.name] = arm
    if not arms:  # the same flags with several seeds
        arms["run"] = Arm("run", {})
    for arm in arms.values():
        chain = [arm.name]
        while start := arms[chain[-1]].start:
            if start not in arms:
                raise UserError(f"{where}: {chain[-1]}: from: expected one of {_words(arms)}; got {start!r}.")
            if start in chain:
                raise UserError(f"{where}: {arm.name}: from leads back to itself ({' → '.join([*chain, start])}).")
            chain.append(start)
    return arms


def _arm(name: str, value: Mapping[str, Any], where: str, at: Mapping[str, str] | None = None) -> Arm:
    if not NAME.fullmatch(name):
        raise UserError(f"{where}: expected a name of letters, digits and _ . = + -, and not train; got {name!r}.")
    flags = dict(value)
    start, evaluate = flags.pop("from", ""), flags.pop("evaluate", {})
    evaluate = None if evaluate is False else _flags({} if evaluate is True else evaluate, f"{where}: evaluate")
    flags = _flags(flags, where)
    if start and "model.ckpt_path" in flags:
        raise UserError(f"{where}: expected from or model.ckpt_path, got both.")
    return Arm(name, flags, str(start or ""), evaluate, at or {})


def _axis_arms(axes: Any, path: Path) -> list[Arm]:
    """The arms that a product of axes stands for."""
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
        named = _mapping(values, where).items()
        if not named:
            raise UserError(f"{where}: expected at least one value.")
        choices.append([(str(axis), str(name), dict(_mapping(flags, f"{where}: {name}"))) for name, flags in named])
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
    """Along each axis to its first value, all else equal; of arms without axes to the first of them."""
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
        raise UserError(f"{path}: seeds: expected a list of different whole numbers from 0 on; got {seeds!r}.")
    return tuple(seeds)


def _check(grid: Grid, path: Path) -> None:
    """Read the command lines of one seed: the others differ in nothing that could be wrong."""
    for cell in grid.cells[:: len(grid.seeds)]:
        with blame(f"{path}: {cell.arm.name}"):
            ema = cell.config.model.model_ema
            for entry in cell.entries():
                if entry.weights == "ema" and not ema:
                    raise UserError(f"variants: {entry.name}: weights: ema needs model.model_ema=1.")
                load_config(EvalConfig, cell.eval_argv(entry))


def _flags(value: Any, where: str) -> dict[str, str]:
    """Dotted names → texts, of flags whose sections may be nested."""
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
            raise UserError(f"{where}: {name} is decided by {DECIDED[name]}; expected no such flag.")


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
    """Whether a YAML value, perhaps a list, is one of the names."""
    return isinstance(name, str) and name in names


def _words(names: Any) -> str:
    return ", ".join(sorted(names))
