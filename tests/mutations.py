"""Files made wrong in the ways that matter to their readers: `safetensors`, `npy`, `npz`, `manifest` and `text` take
the bytes of a whole file and a random.Random, and return other bytes; `place` puts something else than a file there."""

import contextlib
import io
import json
import os
import pathlib
import pickle
import struct
import zipfile

import numpy as np

NUMBERS = [
    0, 1, -1, 2, 3, 8, 9, 31, 255, 2**31 - 1, 2**31, 2**32, 2**32 + 1, 2**40, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63),
    0.5, 1.5, -0.0, 1e30, 1e308, float("nan"), float("inf"), float("-inf"), True, False, None,
]  # fmt: skip
VALUES = [
    "", "a", "0", "-1", "..", "../../escaped", "/etc/passwd", "\x00", "\n\x1b[31m", "é\ud800", "NaN", "1e9", "١",
    "x" * 5000, [], {}, [[]], [None], [1, 2, 3], {"": {}}, [[[[[[[[]]]]]]]], *NUMBERS,
]  # fmt: skip
KEYS = [
    "",
    "0",
    "-1",
    "00",
    "9" * 9,
    "9" * 19,
    "1_0",
    "١",
    "layers",
    "values",
    ".",
    "a.b.c",
    "0." * 3000 + "0",
    "__class__",
]
FLOATS = [np.nan, np.inf, -np.inf, 0.0, -1.0, 1e-38, 1e-45, 1e20, -1e20, 3e38, -3e38, 65504.0]
BOMB_BYTES = 2 << 30


class Marker:
    """Unpickled, it makes the folder that MUTATIONS_MARKER names: nothing may ever do so."""

    def __reduce__(self):
        return os.makedirs, (os.environ.get("MUTATIONS_MARKER", "unpickled"),)


def value(rng):
    return rng.choice(VALUES) if rng.random() < 0.6 else rng.choice([rng.randrange(-5, 600), rng.uniform(-2, 600)])


def tree(rng, node, depth=0):
    """JSON with one leaf, entry or branch of it changed."""
    children = list(node.items()) if isinstance(node, dict) else list(enumerate(node)) if isinstance(node, list) else []
    if not children or (depth and rng.random() < 0.15):
        if isinstance(node, int) and not isinstance(node, bool) and rng.random() < 0.5:
            return node + rng.choice([-64, -1, 1, 2, 16, 64, 512])
        return nested(rng) if rng.random() < 0.02 else value(rng)
    change = _in_object if isinstance(node, dict) else _in_list
    return change(rng, node, rng.choice(children), children, depth)


def _in_object(rng, node, chosen, children, depth):
    (key, child), action = chosen, rng.random()
    if action < 0.12:
        result = {k: v for k, v in children if k != key}
    elif action < 0.22:
        result = {**node, rng.choice([*KEYS, *node]): child}
    elif action < 0.30:
        result = {(rng.choice(KEYS) if k == key else k): v for k, v in children}
    elif action < 0.38:
        other = rng.choice(children)[0]
        result = {**node, key: node[other], other: child}
    else:
        result = {**node, key: tree(rng, child, depth + 1)}
    return result


def _in_list(rng, node, chosen, children, depth):
    (place, child), action = chosen, rng.random()
    if action < 0.12:
        return node[:place] + node[place + 1 :]
    if action < 0.24:
        return [*node, rng.choice([child, value(rng)])]
    if action < 0.32:
        return rng.sample(node, len(node))
    return [*node[:place], tree(rng, child, depth + 1), *node[place + 1 :]]


def nested(rng, depth=None):
    """A list in a list in a list ..."""
    inner = []
    for _ in range(depth or rng.choice([50, 500])):
        inner = [inner]
    return inner


def as_json(rng, node):
    """Its text; now and then with a key twice, cut short, nested too deep for any reader, or in no encoding."""
    text = json.dumps(node)
    kind = rng.random()
    if kind < 0.03 and text.startswith('{"'):
        text = text[0] + text[1:].split(",")[0].rstrip("}") + "," + text[1:]
    elif kind < 0.05:
        text = text[: rng.randrange(len(text) + 1)]
    elif kind < 0.08:
        opening, closing = rng.choice([("[", "]"), ('{"a":', "}")])
        deep = opening * 100_000 + "0" + closing * 100_000
        text = rng.choice([deep, opening * 100_000, f'{{"rotations": {deep}}}'])
    data = text.encode("utf-8", "surrogatepass")
    return data.replace(b"a", b"\xff", 1) if kind > 0.98 else data


