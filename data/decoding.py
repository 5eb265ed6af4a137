"""From a file's bytes to pixels."""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image, UnidentifiedImageError

# What Pillow raises on broken files; UnidentifiedImageError is an OSError.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)


def decode(image: bytes | Image.Image) -> Image.Image:
    """RGB image from an encoded or an opened one of any mode and size. Raises one of `DECODE_ERRORS`."""
    if isinstance(image, bytes):
        if not image:
            raise ValueError("the file is empty or cannot be read")
        try:
            image = Image.open(io.BytesIO(image))
        except UnidentifiedImageError:  # its own message shows a memory address
            raise ValueError("not an image of a format that Pillow knows") from None
    if image.mode.startswith("I"):  # 16-bit grey; convert() would clip it at 255, that is, turn it white
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns about palettes with an alpha table otherwise
    return image.convert("RGB")
