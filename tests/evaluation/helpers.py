"""AutoAttack with fewer iterations and targets, to save time; also in the worker processes of an evaluation."""

from __future__ import annotations

from typing import Any

import evaluation.autoattack
import evaluation.worker

_ENGINE, _SETUP = evaluation.autoattack.standard_autoattack, evaluation.worker.setup


def shorten(engine: Any) -> Any:
    """The same attacks, shorter."""
    for attack in (engine.apgd, engine.apgd_targeted, engine.fab):
        attack.n_iter = 10
    for attack in (engine.apgd_targeted, engine.fab):
        attack.n_target_classes = min(attack.n_target_classes, 3)
    engine.square.n_queries = 200
    return engine


def short_autoattack(*args: Any, **kwargs: Any) -> Any:
    """In the place of `evaluation.autoattack.standard_autoattack`."""
    return shorten(_ENGINE(*args, **kwargs))


def short_setup(*args: Any) -> Any:
    """In the place of `evaluation.worker.setup`."""
    evaluation.autoattack.standard_autoattack = short_autoattack
    return _SETUP(*args)


def shorten_evaluations(patch: Any) -> None:
    """In this process and in the workers of its evaluations; `patch` is pytest's monkeypatch."""
    patch.setattr(evaluation.autoattack, "standard_autoattack", short_autoattack)
    patch.setattr(evaluation.worker, "setup", short_setup)
