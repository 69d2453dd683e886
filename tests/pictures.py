"""Image files made by hand: sound ones, and bytes that are none."""

import io
import struct
import zlib

from PIL import Image

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 6\n%%EndComments\n(TRAP) (w) file closefile showpage\n%%EOF\n"
SVG = b"<svg xmlns='http://www.w3.org/2000/svg' width='8' height='6'><image href='file:///etc/passwd'/></svg>"


def picture(**how) -> bytes:
    """An image file of 8 × 6 pixels."""
    file = io.BytesIO()
    mode = how.pop("mode", "RGB")
    Image.new("RGB", (8, 6), (200, 100, 50)).convert(mode).save(file, **{"format": "JPEG", **how})
    return file.getvalue()


def png(width: int, height: int, rows: bytes, *before: tuple[bytes, bytes], depth: int = 8, colour: int = 0) -> bytes:
    """A PNG, grey by default, of any size and rows, with chunks before its pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    middle = b"".join(chunk(*pair) for pair in before)
    return b"\x89PNG\r\n\x1a\n" + head + middle + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def gif(width: int, height: int, frame: tuple[int, int]) -> bytes:
    """A GIF whose frame may be larger than its screen."""
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    return head + b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02D\x01\x00;"