def flipped(rng, data):
    """Some bytes changed, cut off, put in, or put on."""
    data = bytearray(data)
    kind = rng.random()
    if kind < 0.15:
        return bytes(data[: rng.randrange(len(data) + 1)])
    if kind < 0.25:
        return bytes(data) + rng.randbytes(rng.choice([1, 4, 8, 4096]))
    if kind < 0.35 and data:
        at = rng.randrange(len(data))
        return bytes(data[:at]) + rng.randbytes(rng.choice([1, 4, 8])) + bytes(data[at:])
    if kind < 0.4:
        return rng.choice([b"", b"\0" * 8, b"\0" * 4096, b"{}", rng.randbytes(200)])
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        if data:
            data[rng.randrange(len(data) if rng.random() < 0.5 else min(len(data), 400))] ^= 1 << rng.randrange(8)
    return bytes(data)


# safetensors


def split_safetensors(data):
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined_safetensors(header, body):
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + body


TYPES = {
    "F32": "<f4", "F16": "<f2", "F64": "<f8", "I64": "<i8", "I32": "<i4", "U8": "<u1", "U32": "<u4", "U16": "<u2",
    "BF16": "<u2", "BOOL": "<u1",
}  # fmt: skip


def safetensors(rng, data, arrays=()):
    """arrays: names of those that hold text, as numbers."""
    kind = rng.random()
    if kind < 0.12:
        return flipped(rng, data)
    header, body = split_safetensors(data)
    if kind < 0.17:
        (length,) = struct.unpack("<Q", data[:8])
        wrong = rng.choice([0, 1, length - 1, length + 1, 2 * length, 99_000_000, 2**31, 2**40, 2**63, 2**64 - 1])
        return struct.pack("<Q", wrong) + data[8:]
    if kind < 0.35:
        return joined_safetensors(_fields(rng, header), body)
    if kind < 0.55:
        return joined_safetensors(_metadata(rng, header), body)
    if kind < 0.6:
        return joined_safetensors(as_json(rng, tree(rng, header)), body)
    whole = {n: _array(header[n], body) for n in header if n != "__metadata__"}
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        _change_arrays(rng, whole, [n for n in arrays if n in whole])
    return rebuilt(whole, header.get("__metadata__", {}))


def rebuilt(arrays, metadata):
    """A well-formed file of (dtype name, array) pairs."""
    header, body = {"__metadata__": metadata}, b""
    for name, (kind, array) in arrays.items():
        content = np.ascontiguousarray(array).tobytes()
        offsets = [len(body), len(body) + len(content)]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": offsets}
        body += content
    return joined_safetensors(header, body)


def _array(entry, body):
    start, end = entry["data_offsets"]
    return entry["dtype"], np.frombuffer(body[start:end], TYPES[entry["dtype"]]).reshape(entry["shape"]).copy()


def _fields(rng, header):
    header = dict(header)
    name = rng.choice([n for n in header if n != "__metadata__"])
    entry = dict(header[name])
    field = rng.choice(["dtype", "shape", "data_offsets"])
    kind = rng.random()
    if kind < 0.1:
        del entry[field]
    elif kind < 0.25:
        entry[field] = value(rng)
    elif field == "dtype":
        entry[field] = rng.choice([*TYPES, "C64", "F8_E4M3", "F4", "O"])
    elif field == "shape":
        shape = list(entry["shape"])
        change = rng.randrange(6)
        if change == 0 and shape:
            shape[rng.randrange(len(shape))] = rng.choice(NUMBERS)
        elif change == 1:
            shape = [rng.choice([0, 2**20, 2**32, 2**40, 2**62]) for _ in range(4)]
        elif change == 2:
            shape = [*shape, *[1] * rng.choice([1, 3, 40])]
        elif change == 3:
            shape = [int(np.prod(shape))]
        elif change == 4:
            shape = rng.sample(shape, len(shape))
        else:
            shape = shape[1:]
        entry[field] = shape
    else:
        start, end = entry[field]
        shift = rng.choice([1, 4, -4, 64, 2**20, 2**40, 2**63])
        entry[field] = rng.choice([
            [start + shift, end + shift], [start, end + shift], [end, start], [start], [start, end, end], [0, 0],
            [-start - 1, end], [2**64, 2**64 + end], [float(start), float(end)],
        ])  # fmt: skip
    header[name] = entry
    return header


