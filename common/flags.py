"""Command lines: the fields of frozen dataclasses become fastargs sections and `--section.name` flags.

A field defines default, meaning and check of a flag (`flag`). `load_config` turns a command line and YAML files into one frozen
object, or raises a `UserError` with the flag, what was expected and what came. The rest of the project receives these plain
dataclasses and never sees fastargs. Order of precedence: command line, later config files, earlier config files, default.
Environment variables are not read.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import operator
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import fastargs
import fastargs.validation
import yaml

from common.errors import Problems, UserError, blame
from common.provenance import PROVENANCE_KEY

ConfigT = TypeVar("ConfigT", bound="Config")
REQUIRED: Any = dataclasses.MISSING


def flag(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    harmless: bool = False,
) -> Any:
    """Declare one flag as a dataclass field.

    Args:
        default: value when it is not given; `dataclasses.MISSING` makes the flag required.
        help: meaning, with units.
        choices: the allowed strings.
        at_least, at_most, above: bounds of a number, the last one exclusive.
        harmless: the flag cannot change the trained weights; it is not part of the run's name.
    """
    checks = {"choices": choices, "at_least": at_least, "at_most": at_most, "above": above}
    return field(default=default, metadata={"help": help, "harmless": harmless, **checks})


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole command line. The other fields are its sections.

    `given`: dotted names of the flags set on the command line or in a file; `typed`: those set on the command line.
    """

    given: frozenset[str] = field(default=frozenset(), compare=False)
    typed: frozenset[str] = field(default=frozenset(), compare=False)

    def problems(self) -> list[str]:
        """Return a sentence for each conflict between flags."""
        return []


# --- values -----------------------------------------------------------------------------------------------------------


def _number(text: Any) -> float:
    above, slash, below = str(text).partition("/")
    value = float(above) / float(below) if slash else float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _switch(text: Any) -> bool:
    return {"0": False, "1": True, "false": False, "true": True}[str(text).lower()]


# Type of a flag → converter from text or a YAML value, YAML types to reject, description in messages.
_SCALARS = {
    int: (int, (bool, float), "an integer"),
    float: (_number, bool, "a number or a fraction such as 4/255"),
    bool: (_switch, (), "0 or 1"),
    str: (str, (bool, dict, list), "text"),
}
# Name of a bound → description in messages, comparison that a valid value satisfies.
_BOUNDS = {"above": ("above", operator.gt), "at_least": ("at least", operator.ge), "at_most": ("at most", operator.le)}


class _FlagChecker(fastargs.validation.Checker):
    """A flag's check in fastargs' form: converts text or YAML values to the field's type and checks its bounds."""

    def __init__(self, annotation: Any, meta: typing.Mapping[str, Any]) -> None:
        # "… | None": the value may be empty in a file, because "unset" has its own meaning.
        self.optional = isinstance(annotation, types.UnionType)
        if self.optional:
            annotation = typing.get_args(annotation)[0]
        self.many = typing.get_origin(annotation) is tuple
        scalar = typing.get_args(annotation)[0] if self.many else annotation
        self.convert, self.refused, self.kind = _SCALARS[scalar]
        self.meta = meta

    def check(self, value: Any) -> Any:
        if not self.many:
            return self._check_one(value)
        items = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
        return tuple(self._check_one(item.strip() if isinstance(item, str) else item) for item in items)

    def _check_one(self, value: Any) -> Any:
        meta = self.meta
        if "1" in (meta["choices"] or ()):  # a switch with more than two values
            value = {"true": "1", "false": "0"}.get(str(value).lower(), value)
        if isinstance(value, self.refused):
            raise ValueError
        result = self.convert(value)
        if meta["choices"] is not None and result not in meta["choices"]:
            raise ValueError
        if not all(keeps(result, meta[key]) for key, (_, keeps) in _BOUNDS.items() if meta[key] is not None):
            raise ValueError
        return result

    def help(self) -> str:
        meta = self.meta
        words = [f"one of {', '.join(meta['choices'])}" if meta["choices"] else self.kind]
        words += [f"{word} {meta[key]:g}" for key, (word, _) in _BOUNDS.items() if meta[key] is not None]
        return ("a comma-separated list, each " if self.many else "") + ", ".join(words)

    def complaint(self, value: Any) -> str:
        """Return the message for a value that `check` rejects."""
        near = difflib.get_close_matches(str(value), self.meta["choices"] or (), n=1, cutoff=0.3)
        return f"expected {self.help()}, got {value!r}{f' (did you mean {near[0]}?)' if near else ''}."


