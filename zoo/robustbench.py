"""RobustBench's package: imported with the AutoAttack that is installed, and its ImageNet models for Linf by their ids."""

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
    """The package robustbench.

    It imports a package `autoattack`, which PyPI has as `pyautoattack`. Where the first is missing, the second goes by its name
    for as long as the import takes, so that nobody else finds it under a name it does not have.

    Raises:
        UserError: robustbench, or something that it imports, is not installed.
    """
    if (imported := sys.modules.get("robustbench")) is not None:
        return imported
    aliases = {}
    try:
        if importlib.util.find_spec("autoattack") is None:
            for name in ("autoattack", "autoattack.state"):
                aliases[name] = sys.modules[name] = importlib.import_module(f"py{name}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about deprecated names that robustbench and its models use
            return importlib.import_module("robustbench")
    except ImportError as error:
        raise UserError(
            f"RobustBench cannot be imported: {error}. Try: pip install robustbench pyautoattack."
        ) from error
    finally:
        for name in aliases:
            sys.modules.pop(name, None)


def robustbench_entry(robustbench_id: str) -> Mapping[str, Any]:
    """What RobustBench lists for an ImageNet model for Linf: `model`, which builds it with random weights, `gdrive_id`, and more.

    Raises:
        UserError: no such id, or a model that is not one network with one file of weights at RobustBench.
    """
    import_robustbench()
    enums = importlib.import_module("robustbench.model_zoo.enums")
    registry = importlib.import_module("robustbench.model_zoo").model_dicts
    models = registry[enums.BenchmarkDataset.imagenet][enums.ThreatModel.Linf]
    if robustbench_id not in models:
        near = difflib.get_close_matches(robustbench_id, models, n=3, cutoff=0.5)
        raise UserError(
            f"RobustBench has no ImageNet model for Linf named {robustbench_id!r}; "
            f"{'the nearest are' if near else 'there are'} {', '.join(near or sorted(models))}."
        )
    entry = models[robustbench_id]
    # Without an id, building the network downloads its weights from elsewhere; with a list of them it is an ensemble.
    if not isinstance(entry["gdrive_id"], str) or not entry["gdrive_id"]:
        raise UserError(
            f"{robustbench_id}: expected a model with one file of weights at RobustBench; this one is an ensemble, or its weights "
            f"are kept elsewhere. robustbench.load_model({robustbench_id!r}, dataset='imagenet', threat_model='Linf') loads it."
        )
    return entry
