"""Names and default radii of the threat models. Imports no PyTorch: command lines need them."""

from __future__ import annotations

from common.errors import UserError

# Radius used where no eps is given, in units of pixels in [0, 1] (ImageNet threat models of the paper, Section 2).
DEFAULT_EPS = {"Linf": 4 / 255, "L2": 2.0, "L1": 75.0}
NORMS = tuple(DEFAULT_EPS)


def check_radius(norm: str, eps: float, *, size: int) -> None:
    """Refuse a ball that holds every image of `size` × `size` pixels.

    Raises:
        UserError: it does.
    """
    numbers = 3 * size**2
    largest = {"Linf": 1.0, "L2": numbers**0.5, "L1": float(numbers)}[norm]
    if eps > largest:
        hint = f" (did you mean {eps:g}/255?)" if norm == "Linf" else ""
        raise UserError(
            f"pixels are in [0, 1], so at {size} px an {norm} radius is at most {largest:g}; got {eps:g}{hint}."
        )
