# SPDX-License-Identifier: MIT
"""What Ollama asks of a GGUF header before it takes a file, written down from its two parsers.

fs/ggml/gguf.go and fs/gguf/gguf.go of August 2026: the type ids below have a size in both, no others; at most 4
dimensions; strings of at most 16 MiB and arrays of 64 Mi elements; an alignment above 0; rows of whole blocks; tensors
inside the file.
"""

import struct

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MAX_STRING, MAX_ARRAY, MAX_DIMS = 16 << 20, 64 << 20, 4
BLOCKS = {  # id -> (weights per block, bytes per block)
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66),
    17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136),
    24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2),
}  # fmt: skip


class Refused(Exception):
    """What the server answers `ollama create` with."""


class Header:
    """A header as both parsers read it: `keys` in order, `tensors` as (name, ne, type id), `position` of each key."""

    def __init__(self, data: bytes):
        self.data, self.at, self.keys, self.position = data, 0, {}, {}
        magic, version, n_tensors, n_keys = self.take("<4sIQQ")
        require(magic == b"GGUF" and version in (2, 3), f"unsupported version {version}")
        for _ in range(n_keys):
            start, key = self.at, self.string()
            self.keys[key], self.position[key] = self.value(*self.take("<I")), start
        self.tensors, sizes = [], []
        for _ in range(n_tensors):
            name, (n_dims,) = self.string(), self.take("<I")
            require(n_dims <= MAX_DIMS, f"tensor {name!r} dimensions {n_dims} exceeds maximum {MAX_DIMS}")
            ne = self.take(f"<{n_dims}Q")
            type_id, offset = self.take("<IQ")
            self.tensors.append((name, ne, type_id))
            sizes.append((offset, size(name, ne, type_id)))
        alignment = self.keys.get("general.alignment", 32)
        require(alignment > 0, "invalid GGUF alignment")
        start = -(-self.at // alignment) * alignment
        for (name, *_), (offset, count) in zip(self.tensors, sizes, strict=True):
            require(start + offset + count <= len(data), f"tensor {name!r} offset+size exceeds file size")

    def take(self, form: str) -> tuple:
        found = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return found

    def string(self) -> str:
        (length,) = self.take("<Q")
        require(length <= MAX_STRING, f"string {length} exceeds maximum {MAX_STRING}")
        self.at += length
        return self.data[self.at - length : self.at].decode(errors="replace")

    def value(self, kind: int):
        if kind in SCALARS:
            return self.take("<" + SCALARS[kind])[0]
        if kind == STRING:
            return self.string()
        require(kind == ARRAY, f"unsupported type {kind}")
        item, count = self.take("<IQ")
        require(count <= MAX_ARRAY, f"array size {count} exceeds maximum {MAX_ARRAY}")
        require(item in SCALARS or item == STRING, f"unsupported type {item}")
        return [self.string() if item == STRING else self.take("<" + SCALARS[item])[0] for _ in range(count)]


def size(name: str, ne: tuple[int, ...], type_id: int) -> int:
    """Bytes of a tensor."""
    elements = 1
    for n in ne:
        elements *= n
    require(elements < 1 << 63, f"tensor {name!r} elements overflow")
    require(type_id in BLOCKS, f"tensor {name!r} size overflow")  # an unknown type has size 0
    block, block_bytes = BLOCKS[type_id]
    require((ne[0] if ne else 1) % block == 0, f"tensor {name!r} size overflow")
    return elements // block * block_bytes


def require(sound: bool, cause: str) -> None:
    if not sound:
        raise Refused(cause)
