"""Evaluate straight-line PTX as it stands in inline assembly, for one thread of a warp.

Registers hold 32 bits as a Python integer. Reductions over the warp see this thread only.
"""

import re
import struct

import torch


def as_float(bits):
    """The float32 of 32 bits."""
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def as_bits(value):
    """32 bits of a number rounded to float32."""
    return struct.unpack("<I", struct.pack("<f", value))[0]


def signed(value, bits=32):
    """The number of a two's complement."""
    return value - (1 << bits) if value >> (bits - 1) & 1 else value


def bytes_of(word):
    """Four signed bytes, the lowest first."""
    return [signed(word >> 8 * i & 255, 8) for i in range(4)]


def prmt(low, high, selector):
    """Bytes of two words by the selector's four nibbles; bit 3 asks for the byte's sign."""
    both, result = low | high << 32, 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = both >> 8 * (nibble & 7) & 255
        result |= (byte if nibble < 8 else 255 * (byte >> 7)) << 8 * i
    return result


def lop3(a, b, c, table):
    """Any function of three bits: bit ``4 a + 2 b + c`` of the table."""
    places = range(32)
    return sum(
        (table >> (a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1) & 1) << i for i in places
    )


def dp4a(a, b, c):
    """The sum of products of signed bytes, and c."""
    return sum(x * y for x, y in zip(bytes_of(a), bytes_of(b), strict=True)) + c


def largest(a, b):
    """The larger float32; not a number if either is."""
    x, y = as_float(a), as_float(b)
    return 0x7FFFFFFF if x != x or y != y else max((x, a), (y, b))[1]


def pair(kind, a, b):
    """Two float32 rounded to 16 bits, the second in the low half."""
    both = torch.tensor([as_float(b), as_float(a)]).to(kind)
    return int(both.view(torch.int32)) & 0xFFFFFFFF


OPERATIONS = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "not.b32": lambda a: ~a,
    "sub.u32": lambda a, b: a - b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "bfe.u32": lambda a, start, length: a >> start & (1 << length) - 1,
    "prmt.b32": prmt,
    "lop3.b32": lop3,
    "dp4a.s32.s32": dp4a,
    "mad.lo.s32": lambda a, b, c: a * b + c,
    "fma.rn.f32": lambda a, b, c: as_bits(as_float(a) * as_float(b) + as_float(c)),
    "sub.f32": lambda a, b: as_bits(as_float(a) - as_float(b)),
    "mul.f32": lambda a, b: as_bits(as_float(a) * as_float(b)),
    "cvt.rn.f16x2.f32": lambda a, b: pair(torch.float16, a, b),
    "cvt.rn.bf16x2.f32": lambda a, b: pair(torch.bfloat16, a, b),
    "abs.f32": lambda a: a & 0x7FFFFFFF,
    "max.NaN.f32": largest,
    "cvt.f32.f16": lambda a: as_bits(struct.unpack("<e", struct.pack("<H", a))[0]),
    "cvt.u16.u32": lambda a: a & 65535,
    "max.u32": max,
    "max.u16x2": lambda a, b: max(a & 65535, b & 65535) | max(a >> 16, b >> 16) << 16,
    "setp.ne.b32": lambda a, b: a != b,
    "selp.b32": lambda a, b, c: a if c else b,
    "shfl.sync.idx.b32": lambda a, lane, clamp, lanes: a,
    "redux.sync.max.u32": lambda a, lanes: a,
    "redux.sync.add.s32": lambda a, lanes: a,
}


def run(assembly, results, operands):
    """The results of inline assembly whose operands follow the results in number."""
    held = {f"${results + i}": value for i, value in enumerate(operands)}

    def value(name):
        if name.startswith("0f"):
            return int(name[2:], 16)
        return held[name] if name in held else int(name, 0)

    for line in re.findall(r"[^;{}\s][^;]*(?=;)", assembly):
        operation, arguments = line.split(None, 1)
        if operation == ".reg":
            continue
        names = [name.strip(" {}") for name in arguments.split(",")]
        if line.startswith("mov.b32 {"):
            word = value(names[2])
            held[names[0]], held[names[1]] = word & 65535, word >> 16
        else:
            held[names[0]] = OPERATIONS[operation](*map(value, names[1:])) & 0xFFFFFFFF
    return [held[f"${i}"] for i in range(results)]
