"""Fixtures shared by the tests of several packages."""

from __future__ import annotations

import functools
import os

# Waiting OpenMP threads spin, which slows down two busy test processes on one machine tenfold. Set before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import pytest

import common.provenance
from tests.training.helpers import write_images


@pytest.fixture(autouse=True)
def _curves(request, monkeypatch):
    """Draw curves only in tests marked `curves`: the plot of a small run takes longer than its training."""
    if request.node.get_closest_marker("curves") is None:
        monkeypatch.setattr("training.run_folder.draw_curves", lambda log, picture: None)


@pytest.fixture(autouse=True, scope="session")
def _commit_found_once():
    """Find the commit once per test process; otherwise each run starts git twice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.provenance, "commit", functools.cache(common.provenance.commit))
        yield


# Modules that test files after a failure of the machine or the disk.
SYNCED = {"test_checkpoint.py", "test_run_folder.py"}


@pytest.fixture(autouse=True, scope="module")
def _files_not_synced(request):
    """Disable fsync, which takes 5 % of a small run: the files of tests need not survive a failure of the machine."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.name not in SYNCED:
            patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Return a folder with train/ and val/: four classes, 24 and 8 images of 20 × 20 pixels; tests must not change it."""
    return write_images(tmp_path_factory.mktemp("images"))
