"""The measurements on a GPU in docs/performance.md, made from benchmarks/results/gpu.json.

python -m tools.measured            writes them between the page's marks
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.files import write_atomically
from common.provenance import PROJECT
from common.tables import markdown_table

PAGE, RESULTS = PROJECT / "docs" / "performance.md", PROJECT / "benchmarks" / "results" / "gpu.json"
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"
STEP = "step_"


def section(results: Path) -> str:
    """Return the text between the marks; `results`: the gpu.json of `python -m benchmarks.gpu`, which may not exist."""
    if not results.exists():
        return "Not measured yet.\n"
    content = json.loads(results.read_text())
    steps = [line for part in content["parts"] if part["part"].startswith(STEP) for line in _steps(part)]
    others = [
        {"figure": r["name"], "value": _number(r), "unit": r["unit"], "note": r["note"]}
        for part in content["parts"]
        if not part["part"].startswith(STEP)
        for r in part["rows"]
    ]
    missing = [f"- {part['part']}: {part['reason']}" for part in content["parts"] if part["reason"]]
    trial = "A small trial, of which only the form counts. " if content["trial"] else ""
    head = f"{trial}{content['device']}, PyTorch {content['versions']['torch']}, {content['started'][:10]}.\n"
    tables = [markdown_table(rows) + "\n" for rows in (steps, others) if rows]
    lacking = ["Not measured:\n", "\n".join(missing) + "\n"] if missing else []
    return "\n".join([head, *tables, *lacking])


def _steps(part: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return a line for each kind of step of a network: the published design, and each form with and without reuse."""
    arch, rows = part["part"].removeprefix(STEP), {r["name"]: r for r in part["rows"]}
    prefix, lines = "images_per_second_", []
    for name in rows:
        kind = name.removeprefix(prefix).removesuffix(f"_{arch}")
        if not name.startswith(prefix) or not rows[name]["figure"]:
            continue
        ratio, mfu, memory = (rows.get(f"{what}_{kind}_{arch}") for what in ("time_ratio", "mfu", "peak_memory"))
        lines.append(
            {
                "network": arch,
                "step": kind.replace("_", " "),
                "images/s": _number(rows[name]),
                "time against published": _number(ratio),
                "MFU": f"{mfu['figure']:.0%}" if mfu else "",
                "memory per step": f"{memory['figure'] / 1024:.1f} GiB" if memory else "",
            }
        )
    return lines


def _number(entry: Mapping[str, Any] | None) -> str:
    return "" if entry is None else "not measured" if entry["figure"] is None else f"{entry['figure']:.4g}"


def page(text: str, results: Path) -> str:
    """Return the page `text` with the section of `results` between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{section(results)}\n{END}{after}"


def parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=__doc__.split("\n")[0])


def main(argv: Sequence[str]) -> None:
    parser().parse_args(argv)
    text = page(PAGE.read_text(), RESULTS)
    write_atomically(PAGE, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main(sys.argv[1:])
