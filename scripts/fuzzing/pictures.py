"""Image files of every format, their sizes and parts spoilt, and bombs made by hand."""

import io
import struct
import zlib
from pathlib import Path
from random import Random

import numpy as np

from fuzzing.harness import Parser, Target
from fuzzing.mutations import noise, spoil_bytes
from fuzzing.texts import to_file


def images(folder: Path) -> Target:
    """An image file of any format."""
    from PIL import Image

    from lever_lm.data import open_image

    path = folder / "image.jpg"
    seeds, picture = [], Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    for mode, kind, options in _IMAGES:
        file = io.BytesIO()
        try:
            picture.convert(mode).save(file, kind, **{k: exif if v is None else v for k, v in options.items()})
            path.write_bytes(file.getvalue())
            open_image(str(path))
        except Exception:  # a format that this build cannot write, or that is not taken
            continue
        seeds.append(file.getvalue())
    return Target(seeds, _spoil_image, to_file(path, lambda: open_image(str(path))), _bombs())


_IMAGES = [
    ("RGB", "JPEG", {"exif": None}),
    ("RGB", "JPEG", {"progressive": True}),
    ("CMYK", "JPEG", {}),
    ("L", "JPEG", {}),
]
_IMAGES += [
    ("RGB", "PNG", {}),
    ("RGBA", "PNG", {}),
    ("P", "PNG", {"transparency": 3}),
    ("I;16", "PNG", {}),
    ("1", "PNG", {}),
]
_IMAGES += [
    ("P", "GIF", {}),
    ("RGB", "WEBP", {}),
    ("RGBA", "WEBP", {"lossless": True}),
    ("RGB", "BMP", {}),
    ("RGB", "TIFF", {}),
]
_IMAGES += [
    ("RGB", "TIFF", {"compression": "tiff_lzw"}),
    ("RGB", "MPO", {}),
    ("RGB", "PPM", {}),
    ("RGB", "AVIF", {}),
    ("RGB", "JPEG2000", {}),
]


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _png(width: int, height: int, data: bytes, *more: bytes, depth: int = 8, kind: int = 2) -> bytes:
    header = struct.pack(">IIBBBBB", width & 0xFFFFFFFF, height & 0xFFFFFFFF, depth, kind, 0, 0, 0)
    parts = [_chunk(b"IHDR", header), *more, _chunk(b"IDAT", zlib.compress(data, 1)), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _bombs() -> list[bytes]:
    sizes = [
        (60_000, 1),
        (1, 60_000),
        (0, 0),
        (0, 5),
        (50_000, 50_000),
        (2**31 - 1, 2**31 - 1),
        (13_000, 13_000),
        (9_000, 9_000),
    ]
    pngs = [_png(width, height, b"\0" * 1000) for width, height in sizes]
    text = _chunk(b"zTXt", b"k\0\0" + zlib.compress(b"a" * 60_000_000, 1))
    profile = _chunk(b"iCCP", b"p\0\0" + zlib.compress(b"a" * 60_000_000, 1))
    pngs += [
        _png(4, 4, b"\0" * 52, text),
        _png(4, 4, b"\0" * 52, profile),
        _png(4, 4, b"\0" * 52, *[_chunk(b"tEXt", b"a\0b")] * 20_000),
    ]
    pngs += [_png(3_000, 3_000, b"\0" * 27_003_000), _png(9_400, 9_400, b"\0" * 88_369_400, kind=0)]
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image href="file:///etc/passwd"/></svg>'
    others = [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run quit\n",
        b"%PDF-1.7\n",
        b"GIF89a" + b"\xff" * 40,
        b"BM" + b"\xff" * 60,
    ]
    others += [
        b"P6 99999999 99999999 255\n",
        b"P3 2 2 255 " + b"9" * 100_000,
        b"II*\0" + b"\xff" * 100,
        b"\xff\xd8\xff\xe0" + b"\0" * 100,
        svg,
    ]
    others += [
        b"RIFF\xff\xff\xff\x7fWEBPVP8X" + b"\xff" * 30,
        b"\0\0\1\0\xff\xff" + b"\0" * 100,
        b"8BPS\0\1" + b"\xff" * 40,
        b"SIMPLE  = T" + b" " * 3000,
    ]
    return [*pngs, *others]


def _spoil_image(rng: Random, content: bytes) -> bytes:
    """Sizes, segments and chunks of an image file: numbers at their borders in its head; PNG chunks, sound sums."""
    if content[:8] == b"\x89PNG\r\n\x1a\n" and rng.random() < 0.8:
        chunks, place = [], 8
        while place < len(content):
            size = int.from_bytes(content[place : place + 4], "big")
            chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + size]))
            place += 12 + size
        i, change = rng.randrange(len(chunks)), rng.randrange(5)
        name, body = chunks[i]
        if change == 0:
            chunks[i] = (name, spoil_bytes(rng, body))
        elif change == 1:
            del chunks[i]
        elif change == 2:
            chunks.insert(rng.randrange(len(chunks) + 1), (name, body))
        elif change == 3:
            extra = rng.choice(
                (
                    b"tRNS",
                    b"PLTE",
                    b"eXIf",
                    b"iCCP",
                    b"zTXt",
                    b"iTXt",
                    b"acTL",
                    b"fcTL",
                    b"fdAT",
                    b"gAMA",
                    b"IDAT",
                    b"pHYs",
                )
            )
            chunks.insert(1, (extra, noise(rng)[:300]))
        else:
            wide = [rng.choice((0, 1, 2, 16, 201, 65_535, 2**31 - 1, rng.randrange(3000))) for _ in range(2)]
            head = struct.pack(
                ">IIBBBBB", *wide, rng.choice((1, 2, 8, 16)), rng.choice((0, 2, 3, 4, 6)), 0, 0, rng.randrange(2)
            )
            chunks[0] = (b"IHDR", head)
        return content[:8] + b"".join(_chunk(name, body) for name, body in chunks)
    changed = bytearray(content)
    for _ in range(rng.choice((1, 2, 3))):  # heads hold sizes, counts and places
        place, size = rng.randrange(min(len(changed), 300)), rng.choice((1, 2, 4))
        value = rng.choice((0, 1, 2, 0xFF, 0xFFFF, 0x7FFF, 0x7FFFFFFF, 0xFFFFFFFF, rng.randrange(70_000)))
        number = (value & (1 << 8 * size) - 1).to_bytes(size, rng.choice(("little", "big")))
        changed[place : place + size] = number
    return bytes(changed)


PARSERS = [Parser("images", images, memory=768 << 20)]
