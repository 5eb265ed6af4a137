"""torch.hub's door: `torch.hub.load("<folder of the project>", "robust", name, source="local")` from anywhere."""

dependencies = ["torch", "torchvision", "timm", "safetensors"]


def robust(name, **options):
    """A ready robust network by name, file or run folder; arguments and result as in `zoo.robust.load_robust_model`."""
    from zoo.robust import load_robust_model

    return load_robust_model(name, **options)