def _metadata(rng, header):
    header = dict(header)
    metadata = header.get("__metadata__", {})
    if not metadata or rng.random() < 0.3:
        header["__metadata__"] = tree(rng, metadata)
        return header
    key = rng.choice(list(metadata))
    try:
        text = as_json(rng, tree(rng, json.loads(metadata[key]))).decode("utf-8", "replace")
    except (ValueError, RecursionError):
        text = rng.choice(
            ["", "KVCache", "SpectralKVCache", "BatchSpectralKVCache", "os", "scalar", "string", "none", "9" * 12]
        )
    header["__metadata__"] = {**metadata, key: text}
    return header


def _change_arrays(rng, arrays, texts):
    """Well-formed, but not what it should be."""
    if not arrays:
        return
    name = rng.choice(texts) if texts and rng.random() < 0.5 else rng.choice(list(arrays))
    kind, array = arrays[name]
    if name in texts and rng.random() < 0.9:
        _change_text(rng, arrays, name)
        return
    action = rng.randrange(9)
    if action == 0:
        del arrays[name]
    elif action == 1:
        arrays[rng.choice([*KEYS, *(f"{name.rsplit('.', 1)[0]}.{k}" for k in KEYS), *arrays])] = kind, array
    elif action == 2:
        other = rng.choice(list(arrays))
        arrays[name], arrays[other] = arrays[other], arrays[name]
    elif action == 3 and array.ndim:
        arrays[name] = kind, _change_length(rng, array)
    elif action == 4:
        shapes = [(array.size,), (1, *array.shape), array.shape[::-1], (*array.shape, 1)]
        arrays[name] = kind, array.reshape(rng.choice(shapes))
    elif action == 5:
        other = rng.choice(list(TYPES))
        with np.errstate(all="ignore"):
            arrays[name] = other, array.astype(TYPES[other])
    elif action == 6:
        arrays[name] = kind, np.zeros(rng.choice([(0,), (0, 2**40), (1, 0, 2**31), (0, 0, 0, 0)]), array.dtype)
    elif array.size:
        _change_numbers(rng, array)


def _change_text(rng, arrays, name):
    kind, array = arrays[name]
    with contextlib.suppress(ValueError, OverflowError, TypeError, RecursionError):  # it was changed before
        fields = json.loads("".join(map(chr, array.tolist())))
        for _ in range(rng.choice([1, 1, 2])):
            fields = tree(rng, fields)
        text = as_json(rng, fields).decode("utf-8", "replace")
        arrays[name] = kind, np.array([ord(c) for c in text]).astype(array.dtype)


