"""Entry points for torch.hub: `torch.hub.load("<project folder>", "robust", name, source="local")`."""

import sys
from pathlib import Path

dependencies = ["torch", "torchvision", "timm", "safetensors"]


def robust(name, **options):
    """Load a robust network by name, file or run folder; arguments and result as in `zoo.robust.load_robust_model`."""
    _check_modules()
    from zoo.robust import load_robust_model

    return load_robust_model(name, **options)


def _check_modules():
    """Check that no foreign module has the name of one of this project's packages; Python would import that one."""
    folder = Path(__file__).resolve().parent
    for name in ("attacks", "common", "data", "evaluation", "training", "utils_architecture", "zoo"):
        if (module := sys.modules.get(name)) is not None:
            place = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", [])), "no file")
            if not Path(place).resolve().is_relative_to(folder):
                raise ImportError(
                    f"expected the module {name} of {folder}, but this program has imported another one from {place}."
                )
