"""Compile the kernel with one format's tile functions, and print registers and spills as JSON.

Run by tests in a process of its own, because the interpreter and the compiler exclude each other.
"""

import json
import sys

from compile_decode_attention import compile_case

from squeeze.quant.kv.binary_spectral import BinarySpectral
from squeeze.quant.kv.bitmap import Bitmap
from squeeze.quant.kv.float8 import Float8
from squeeze.quant.kv.ternary import Ternary

# Keys, values, block length, head size, rows of a tile, dtype.
CASES = {
    "bitmap": (Bitmap(), Bitmap(), 128, 128, 8, "bf16"),
    "bitmap_64": (Bitmap(0.5), Bitmap(), 64, 64, 8, "fp16"),
    "bitmap_80": (Bitmap(), Bitmap(0.55), 64, 80, 16, "bf16"),
    "bitmap_halves": (Bitmap(0.5, 16), Bitmap(0.7, 16), 128, 128, 8, "bf16"),
    "float8": (Float8(), Float8(), 128, 128, 8, "bf16"),
    "float8_half": (Float8("head"), Float8("head"), 128, 128, 16, "fp16"),
    "float8_80": (Float8(), Float8(), 64, 80, 8, "bf16"),
    "ternary": (Ternary(), Ternary(), 128, 128, 8, "bf16"),
    "ternary_protected": (Ternary(protected=8), Ternary(protected=8), 128, 128, 8, "bf16"),
    "ternary_token": (Ternary("token", 64), Ternary("token", 64), 128, 64, 8, "fp16"),
    "ternary_mixed": (Ternary("channel", 32), Ternary("token", 32), 128, 64, 8, "bf16"),
    "spectral": (BinarySpectral(), BinarySpectral(), 128, 128, 8, "bf16"),
    "spectral_protected": (
        BinarySpectral(protected=4),
        Ternary(protected=8),
        128,
        128,
        8,
        "bf16",
    ),
    "spectral_half": (BinarySpectral(0.5), BinarySpectral(0.5), 128, 64, 8, "fp16"),
    "spectral_mixed": (BinarySpectral(0.25, group_size=32), Ternary(), 128, 64, 8, "bf16"),
}

if __name__ == "__main__":
    for argument in sys.argv[1:]:
        name, capability = argument.split(":")
        result = compile_case(CASES[name], int(capability))
        print(json.dumps({"case": argument} | result), flush=True)
