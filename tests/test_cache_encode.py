"""A cache layer stores the same by the encoding kernel and by the formats' own code."""

import pytest
import torch

from squeeze.cache import layer as layers
from squeeze.cache.blocks import BlockStorage
from squeeze.cache.layer import PackedLayer
from squeeze.cache.spec import LayerSpec, Side
from squeeze.cache.static import StaticPackedLayer
from squeeze.kernels.kv_encode import api
from squeeze.kernels.kv_encode import triton as kernels
from squeeze.quant.kv.affine import Affine
from squeeze.quant.kv.bitmap import Bitmap
from squeeze.quant.kv.float8 import Float8
from squeeze.quant.kv.graded import Graded
from squeeze.quant.transforms.center import Center
from squeeze.quant.transforms.hadamard import Hadamard
from squeeze.quant.transforms.klt import Klt
from squeeze.types import Implementation
from tests.test_cache_exact import Launches

HEADS, SIZE = 2, 16
CENTER = (Center(), {"center": torch.linspace(-3, 3, HEADS * SIZE).view(HEADS, SIZE)})
# Rotations without rounding: channels change places and signs.
PLACES = torch.stack([(-torch.eye(SIZE)).roll(5, 0), torch.eye(SIZE).flip(0)])
KLT = (Klt(), {"forward": PLACES, "backward": PLACES.mT.contiguous()})
PAIRS = {
    "affine": (Side(Affine(4, "channel", 32), {}, (CENTER,)), Side(Affine(2, "token", 16), {})),
    "graded": (
        Side(Graded((4, 0), 32), {}, (CENTER, (Hadamard(), {}))),
        Side(Graded((1,), 32), {}),
    ),
    "rotated": (
        Side(Graded((4, 0), 32), {}, (CENTER, KLT)),
        Side(Affine(2, "token", 16), {}, (KLT,)),
    ),
    "other": (Side(Float8(), {}), Side(Bitmap(), {})),
}


def filled(name, implementation, rows, pads):
    """Keep a prompt and then single tokens, 100 and 70."""
    torch.manual_seed(0)
    made = PackedLayer(LayerSpec(*PAIRS[name], 32, 2, 5, implementation))
    made.pads = pads
    for steps in (100, *[1] * 70):
        keys, values = torch.randn(2, rows, steps, HEADS, SIZE).transpose(2, 3).half()
        made.update(keys, values)
        made.commit(keys, values)
    return made


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("pads", [[0, 0], [0, 9]])
def test_the_kernel_stores_what_the_formats_encode(name, pads, monkeypatch):
    monkeypatch.setattr(layers, "ENCODE_TOKENS", 64)
    ours = filled(name, Implementation.TRITON, 2, pads)
    truth = filled(name, Implementation.REFERENCE, 2, pads)
    assert ours.blocks == truth.blocks == [5, (170 - pads[1] - 7) // 32]
    storages = [(made.key_blocks, made.value_blocks) for made in (ours, truth)]
    for mine, theirs in zip(*storages, strict=True):
        for row, count in enumerate(ours.blocks):
            expected = {n: x[:, row] for n, x in theirs.merged(count).items()}
            for part, x in mine.merged(count).items():
                assert torch.equal(x[:, row], expected[part]), (part, row)


def test_the_kernel_takes_the_centre_and_writes_the_slots(monkeypatch):
    calls, multiplied = [], []

    def spy(format, x, parameters, *, center, matrix, out, **options):
        calls.append((center is not None, out is not None, x.dtype))
        multiplied.append(matrix is not None)
        options |= {"center": center, "matrix": matrix, "out": out}
        return api.encode(format, x, parameters, **options)

    monkeypatch.setattr("squeeze.cache.spec.encode", spy)
    monkeypatch.setattr(layers, "ENCODE_TOKENS", 64)
    filled("affine", Implementation.TRITON, 1, [0])
    # The prompt's blocks give the shapes of the others.
    assert calls[:4] == [(c, o, torch.float16) for o in (False, True) for c in (True, False)]
    calls.clear()
    filled("graded", Implementation.TRITON, 1, [0])
    assert calls[:2] == [(True, False, torch.float32), (False, False, torch.float16)]
    assert not any(multiplied)
    calls.clear(), multiplied.clear()
    filled("rotated", Implementation.TRITON, 1, [0])
    # The keys' kernel multiplies; values by token are multiplied before it.
    assert calls[:2] == [(True, False, torch.float16), (False, False, torch.float32)]
    assert multiplied[:2] == [True, False]


def test_a_full_block_takes_five_launches(monkeypatch):
    sides = PAIRS["rotated"][0], PAIRS["affine"][1]
    made = StaticPackedLayer(LayerSpec(*sides, 32, 2, 32, Implementation.TRITON), 130)
    x = torch.randn(1, HEADS, 34, SIZE).half()
    made.update(x, x)
    made.commit(x, x)
    launched = []
    monkeypatch.setattr(kernels, "_launch", lambda launch, *_: launched.append(launch.constants))
    with Launches() as launches:
        made.advance(32)
    assert [(part["BITS"], part["HEAD"]) for part in launched] == [(4, SIZE), (2, 0)]
    # Exact keys and values close up together; two counts follow.
    assert sorted(launches.names) == ["add_", "add_", "copy_"]
    assert made.blocks == [1]


def test_slots_are_views_where_one_segment_holds_them():
    storage = BlockStorage()
    storage.grow(3, {"codes": torch.zeros(1, 2, HEADS, 4, SIZE)})
    storage.grow(5, {"codes": torch.zeros(1, 2, HEADS, 4, SIZE)})
    version = storage.version
    view = storage.slots(3, 2)
    assert view["codes"].data_ptr() == storage.segments[1]["codes"].data_ptr()
    assert view["codes"].shape == (2, 2, HEADS, 4, SIZE) and storage.version > version
    assert storage.slots(2, 2) is None and storage.slots(4, 2) is None
    away = BlockStorage(offload=True)
    away.grow(2, {"codes": torch.zeros(1, 2, HEADS, 4, SIZE)})
    assert away.slots(0, 1) is None
