"""Images by their meaning: every mode against values worked out by hand, and files that must not be decoded."""

import numpy
import pytest
from PIL import Image

from libmoe_fast.errors import DataError
from libmoe_fast.train.images import load_image, pad_to_square, prepare_image
from libmoe_fast.train.tiny import tiny_llava

GREY16 = numpy.array([[0, 257, 65535]], dtype=numpy.uint16)


def rgba(*pixels):
    return Image.fromarray(numpy.array([pixels], dtype=numpy.uint8), "RGBA")


def palette():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    return image


CASES = {  # image, how it is saved, the RGB it means
    "rgb": (Image.new("RGB", (1, 1), (1, 2, 3)), "png", {}, [(1, 2, 3)]),
    "grey": (Image.new("L", (1, 1), 7), "png", {}, [(7, 7, 7)]),
    "1 bit": (Image.new("1", (1, 1), 1), "png", {}, [(255, 255, 255)]),
    "palette": (palette(), "png", {}, [(10, 20, 30), (40, 50, 60)]),
    "palette with a transparent colour": (palette(), "png", {"transparency": 1}, [(10, 20, 30), (255, 255, 255)]),
    "black, from clear to solid": (
        rgba((0, 0, 0, 0), (0, 0, 0, 51), (0, 0, 0, 255)),
        "png",
        {},
        [(255,) * 3, (204,) * 3, (0,) * 3],
    ),
    "grey and alpha": (Image.new("LA", (1, 1), (0, 0)), "png", {}, [(255, 255, 255)]),
    "16-bit PNG": (Image.fromarray(GREY16), "png", {}, [(0,) * 3, (1,) * 3, (255,) * 3]),
    "16-bit TIFF": (Image.fromarray(GREY16), "tiff", {}, [(0,) * 3, (1,) * 3, (255,) * 3]),
    "32-bit TIFF of 16-bit values": (
        Image.fromarray(GREY16.astype("int32")),
        "tiff",
        {},
        [(0,) * 3, (1,) * 3, (255,) * 3],
    ),
    "float TIFF in [0, 1]": (
        Image.fromarray(numpy.float32([[0, 0.2, 1]])),
        "tiff",
        {},
        [(0,) * 3, (51,) * 3, (255,) * 3],
    ),
    "float TIFF in [0, 255]": (
        Image.fromarray(numpy.float32([[0, 51.4, 255]])),
        "tiff",
        {},
        [(0,) * 3, (51,) * 3, (255,) * 3],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_mode_by_its_meaning(case, tmp_path):
    image, kind, options, expected = CASES[case]
    path = tmp_path / f"image.{kind}"
    image.save(path, **options)
    loaded = load_image(path, square=False)
    assert loaded.mode == "RGB"
    assert [tuple(pixel) for pixel in numpy.asarray(loaded)[0].tolist()] == expected


def test_cmyk_is_converted(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=100)
    red, green, blue = load_image(tmp_path / "red.jpg", square=False).getpixel((4, 4))
    assert red > 200 > 60 > max(green, blue)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation, tmp_path):
    """The upright picture, stored as a camera that was turned stores it, comes back upright."""
    upright = Image.fromarray(numpy.arange(6 * 4, dtype=numpy.uint8).reshape(4, 6) * 10)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation -> Image.Transpose that makes the stored picture
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    loaded = load_image(tmp_path / "turned.png", square=False)
    assert numpy.array_equal(numpy.asarray(loaded)[..., 0], numpy.asarray(upright))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param(numpy.float32([[-1, 2]]), "mode F with values from -1 to 2", id="negative"),
        pytest.param(numpy.float32([[0, 3000]]), "mode F with values from 0 to 3000", id="large"),
        pytest.param(numpy.float32([[numpy.nan, 1]]), "mode F with values from nan", id="nan"),
        pytest.param(numpy.int32([[0, 70000]]), "mode I with values from 0 to 70000", id="32-bit"),
    ],
)
def test_unknown_meaning_is_refused(values, message, tmp_path):
    Image.fromarray(values).save(tmp_path / "image.tiff")
    with pytest.raises(DataError, match=message):
        load_image(tmp_path / "image.tiff", square=False)


@pytest.mark.parametrize(
    ("size", "square", "message"),
    [
        pytest.param((30_000, 1), True, "30000 x 1, 900,000,000 pixels when padded", id="long"),
        pytest.param((30_000, 1), False, None, id="long, not padded"),
        pytest.param((1, 4000), True, None, id="narrow"),
        pytest.param((12_000, 12_000), False, "144,000,000 pixels; more than", id="bomb"),
    ],
)
def test_too_many_pixels_are_refused_before_decoding(size, square, message, tmp_path, monkeypatch):
    Image.new("1", size).save(tmp_path / "image.png")
    if message is None:
        assert load_image(tmp_path / "image.png", square=square).size == size
        return
    monkeypatch.setattr(Image.Image, "load", None)  # decoding would fail with another error
    with pytest.raises(DataError, match=message):
        load_image(tmp_path / "image.png", square=square)


def test_no_helper_program_is_started(tmp_path, monkeypatch):
    """An .eps named .png would start Ghostscript."""
    (tmp_path / "image.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    monkeypatch.setattr("subprocess.Popen", None)
    with pytest.raises(DataError, match="cannot be read: cannot identify image file"):
        load_image(tmp_path / "image.png", square=True)


def test_training_and_evaluation_read_the_same(tmp_path):
    """A file as training reads it, and the open image that a benchmark hands over."""
    _, processor = tiny_llava()
    path = tmp_path / "image.png"
    Image.fromarray(GREY16).save(path)
    for aspect in ("pad", "none"):
        prepared = prepare_image(path, processor.image_processor, aspect)
        with Image.open(path) as given:
            assert prepare_image(given, processor.image_processor, aspect) == prepared


def test_padding_to_a_square_centres_the_image_on_the_mean_colour():
    image = Image.new("RGB", (4, 2), (255, 0, 0))
    square = pad_to_square(image, [0.5, 0.25, 1.0])
    assert square.size == (4, 4)
    rows = [square.getpixel((1, y)) for y in range(4)]
    mean = (127, 63, 255)
    assert rows == [mean, (255, 0, 0), (255, 0, 0), mean]
    assert pad_to_square(image.resize((3, 3)), [0, 0, 0]).size == (3, 3)
