import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from squeeze.kernels.decode_attention import api
from squeeze.quant.kv.bitmap import Bitmap
from tests.kernels.test_product_quantization_tiles import permute
from tests.kernels.tile_cases import Case, build, check

pytest.importorskip("triton")
gluon_bitmap = pytest.importorskip("squeeze.kernels.decode_attention.gluon_bitmap")
from squeeze.kernels.decode_attention import bitmap, tuning  # noqa: E402

# 4, 5, 6 and 8 survivors of 16.
SPARSITIES = (0.75, 0.7, 0.6, 0.5)
OPERATIONS = {
    "and.b32": lambda x, y: x & y,
    "shl.b32": lambda x, y: x << y,
    "shr.u32": lambda x, y: x >> y,
    "mad.lo.u32": lambda x, y, z: x * y + z,
    "prmt.b32": permute,
}


def execute(text, registers):
    """Run straight-line PTX on one lane's registers, and return them."""
    values = dict(registers)
    read = lambda name: values[name] if name in values else int(name, 0)  # noqa: E731
    for instruction in re.split(r"[;{}]\s*", text):
        name, _, rest = instruction.partition(" ")
        if name not in ("", ".reg"):
            target, *arguments = (argument.strip() for argument in rest.split(","))
            values[target] = OPERATIONS[name](*map(read, arguments)) & 0xFFFFFFFF
    return values


def signed(word):
    """Four bytes as signed integers."""
    return [((word >> 8 * i & 255) ^ 128) - 128 for i in range(4)]


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("place", [0, 1])
def test_expanded_words_are_16_times_the_codes_of_their_slots(sparsity, place):
    format = Bitmap(sparsity)
    far = format.kept - 4
    torch.manual_seed(0)
    packed = format.encode(torch.randn(1, 64, 128), {})
    packed["scale"].fill_(1.0)
    codes = format.decode(packed, {})[0].unflatten(-1, (16, 8))  # token, slot, group
    units = packed["codes"].shape[1] // format.kept
    near = packed["codes"][0, : 4 * units].unflatten(0, (-1, 8, 4))
    other = packed["codes"][0, 4 * units :].unflatten(0, (-1, 8, max(far, 1))) if far else near
    # Of keys two groups share a register unless one fills it; of values none do.
    shared = place if far < 4 else 0
    text = gluon_bitmap.expansion(far, 8 * far * shared, True)
    word = lambda row: int.from_bytes(bytes(row.tolist()), "little")  # noqa: E731
    for pair in range(32):
        for group in range(shared, 8):
            registers = {"$8": int(packed["bitmap"][0, pair, group]) & 0xFFFFFFFF}
            registers["$9"] = word(near[pair, group])
            registers["$10"] = word(other[pair, group - shared : group + 1].flatten())
            found = execute(text, registers)
            for token in range(2):
                got = [x for i in range(4) for x in signed(found[f"${4 * token + i}"])]
                assert got == (16 * codes[2 * pair + token, :, group]).tolist()


def test_four_by_four_exchanges_rows_and_columns():
    rows = [0x07060504, 0x17161514, 0x27262524, 0x37363534]
    found = execute(gluon_bitmap.FOUR_BY_FOUR.value, {f"${4 + i}": x for i, x in enumerate(rows)})
    for i in range(4):
        column = sum((row >> 8 * i & 255) << 8 * k for k, row in enumerate(rows))
        assert found[f"${i}"] == 2 * column


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="compiles without a GPU")
@pytest.mark.parametrize(
    "names", [("90:5:5:12",), pytest.param(("80:8:6:12", "90:4:8:8"), marks=pytest.mark.slow)]
)
def test_kernel_compiles_without_a_gpu(names):
    script = Path(__file__).with_name("compile_bitmap.py")
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(api.__file__).parents[3])
    command = [sys.executable, str(script), *names]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["case"] for result in results] == list(names)
    for result in results:
        assert result["stack"] < 64  # bytes, and none of them in the loop
        assert not result["loop"].keys() & {"LDL", "STL"}
        # Units stand at the beginning of shared memory, and nothing else is there.
        assert result["shared"] == gluon_bitmap.SHARED_BYTES.value
        # 64 tokens in 32 lanes: one byte permutation for four numbers, and two more of values to
        # transpose them.
        assert result["loop"]["IMMA"] == 32
        assert 4 * 64 <= result["loop"]["PRMT"] < 4 * 64 + 16
        assert sum(result["loop"].values()) < 1200, result["loop"]


