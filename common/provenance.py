"""Provenance of results: commit, versions, devices, command line."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

# Top-level key of params.json that is not a section of flags. Config files may contain it, so that params.json is one.
PROVENANCE_KEY = "provenance"
PROJECT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "fastargs", "pyautoattack", "autoattack", "robustbench")


def provenance() -> dict[str, Any]:
    """Return commit (with "+changes" if files differ from it), versions, devices, command line and time of this process."""
    import torch  # here, because command lines need only the constants of this module

    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    else:
        devices = [f"{platform.processor() or platform.machine()} CPU, {os.cpu_count()} cores"]
    return {
        "command": [sys.executable, *sys.argv],
        "commit": commit(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := installed_version(name)) is not None},
        "devices": devices,
        "threads": torch.get_num_threads(),
    }


def installed_version(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed, or only incompletely."""
    try:
        return importlib.metadata.metadata(package).get("Version")
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the commit of the project's checkout; None outside git."""
    head = _git("rev-parse", "HEAD")
    return head and head + ("+changes" if _git("status", "--porcelain") else "")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(PROJECT), *arguments], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
