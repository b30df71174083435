"""Images: every kind of file becomes upright RGB of the size asked for; what cannot be decoded is said in one line."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from gpt4moe.config.data import ImageConfig
from gpt4moe.data.documents import Document
from gpt4moe.data.images import decode_into, image_problem, rgb_image
from gpt4moe.data.prepare import prepare
from tests.data.image_documents import config_of, encoded, picture

LIMIT = 40_000_000
NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def decoded(data, **changes):
    """Frames and validity of one image."""
    config = ImageConfig(**{"height": 4, "width": 6, "per_row": 1} | changes)
    out, valid = np.zeros((config.frames, config.height, config.width, 3), np.uint8), np.zeros(config.frames, bool)
    decode_into(data, config, out, valid)
    return out, valid


def opened(data):
    return Image.open(io.BytesIO(data))


def page_of(width, height):
    """A picture whose red is its column and whose green is its row."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
    return encoded(Image.fromarray(pixels))


def huge_png(side):
    """A small file that says it is `side` by `side` and has the data of one row."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(side * 3 + 1))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "animated GIF", "WEBP", "GIF"])
def test_any_number_of_channels_becomes_rgb(mode):
    grey = Image.new("L", (6, 4), 255)
    if mode == "animated GIF":
        data = encoded(grey, "GIF", save_all=True, append_images=[Image.new("L", (6, 4), 0)])
    elif mode in ("WEBP", "GIF"):
        data = encoded(grey, mode)
    elif mode == "CMYK":
        data = encoded(Image.new("CMYK", (6, 4), (0, 0, 0, 0)), "JPEG")
    elif mode == "I;16":
        data = encoded(Image.fromarray(np.full((4, 6), 65535, np.uint16)))
    else:
        data = encoded(grey.convert(mode))
    assert image_problem(data, LIMIT) is None
    out, valid = decoded(data)
    assert (out == 255).all() and out.shape == (1, 4, 6, 3) and valid.all(), "of an animated file the first frame"


def test_transparent_pixels_are_white_and_sixteen_bits_are_scaled():
    assert (decoded(encoded(Image.new("RGBA", (6, 4), (9, 9, 9, 0))))[0] == 255).all()
    assert (decoded(encoded(Image.new("RGBA", (6, 4), (9, 9, 9, 255))))[0] == 9).all()
    assert (decoded(encoded(Image.fromarray(np.full((4, 6), 40 * 257, np.uint16))))[0] == 40).all()


def see_through(mode):
    """A file of `mode` whose pixels are all transparent, whatever their colour."""
    if mode == "P":
        image = Image.new("P", (6, 4), 1)
        image.putpalette([255, 0, 0, 0, 0, 255] + [0] * 762)
        return encoded(image, transparency=1)
    if mode in ("RGB", "L"):
        colour = (1, 2, 3) if mode == "RGB" else 7
        return encoded(Image.new(mode, (6, 4), colour), transparency=colour)
    if mode == "GIF":
        return encoded(Image.new("P", (6, 4), 1), "GIF", transparency=1)
    return encoded(Image.new("LA" if mode == "LA" else "RGBA", (6, 4), 0), "WEBP" if mode == "WEBP" else "PNG")


@pytest.mark.parametrize("mode", ["LA", "P", "RGB", "L", "GIF", "WEBP"])
def test_transparency_is_white_however_a_file_says_it(mode):
    data = see_through(mode)
    assert image_problem(data, LIMIT) is None and (decoded(data)[0] == 255).all()


def oriented(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif.tobytes()


@pytest.mark.parametrize("value", range(1, 9))
def test_a_picture_lies_as_its_exif_says(value):
    exif = oriented(value)
    data = encoded(Image.fromarray(NOISE[:10, :7]), exif=exif)
    upright = ImageOps.exif_transpose(opened(data))
    assert upright.size == ((7, 10) if value < 5 else (10, 7))
    assert np.array_equal(np.asarray(rgb_image(data)), np.asarray(upright))


def raw_profile(exif):
    """EXIF as ImageMagick wrote it into a PNG: hexadecimal digits in a text."""
    return "\nexif\n" + f"{len(exif):8d}\n" + exif.hex()


XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="3"/></x:xmpmeta>'
SAID_BY = {
    "exif of a JPEG": ("JPEG", {"exif": oriented(3), "quality": 95}),
    "exif of a WebP": ("WEBP", {"exif": oriented(3), "lossless": True}),
    "a raw profile": ("PNG", {"Raw profile type exif": raw_profile(oriented(3))}),
    "XMP of a PNG": ("PNG", {"XML:com.adobe.xmp": XMP}),
    "XMP of a JPEG": ("JPEG", {"xmp": XMP.encode(), "quality": 95}),
}


@pytest.mark.parametrize("name", SAID_BY)
def test_orientation_is_found_wherever_it_stands(name):
    kind, options = SAID_BY[name]
    if kind == "PNG":
        ((key, text),) = options.items()
        options = {"pnginfo": (chunks := PngImagePlugin.PngInfo())}
        chunks.add_itxt(key, text) if key.startswith("XML") else chunks.add_text(key, text)
    image = Image.new("RGB", (16, 16))
    image.paste((255, 0, 0), (0, 0, 16, 8))
    out = np.asarray(rgb_image(encoded(image, kind, **options)))
    assert out[:7, :, 0].max() < 40 and out[9:, :, 0].min() > 215, "upside down"


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("exif", [b"Exif\0\0nothing of the kind", b"MM\0*"], ids=["no header", "cut"])
def test_a_picture_whose_exif_says_nothing_lies_as_it_is(kind, exif):
    data = encoded(Image.new("RGB", (8, 4)), kind, exif=exif)
    assert image_problem(data, LIMIT) is None and rgb_image(data).size == (8, 4)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_exif_does_not_cost_the_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "hello"
    data = encoded(Image.new("RGB", (8, 4), (200, 0, 0)), "JPEG", exif=exif.tobytes())
    place, sizes, damaged = data.index(b"Exif") + 6, set(), []
    for index in range(place, place + len(exif.tobytes()) - 6):
        for value in (0, 1, 7, 11, 255):
            damaged.append(data[:index] + bytes([value]) + data[index + 1 :])
    for one in damaged:
        assert image_problem(one, LIMIT) is None
        sizes.add(rgb_image(one).size)
    assert sizes == {(8, 4), (4, 8)}, "turned where that can still be read"
    documents = [Document(str(index), images=(one,)) for index, one in enumerate(damaged)]
    (source,) = prepare(config_of(documents), tmp_path).sources
    assert (source.images, source.bad_records) == (len(damaged), 0)


def test_fits_told_on_a_page_of_120_by_40():
    page = page_of(120, 40)
    (squashed,) = decoded(page, height=20, width=20)[0]
    assert squashed[0, -1, 0] > 110 and squashed[-1, 0, 1] > 35, "all of the page"
    (padded,) = decoded(page, height=60, width=60, fit="pad")[0]
    assert not padded[:20].any() and not padded[40:].any() and padded[30, -1, 0] > 115
    (cropped,) = decoded(page, height=20, width=20, fit="crop")[0]
    assert cropped[:, :, 0].min() >= 40 and cropped[:, :, 0].max() < 80, "the middle third"
    # The page in its own size: three tiles of 40 by 40 beside one another, read from left to right.
    tiles, valid = decoded(page, height=40, width=40, fit="tile", frames=4)
    assert valid.tolist() == [True, True, True, False] and not tiles[3].any()
    assert [(tile[0, 0, 0], tile[0, -1, 0], tile[-1, 0, 1]) for tile in tiles[:3]] == [
        (0, 39, 39),
        (40, 79, 39),
        (80, 119, 39),
    ]
    # Two rows of two: from left to right, then down.
    tiles, valid = decoded(page_of(80, 60), height=30, width=40, fit="tile", frames=4)
    assert valid.all() and [tuple(tile[0, 0, :2]) for tile in tiles] == [(0, 0), (40, 0), (0, 30), (40, 30)]
    assert [tuple(tile[-1, -1, :2]) for tile in tiles] == [(39, 29), (79, 29), (39, 59), (79, 59)]
    # At most two tiles: the scale is kept, what is below the page is black.
    tiles, valid = decoded(page, height=40, width=40, fit="tile", frames=2)
    assert valid.all() and not tiles[:, 27:].any() and tiles[1, 0, -1, 0] > 115
    _, valid = decoded(page_of(10, 10), height=40, width=40, fit="tile", frames=4)
    assert valid.tolist() == [True, False, False, False]


def test_a_large_jpeg_is_unfolded_no_larger_than_needed_and_looks_the_same():
    gradient = np.broadcast_to(np.linspace(0, 255, 800).astype(np.uint8)[:, None, None], (800, 800, 3))
    data = encoded(Image.fromarray(gradient), "JPEG", quality=95)
    assert rgb_image(data, (32, 32)).size == (100, 100)
    (small,) = decoded(data, height=32, width=32)[0]
    (exact,) = decoded(encoded(Image.fromarray(gradient)), height=32, width=32)[0]
    assert np.abs(small.astype(int) - exact).max() <= 3


@pytest.mark.parametrize("value", [1, 6, 8])
def test_a_large_jpeg_keeps_what_the_size_asked_for_can_show_also_where_it_lies_on_its_side(value):
    """2048 by 64 pixels in stripes of eight, each a pixel of the result."""
    upright = np.broadcast_to((np.arange(2048) // 8 % 2 * 255).astype(np.uint8)[None, :, None], (64, 2048, 3))
    stored = {1: upright, 6: np.rot90(upright, 1), 8: np.rot90(upright, -1)}[value]
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), "JPEG", quality=95, exif=oriented(value))
    (small,) = decoded(data, height=8, width=256)[0]
    exact = np.arange(256) % 2 * 255
    assert np.abs(small.astype(int) - exact[None, :, None]).mean() < 5


def test_a_clip_is_never_cut_into_tiles():
    frames = tuple(picture(red) for red in (10, 20, 30))
    out, valid = decoded(frames, fit="tile", frames=4)
    assert valid.tolist() == [True, True, True, False]
    assert out[:, 0, 0, 0].tolist() == [10, 20, 30, 0]
    out, valid = decoded(frames, fit="tile", frames=2)
    assert valid.all() and out[:, 0, 0, 0].tolist() == [10, 30]


BAD = {
    "zero bytes": (b"", "has an image of zero bytes"),
    "no image": (b"nothing of the kind", r"has an image that cannot be decoded \(not one of PNG JPEG"),
    "cut PNG": (encoded(Image.fromarray(NOISE))[:6000], "has an image that cannot be decoded"),
    "cut JPEG": (encoded(Image.fromarray(NOISE), "JPEG")[:1500], "has an image that cannot be decoded"),
    "flipped PNG": (
        bytes([*(data := encoded(Image.fromarray(NOISE)))[:200], data[200] ^ 255, *data[201:]]),
        "cannot be",
    ),
    "100 megapixels": (huge_png(10_000), "has an image of 10000 x 10000 pixels, above max_pixels=40000000"),
    "a bomb": (huge_png(60_000), "has an image of too many pixels, above max_pixels=40000000"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not one of PNG"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_decoded_is_a_bad_record_or_stops(tmp_path, name):
    data, message = BAD[name]
    documents = [Document("good", images=(picture(1),)), Document("bad", images=(picture(2), data))]
    report = prepare(config_of(documents), tmp_path / "count")
    (source,) = report.sources
    assert (source.documents, source.images, source.bad_records) == (1, 1, 1)
    (example,) = source.bad_examples
    assert example.startswith(str(tmp_path)) and ".jsonl:2 has" in example and "\n" not in example
    with pytest.raises(ValueError, match=rf"^bad_records='stop' met [^\n]*{message}[^\n]*$"):
        prepare(config_of(documents, bad_records="stop"), tmp_path / "stop")


def test_as_many_pixels_as_the_user_allows():
    data = picture(1, (100, 100))
    assert image_problem(data, 10_000) is None
    too_large = (
        "has an image of 100 x 100 pixels, above max_pixels=9999; scale it down, or raise ImageConfig.max_pixels"
    )
    assert image_problem(data, 9_999) == too_large
    assert image_problem((picture(1), b""), LIMIT) == "has an image of zero bytes"
    assert image_problem((), LIMIT) == "has a clip without frames"


@pytest.mark.parametrize(("text", "count"), [("<image>a<image>", 1), ("<image>", 2), ("a <image>", 3)])
def test_markers_that_do_not_match_are_a_bad_record(tmp_path, text, count):
    documents = [Document("good"), Document(text, images=tuple(map(picture, range(1, count + 1))))]
    (source,) = prepare(config_of(documents), tmp_path).sources
    assert source.bad_records == 1 and not source.images
    assert source.bad_examples[0].endswith(f"has {text.count('<image>')} <image> markers and {count} images")


def test_an_image_with_nothing_to_say_of_it_is_an_empty_document(tmp_path):
    documents = [Document("", images=(picture(1),)), Document("x", images=(picture(1),))]
    (source,) = prepare(config_of(documents), tmp_path).sources
    assert (source.empty_documents, source.images) == (1, 1)
