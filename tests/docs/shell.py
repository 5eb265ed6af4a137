"""The commands of shell blocks, as bash would start them: bash runs a block and writes down programs instead of starting them.

So continuation lines, comments, quotes, variables, arrays and loops are bash's own work. No program is found on the empty PATH.
A program that is "called" succeeds and prints the word `placeholder`, for `$(…)`.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.docs.pages import Block

PLACEHOLDER = "placeholder"
SECONDS = 20  # for one block

# What one record holds, each followed by a zero byte: number of words, line, words.
_PRELUDE = r"""
exec 9>>"$RECORD"
record() { printf '%s\0' "$#" "${BASH_LINENO[1]}" "$@" >&9; }
command_not_found_handle() { record "$@"; echo placeholder; }
cd() { record cd "$@"; }
source() { record source "$@"; }
cat() {
    record cat "$@"
    if [ $# != 0 ]; then echo placeholder; return; fi
    while IFS= read -r text; do printf '%s\n' "$text"; done
}
"""


@dataclass(frozen=True)
class Command:
    """A command with its words as the program gets them, and the line in the page where it begins."""

    page: str
    line: int
    words: tuple[str, ...]

    @property
    def id(self) -> str:
        return f"{self.page}:{self.line}"


def plain(text: str) -> str:
    """Return a block's text with words for `<…>`, and without paths of programs that lie in the project."""
    text = re.sub(r"<[A-Za-z](?:[\w .,:/-]*[\w.…])?>", PLACEHOLDER, text)
    return re.sub(r"(^|(?<=[\s;&|(]))(\./|\.venv/bin/)(?=\w)", "", text, flags=re.MULTILINE)


def syntax_error(block: Block) -> str:
    """Return what bash says of the block's syntax; empty if it has no objection."""
    return subprocess.run(["bash", "-n"], input=plain(block.text), capture_output=True, text=True).stderr


def recorded(block: Block, folder: Path) -> tuple[list[Command], str]:
    """Return the commands of a block, in order and each once, and what bash complained about.

    `folder`: bash works there, and may write files there.
    """
    with tempfile.TemporaryDirectory() as place:
        prelude, script, record = (Path(place) / name for name in ("prelude", "block", "record"))
        prelude.write_text(_PRELUDE)
        script.write_text(plain(block.text), encoding="utf-8")
        record.touch()
        environment = {"PATH": "/nonexistent", "LC_ALL": "C.UTF-8", "BASH_ENV": str(prelude), "RECORD": str(record)}
        try:
            done = subprocess.run(
                [_bash(), str(script)],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=SECONDS,
            )
            lines = done.stderr.decode().replace(f"{script}: ", "").splitlines()
            complaint = "\n".join(line for line in lines if ": [: " not in line)  # of variables that the reader sets
        except subprocess.TimeoutExpired:
            complaint = f"bash has not come to the end of the block after {SECONDS} seconds"
        fields = record.read_bytes().decode().split("\0")[:-1]
    commands = []
    while fields:
        count, line = int(fields[0]), int(fields[1])
        commands.append(Command(block.page, block.line + line - 1, tuple(fields[2 : 2 + count])))
        fields = fields[2 + count :]
    commands.sort(key=lambda command: command.line)  # those with & come when they like
    return list(dict.fromkeys(commands)), complaint


def _bash() -> str:
    return next(path for path in ("/bin/bash", "/usr/bin/bash", "/usr/local/bin/bash") if os.access(path, os.X_OK))


def missed(block: Block, commands: list[Command]) -> list[str]:
    """Return the programs of this project that the block names more often than bash has called them."""
    code = re.sub(r"(^|\s)#.*$", "", plain(block.text), flags=re.MULTILINE)
    called = "\n".join(" ".join(command.words) for command in commands)
    programs = set(re.findall(r"\b(?:\w+\.py|run_\w+\.sh|python3? -m [\w.]+)", code))
    return sorted(program for program in programs if code.count(program) > called.count(program))
