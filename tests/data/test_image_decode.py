"""Images that were made to harm: refused in one message or decoded, and nothing more.

A file never makes a command hang and never allocates what it does not hold: such cases run in a process with little
memory.
"""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hostile import read_in_little_memory
from pictures import EPS, SVG, gif, picture, png
from PIL import Image

from lever_lm.data import image_size, open_image
from lever_lm.utils.errors import LeverError

BAD_IMAGES = {
    "eps": (EPS, "it is none of JPEG"),
    "svg": (SVG, "it is none of JPEG"),
    "pdf": (b"%PDF-1.4\n1 0 obj << >> endobj\n%%EOF\n", "it is none of JPEG"),
    "psd": (b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 6, 8, 8, 3) + bytes(40), "it is none of JPEG"),
    "ppm": (b"P6 8 6 255\n" + bytes(144), "it is none of JPEG"),
    "html": (b"<html><script>1</script></html>", "it is none of JPEG"),
    "empty": (b"", "it is none of JPEG"),
    "bomb": (png(12_000, 8_000, bytes(100)), "pixels"),
    "larger bomb": (png(65_000, 65_000, bytes(100)), "pixels"),
    "bomb of a frame": (gif(8, 6, (60_000, 60_000)), "pixels"),
    "line": (png(60_000, 1, bytes(60_001)), "ratio over 200"),
    "nothing": (png(0, 0, b""), ""),
    "no rows": (gif(0, 0, (0, 0)), ""),
    "text bomb": (png(8, 6, bytes(54), (b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 26), 9))), "too large"),
    "profile bomb": (png(8, 6, bytes(54), (b"iCCP", b"k\0\0" + zlib.compress(bytes(1 << 26), 9))), "too large"),
    "truncated": (picture()[:200], ""),
    "tiff of directories": (b"II*\0\x08\0\0\0" + struct.pack("<H", 65535) + b"\xff" * 400, ""),
    "webp": (b"RIFF\x24\0\0\0WEBPVP8 " + b"\xff" * 40, ""),
    "bmp": (b"BM" + bytes(8) + struct.pack("<IIiiHHI", 54, 40, 2**30, 2**30, 1, 24, 0) + bytes(24), "pixels"),
}


@pytest.fixture(scope="module")
def bad_images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for name, (content, _) in BAD_IMAGES.items():
        (folder / f"{name}.jpg").write_bytes(content)
    return folder


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_a_hostile_image_is_refused_in_one_message(bad_images, kind):
    words = BAD_IMAGES[kind][1]
    with pytest.raises(LeverError, match=rf"cannot decode the image .*{kind}\.jpg: .*{words}") as caught:
        open_image(str(bad_images / f"{kind}.jpg"))
    told = str(caught.value)
    assert "\n" not in told
    assert ".." not in told.replace(str(bad_images), "")
    assert "--skip-bad-examples" in told


def test_the_largest_and_the_longest_image(tmp_path):
    """Of 89 megapixels and of sides 1 : 200; larger or longer ones are refused by their heads alone."""
    cases = {
        (9459, 9459): "truncated", (9460, 9460): "9460 by 9460 pixels, more than 89478485",
        (200, 1): None, (201, 1): "ratio over 200", (1, 200): None, (1, 201): "ratio over 200",
    }  # fmt: skip
    for (width, height), why in cases.items():
        path = tmp_path / f"{width}x{height}.png"
        path.write_bytes(png(width, height, bytes(min(500, (width + 1) * height))))
        if why is None:
            assert open_image(str(path)).size == (width, height)
        else:
            with pytest.raises(LeverError, match=why):
                open_image(str(path))


def test_nothing_of_a_decoder_reaches_the_screen_from_threads_either_and_nothing_is_allocated(bad_images):
    files = sorted(bad_images.iterdir())
    told, memory = read_in_little_memory(lambda path: open_image(str(path)), files, threads=8)
    assert sum(line.startswith("refused") for line in told) == len(told) == 3 * len(files)
    assert memory < 400


def _opened(content: bytes):
    with Image.open(io.BytesIO(content)) as image:
        return image.convert("RGB")


@pytest.mark.parametrize(
    ("form", "mode"),
    [("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")]
    + [("GIF", "P"), ("WEBP", "RGBA"), ("BMP", "RGB"), ("JPEG", "CMYK")],
)
def test_every_mode_keeps_its_brightness(tmp_path, form, mode):
    path = tmp_path / "picture"
    Image.new("L", (8, 6), 255 if mode == "1" else 128).convert(mode).save(path, format=form)
    seen = np.asarray(open_image(str(path)))
    assert abs(float(seen.mean()) - (255 if mode == "1" else 128)) < 4


def test_sixteen_bits_of_grey_are_scaled_and_not_cut_off(tmp_path):
    path = tmp_path / "depth.png"
    Image.fromarray(np.full((6, 8), 0x8000, dtype=np.uint16)).save(path)
    assert np.asarray(open_image(str(path))).mean() == 128


def test_of_an_animation_the_first_frame_is_shown_whatever_their_number(tmp_path):
    frames = [Image.new("P", (64, 48), i % 256) for i in range(500)]
    frames[0] = Image.new("RGB", (64, 48), (250, 0, 0))
    frames[0].save(tmp_path / "many.gif", save_all=True, append_images=frames[1:])
    assert open_image(str(tmp_path / "many.gif")).getpixel((3, 3)) == (250, 0, 0)


def test_an_image_that_is_a_pipe_a_device_or_a_folder_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "folder.jpg").mkdir()
    for name in ("pipe", "zero", "folder"):
        with pytest.raises(LeverError, match=rf"{name}\.jpg: (it is no regular file|Is a directory)"):
            open_image(str(tmp_path / f"{name}.jpg"))


def test_a_rotated_photograph_opens_upright(tmp_path):
    picture = Image.new("RGB", (40, 20), "black")
    picture.paste((255, 255, 255), (0, 0, 20, 20))  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise: left comes up
    picture.save(tmp_path / "x.jpg", exif=exif, quality=95)
    upright = open_image(str(tmp_path / "x.jpg"))
    assert upright.size == image_size(str(tmp_path / "x.jpg")) == (20, 40)
    assert min(upright.getpixel((10, 5))) > 240
    assert max(upright.getpixel((10, 35))) < 15


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_of_an_image_is_that_of_the_opened_one(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (40, 20)).save(tmp_path / "x.jpg", exif=exif)
    assert image_size(str(tmp_path / "x.jpg")) == open_image(str(tmp_path / "x.jpg")).size


def test_the_size_of_what_is_no_image_is_refused_as_the_image_is(tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"no image")
    for read in (open_image, image_size):
        with pytest.raises(LeverError, match=r"cannot decode the image .*x\.jpg: it is none of JPEG"):
            read(str(tmp_path / "x.jpg"))


@pytest.mark.parametrize("read", [open_image, image_size])
def test_a_missing_image_is_refused_with_the_variable(tmp_path, read):
    with pytest.raises(LeverError, match=r"image not found: .*none\.jpg .*COCO_PATH"):
        read(str(tmp_path / "none.jpg"))