# --- reading ----------------------------------------------------------------------------------------------------------


def load_config(
    config_class: type[ConfigT],
    argv: Sequence[str],
    *,
    switches: argparse.ArgumentParser | None = None,
    problems: Problems | None = None,
) -> ConfigT:
    """Read a command line (without the program's name) and its config files.

    Args:
        switches: options that the caller has already read; `--help` lists them too.
        problems: collects the problems, so that the caller can find more; wrong flags then get their defaults. Missing flags
            and unreadable files are raised in any case.

    Raises:
        UserError: unknown flag or key, missing required flag, wrong type or range, unreadable file.
        SystemExit: status 0 after `--help`.
    """
    config = _fastargs_config(config_class)
    arguments, unknown = _parser(config, config_class.__doc__, switches).parse_known_args(list(argv))
    values = vars(arguments)
    report, problems, given = problems is None, problems or Problems(), set()
    for path in values.pop("config_file", []):
        with problems.caught(), blame("--config-file"):
            content, set_in_file = _read_config_file(Path(path).absolute(), config)
            config.collect(content)
            given |= set_in_file
    problems.report()  # otherwise flags in an unreadable file would be reported as missing
    for option in unknown[:1]:  # the next one may be its value
        options = ["--config-file", *(f"--{'.'.join(path)}" for path in config.entries)]
        problems.found.append(f"command line: unknown flag {option!r}{_did_you_mean(option.split('=')[0], options)}.")
    config.collect(values)
    wrong = _check(config, problems)
    sections = {}
    for name, cls in sections_of(config_class):
        fields = dataclasses.fields(cls)
        sections[name] = cls(
            **{f.name: f.default if (name, f.name) in wrong else config[(name, f.name)] for f in fields}
        )
    loaded = config_class(**sections, given=frozenset(given | values.keys()), typed=frozenset(values))
    # A default in place of a wrong value may conflict with other flags; that is not reported.
    names = list(map(".".join, wrong))
    problems.found += [text for text in loaded.problems() if not any(name in text for name in names)]
    if report:
        problems.report()
    return loaded


def config_to_dict(config: Any) -> dict[str, dict[str, Any]]:
    """Return sections → flags → plain values, as written to params.json and accepted as a config file."""
    return {name: dataclasses.asdict(getattr(config, name)) for name, _ in sections_of(type(config))}


@dataclass(frozen=True)
class FlagDescription:
    """One flag in words: `name` is `section.name`, `values` says what it takes, `default` is "required" where there is none."""

    section: str
    name: str
    values: str
    default: str
    help: str
    harmless: bool


def described(config_class: type) -> Iterator[FlagDescription]:
    """Yield all flags of a configuration, in the order of its sections."""
    for section, cls in sections_of(config_class):
        params = _params(cls)
        for f in dataclasses.fields(cls):
            param = params[f.name]
            yield FlagDescription(
                section=section,
                name=f"{section}.{f.name}",
                values=param.checker.help(),
                default="required" if param.required else _shown(param.default),
                help=param.desc,
                harmless=f.metadata["harmless"],
            )


def sections_of(config_class: type) -> list[tuple[str, type]]:
    """Return the names and dataclasses of a configuration's sections."""
    return [(name, cls) for name, cls in typing.get_type_hints(config_class).items() if dataclasses.is_dataclass(cls)]


def _fastargs_config(config_class: type) -> fastargs.Config:
    config = fastargs.Config()
    for name, cls in sections_of(config_class):
        fastargs.Section(name, cls.__doc__, config_descriptor=config).params(**_params(cls))
    return config


def _params(section: type) -> dict[str, fastargs.Param]:
    hints = typing.get_type_hints(section)
    return {
        f.name: fastargs.Param(
            _FlagChecker(hints[f.name], f.metadata),
            f.metadata["help"],
            default=None if f.default is REQUIRED else f.default,
            required=f.default is REQUIRED,
        )
        for f in dataclasses.fields(section)
    }


