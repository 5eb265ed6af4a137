"""Check commands of the pages against the programs that they call: every word is parsed as the program itself would.

`…` stands for further flags, or for a value. A flag whose value is left open has to exist. Where a line ends in `…`, or has
it between its flags, required flags are filled in.
"""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from common.flags import Config, FlagDescription, described, load_config
from common.provenance import PROJECT
from evaluation.config import EvalConfig
from tests.docs.shell import PLACEHOLDER
from training.config import TrainConfig

GAPS = ("…", "...")

# Programs that are not this project's; their words are not checked.
FOREIGN = set(
    """
    apt-get cat cd chmod conda cp curl docker gcloud git grep gsutil head hf huggingface-cli kill less
    ln ls mkdir mkdocs module mv nvidia-smi pip pip3 rm rsync ruff salloc scancel scontrol scp seq sinfo
    sleep source squeue ssh sudo sysctl tail tar tensorboard touch unzip uv watch wget
    """.split()
)
FOREIGN_MODULES = {"pip", "venv", "http.server", "tensorboard"}
WRAPPERS = {"nohup", "env"}


class Unknown(Exception):
    """A command that is neither checked nor allowed."""


def check_command(words: Sequence[str]) -> None:
    """Parse a command to its last word. The working folder holds what relative paths of config files lead to.

    Raises:
        Unknown: the command is neither known nor allowed.
        UserError, ValueError: a program would refuse it.
    """
    words = list(words)
    while words and (words[0] in WRAPPERS or re.match(r"\w+=", words[0])):
        words = words[1:]
    match words:
        case [name, *_] if name in FOREIGN:
            return
        case [("bash" | "sh"), script, *argv] if Path(script).name in SCRIPTS:
            return SCRIPTS[Path(script).name](argv)
        case [script, *argv] if script in SCRIPTS:
            return SCRIPTS[script](argv)
        case [("python" | "python3"), "-m", module, *argv]:
            return _check_module(module, argv)
        case [("python" | "python3"), "-c", code, *_]:
            compile(code, "python -c", "exec")
            return
        case [("python" | "python3"), script, *argv] if script in SCRIPTS:
            return SCRIPTS[script](argv)
        case ["pytest", *argv]:
            return _check_tests(argv)
        case ["torchrun", *argv]:
            return _check_torchrun(argv)
        case ["sbatch", *argv]:
            return _check_sbatch(argv)
    raise Unknown(f"no check is known for this command (tests/docs/commands.py): {shlex.join(words)}")


# ---------------------------------------------------------------------------------------------------- our programs
def _check_train(argv: Sequence[str]) -> None:
    import train

    _, flags = train.switches().parse_known_args(list(argv))
    load_config(TrainConfig, filled(TrainConfig, flags), switches=train.switches())


def _check_run_train(argv: Sequence[str]) -> None:
    if argv:  # else the demo
        _check_train(argv)


def _check_evaluation(argv: Sequence[str]) -> None:
    import runner_aa_eval

    flags = list(argv) if argv[:1] in (["…"], ["..."]) else runner_aa_eval.with_flag(argv)
    config = load_config(EvalConfig, filled(EvalConfig, flags))
    if config.eval.models and Path(config.eval.models).is_file():
        config.networks()


def _check_run_eval(argv: Sequence[str]) -> None:
    if argv:  # else the demo's networks
        _check_evaluation(argv)


def _check_ablation(argv: Sequence[str]) -> None:
    from ablation.__main__ import parse
    from ablation.grid import load_grid

    arguments, extra = parse([word for word in argv if word not in GAPS])
    if not is_open(str(arguments.grid)):
        extra = [flag for flag in extra if not is_open(flag)]
        grid = load_grid(arguments.grid, out=arguments.out, seeds=arguments.seeds, extra=extra)
        cell = grid.cells_of(arguments.arms)[0]
        load_config(TrainConfig, filled(TrainConfig, [*cell.train_argv(), *(["…"] if set(argv) & {*GAPS} else [])]))


def _check_tests(argv: Sequence[str]) -> None:
    for word in argv:
        if word.startswith("tests/") and not (PROJECT / word.split("::")[0]).exists():
            raise ValueError(f"{word}: no such tests")


def _check_nothing_given(argv: Sequence[str]) -> None:
    if argv:
        raise ValueError(f"takes no arguments, got {shlex.join(argv)}")


