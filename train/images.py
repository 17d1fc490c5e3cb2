"""One way from an image file to what the processor sees, for training, checking and evaluation alike."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy
from PIL import Image, ImageOps

from libmoe_fast.errors import DataError

# Decoded by Pillow itself. What it would hand to another program (.eps to Ghostscript) is not among them, whatever a
# file is called.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "ICO")
MAX_PIXELS = 89_000_000  # where Pillow starts to warn of decompression bombs; 9,433 x 9,433
ALPHA = ("RGBA", "RGBa", "LA", "La", "PA")
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")


def load_image(source: str | os.PathLike | Image.Image, *, square: bool) -> Image.Image:
    """An image as RGB, 8 bits each, turned as its EXIF orientation says.

    16-bit grey is scaled by 1 / 257, float grey from [0, 1] (or taken as it is from [0, 255]), and what is transparent
    lies on white.

    Args:
        source: a file, or an image that is open already.
        square: it will be padded to a square, which must stay within MAX_PIXELS as well.
    Raises:
        DataError: not an image of a known format, damaged, too large, or of values whose meaning is not known.
    """
    name = "image" if isinstance(source, Image.Image) else f"image {source}"
    try:
        if isinstance(source, Image.Image):
            return _rgb(source, square)
        Image.init()
        with Image.open(source, formats=[known for known in FORMATS if known in Image.OPEN]) as file:
            return _rgb(file, square)
    except DataError as error:
        raise DataError(f"{name} {error}") from None
    # Pillow's decoders raise many kinds of errors on broken files (OSError, SyntaxError, ValueError, struct.error).
    except Exception as error:
        raise DataError(f"{name} cannot be read: {error}") from error


def _rgb(image: Image.Image, square: bool) -> Image.Image:
    _check_size(image, square)  # before a pixel is decoded
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        return _grey(image).convert("RGB")
    if image.mode in ALPHA or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _check_size(image: Image.Image, square: bool) -> None:
    width, height = image.size
    pixels = max(width, height) ** 2 if square else width * height
    if pixels > MAX_PIXELS:
        padded = " when padded to a square" if square else ""
        raise DataError(
            f"is {width} x {height}, {pixels:,} pixels{padded}; more than {MAX_PIXELS:,} are not decoded: scale it down"
        )


def _grey(image: Image.Image) -> Image.Image:
    """Grey values of more than 8 bits, by their meaning: Pillow's own conversion cuts them off at 255."""
    values = numpy.asarray(image).astype(numpy.float64)
    low, high = values.min(), values.max()
    if image.mode in SIXTEEN_BITS or (image.mode == "I" and low >= 0 and high <= 65535):
        scale = 255 / 65535
    elif image.mode == "F" and low >= 0 and high <= 255:
        scale = 255 if high <= 1 else 1
    else:
        raise DataError(
            f"has mode {image.mode} with values from {low:g} to {high:g}; expected 16-bit values, or floats in [0, 1]"
        )
    return Image.fromarray(numpy.rint(values * scale).astype(numpy.uint8))


def pad_to_square(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """The image in the middle of a square of the processor's mean colour (which becomes zero when normalised)."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(channel * 255) for channel in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def prepare_image(source: str | os.PathLike | Image.Image, image_processor: Any, aspect: str) -> Image.Image:
    """What an image processor is given: load_image's, made square where `aspect` is "pad"; raises as that does."""
    image = load_image(source, square=aspect == "pad")
    return pad_to_square(image, image_processor.image_mean) if aspect == "pad" else image
