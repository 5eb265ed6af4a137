"""Decoding for training and evaluation: compared with Pillow, and with unusual, broken and dangerous files."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from data.datasets import open_source
from data.decoding import DECODE_ERRORS, CropDecoder, decode
from data.loader import EvalLoader, TrainLoader
from tests.data import encoded, picture


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def whole(height: int, width: int) -> tuple[int, int, int, int]:
    return 0, 0, height, width


class Chooser:
    """Chooses always the same crop, and records the size of the image."""

    def __init__(self, box: tuple[int, int, int, int]) -> None:
        self._box = box

    def __call__(self, *shape: int) -> tuple[int, int, int, int]:
        self.seen = shape
        return self._box


def pillows_crop(data: bytes, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    top, left, height, width = box
    return np.asarray(
        image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BICUBIC)
    )


def difference(x: torch.Tensor, expected: np.ndarray) -> float:
    assert x.dtype == torch.uint8 and x.is_contiguous()
    return float(np.abs(x.permute(1, 2, 0).numpy().astype(int) - expected).max())


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(picture(3, 48, 32), "JPEG", quality=95, exif=exif)


class TestCrop:
    @pytest.mark.parametrize("subsampling", [0, 1, 2])
    @pytest.mark.parametrize("kind", ["RGB", "L", "progressive"])
    def test_is_pillows(self, kind: str, subsampling: int) -> None:
        rng, decoder = np.random.default_rng(0), CropDecoder()
        for width, height in [(200, 150), (97, 131), (33, 500)]:
            image = picture(width, width, height).convert("L" if kind == "L" else "RGB")
            data = saved(image, "JPEG", quality=90, subsampling=subsampling, progressive=kind == "progressive")
            for size in (32, 64):
                h, w = int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1))
                box = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
                choose = Chooser(box)
                x = decoder(data, choose, size)
                assert choose.seen == (height, width) and difference(x, pillows_crop(data, box, size)) <= 1

    def test_results_are_not_overwritten_by_the_next_image(self) -> None:
        decoder, files = CropDecoder(), [encoded(i, 100, 80, "JPEG") for i in range(3)]
        shown = [decoder(file, whole, 16) for file in files]
        assert all(torch.equal(x, CropDecoder()(file, whole, 16)) for x, file in zip(shown, files, strict=True))

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_turned_photos_stand_upright(self, orientation: int) -> None:
        data = turned(orientation)
        shape = (32, 48) if orientation < 5 else (48, 32)
        x = CropDecoder()(data, whole, 32)
        assert difference(x, pillows_crop(data, (0, 0, *shape), 32)) <= 1
        assert np.array_equal(
            np.asarray(decode(data)), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
        )
        assert np.array_equal(np.asarray(decode(data, upright=False)), np.asarray(Image.open(io.BytesIO(data))))

    def test_damaged_exif_says_nothing(self) -> None:
        data = turned(6)
        damaged = data.replace(b"Exif\0\0II", b"Exif\0\0XX").replace(b"Exif\0\0MM", b"Exif\0\0XX")
        assert damaged != data and CropDecoder()(damaged, whole, 16).shape == (3, 16, 16)

    def test_pictures_in_memory(self) -> None:
        image = picture(1, 60, 40)
        expected = np.asarray(image.crop((5, 10, 35, 30)).resize((16, 16), Image.Resampling.BICUBIC))
        assert difference(CropDecoder()(image, lambda h, w: (10, 5, 20, 30), 16), expected) <= 1


def animation() -> bytes:
    frames = [Image.new("RGB", (30, 20), colour) for colour in ("red", "blue", "green")]
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:])


def bomb() -> bytes:
    png = encoded(1)
    chunk = b"IHDR" + struct.pack(">2I5B", 40_000, 40_000, 8, 2, 0, 0, 0)  # 1.6 gigapixels
    return png[:8] + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[33:]


def jpeg_bomb() -> bytes:
    """Return a small JPEG whose header says 60,000 × 60,000 pixels."""
    data = encoded(1, 64, 64, "JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">2H", 60_000, 60_000) + data[at + 4 :]


def right_files() -> dict[str, tuple[bytes, np.ndarray]]:
    """Return unusual files and their pixels."""
    rgb = picture(1, 40, 30)
    grey16 = np.linspace(0, 65535, 30 * 40).reshape(30, 40).astype(np.uint16)
    cmyk = Image.merge("CMYK", [Image.new("L", (40, 30), level) for level in (0, 255, 255, 0)])  # red
    panorama = Image.fromarray(np.tile(np.linspace(0, 255, 30_000, dtype=np.uint8), (60, 1)))
    palette = rgb.quantize(16)
    pgm16 = b"P5 40 30 65535\n" + grey16.astype(">u2").tobytes()
    return {
        "cmyk.jpg": (saved(cmyk, "JPEG", quality=95), np.full((30, 40, 3), (255, 0, 0))),
        "grey16.png": (saved(Image.fromarray(grey16), "PNG"), np.repeat((grey16 >> 8)[..., None], 3, 2)),
        "grey16.tif": (saved(Image.fromarray(grey16), "TIFF"), np.repeat((grey16 >> 8)[..., None], 3, 2)),
        "grey16.pgm": (pgm16, np.repeat((grey16 >> 8)[..., None], 3, 2)),
        "grey.jpg": (
            saved(rgb.convert("L"), "JPEG", quality=95),
            np.repeat(np.asarray(rgb.convert("L"))[..., None], 3, 2),
        ),
        "palette.png": (saved(palette, "PNG"), np.asarray(palette.convert("RGB"))),
        "turned.jpg": (turned(6), np.asarray(picture(3, 48, 32).transpose(Image.Transpose.ROTATE_270))),
        "1x1.jpg": (
            saved(Image.new("RGB", (1, 1), (10, 200, 30)), "JPEG", quality=95),
            np.full((1, 1, 3), (10, 200, 30)),
        ),
        "panorama.jpg": (saved(panorama, "JPEG", quality=95), np.repeat(np.asarray(panorama)[..., None], 3, 2)),
        "animation.gif": (animation(), np.full((20, 30, 3), (255, 0, 0))),
        "really a png.jpg": (saved(rgb, "PNG"), np.asarray(rgb)),
    }


def wrong_files() -> dict[str, bytes]:
    jpeg = encoded(1, 200, 150, "JPEG")
    grey = np.linspace(0, 1, 30 * 40).reshape(30, 40)
    return {
        "float.tif": saved(Image.fromarray(grey.astype(np.float32)), "TIFF"),
        "int32.tif": saved(Image.fromarray((grey * 255).astype(np.int32)), "TIFF"),
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "header only.jpg": jpeg[:300],
        "zero bytes.jpg": b"",
        "text.jpg": b"404 Not Found",
        "bomb.png": bomb(),
        "bomb.jpg": jpeg_bomb(),
    }


class TestBadData:
    @pytest.mark.parametrize("name", right_files())
    def test_is_right(self, tmp_path: Path, name: str) -> None:
        data, expected = right_files()[name]
        found = np.asarray(decode(data)).astype(int)
        assert found.shape == expected.shape and np.abs(found - expected).mean() < 4
        assert difference(CropDecoder()(data, whole, 24), pillows_crop_of(expected)) <= 12

    @pytest.mark.parametrize("pipeline", ["fast", "timm"])
    def test_is_shown_or_reported(self, tmp_path: Path, pipeline: str) -> None:
        """All files at once, in training and evaluation, with every augmentation; broken files are replaced and reported."""
        (tmp_path / "a").mkdir()
        good = {name: data for name, (data, _) in right_files().items() if not name.endswith(".gif")}
        for name, data in {**good, **wrong_files()}.items():
            (tmp_path / "a" / name).write_bytes(data)
        source = open_source(str(tmp_path), split="train")
        loader = TrainLoader(source, augmentation=1, batch_size=len(source), pipeline=pipeline, num_workers=0)
        (batch,) = loader.epoch(0, 24)
        (evaluated,) = EvalLoader(source, size=24, batch_size=len(source))
        assert batch.x.shape == (len(source), 3, 24, 24) and len(evaluated.y) == len(good)
        for shown in (batch, evaluated):
            assert {Path(name).name for name, _ in shown.failures} == set(wrong_files())
            reasons = {Path(name).name: reason for name, reason in shown.failures}
            assert all(reasons.values()) and "decompression bomb" in reasons["bomb.jpg"].lower()
            assert "decompression bomb" in reasons["bomb.png"].lower() and "truncated" in reasons["truncated.jpg"]

    @pytest.mark.parametrize("name", wrong_files())
    def test_broken_files_raise_what_the_loader_knows(self, name: str) -> None:
        for read in (decode, lambda data: CropDecoder()(data, whole, 16)):
            with pytest.raises(DECODE_ERRORS):
                read(wrong_files()[name])

    def test_every_cut_of_a_jpeg_is_noticed(self) -> None:
        jpeg = encoded(1, 64, 48, "JPEG")
        for length in range(0, len(jpeg) - 4, 29):
            with pytest.raises(DECODE_ERRORS):
                CropDecoder()(jpeg[:length], whole, 16)


def pillows_crop_of(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels.astype(np.uint8)).resize((24, 24), Image.Resampling.BICUBIC))
