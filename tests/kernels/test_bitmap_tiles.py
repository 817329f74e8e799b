import os

import pytest
import torch

from squeeze.quant.kv._raw import RawBlocks
from squeeze.quant.kv.bitmap import Bitmap
from tests.kernels.tile_cases import Case, check, compiled, interpreted

triton = pytest.importorskip("triton")
tl = triton.language
from squeeze.kernels.decode_attention.tiles import bitmap  # noqa: E402

FOUR, HALVES = Bitmap(), Bitmap(survivor_bits=16)
CASES = [
    Case(FOUR, FOUR, length=128, size=128, kv_heads=1, groups=4, blocks=(2, 1)),
    Case(Bitmap(0.5), HALVES, kv_heads=1, shifted=True, blocks=(2, 1)),
    Case(FOUR, Bitmap(0.6), length=32, size=80, groups=1, steps=2, softcap=3.0, blocks=(2, 1),
         dtype=torch.float16),
    Case(Bitmap(0.55), Bitmap(0.95), length=32, size=32, groups=7, kv_heads=1, steps=3,
         blocks=(1, 1)),
    Case(Bitmap(0.8), Bitmap(0.75), length=32, size=256, kv_heads=1, groups=1, blocks=(1, 1)),
    Case(Bitmap(0.5, 16), Bitmap(0.85, 16), kv_heads=1, dtype=torch.float16, blocks=(2, 1)),
    Case(FOUR, RawBlocks(), size=16, groups=1, kv_heads=1, blocks=(1, 1)),
]  # fmt: skip


@interpreted
@pytest.mark.parametrize("case", CASES)
def test_kernel_matches_float64(case):
    check(case, seed=CASES.index(case))


def permuted(low, high, selector):
    """What the PTX manual says of ``prmt`` in its default mode, byte by byte."""
    data = [(word >> shift) & 255 for word in (low, high) for shift in (0, 8, 16, 24)]
    result = 0
    for i in range(4):
        nibble = (selector >> 4 * i) & 15
        byte = data[nibble & 7]
        result |= ((255 if byte & 128 else 0) if nibble & 8 else byte) << 8 * i
    return result


@triton.jit
def permute(words, output, INTERPRETED: tl.constexpr):
    place = tl.arange(0, 64)
    low, high = tl.load(words + place), tl.load(words + 64 + place)
    result = bitmap._permute(low, high, tl.load(words + 128 + place), INTERPRETED)
    tl.store(output + place, result)
    tl.store(output + 64 + place, bitmap._select(low, 0x58405840, INTERPRETED))


def permute_on(device):
    """Run the tile's instructions on random words; return the results and what they should be."""
    words = torch.randint(-(2**31), 2**31, (3, 64), dtype=torch.int32, device=device)
    output = torch.empty(2, 64, dtype=torch.int32, device=device)
    permute[(1,)](words, output, device == "cpu")
    rows = [[word & 0xFFFFFFFF for word in row] for row in words.tolist()]
    expected = [
        [permuted(*column) for column in zip(*rows, strict=True)],
        [(word & 0x00FF00FF) ^ 0x58405840 for word in rows[0]],
    ]
    return [[word & 0xFFFFFFFF for word in row] for row in output.tolist()], expected


@interpreted
def test_emulated_instructions_are_the_manuals():
    got, expected = permute_on("cpu")
    assert got == expected


def multiplied(field, kept):
    """The selector of a half group as the kernel makes it: below, and from above."""
    low = (field * 0x11111108 + 0x88888888) & 0xFFFFFFFF
    high = ((kept + 7) * 0x11111111 - field * 0x11111118) & 0xFFFFFFFF
    return low, high


@pytest.mark.parametrize("kept", range(1, 9))
def test_selectors_point_at_survivors_or_at_zero(kept):
    # Every half group of eight bits that at most ``kept`` survivors can have.
    for bits in range(256):
        if bits.bit_count() > kept:
            continue
        field = sum((bits >> i & 1) << 4 * i for i in range(8))
        selectors = multiplied(field, kept)
        for i in range(8):
            below = (bits & ((1 << i) - 1)).bit_count()
            near, far = (selector >> 4 * i & 15 for selector in selectors)
            if bits >> i & 1:
                assert (near, far) == (below, kept - 1 - below)
            else:
                # Bytes past the survivors are zero, and so is the sign of any.
                assert near & 8
                assert far & 8 or far & 7 >= kept


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="compiles without a GPU")
@pytest.mark.parametrize(
    "names",
    [
        ("bitmap:90",),
        pytest.param(
            ("bitmap_64:90", "bitmap_halves:80", "bitmap_halves:90", "bitmap_80:100"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_kernel_compiles_without_a_gpu(names):
    compiled(*names)


GPU_CASES = [
    Case(keys, values, length=length, size=size, groups=groups, steps=steps, dtype=torch.bfloat16,
         blocks=(11, 4), exact=(130, 64), shifted=bool(groups % 2))
    for keys, values, length, size in (
        (FOUR, FOUR, 128, 128),
        (Bitmap(0.5), Bitmap(0.6), 128, 128),
        (FOUR, Bitmap(0.75), 64, 64),
        (Bitmap(0.55), FOUR, 64, 80),
        (FOUR, FOUR, 32, 256),
        (HALVES, Bitmap(0.5, 16), 128, 128),
        (Bitmap(0.8, 16), FOUR, 64, 96),
    )
    for groups, steps in ((1, 1), (4, 1), (7, 1), (3, 16))
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=range(len(GPU_CASES)))
def test_kernel_on_the_gpu_matches_float64(case):
    check(case, seed=GPU_CASES.index(case), device="cuda")


@pytest.mark.gpu
def test_instructions_on_the_gpu_are_the_manuals():
    got, expected = permute_on("cuda")
    assert got == expected
