"""Torch files spoilt three ways: other values in what was saved, other opcodes in its pickle, another zip around it."""

import io
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from random import Random

import numpy as np
import torch

from fuzzing.harness import CANARY
from fuzzing.mutations import TOKENS

_PAYLOAD = f"touch {CANARY}"


class Payload:
    """Pickled, a call of os.system."""

    def __reduce__(self):
        import os

        return os.system, (_PAYLOAD,)


def saved(content) -> bytes:
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def spoil_torch(rng: Random, content: bytes) -> bytes:
    """A torch file with its values, its pickle or its zip spoilt."""
    members = _members(content)
    kind = rng.randrange(10)
    if kind < 4:
        return _spoil_values(rng, content)
    if kind < 8:
        name = next(name for name in members if name.endswith("/data.pkl"))
        members[name] = spoil_pickle(rng, members[name])
        return zipped(list(members.items()))
    return _spoil_zip(rng, members)


def _members(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def zipped(members: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip of these."""
    import warnings

    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name twice
        with zipfile.ZipFile(file, "w", compression) as archive:
            for name, content in members:
                archive.writestr(zipfile.ZipInfo(name), content, compression)
    return file.getvalue()


# ---------------------------------------------------------------------- values


def _values() -> list:
    """What a stranger may have put in the place of a value."""
    tensors = [torch.zeros(0), torch.zeros(2, 2), torch.full((6, 8), float("nan")), torch.full((8,), float("inf"))]
    tensors += [torch.tensor(1.0), torch.zeros(8, 6, dtype=torch.int64), torch.zeros(3, dtype=torch.complex64)]
    tensors += [torch.zeros(4, dtype=torch.bool), torch.zeros(8, 6, dtype=torch.float16), torch.ones(1).expand(8)]
    tensors += [torch.zeros(8, 6).to_sparse(), torch.zeros(2, 2, device="meta")]
    tensors += [torch.zeros(1, 1, 1, 1, 1, 1, 1), torch.zeros(8, 6).t(), torch.nn.Parameter(torch.ones(8, 6))]
    tensors += [torch.full((8, 6), 1e38), torch.zeros(8, 6, dtype=torch.float64), torch.zeros(5056, dtype=torch.uint8)]
    arrays = [
        np.zeros((2, 2)),
        np.array("x"),
        np.zeros(3, dtype=np.complex64),
        np.float64(3.0),
        np.zeros((0, 3)),
        np.int64(4),
    ]
    plain = [
        None,
        True,
        False,
        -1,
        0,
        10**30,
        2**63,
        1.5,
        float("nan"),
        float("inf"),
        b"bytes",
        (),
        [],
        {},
        [None],
        {1: 2},
    ]
    plain += [
        set(),
        {"": None},
        OrderedDict(a=1),
        torch.Size([2, 3]),
        _deep(20),
        _deep(300),
        ["x"] * 2000,
        "grpo",
        "rce",
    ]
    return [*tensors, *arrays, *plain, *TOKENS, torch.float32, torch.device("cpu"), complex(1, 2), Payload()]


def _deep(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


_VALUES = _values()


def _spoil_values(rng: Random, content: bytes) -> bytes:
    tree = [torch.load(io.BytesIO(content), weights_only=False)]  # our own seed
    for _ in range(rng.choice((1, 1, 2, 4))):
        places, level = [], [tree]
        while level:
            here = [(c, k) for c in level for k in (c if isinstance(c, dict) else range(len(c)))]
            places += [here] if here else []
            level = [v for c, k in here if isinstance(v := c[k], (dict, list))]
        if not places:
            break
        holder, key = rng.choice(rng.choice(places))
        change = rng.randrange(8)
        if change < 5:
            holder[key] = rng.choice(_VALUES)
        elif change == 5:
            del holder[key]
        elif change == 6 and isinstance(holder, dict):
            holder[rng.choice(("epoch", "policy", 3, None, (1, 2), rng.choice(TOKENS)))] = holder.pop(key)
        else:
            value = holder[key]
            narrow = isinstance(value, torch.Tensor) and value.ndim and value.layout == torch.strided
            holder[key] = value[..., :1] if narrow else [value]
    return saved(tree[0] if tree else None)


# ---------------------------------------------------------------------- pickles

_NAMES = ["os system", "posix system", "builtins exec", "builtins eval", "__builtin__ getattr", "builtins bytearray"]
_NAMES += [
    "torch load",
    "torch.hub load",
    "torch.storage _load_from_bytes",
    "torch._utils _rebuild_tensor_v2",
    "numpy ndarray",
]
_NAMES += [
    "torch._utils _rebuild_sparse_tensor",
    "torch._utils _rebuild_parameter",
    "torch FloatStorage",
    "torch UntypedStorage",
]
_NAMES += [
    "collections OrderedDict",
    "torch Size",
    "numpy dtype",
    "_codecs encode",
    "numpy.core.multiarray _reconstruct",
]
_NAMES += [
    "numpy._core.multiarray _reconstruct",
    "numpy.core.multiarray scalar",
    "collections defaultdict",
    "torch device",
    " ",
]
_NAMES += [
    "os.path join",
    "torch._tensor _rebuild_from_type_v2",
    "runpy run_path",
    "functools partial",
    "operator attrgetter",
]
_TEXT = pickle.dumps(_PAYLOAD, 2)[2:-1]
_SNIPPETS = [f"c{name.replace(' ', chr(10), 1)}\n".encode() + _TEXT + b"\x85R" for name in _NAMES]
_SNIPPETS += [b"cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x10\x85R", b"cbuiltins\nbytes\nJ\xff\xff\xff\x7f\x85R"]
_SNIPPETS += [
    b"(" * 3000,
    b"]" * 3000 + b"a" * 2999,
    b")" + b"\x85" * 3000,
    b"}" * 100,
    b"0",
    b"2",
    b"l",
    b"t",
    b"u",
    b"s",
    b"e",
    b"b",
]
_SNIPPETS += [
    b"R",
    b"Q",
    b"\x81",
    b"\x92",
    b"o",
    b"(ios\nsystem\n",
    b"P0\n",
    b"N.",
    b".",
    b"h\xff",
    b"j\xff\xff\xff\x7f",
    b"q\xff",
]
_SNIPPETS += [
    b"r\xff\xff\xff\x7f",
    b"X\xff\xff\xff\x7fabc",
    b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc",
    b"\x8b\xff\xff\xff\x7f",
    b"\x8a\xff" + b"\x7f" * 255,
]
_SNIPPETS += [
    b"I" + b"9" * 5000 + b"\n",
    b"F1e400\n",
    b"L" + b"9" * 30 + b"L\n",
    b"Vx\\u0041\n",
    b"S'x'\n",
    b"G\x7f\xf8\0\0\0\0\0\0",
    b"\x80\x05",
]
_SNIPPETS += [
    b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\x82\x01",
    b"\x8f",
    b"(\x90",
    b"\x97\x98",
    b"K\0",
    b"J\0\0\0\x80",
]
_SNIPPETS += [b"]q\x00h\x00a", b"}q\x00K\x01h\x00s", b")q\x01h\x01h\x01\x86q\x01" * 60, b"]h\x00h\x00h\x00\x87" * 40]


def spoil_pickle(rng: Random, pickled: bytes) -> bytes:
    """A pickle of protocol 2 with opcodes taken away, doubled, moved, replaced and put in, other numbers in them."""
    starts = [place for _, _, place in pickletools.genops(pickled)]
    codes = [pickled[a:b] for a, b in zip(starts, [*starts[1:], len(pickled)], strict=True)]
    for _ in range(rng.choice((1, 1, 2, 5))):
        i, change = rng.randrange(len(codes)), rng.randrange(8)
        if change == 0:
            codes[i] = b""
        elif change == 1:
            codes.insert(i, codes[i])
        elif change == 2:
            j = rng.randrange(len(codes))
            codes[i], codes[j] = codes[j], codes[i]
        elif change == 3:
            codes[i] = rng.choice(_SNIPPETS)
        elif change == 4:
            codes.insert(i, rng.choice(_SNIPPETS))
        elif change == 5:  # another name
            places = [n for n, code in enumerate(codes) if code[:1] == b"c"]
            if places:
                codes[rng.choice(places)] = f"c{rng.choice(_NAMES).replace(' ', chr(10), 1)}\n".encode()
        elif change == 6:  # another number: sizes, strides, offsets, lengths
            places = [n for n, code in enumerate(codes) if code[:1] in (b"K", b"M", b"J")]
            if places:
                value = rng.choice((0, 1, 2, 255, 65535, 2**31 - 1, -1, -(2**31), rng.randrange(64)))
                codes[rng.choice(places)] = b"J" + struct.pack("<i", value)
        else:
            places = [n for n, code in enumerate(codes) if code[:1] == b"X"]
            if places:
                text = rng.choice(("0", "1", "storage", "cpu", "cuda:0", "latin1", "f4", "O", "V9", *TOKENS)).encode()
                codes[rng.choice(places)] = b"X" + struct.pack("<I", len(text)) + text
    return b"".join(codes)


# ---------------------------------------------------------------------- zips


def _spoil_zip(rng: Random, members: dict[str, bytes]) -> bytes:
    entries = list(members.items())
    folder = entries[0][0].split("/")[0]
    i, change = rng.randrange(len(entries)), rng.randrange(9)
    name, content = entries[i]
    if change == 0:
        new = rng.choice(
            (f"../{name}", f"/{name}", name.replace("/", "\\"), "data.pkl", "x" * 60_000, f"{folder}/x/data.pkl", "")
        )
        entries[i] = (new, content)
    elif change == 1:
        entries.append((name, rng.choice((content, b"", b"\x80\x02N.", rng.randbytes(64)))))
    elif change == 2:
        del entries[i]
    elif change == 3:
        rng.shuffle(entries)
    elif change == 4:
        entries[i] = (name, content[: rng.randrange(len(content) + 1)])
    elif change == 5:
        more = rng.choice(
            ("data/9", "byteorder", ".format_version", "version", "code/x.py", "constants.pkl", "other/data.pkl")
        )
        entries.append((f"{folder}/{more}", rng.choice((b"big", b"little", b"", b"\x80\x02N.", b"1" * 1000))))
    elif change == 6:
        entries += [(f"{folder}/extra/{n}", b"") for n in range(2000)]
    elif change == 7:
        entries[i] = (name, b"\0" * 20_000_000)
        return zipped(entries, rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)))
    made = zipped(entries)
    if change == 8:  # its directory lies about sizes, places and counts
        made = bytearray(made)
        start = made.rfind(b"PK\x05\x06")
        directory = int.from_bytes(made[start + 16 : start + 20], "little")
        for _ in range(rng.choice((1, 2, 4))):
            place = rng.randrange(directory, len(made) - 4)
            value = rng.choice((0, 1, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF, rng.randrange(len(made))))
            made[place : place + 4] = value.to_bytes(4, "little")
        made = bytes(made)
    return made


def known() -> list[bytes]:
    """Files made by hand to do harm."""
    plain = [pickle.dumps(Payload(), protocol) for protocol in range(6)]
    old = io.BytesIO()
    torch.save({"a": torch.ones(2), "b": Payload()}, old, _use_new_zipfile_serialization=False)
    bombs = [zipped([("archive/data.pkl", b"\0" * 20_000_000)], zipfile.ZIP_DEFLATED)]
    bombs += [zipped([("archive/data.pkl", snippet + b"."), ("archive/version", b"3\n")]) for snippet in _SNIPPETS]
    bombs += [zipped([("archive/data.pkl", b"\x80\x02" + snippet + b".")]) for snippet in _SNIPPETS]
    bombs.append(zipped([("archive/data.pkl", b"\x80\x02" + b"]" * 400_000 + b"a" * 399_999 + b".")]))
    bombs.append(zipped([("archive/data.pkl", b"\x80\x02)" + b"\x85" * 900_000 + b"K\1s.")]))
    bombs.append(zipped([("archive/data.pkl", b"\x80\x02}" + b"\x85" * 900_000 + b".")]))
    shared = b"]q\0" + b"".join(b"](" + b"h%c" % i * 20 + b"eq%c" % (i + 1) for i in range(40))
    bombs.append(zipped([("archive/data.pkl", b"\x80\x02" + shared + b".")]))
    return [*plain, old.getvalue(), *bombs, saved(Payload()), b"PK\x05\x06" + b"\0" * 18, b"", b"\0" * 100_000]
