"""Fixtures that several rooms' tests use."""

from __future__ import annotations

import functools
import os

# Two busy test processes on one machine slow each other down tenfold if OpenMP's threads spin while they wait. This has to be
# set before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import pytest

import common.provenance
from tests.training.helpers import write_images


@pytest.fixture(autouse=True)
def _curves(request, monkeypatch):
    """A small run's picture takes longer than its training: only tests marked `curves` draw it."""
    if request.node.get_closest_marker("curves") is None:
        monkeypatch.setattr("training.run_folder.draw_curves", lambda log, picture: None)


@pytest.fixture(autouse=True, scope="session")
def _commit_found_once():
    """A run starts git twice to find its commit, which the runs of one test process share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.provenance, "commit", functools.cache(common.provenance.commit))
        yield


# Modules that test what happens to files when the machine or the disk fails.
SYNCED = {"test_checkpoint.py", "test_run_folder.py"}


@pytest.fixture(autouse=True, scope="module")
def _files_not_synced(request):
    """A test's files need not outlive the machine: writing them through to the disk takes 5 % of a small run."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.name not in SYNCED:
            patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder with train/ and val/ of four classes, 24 and 8 images of 20 × 20 pixels; not to be changed."""
    return write_images(tmp_path_factory.mktemp("images"))
