"""Spoil binary formats by what they are made of, and make files by hand that would do harm: torch files, arrays,
safetensors, images."""

import io
import json
import pickle
import pickletools
import struct
import warnings
import zipfile
import zlib
from collections import OrderedDict
from random import Random

import numpy as np
import torch

from fuzz.harness import CANARY
from fuzz.mutations import TOKENS, extreme, noise, spoil_bytes, spoil_json, spoil_parts, spoil_tree, table

_COMMAND = f"touch {CANARY}"


class Payload:
    """Pickled, a call of os.system."""

    def __reduce__(self):
        import os

        return os.system, (_COMMAND,)

    def __deepcopy__(self, memo):
        return self


# ---------------------------------------------------------------------- torch files


def saved(content) -> bytes:
    """Return what torch.save writes."""
    torch.save(content, file := io.BytesIO())
    return file.getvalue()


def zipped(members: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return a zip of these; a name may stand twice."""
    with warnings.catch_warnings(), zipfile.ZipFile(file := io.BytesIO(), "w", compression) as archive:
        warnings.simplefilter("ignore")
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, compression)
    return file.getvalue()


def _nested(depth: int) -> list:
    return [_nested(depth - 1)] if depth else []


def _values() -> list:
    """Return what a file may hold in the place of a value."""
    grid = torch.zeros(8, 6)
    tensors = [torch.zeros(0), torch.zeros(2, 2), torch.full((6, 8), float("nan")), torch.full((8,), float("inf"))]
    tensors += [torch.tensor(1.0), torch.ones(1).expand(8), grid.to_sparse(), grid.t(), torch.full((8, 6), 1e38)]
    tensors += [grid.to(kind) for kind in (torch.int64, torch.float16, torch.float64, torch.complex64, torch.bool)]
    tensors += [torch.zeros(2, 2, device="meta"), torch.zeros(1, 1, 1, 1, 1, 1, 1), torch.zeros(5056).byte()]
    arrays = [np.zeros((2, 2)), np.array("x"), np.zeros(3, complex), np.float64(3), np.zeros((0, 3)), np.int64(4)]
    plain = [None, True, False, -1, 0, 10**30, 2**63, 1.5, float("nan"), float("inf"), b"bytes", (), [], {}, [None]]
    plain += [{1: 2}, set(), {"": None}, OrderedDict(a=1), torch.Size([2, 3]), ["x"] * 2000, "grpo", "rce"]
    plain += [_nested(20), _nested(300), torch.float32, torch.device("cpu"), complex(1, 2), torch.nn.Parameter(grid)]
    return [*tensors, *arrays, *plain, *TOKENS, Payload()]


_VALUES = _values()
_NAMES = """os system¦posix system¦builtins exec¦builtins eval¦__builtin__ getattr¦builtins bytearray¦torch load¦ ¦
torch.hub load¦torch.storage _load_from_bytes¦torch._utils _rebuild_tensor_v2¦torch._utils _rebuild_sparse_tensor¦
torch._utils _rebuild_parameter¦torch FloatStorage¦torch UntypedStorage¦torch Size¦torch device¦numpy ndarray¦
torch._tensor _rebuild_from_type_v2¦numpy dtype¦_codecs encode¦numpy.core.multiarray _reconstruct¦os.path join¦
numpy._core.multiarray _reconstruct¦numpy.core.multiarray scalar¦collections OrderedDict¦collections defaultdict¦
runpy run_path¦functools partial¦operator attrgetter"""
_NAMES = [f"c{name.replace(' ', chr(10), 1)}\n".encode() for name in table(_NAMES)]
_ARGUMENT = pickle.dumps(_COMMAND, 2)[2:-1]
# Opcodes and runs of them: calls of each name; stacks, marks and memo entries that are not there; lengths that lie.
_SNIPPETS = [name + _ARGUMENT + b"\x85R" for name in _NAMES]
_SNIPPETS += [b"cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x10\x85R", b"cbuiltins\nbytes\nJ\xff\xff\xff\x7f\x85R"]
_SNIPPETS += [b"(" * 3000, b"]" * 3000 + b"a" * 2999, b")" + b"\x85" * 3000, b"}" * 100, b"(ios\nsystem\n", b"P0\n"]
_SNIPPETS += [bytes([code]) for code in b"02ltusebRQo.\x81\x92\x8f"]
_SNIPPETS += [b"N.", b"h\xff", b"j\xff\xff\xff\x7f", b"q\xff", b"r\xff\xff\xff\x7f", b"(\x90", b"\x97\x98", b"K\0"]
_SNIPPETS += [b"X\xff\xff\xff\x7fabc", b"\x8b\xff\xff\xff\x7f", b"\x8a\xff" + b"\x7f" * 255, b"\x80\x05", b"\x82\x01"]
_SNIPPETS += [code + b"\xff\xff\xff\xff\xff\xff\xff\x7f" for code in (b"\x8d", b"\x95", b"\x96")]
_SNIPPETS += [b"I" + b"9" * 5000 + b"\n", b"F1e400\n", b"L" + b"9" * 30 + b"L\n", b"Vx\\u0041\n", b"S'x'\n"]
_SNIPPETS += [b"G\x7f\xf8\0\0\0\0\0\0", b"J\0\0\0\x80", b"]q\x00h\x00a", b"}q\x00K\x01h\x00s"]
_SNIPPETS += [b")q\x01h\x01h\x01\x86q\x01" * 60, b"]h\x00h\x00h\x00\x87" * 40]


def spoil_torch(rng: Random, content: bytes) -> bytes:
    """Spoil a torch file by its values, by the opcodes of its pickle, or by the zip around it."""
    kind = rng.randrange(10)
    if kind < 4:
        return _spoil_values(rng, content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    if kind < 8:
        return zipped([(name, _spoil_pickle(rng, c) if name.endswith("/data.pkl") else c) for name, c in members])
    return _spoil_zip(rng, members)


def _spoil_values(rng: Random, content: bytes) -> bytes:
    def new(old):
        narrow = isinstance(old, torch.Tensor) and old.ndim and old.layout == torch.strided and rng.random() < 0.2
        return old[..., :1] if narrow else rng.choice(_VALUES)

    tree = [torch.load(io.BytesIO(content), weights_only=False)]  # our own seed
    spoil_tree(rng, tree, new, lambda key: rng.choice(("epoch", "policy", 3, None, (1, 2), rng.choice(TOKENS))))
    return saved(tree[0] if tree else None)


def _spoil_pickle(rng: Random, pickled: bytes) -> bytes:
    """Spoil a pickle of protocol 2: other names, numbers (sizes, strides, offsets) and texts in its opcodes, or other
    opcodes."""
    starts = [place for _, _, place in pickletools.genops(pickled)]
    codes = [pickled[a:b] for a, b in zip(starts, [*starts[1:], len(pickled)], strict=True)]
    for _ in range(rng.choice((1, 1, 2, 5))):
        kind = rng.choice((b"c", b"KMJ", b"X", b"", b""))
        places = [n for n, code in enumerate(codes) if kind and code[:1] in kind]
        if not places:
            codes = spoil_parts(rng, codes, lambda: rng.choice(_SNIPPETS), lambda code: rng.choice(_SNIPPETS))
        elif kind == b"c":
            codes[rng.choice(places)] = rng.choice(_NAMES)
        elif kind == b"X":
            text = rng.choice(("0", "1", "storage", "cpu", "cuda:0", "latin1", "f4", "O", "V9", *TOKENS)).encode()
            codes[rng.choice(places)] = b"X" + struct.pack("<I", len(text)) + text
        else:
            number = rng.choice((0, 1, 2, 255, 65535, 2**31 - 1, -1, -(2**31), rng.randrange(64)))
            codes[rng.choice(places)] = b"J" + struct.pack("<i", number)
    return b"".join(codes)


def _spoil_zip(rng: Random, members: list[tuple[str, bytes]]) -> bytes:
    folder, change = members[0][0].split("/")[0], rng.randrange(8)
    parts = table("data/9¦byteorder¦.format_version¦version¦code/x.py¦constants.pkl¦other/data.pkl")

    def new() -> tuple[str, bytes]:
        name = rng.choice((rng.choice(members)[0], f"{folder}/{rng.choice(parts)}"))
        return name, rng.choice((b"big", b"little", b"", b"\x80\x02N.", b"1" * 1000, rng.randbytes(64)))

    def alter(member: tuple[str, bytes]) -> tuple[str, bytes]:
        name, content = member
        names = (f"../{name}", f"/{name}", name.replace("/", "\\"), "data.pkl", "x" * 60_000, "")
        renamed = (rng.choice(names), content)
        return renamed if rng.random() < 0.5 else (name, content[: rng.randrange(len(content) + 1)])

    if change == 0:
        return zipped(members + [(f"{folder}/extra/{n}", b"") for n in range(2000)])
    if change == 1:
        members[rng.randrange(len(members))] = (rng.choice(members)[0], b"\0" * 20_000_000)
        return zipped(members, rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)))
    if change < 6:
        return zipped(spoil_parts(rng, members, new, alter))
    made = bytearray(zipped(members))  # its directory lies about sizes, places and counts
    directory = int.from_bytes(made[made.rfind(b"PK\x05\x06") + 16 :][:4], "little")
    for _ in range(rng.choice((1, 2, 4))):
        place = rng.randrange(directory, len(made) - 4)
        made[place : place + 4] = (
            extreme(rng, 4) if rng.random() < 0.8 else rng.randrange(len(made)).to_bytes(4, "little")
        )
    return bytes(made)


def harmful_torch() -> list[bytes]:
    """Return torch files made by hand to do harm."""
    old = io.BytesIO()
    torch.save({"a": torch.ones(2), "b": Payload()}, old, _use_new_zipfile_serialization=False)
    shared = b"]q\0" + b"".join(b"](" + b"h%c" % i * 20 + b"eq%c" % (i + 1) for i in range(40))
    pickles = [snippet + b"." for snippet in _SNIPPETS] + [b"]" * 400_000 + b"a" * 399_999 + b".", shared + b"."]
    pickles += [b")" + b"\x85" * 900_000 + b"K\1s.", b"}" + b"\x85" * 900_000 + b"."]
    made = [pickle.dumps(Payload(), protocol) for protocol in range(6)] + [old.getvalue(), saved(Payload())]
    made.append(zipped([("archive/data.pkl", b"\0" * 20_000_000)], zipfile.ZIP_DEFLATED))
    made += [zipped([("archive/data.pkl", b"\x80\x02" + content)]) for content in pickles]
    made += [zipped([("archive/data.pkl", snippet + b"."), ("archive/version", b"3\n")]) for snippet in _SNIPPETS]
    return [*made, b"PK\x05\x06" + b"\0" * 18, b"", b"\0" * 100_000]


# ---------------------------------------------------------------------- arrays

_SHAPES = table(
    "(5, 3)¦(-1, 3)¦(2**62, 4)¦(99999999999, 9999999999)¦(5,)¦()¦(0, 0)¦(5, 3, 0)¦(1.5, 2)¦[5, 3]¦(5, True)"
)
_KINDS = table("'<f8'¦'|O'¦'<U9'¦'V1000000000'¦'>f4'¦[('a', '<f8')]¦'<f2'¦'<M8[s]'¦'x'¦None¦'<c16'¦'<f16'")


def _npy_header(kind: str = "'<f8'", order: str = "False", shape: str = "(5, 3)") -> bytes:
    return f"{{'descr': {kind}, 'fortran_order': {order}, 'shape': {shape}}}\n".encode()


def npy(array: np.ndarray, header: bytes | None = None, version: bytes = b"\2\0", size: int | None = None) -> bytes:
    """Return an array as np.save writes it; with another header, its claim of version and size, before its data."""
    np.save(file := io.BytesIO(), array, allow_pickle=True)
    content = file.getvalue()
    if header is None:
        return content
    data = content[10 + int.from_bytes(content[8:10], "little") :]
    return b"\x93NUMPY" + version + struct.pack("<I", len(header) if size is None else size) + header + data


def harmful_npy(matrix: np.ndarray) -> list[bytes]:
    """Return arrays made by hand: objects, other kinds and shapes, headers that lie or are no literal."""
    arrays = [np.array([Payload()], object), np.zeros((2, 2), "V9"), np.zeros(3), np.array("x"), np.zeros((0, 3))]
    headers = [_npy_header(shape=shape) for shape in _SHAPES] + [_npy_header(kind, "True") for kind in _KINDS]
    headers += [b"[" * 5000, b"(" * 90_000, b"__import__('os')", b"{}" * 9, b"{'descr': '<f8'}", b"1" * 9000]
    headers += [b"-" * 50_000 + b"1"]
    return [*map(npy, arrays), *(npy(matrix, header) for header in headers)]


def spoil_npy(rng: Random, content: bytes) -> bytes:
    """Put another header before the data of an array."""
    order = rng.choice(("False", "True", "1", "None"))
    header = _npy_header(rng.choice(("'<f8'", *_KINDS)), order, rng.choice(_SHAPES))
    header = spoil_bytes(rng, header) if rng.random() < 0.3 else header
    size = len(header) if rng.random() < 0.9 else rng.choice((0, 2**32 - 1, 70_000))
    array = np.load(io.BytesIO(content))  # our own seed
    return npy(array, header, rng.choice((b"\2\0", b"\3\0", b"\x09\0")), size)


# ---------------------------------------------------------------------- safetensors

_DTYPES = ["F64", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "C64", "U64", "F32", "X", ""]


def safetensors(header: bytes, data: bytes = b"") -> bytes:
    """Return a safetensors file of a header and data."""
    return len(header).to_bytes(8, "little") + header + data


def spoil_safetensors(rng: Random, content: bytes) -> bytes:
    """Put other names, kinds, shapes, places and metadata into the header, other lengths or numbers into the file."""
    size, change = int.from_bytes(content[:8], "little"), rng.randrange(6)
    header, data = content[8 : 8 + size], content[8 + size :]
    if change < 2:
        return safetensors(spoil_json(rng, header), data)
    if change == 2:
        size = rng.choice((0, 1, len(header), 2**62, 100_000_001, len(content)))
        return size.to_bytes(8, "little") + content[8:]
    if change == 3:
        return safetensors(header, bytes(rng.choices((0, 0x7F, 0xFF, 0x80, 0xC0), k=len(data))))
    fields = json.loads(header)
    if change == 4:
        tensor = fields[rng.choice([name for name in fields if name != "__metadata__"])]
        places = ([], [1], [0, 0], [2**63, 2], [len(data), 0], [0, len(data)], [1, 3, 1], [-1], None)
        tensor[rng.choice(("dtype", "shape", "data_offsets"))] = rng.choice((*_DTYPES, *places))
    else:
        key = rng.choice(("grids", "fingerprint", "train", rng.choice(TOKENS)))
        fields.setdefault("__metadata__", {})[key] = rng.choice(TOKENS)
    return safetensors(json.dumps(fields).encode(), data)


# ---------------------------------------------------------------------- images

_IMAGES = """RGB JPEG exif¦RGB JPEG progressive¦CMYK JPEG¦L JPEG¦RGB PNG¦RGBA PNG¦P PNG transparency¦I;16 PNG¦1 PNG¦
P GIF¦RGB WEBP¦RGBA WEBP lossless¦RGB BMP¦RGB TIFF¦RGB MPO¦RGB PPM¦RGB AVIF¦RGB JPEG2000"""
_CHUNKS = b"tRNS PLTE eXIf iCCP zTXt iTXt acTL fcTL fdAT gAMA IDAT pHYs".split()
_PNG = b"\x89PNG\r\n\x1a\n"


def pictures() -> list[bytes]:
    """Return a small picture in every mode and format that this build of Pillow can write."""
    from PIL import Image

    made, picture = [], Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif, "progressive": True, "transparency": 3, "lossless": True}
    for mode, kind, *named in map(str.split, table(_IMAGES)):
        try:
            picture.convert(mode).save(file := io.BytesIO(), kind, **{name: options[name] for name in named})
        except (KeyError, OSError, ValueError):  # not in this build
            continue
        made.append(file.getvalue())
    return made


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _ihdr(width: int, height: int, depth: int = 8, kind: int = 2, interlaced: int = 0) -> bytes:
    return struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, interlaced)


def _png(width: int, height: int, data: bytes, *more: bytes, kind: int = 2) -> bytes:
    parts = [_chunk(b"IHDR", _ihdr(width, height, kind=kind)), *more, _chunk(b"IDAT", zlib.compress(data, 1))]
    return _PNG + b"".join(parts) + _chunk(b"IEND", b"")


def harmful_images() -> list[bytes]:
    """Return images made by hand: bombs of pixels, text and profiles, and formats that must not be taken."""
    sizes = [(60_000, 1), (1, 60_000), (0, 0), (0, 5), (50_000, 50_000), (2**31 - 1, 2**31 - 1), (9_000, 9_000)]
    made = [_png(width, height, b"\0" * 1000) for width, height in [*sizes, (13_000, 13_000)]]
    bomb = zlib.compress(b"a" * 60_000_000, 1)
    extras = [
        [_chunk(b"zTXt", b"k\0\0" + bomb)],
        [_chunk(b"iCCP", b"p\0\0" + bomb)],
        [_chunk(b"tEXt", b"a\0b")] * 20_000,
    ]
    made += [_png(4, 4, b"\0" * 52, *extra) for extra in extras]
    made += [_png(3_000, 3_000, b"\0" * 27_003_000), _png(9_400, 9_400, b"\0" * 88_369_400, kind=0)]
    made += [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run quit\n",
        b"%PDF-1.7\n",
        b"GIF89a" + b"\xff" * 40,
    ]
    made += [
        b"BM" + b"\xff" * 60,
        b"P6 99999999 99999999 255\n",
        b"P3 2 2 255 " + b"9" * 100_000,
        b"II*\0" + b"\xff" * 100,
    ]
    made += [
        b"\xff\xd8\xff\xe0" + b"\0" * 100,
        b"RIFF\xff\xff\xff\x7fWEBPVP8X" + b"\xff" * 30,
        b"8BPS\0\1" + b"\xff" * 40,
    ]
    made += [b"\0\0\1\0\xff\xff" + b"\0" * 100, b"SIMPLE  = T" + b" " * 3000]
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image href="file:///etc/passwd"/></svg>'
    return [*made, svg]


def spoil_image(rng: Random, content: bytes) -> bytes:
    """Spoil the chunks of a PNG under sound check sums; of other formats sizes, counts and places in the head."""
    if content.startswith(_PNG) and rng.random() < 0.8:
        chunks, place = [], 8
        while place < len(content):
            size = int.from_bytes(content[place : place + 4], "big")
            chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + size]))
            place += 12 + size
        return _PNG + b"".join(_chunk(*chunk) for chunk in spoil_parts(rng, chunks, *_chunk_changes(rng)))
    changed = bytearray(content)
    for _ in range(rng.choice((1, 2, 3))):
        place, size = rng.randrange(min(len(changed), 300)), rng.choice((1, 2, 4))
        number = extreme(rng, size) if rng.random() < 0.7 else rng.randrange(256**size).to_bytes(size, "big")
        changed[place : place + size] = number
    return bytes(changed)


def _chunk_changes(rng: Random):
    def new() -> tuple[bytes, bytes]:
        return rng.choice(_CHUNKS), noise(rng)[:300]

    def alter(chunk: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
        if chunk[0] != b"IHDR" or rng.random() < 0.3:
            return chunk[0], spoil_bytes(rng, chunk[1])
        size = [rng.choice((0, 1, 2, 16, 201, 65_535, 2**31 - 1, rng.randrange(3000))) for _ in range(2)]
        return b"IHDR", _ihdr(*size, rng.choice((1, 2, 8, 16)), rng.choice((0, 2, 3, 4, 6)), rng.randrange(2))

    return new, alter
