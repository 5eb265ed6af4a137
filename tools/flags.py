"""docs/flags.md: all flags of train.py and runner_aa_eval.py, made from their declarations.

python -m tools.flags              writes the page
python -m tools.flags --check      exits with status 1 if the page is not current, and writes nothing
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from common.files import write_atomically
from common.flags import Config, FlagDescription, described, sections_of
from common.provenance import PROJECT
from common.tables import markdown_table
from evaluation.config import EvalConfig
from training.config import TrainConfig

PAGE = PROJECT / "docs" / "flags.md"

HEAD = """\
# All flags

Flags are `--section.name=value`, and `--config-file FILE` reads them from YAML or JSON (it may be given several times).
A flag on the command line beats the files, a later file beats an earlier one, and any file beats the default.
Numbers that need not be whole may be fractions such as 4/255.

For example, this is the recipe of the file with fewer epochs:

<!-- run -->
```bash
python train.py --config-file configs/demo_clean.yaml --training.epochs=2
```

This page is written by `python -m tools.flags`. Both programs print the same with `--help`.
"""

TRAINING = """\
## Flags of train.py

`--check` checks flags, files and folders and starts nothing. `--where` prints the run's folder.
A flag marked \\* is not part of the run's name.
"""

EVALUATION = """\
## Flags of runner_aa_eval.py

Words before the first flag are networks, as in `eval.model_in`.
"""


def page() -> str:
    """Return the content of docs/flags.md."""
    training = _tables("train.py", TrainConfig, marked=True)
    evaluation = _tables("runner_aa_eval.py", EvalConfig, marked=False)
    return "\n".join([HEAD, TRAINING, *training, EVALUATION, *evaluation])


def _tables(program: str, config_class: type[Config], *, marked: bool) -> list[str]:
    """Return a heading and a table for each section."""
    flags = list(described(config_class))
    parts = []
    for section, cls in sections_of(config_class):
        summary = (cls.__doc__ or "").split("\n\n")[0]
        rows = [_row(flag, marked=marked) for flag in flags if flag.section == section]
        parts.append(f"### {program}: {section}\n\n{_escaped(summary)}\n\n{markdown_table(rows)}\n")
    return parts


def _row(flag: FlagDescription, *, marked: bool) -> dict[str, str]:
    mark = " \\*" if marked and flag.harmless else ""
    words = flag.default in ("required", "unset", "empty")
    plain = flag.values == "text" or (flag.values == "0 or 1" and flag.help.startswith("1:"))
    values = "" if plain else f" ({flag.values.replace(' or a fraction such as 4/255', '')})"
    return {
        "flag": f"`{flag.name}`{mark}",
        "default": flag.default if words else f"`{flag.default}`",
        "meaning": _escaped(flag.help + values),
    }


def _escaped(text: str) -> str:
    """Return Markdown that shows the text as it stands; `markdown_table` escapes the bars."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("*", "\\*").replace("`", "\\`")


def is_current(path: Path) -> bool:
    """Return whether the file holds the present flags."""
    return path.is_file() and path.read_text(encoding="utf-8") == page()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m tools.flags", description="Write docs/flags.md.", allow_abbrev=False)
    made.add_argument("--check", action="store_true", help="exit with status 1 if the page is not current")
    return made


def main(argv: Sequence[str]) -> int:
    """Run one command line (without the program's name) and return the exit status."""
    if parser().parse_args(argv).check:
        if is_current(PAGE):
            return 0
        print(f"{PAGE} is not current: run `python -m tools.flags`.", file=sys.stderr)
        return 1
    write_atomically(PAGE, lambda file: file.write(page().encode()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