def _check(config: fastargs.Config, problems: Problems) -> set[tuple[str, str]]:
    """Record missing and wrong flags and return the wrong ones. Raises if a required flag is missing or wrong."""
    missing = [p for p, param in config.entries.items() if param.required and config.content.get(p) is None]
    if missing:
        names = ", ".join(sorted(map(".".join, missing)))
        problems.found.append(f"{names}: required, but given neither as a flag nor in a config file.")
    wrong = config.validate(mode="errordict").keys() - set(missing)
    for path in sorted(wrong):
        problems.found.append(f"{'.'.join(path)}: {config.entries[path].checker.complaint(config.content[path])}")
    if missing or any(config.entries[path].required for path in wrong):
        problems.report()
    return wrong


def converted(section: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Check and convert the values of some fields of a section, as read from a YAML file.

    Raises:
        UserError: an unknown key, or a value of wrong type or range.
    """
    params = _params(section)
    values = {}
    for key, value in given.items():
        if key not in params:
            raise UserError(f"unknown key {key!r}{_did_you_mean(str(key), list(params))}.")
        try:
            values[key] = params[key].checker.check(value)
        except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
            raise UserError(f"{key}: {params[key].checker.complaint(value)}") from error
    return values


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"command line: {message}.")


def _parser(
    config: fastargs.Config, description: str | None, switches: argparse.ArgumentParser | None
) -> argparse.ArgumentParser:
    parser = _Parser(
        usage="%(prog)s [--config-file FILE] [--section.name=value …]",
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # the result contains only what was given
        parents=[] if switches is None else [switches],
    )
    parser.add_argument(
        "--config-file", "-C", action="append", metavar="FILE", help="YAML or JSON file of flags; may be repeated"
    )
    for section, paths in config.sections_to_entries.items():
        group = parser.add_argument_group(".".join(section), config.sections[section].desc)
        for path in paths:
            param = config.entries[path]
            default = "required" if param.required else f"default {_shown(param.default)}"
            text = f"{param.desc} ({param.checker.help()}; {default})"
            group.add_argument(f"--{'.'.join(path)}", metavar="V", help=text.replace("%", "%%"))
    return parser


def _shown(default: Any) -> str:
    if default is None:
        return "unset"
    if isinstance(default, tuple):
        return ",".join(map(str, default)) or "empty"
    return str(int(default) if isinstance(default, bool) else default) or "empty"


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; the nearest known one is {near[0]!r}" if near else ""


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader, which also rejects duplicate keys (instead of taking the last) and values that contain themselves."""

    def construct_document(self, node: yaml.Node) -> Any:
        self.deep_construct = True  # otherwise a list or mapping may become an item of itself
        return super().construct_document(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for i, key in enumerate(keys) if key in keys[:i]]
        if twice:
            raise yaml.YAMLError(f"the key {twice[0]!r} is given twice")
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML or JSON file; raises UserError if it cannot be read or has a duplicate key."""
    try:
        return yaml.load(path.read_text(), _UniqueKeys)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
    except RecursionError as error:
        raise UserError(f"{path}: expected YAML or JSON; it is nested too deeply.") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, or a date such as 2024-13-01
        raise UserError(f"{path}: expected YAML or JSON; {' '.join(str(error).split())}.") from error


def _read_config_file(path: Path, config: fastargs.Config) -> tuple[dict[str, Any], set[str]]:
    """Return dotted flag names → values of a YAML or JSON file; nested sections and dotted keys are both allowed.

    Also returns the names of the flags that a person set, because a run's params.json contains all flags.
    """
    content = read_yaml(path)
    if content is None:
        return {}, set()
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected sections with flags, got {type(content).__name__}.")
    provenance = content.pop(PROVENANCE_KEY, None)
    params = {".".join(name): param for name, param in config.entries.items()}
    values: dict[str, Any] = {}
    for section, flags in content.items():
        if flags is None and (section,) in config.sections:
            continue  # a section whose flags are all commented out
        values.update(
            {f"{section}.{k}": v for k, v in flags.items()} if isinstance(flags, dict) else {str(section): flags}
        )
    for name, value in values.items():
        if name not in params:
            raise UserError(f"{path}: unknown key {name!r}{_did_you_mean(name, list(params))}.")
        if (value is None and not params[name].checker.optional) or isinstance(value, dict):
            raise UserError(f"{path}: {name} has no value; give one, or delete the line.")
    if provenance is None:
        return values, set(values)
    # A value that differs from its default was given, or set by the run for its device. Values without default do not count,
    # because the run may have set them for its machine.
    given = {name for name, value in values.items() if params[name].default not in (None, value)}
    given |= set(provenance.get("given", ())) if isinstance(provenance, dict) else set()
    return values, values.keys() & given
