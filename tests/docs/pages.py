"""README.md and the pages of docs/ taken apart: blocks of code, prose, headings, links, code spans.

An HTML comment on the line above a block of code says how it is tested:

    <!-- run -->                   the slow test runs it; blocks of one page run in their order, in one folder and one shell
    <!-- no test: the reason -->   only its syntax is checked
"""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.provenance import PROJECT

SHELLS = ("bash", "sh", "shell", "console")
_FENCE = re.compile(r"^ *(?P<fence>`{3,}|~{3,}) *(?P<language>[\w+-]*)")
_MARK = re.compile(r"^ *<!-- *(?P<mark>run|no test: *\S.*?) *-->\s*$")
_SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")
_LINK = re.compile(
    r"\[(?:[^\[\]]|\[[^\[\]]*\](?:\([^()]*\))?)*\]\(\s*<?([^\s()<>]+(?:\([^()]*\)[^\s()<>]*)*)>?(?:\s+\"[^\"]*\")?\s*\)"
)
_REFERENCE = re.compile(r"^ {0,3}\[[^\]]+\]:\s+<?(\S+?)>?(?:\s|$)")
_HTML_LINK = re.compile(r"<(?:a|img)\b[^>]*?\b(?:href|src)=[\"']([^\"']+)[\"']")
_HTML_ANCHOR = re.compile(r"<\w+\b[^>]*?\b(?:id|name)=[\"']([^\"']+)[\"']")


@dataclass(frozen=True)
class Block:
    """A fenced block of code; `line` is that of its first line of content, `mark` the comment above it, or empty."""

    page: str
    line: int
    language: str
    text: str
    mark: str

    @property
    def id(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def file_name(self) -> str | None:
        """The name of the file that the block shows, from a first line such as `# grid.yaml: what it does`."""
        match = re.match(r"# ([\w./-]+\.(?:ya?ml|json|txt|csv))\b", self.text)
        return match and match[1]


class Page:
    """A page's text, taken apart. `name` is its path in the project."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.lines = text.splitlines()
        self.blocks: list[Block] = []
        self.prose: list[tuple[int, str]] = []
        """Numbers and texts of the lines outside blocks of code."""
        self._take_apart()

    def _take_apart(self) -> None:
        fence, start, language, mark = "", 0, "", ""
        for number, line in enumerate(self.lines, 1):
            match = _FENCE.match(line)
            if not fence and match and "`" not in line[match.end() :]:
                above = _MARK.match(self.lines[number - 2]) if number > 1 else None
                fence, start, language, mark = match["fence"], number, match["language"], above["mark"] if above else ""
            elif fence and match and match["fence"].startswith(fence) and not line[match.end("fence") :].strip():
                text = textwrap.dedent("\n".join(self.lines[start : number - 1])) + "\n"
                self.blocks.append(Block(self.name, start + 1, language, text, mark))
                fence = ""
            elif not fence:
                self.prose.append((number, line))
        if fence:
            raise ValueError(f"{self.name}:{start}: a block of code that does not end")

    @property
    def shell_blocks(self) -> list[Block]:
        return [block for block in self.blocks if block.language in SHELLS]

    @property
    def anchors(self) -> set[str]:
        """What a link's `#…` may lead to, as GitHub names its headings."""
        seen: Counter[str] = Counter()
        found = set()
        for _, line in self.prose:
            found.update(_HTML_ANCHOR.findall(line))
            if match := re.match(r" {0,3}#{1,6}\s+(.*?)\s*#*\s*$", line):
                slug = slug_of(match[1])
                found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
                seen[slug] += 1
        return found

    def links(self) -> Iterator[tuple[int, str]]:
        """Yield the line numbers and targets of links and pictures, other sites' too."""
        for number, line in self.prose:
            plain = _SPAN.sub(lambda match: "x" * len(match[0]), line)
            for pattern in (_LINK, _REFERENCE, _HTML_LINK):
                for match in pattern.finditer(plain):
                    yield number, match[1]
            # a picture that is a link's text
            for match in re.finditer(r"\[!\[[^\]]*\]\(([^\s()]+)\)\]", plain):
                yield number, match[1]

    def code_spans(self) -> Iterator[tuple[int, str]]:
        for number, line in self.prose:
            for match in _SPAN.finditer(line):
                yield number, match[2].strip()

    def comment_lines(self) -> set[int]:
        """Numbers of the prose lines that are nothing but an HTML comment."""
        return {number for number, line in self.prose if re.fullmatch(r"\s*<!--.*-->\s*", line)}


def slug_of(heading: str) -> str:
    """Return the anchor that GitHub gives a heading that is the first of its name."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)  # links and pictures count with their text
    text = re.sub(r"<[^>]+>", "", text)
    text = re.sub(r"(\*\*|\*|(?<!\w)_(?=\S)|(?<=\S)_(?!\w))", "", text.replace("`", ""))
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


def project_pages() -> dict[str, Page]:
    """Return README.md and the pages of docs/, by their paths in the project."""
    paths = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
    return {name: Page(name, Path(PROJECT / name).read_text(encoding="utf-8")) for name in map(_relative, paths)}


def _relative(path: Path) -> str:
    return path.relative_to(PROJECT).as_posix()
