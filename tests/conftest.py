"""Fixtures that several rooms' tests use."""

from __future__ import annotations

import os

# Two busy test processes on one machine slow each other down tenfold if OpenMP's threads spin while they wait. This has to be
# set before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import pytest

from tests.training.helpers import write_images


@pytest.fixture(autouse=True)
def _curves(request, monkeypatch):
    """A small run's picture takes longer than its training: only tests marked `curves` draw it."""
    if request.node.get_closest_marker("curves") is None:
        monkeypatch.setattr("training.log.draw_curves", lambda log, picture: None)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder with train/ and val/ of four classes, 24 and 8 images of 20 × 20 pixels; not to be changed."""
    return write_images(tmp_path_factory.mktemp("images"))