SCRIPTS: dict[str, Callable[[Sequence[str]], None]] = {
    "train.py": _check_train,
    "runner_aa_eval.py": _check_evaluation,
    "run_train.sh": _check_run_train,
    "run_eval.sh": _check_run_eval,
    "run_slurm.sh": _check_train,
    "run_ablation.sh": _check_ablation,
    "run_tests.sh": lambda argv: _check_tests(argv[1:] if argv[:1] == ["--all"] else argv),
    "demo.py": _check_nothing_given,
    "setup_env.sh": _check_nothing_given,
}


# --------------------------------------------------------------------------------------------------------- modules
def _check_module(module: str, argv: Sequence[str]) -> None:
    if module in FOREIGN_MODULES:
        return
    given = [word for word in argv if word not in GAPS]
    match module.split("."):
        case ["pytest"]:
            _check_tests(given)
        case ["ablation"]:
            _check_ablation(argv)
        case ["torch", "distributed", "run"]:
            _check_torchrun(argv)
        case ["tools", "published"]:
            _check_nothing_given(given)
        case ["zoo"]:
            _parsed(lambda: importlib.import_module("zoo.__main__").parser().parse_args(given))
        case ["tools", _] | ["ablation", "subset"]:
            _parsed(lambda: _module(module).parser().parse_args(given))
        case ["data", "prepare"] | ["benchmarks", _]:
            _parsed(lambda: _module(module).parse(given))
        case _:
            raise Unknown(f"no check is known for python -m {module} (tests/docs/commands.py)")


def _module(name: str):
    if not (PROJECT / f"{name.replace('.', '/')}.py").is_file():
        raise ValueError(f"python -m {name}: no such module")
    return importlib.import_module(name)


def _parsed(parse: Callable[[], object]) -> None:
    """Let a parser that ends the program end nothing; what it says is on standard error."""
    try:
        parse()
    except SystemExit as end:
        if end.code:
            raise ValueError("the program refuses this command line, see standard error") from None


# -------------------------------------------------------------------------------------------- what starts programs
def _check_torchrun(argv: Sequence[str]) -> None:
    from torch.distributed.run import get_args_parser

    scripts = [i for i, word in enumerate(argv) if word in SCRIPTS]
    if not scripts:
        raise ValueError("torchrun: expected a program of this project")
    options = [word for word in argv[: scripts[0]] if word not in GAPS]
    found = argparse.Namespace()
    _parsed(lambda: get_args_parser().parse_args([*options, *argv[scripts[0] :]], namespace=found))
    check_command(["python", found.training_script, *found.training_script_args])


def _check_sbatch(argv: Sequence[str]) -> None:
    for i, word in enumerate(argv):
        if word == "--wrap" or word.startswith("--wrap="):
            return check_command(shlex.split(argv[i + 1] if word == "--wrap" else word.partition("=")[2]))
        if Path(word).name == "run_slurm.sh":
            return _check_train(argv[i + 1 :])
    raise Unknown(f"sbatch: expected run_slurm.sh or --wrap, got {shlex.join(argv)}")


# ------------------------------------------------------------------------------------------------------------ gaps
def is_open(text: str) -> bool:
    return PLACEHOLDER in text or any(gap in text for gap in GAPS)


def filled(config_class: type[Config], argv: Sequence[str]) -> list[str]:
    """Return the flags without those whose value is left open and not text; required flags precede them where `…` stands."""
    flags = {flag.name: flag for flag in described(config_class)}
    complete, kept, rest = not (argv and argv[-1].endswith(GAPS)), [], list(argv)
    while rest:
        word = rest.pop(0)
        if word in GAPS:
            complete = False
            continue
        name, equals, value = word.partition("=")
        if not equals and rest and (name.removeprefix("--") in flags or name in ("--config-file", "-C")):
            value = rest.pop(0)
        if name in ("--config-file", "-C"):
            # A run's params.json, which gives all flags, is there only after the run.
            if is_open(value) or value.startswith("runs/"):
                complete = False
                continue
        elif is_open(value) and not _takes_text(flags.get(name.removeprefix("--"))):
            continue
        kept.append(f"{name}={value}" if name.startswith("--") and (equals or value) else word)
        if name == "-C":
            kept.append(value)
    if complete:
        return kept
    needed = [name for name, flag in flags.items() if flag.default == "required"]
    needed += (
        ["eval.model_in"] if "eval.model_in" in flags and not any("--eval.models" in word for word in kept) else []
    )
    return [*(f"--{name}={PLACEHOLDER}" for name in needed), *kept]


def _takes_text(flag: FlagDescription | None) -> bool:
    """Whether an open value can stay: of text, or of a flag that does not exist, which is refused later."""
    return flag is None or flag.values in ("text", "a comma-separated list, each text")