class OnDevice:
    """What ``takes`` asks of a query, without a GPU."""

    is_cuda = True
    dtype = torch.bfloat16
    device = torch.device("cpu")

    def __init__(self, *shape):
        self.shape = shape

    def stride(self):
        return torch.empty(self.shape, device="meta").stride()

    def data_ptr(self):
        return 0


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({}, True),
        ({"keys": Bitmap(0.5), "values": Bitmap(0.6), "length": 64, "groups": 4, "steps": 2}, True),
        ({"groups": 3, "steps": 3}, False),
        ({"length": 32}, False),
        ({"keys": Bitmap(0.55)}, False),
        ({"values": Bitmap(0.7, 16)}, False),
        ({"size": 64}, False),
    ],
    ids=str,
)
def test_calls_that_the_kernel_takes(options, taken, monkeypatch):
    given = {"keys": Bitmap(), "values": Bitmap(), "length": 128, "size": 128, "exact": (8, 8)}
    case = Case(**given | {"blocks": (1, 1), "dtype": torch.bfloat16} | options)
    arguments = build(case, seed=0, device="cpu")
    monkeypatch.setattr(bitmap.streamed, "capability", lambda query: (9, 0))
    query = OnDevice(*arguments[0].shape)
    exact = [torch.empty(x.shape, dtype=x.dtype) for x in arguments[6:8]]
    assert bitmap.takes(query, exact, *arguments[3:5]) is taken
    assert not bitmap.takes(arguments[0], exact, *arguments[3:5])  # not on a GPU


GPU_CASES = [
    Case(Bitmap(keys), Bitmap(values), length=length, size=128, groups=groups, steps=steps,
         dtype=dtype, blocks=(11, 4), exact=(130, 64), shifted=bool(groups % 2),
         softcap=3.0 if steps == 2 else None)
    for keys, values, length, dtype in (
        (0.7, 0.7, 128, torch.bfloat16),
        (0.5, 0.6, 64, torch.float16),
        (0.75, 0.7, 192, torch.bfloat16),
    )
    for groups, steps in ((4, 1), (1, 1), (7, 1), (4, 2))
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=range(len(GPU_CASES)))
def test_kernel_matches_float64(case):
    arguments = build(case, seed=GPU_CASES.index(case), device="cuda")
    assert bitmap.takes(arguments[1], arguments[6:8], arguments[3], arguments[4])
    check(case, seed=GPU_CASES.index(case), device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("setting", bitmap.SETTINGS, ids=str)
def test_every_launch_setting_splits_a_long_row(setting, monkeypatch):
    monkeypatch.setattr(tuning, "choose", lambda *_: setting)
    check(replace(GPU_CASES[0], blocks=(300, 0), exact=(130, 1)), device="cuda")


@pytest.mark.gpu
def test_nan_of_one_token_is_seen():
    case = replace(GPU_CASES[0], blocks=(2, 2))
    for side in (3, 4):
        arguments = build(case, seed=0, device="cuda")
        arguments[side].segments[0]["scale"][0, 1, 0, 77] = float("nan")
        names = ("scaling", "implementation")
        options = dict(zip(names, (0.1, api.Implementation.TRITON), strict=True))
        output, _ = api.decode_attention(*arguments, **options)
        assert output[1, : case.groups].isnan().all()
        assert output[0].isfinite().all()
        assert output[1, case.groups :].isfinite().all()
