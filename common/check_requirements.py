"""Check whether the running Python meets requirements.txt. Only metadata are read, in a fraction of a second.

    python -m common.check_requirements requirements.txt

Exits with status 0 if it does. Otherwise exits with status 1 and prints one line per unmet requirement to standard
error. Needs only the standard library and either `packaging` or pip, which contains a copy of it. Without either,
no requirement counts as met.
"""

from __future__ import annotations

import sys
from pathlib import Path

from common.provenance import installed_version

OLDEST_PYTHON = (3, 10)


def read_requirements(path: Path) -> list[str]:
    """Return the requirements of a file in pip's format, one string each, without comments and empty lines."""
    lines = (line.split("#", maxsplit=1)[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def unmet_requirements(lines: list[str]) -> list[str]:
    """Return one sentence for each requirement (PEP 508) that the running Python does not meet.

    Requirements whose marker excludes this Python count as met. Pre-releases are compared by version order,
    because vendors' builds of PyTorch carry such versions (`2.7.0a0+...` meets `torch>=2.6`).
    """
    try:
        from packaging.requirements import Requirement
    except ImportError:
        try:
            from pip._vendor.packaging.requirements import Requirement
        except ImportError:
            return ["neither packaging nor pip is installed"]
    problems = []
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        version = installed_version(requirement.name)
        if version is None:
            problems.append(f"{requirement.name} is not installed")
        elif not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{requirement.name} {version} is installed, {requirement.specifier} is needed")
    return problems


def main(path: Path) -> int:
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        problems = [f"this is Python {sys.version.split()[0]}, {oldest} or newer is needed"]
    else:
        problems = unmet_requirements(read_requirements(path))
    print(*problems, sep="\n", end="\n" if problems else "", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
