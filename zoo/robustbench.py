"""Access to RobustBench: import of the package with the installed AutoAttack, and its ImageNet Linf models by id."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from common.errors import UserError


def import_robustbench() -> ModuleType:
    """Import the package robustbench.

    It imports a package `autoattack`, whose name on PyPI is `pyautoattack`. If `autoattack` is missing, `pyautoattack` is
    registered under this name, but only during the import: other code must not find it under a wrong name.

    Raises:
        UserError: robustbench or one of its imports is not installed.
    """
    if (imported := sys.modules.get("robustbench")) is not None:
        return imported
    aliases = {}
    try:
        if importlib.util.find_spec("autoattack") is None:
            for name in ("autoattack", "autoattack.state"):
                aliases[name] = sys.modules[name] = importlib.import_module(f"py{name}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on deprecated names used by robustbench and its models
            return importlib.import_module("robustbench")
    except ImportError as error:
        raise UserError(
            f"RobustBench cannot be imported: {error}. Try: pip install robustbench pyautoattack."
        ) from error
    finally:
        for name in aliases:
            sys.modules.pop(name, None)


def robustbench_entry(robustbench_id: str) -> Mapping[str, Any]:
    """Return RobustBench's entry of an ImageNet Linf model: `model` (builds it with random weights), `gdrive_id`, and more.

    Raises:
        UserError: the id is unknown, or the model is not a single network with one weights file at RobustBench.
    """
    import_robustbench()
    enums = importlib.import_module("robustbench.model_zoo.enums")
    registry = importlib.import_module("robustbench.model_zoo").model_dicts
    models = registry[enums.BenchmarkDataset.imagenet][enums.ThreatModel.Linf]
    if robustbench_id not in models:
        near = difflib.get_close_matches(robustbench_id, models, n=3, cutoff=0.5)
        raise UserError(
            f"RobustBench has no ImageNet model for Linf with the id {robustbench_id!r}; "
            f"{'the nearest are' if near else 'there are'} {', '.join(near or sorted(models))}."
        )
    entry = models[robustbench_id]
    # Without a gdrive_id, `model` downloads weights from elsewhere; with a list of ids, the model is an ensemble.
    if not isinstance(entry["gdrive_id"], str) or not entry["gdrive_id"]:
        raise UserError(
            f"{robustbench_id}: expected a model with one weights file at RobustBench; this one is an ensemble, or its weights "
            f"are stored elsewhere. robustbench.load_model({robustbench_id!r}, dataset='imagenet', threat_model='Linf') loads it."
        )
    return entry
