"""Names and default radii of the threat models. Imports no PyTorch, because command lines need them."""

from __future__ import annotations

from common.errors import UserError

# Radius used if no eps is given, in units of pixels in [0, 1] (ImageNet threat models of the paper, Section 2).
DEFAULT_EPS = {"Linf": 4 / 255, "L2": 2.0, "L1": 75.0}
NORMS = tuple(DEFAULT_EPS)
# Plausible radii let all values change at once by at least these multiples of 1/255; `DEFAULT_EPS` gives 4, 1.3 and 0.13.
SMALLEST_STEP = {"Linf": 0.05, "L2": 0.1, "L1": 0.005}


def check_radius(norm: str, eps: float, *, size: int) -> None:
    """Check that a radius is at most the largest distance between two images of `size` × `size` pixels.

    Raises:
        UserError: it is larger.
    """
    numbers = 3 * size**2
    largest = {"Linf": 1.0, "L2": numbers**0.5, "L1": float(numbers)}[norm]
    if eps > largest:
        hint = f" (did you mean {eps:g}/255?)" if norm == "Linf" else ""
        raise UserError(
            f"pixels are in [0, 1], so at {size} px an {norm} radius is at most {largest:g}; got {eps:g}{hint}."
        )


def odd_radius(norm: str, eps: float, *, size: int) -> str:
    """Return a sentence if `eps` is so unusual that another norm or another unit was likely meant; else an empty string."""
    numbers = 3 * size**2
    step = 255 * eps / {"Linf": 1, "L2": numbers**0.5, "L1": numbers}[norm]  # possible change of all values at once
    if step >= 127.5:
        hint = f"; {eps:g}/255 may be meant" if norm == "Linf" else ""
        return f"with an {norm} radius of {eps:g} at {size} px every image can become the same grey{hint}"
    if step >= SMALLEST_STEP[norm]:
        return ""
    return (
        f"an {norm} radius of {eps:.3g} at {size} px changes all pixels by {step:.2g}/255 at most; radii of Linf, L2 and L1 differ "
        f"(usual for {norm}: {DEFAULT_EPS[norm]:.3g} at 224 px)"
    )