def _change_length(rng, array):
    axis = rng.randrange(array.ndim)
    length = array.shape[axis]
    count = rng.choice([0, 1, length // 2, max(length - 1, 0), length * 2])
    return np.take(array, np.arange(count) % length, axis) if array.size else array


def _change_numbers(rng, array):
    flat = array.reshape(-1)
    places = [rng.randrange(flat.size) for _ in range(rng.choice([1, 1, 3, flat.size]))]
    if array.dtype.kind == "f":
        with np.errstate(all="ignore"):
            flat[places] = rng.choice(FLOATS) if rng.random() < 0.7 else flat[places] * rng.choice([-1, 1e5, 1e-9])
    else:
        flat[places] = np.array(rng.getrandbits(64), np.uint64).astype(array.dtype)


# npy, npz


def npy_header(rng, header):
    """Text of a .npy header with something else in it."""
    header = dict(header)
    kind = rng.random()
    if kind < 0.3:
        huge = rng.choice([(2**31,), (2**40, 2**40), (2**62, 4), (0, 2**63), (1 << 33,)])
        header["shape"] = rng.choice([huge, (-1,), (2.0,), (True,), "8", None, [8], (), (8,) * 40, huge])
    elif kind < 0.6:
        header["descr"] = rng.choice([
            "|O", "<f8", "<f2", "<c8", "<i4", "<U4", "<U500000000", "|S2000000000", "<M8[ns]", "|V4", ">f4", "", "x", 7,
            None, [("a", "<f4")], [("a", "|O")], [("a", "<f4", (2**20, 2**20))], [("a", [("b", [("c", "<f4")])])],
        ])  # fmt: skip
    elif kind < 0.7:
        header["fortran_order"] = rng.choice([True, 1, None, "x"])
    elif kind < 0.8:
        header.pop(rng.choice(list(header)))
    elif kind < 0.9:
        return rng.choice(
            ["{" * 4000, "[" * 9000, "-" * 9000 + "1", "(" * 90 + ")" * 90, "__import__('os')", "x" * 70000, "{}"]
        )
    else:
        header[rng.choice(KEYS)] = value(rng)
    return repr(header)


def npy(rng, data):
    kind = rng.random()
    if kind < 0.2:
        return flipped(rng, data)
    if kind < 0.35:
        return pickled(rng)
    array = np.load(io.BytesIO(data), allow_pickle=False)
    if kind < 0.7:
        text = (
            npy_header(rng, {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape}).encode() + b"\n"
        )
        version = rng.choice([(1, 0)] * 8 + [(2, 0), (3, 0), (9, 9)])
        size = struct.pack("<H", len(text) & 0xFFFF) if version == (1, 0) else struct.pack("<I", len(text))
        return b"\x93NUMPY" + bytes(version) + size + text + array.tobytes()
    buffer = io.BytesIO()
    arrays = {"a": (array.dtype.str, array.copy())}
    _change_npy(rng, arrays)
    np.save(buffer, arrays["a"][1], allow_pickle=False)
    return buffer.getvalue()


def _change_npy(rng, arrays):
    kind, array = arrays["a"]
    action = rng.randrange(4)
    if action == 0:
        arrays["a"] = kind, array[: rng.randrange(len(array) + 1)] if array.ndim else array
    elif action == 1:
        arrays["a"] = kind, array.reshape(rng.choice([(-1,), (1, *array.shape), (*array.shape, 1)]))
    elif action == 2:
        with np.errstate(all="ignore"):
            arrays["a"] = kind, array.astype(rng.choice(["<f8", "<f2", "<i4", "<c8", "?", ">f4"]))
    else:
        _change_numbers(rng, array)


def pickled(rng):
    """An .npy of objects, or a bare pickle, that runs code when it is unpickled."""
    if rng.random() < 0.5:
        return pickle.dumps(Marker(), protocol=rng.choice([0, 2, 4]))
    buffer = io.BytesIO()
    np.save(buffer, np.array([Marker()] * rng.choice([1, 3]), dtype=object), allow_pickle=True)
    return buffer.getvalue()


def write_bomb(path):
    """An archive of a few MB whose one member is BOMB_BYTES of zeros, to the file that MUTATIONS_BOMB names."""
    zeros, shape = b"\0" * (1 << 20), (BOMB_BYTES // 4,)
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("layer_0_key_U.npy", "w", force_zip64=True) as member,
    ):
        np.lib.format.write_array_header_1_0(member, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for _ in range(BOMB_BYTES >> 20):
            member.write(zeros)


def npz(rng, data):
    kind = rng.random()
    if kind < 0.25:
        return flipped(rng, data)
    if kind < 0.26:
        return pathlib.Path(os.environ["MUTATIONS_BOMB"]).read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(i.filename, archive.read(i)) for i in archive.infolist()]
    at = rng.randrange(len(members))
    name, content = members[at]
    if kind < 0.65:
        members[at] = name, npy(rng, content)
    elif kind < 0.75:
        del members[at]
    elif kind < 0.9:
        wrong = [
            "../x.npy", "layer_0_key_U", "layer_99999999999_key_U.npy", "layer_-1_key_U.npy", "a/", "layer_١_key_U.npy",
            name, rng.choice(members)[0],
        ]  # fmt: skip
        members[at] = rng.choice(wrong), content
    else:
        members.append(rng.choice(members))
    buffer = io.BytesIO()
    method = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for member in members:
            archive.writestr(*member)
    result = bytearray(buffer.getvalue())
    if rng.random() < 0.2:  # what the directory says of a member: flags, method, sizes
        at = result.rfind(b"PK\x01\x02") + rng.choice([8, 10, 20, 21, 24, 25, 27, 42])
        result[at] ^= 1 << rng.randrange(8)
    return bytes(result)


# text


def text(rng, data):
    """Lines of a source file or a patch lost, doubled, changed, swapped, or with other ends."""
    kind = rng.random()
    if kind < 0.2:
        return flipped(rng, data)
    if kind < 0.3:
        return data.replace(b"\n", b"\r\n")
    lines = data.splitlines(keepends=True)
    at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    if kind < 0.45:
        del lines[at]
    elif kind < 0.6:
        lines.insert(at, lines[other])
    elif kind < 0.8:
        lines[at], lines[other] = lines[other], lines[at]
    else:
        lines[at] = lines[at].rstrip(b"\n") + rng.choice([b" ", b"#", b"\xff", b""]) + rng.choice([b"\n", b""])
    return b"".join(lines)


# what is no file


def place(rng, path):
    """In the place of the file a folder, a pipe, or a link to nothing, to itself, to a folder, to an endless device."""
    kind = rng.randrange(7)
    if kind == 0:
        path.mkdir()
    elif kind == 5:
        os.mkfifo(path)
    elif kind < 6:
        path.symlink_to({1: "nowhere", 2: path.name, 3: "..", 4: "/dev/zero"}[kind])
