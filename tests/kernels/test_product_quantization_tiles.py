import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from squeeze.kernels.decode_attention import api
from squeeze.quant.kv._raw import RawBlocks
from squeeze.quant.kv.product_quantization import ProductQuantization
from tests.kernels.tile_cases import Case, check, interpreted

pytest.importorskip("triton")
codebook_launch = pytest.importorskip("squeeze.kernels.decode_attention.codebook")
assembly = pytest.importorskip("squeeze.kernels.decode_attention.gluon_codebook_assembly")


@dataclass(frozen=True)
class Fitted:
    """A format together with codebooks of random centroids, standing in for its plain self."""

    format: ProductQuantization
    size: int
    heads: int = 2
    device: str = "cpu"

    def __getattr__(self, name):
        return getattr(self.format, name)

    @property
    def parameters(self):
        table = codebook(self.format, self.size, self.heads).to(self.device)
        return {"codebook": table, "root": torch.ones_like(table[:, 0], dtype=torch.float32)}

    def encode(self, x, parameters):
        return self.format.encode(x, self.parameters)

    def decode(self, packed, parameters, *options):
        return self.format.decode(packed, self.parameters, *options)


@cache
def codebook(format, size, heads):
    generator = torch.Generator().manual_seed(format.bits)
    shape = (heads, 2**format.bits, size // format.subvector, format.subvector)
    return (3 * torch.randn(*shape, generator=generator)).half()


def case(keys=(8, 2), values=(8, 2), size=64, kv_heads=2, device="cpu", **options):
    sides = [
        Fitted(ProductQuantization(*side), size, kv_heads, device) if side else RawBlocks()
        for side in (keys, values)
    ]
    return Case(*sides, size=size, kv_heads=kv_heads, **options)


CASES = [
    case(shifted=True),
    case((8, 4), (8, 4), size=128, groups=4, kv_heads=1),
    case((7, 2), (5, 2), size=80, length=32, groups=1, steps=2, softcap=3.0),
    case((4, 2), (6, 4), groups=7, kv_heads=1, steps=3),
    case((8, 2), None, dtype=torch.float16, steps=2),
]


@interpreted
@pytest.mark.parametrize("case", CASES)
def test_kernel_matches_float64(case):
    check(case, seed=CASES.index(case))


def permute(first, second, selector):
    """PTX ``prmt``: four bytes out of eight; bit 3 of a choice spreads that byte's sign."""
    source = [word >> shift & 255 for word in (first, second) for shift in (0, 8, 16, 24)]
    result = 0
    for place in range(4):
        choice = selector >> (4 * place) & 15
        byte = source[choice & 7]
        result |= (byte if choice < 8 else 255 * (byte >> 7)) << (8 * place)
    return result


def execute(text, registers, memory):
    """Run straight-line PTX; a load finds a word of ``memory`` or leaves its address."""
    values = dict(registers)
    read = lambda name: values[name] if name in values else int(name, 0)  # noqa: E731
    for instruction in re.split(r";\s*", text.strip("{}\n")):
        name, _, rest = instruction.partition(" ")
        arguments = [argument.strip() for argument in rest.split(",")]
        if name == "xor.b32":
            values[arguments[0]] = read(arguments[1]) ^ read(arguments[2])
        elif name == "add.u32":
            values[arguments[0]] = read(arguments[1]) + read(arguments[2])
        elif name == "and.b32":
            values[arguments[0]] = read(arguments[1]) & read(arguments[2])
        elif name == "setp.ne.u32":
            values[arguments[0]] = read(arguments[1]) != read(arguments[2])
        elif name == "selp.b32":
            values[arguments[0]] = read(arguments[1] if read(arguments[3]) else arguments[2])
        elif name == "prmt.b32":
            values[arguments[0]] = permute(*map(read, arguments[1:]))
        elif name.startswith("ld.shared"):
            *targets, source = [argument.strip("{}") for argument in arguments]
            base, offset = re.fullmatch(r"\[([$\w]+)(?:\+(\d+))?\]", source).groups()
            address = read(base) + int(offset or 0)
            if base.startswith("$") or address in memory:
                for i, target in enumerate(targets):
                    values[target] = memory[address + 4 * i]
            else:
                values[targets[0]] = address
                values.setdefault("loads", []).append(address)
        else:
            assert name in ("", ".reg"), instruction
    return values


CODES = 1 << 20  # address of the first token's codes, beyond the codebooks


def remember(codes):
    """Codes ``[tokens, 64]`` as words of shared memory by address."""
    packed = codes.to(torch.uint8).view(torch.int32).flatten().to(torch.int64) & 0xFFFFFFFF
    return {CODES + 4 * i: int(word) for i, word in enumerate(packed)}


def test_lanes_look_up_their_own_centroids_of_keys_without_sharing_a_bank():
    codes = torch.randint(0, 256, (8, 64), generator=torch.Generator().manual_seed(0))
    memory = remember(codes)
    found = {}
    for token in range(8):
        for lane in range(4):
            registers = {"$16": 0x3210 ^ (token * 0x1111), "$32": 0}
            registers["$24"] = (32 * lane * 0x01010101) ^ 0x0C080400 ^ (token * 0x04040404)
            registers["$40"] = CODES + 64 * token + 8 * lane
            found[token, lane] = execute(assembly.KEY_GATHER.value, registers, memory)
    for half, v, b in ((h, v, b) for h in range(2) for v in range(2) for b in range(4)):
        for (token, lane), registers in found.items():
            order = (4 * v + b) ^ (token % 4)  # of the query operand's row for this token
            code = codes[token, 32 * half + 8 * lane + order]
            place = 256 * code + 4 * (32 * half + 8 * lane + order)
            assert registers[f"${4 * b + 2 * half + v}"] == place
    for together in zip(*(registers["loads"] for registers in found.values()), strict=True):
        assert len({place // 4 % 32 for place in together}) == 32


def test_lanes_look_up_their_own_centroids_of_values_without_sharing_a_bank():
    codes = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(1))
    memory = remember(codes)
    found = {}
    for token in range(4):
        for row in range(8):
            selector = (0x3210 ^ (token * 0x1111)) + token // 2 * 0x4444
            registers = {"$8": selector, "$16": 0}
            registers["$12"] = (16 * row * 0x01010101) ^ 0x0C080400 ^ (token * 0x04040404)
            registers["$20"] = CODES + 64 * token + 4 * row + token // 2 * 32
            found[token, row] = execute(assembly.VALUE_GATHER.value, registers, memory)
    for i, high in ((i, high) for i in range(4) for high in range(2)):
        banks = set()
        for (token, row), registers in found.items():
            address = registers[f"${2 * i + high}"]
            column = 4 * (row + 8 * high) + (i ^ token)
            assert address == 65536 + 256 * codes[token, column] + 4 * column
            banks.add(address // 4 % 32)
        assert len(banks) == 32


@pytest.mark.parametrize(
    ("slabs", "tiles", "tokens", "expected"),
    [
        (8, 1, 3968, (32, 16)),
        (8, 1, 130944, (64, 16)),
        (64, 1, 32640, (64, 2)),
        (8, 2, 130944, (64, 8)),
        (1, 1, 64, (32, 1)),
    ],
)
def test_programs_fill_the_gpu_once_and_warps_share_what_there_is(
    monkeypatch, slabs, tiles, tokens, expected
):
    device = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    assert codebook_launch._division("cuda", slabs, tiles, tokens) == expected


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="compiles without a GPU")
@pytest.mark.parametrize("capability", ["90", pytest.param("100", marks=pytest.mark.slow)])
def test_kernel_compiles_without_a_gpu(capability):
    script = Path(__file__).with_name("compile_codebook.py")
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(api.__file__).parents[3])
    command = [sys.executable, str(script), capability, "64", "32"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["tokens"] for result in results] == [64, 32]
    for result in results:
        # Nothing but what the launch reserves stands in shared memory.
        assert result["shared"] == codebook_launch.SHARED_BYTES
        assert result["stack"] == 0
        # 64 + 64 codes of a token in 32 lanes, and their own loads: six for eight tokens.
        assert result["loop"]["LDS"] == (4 + 6 / 8) * result["tokens"]
        # A product for two look-ups of keys or one of values.
        assert result["loop"]["HMMA"] == 3 * result["tokens"]
        assert sum(result["loop"].values()) < 26 * result["tokens"], result["loop"]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {"groups": 4},
        {"groups": 1, "dtype": torch.float16, "length": 64},
        {"groups": 7, "steps": 2, "softcap": 3.0},
        {"groups": 3, "kv_heads": 1, "shifted": True, "blocks": (0, 5)},
        {"groups": 4, "size": 64},
        {"groups": 4, "keys": (8, 4), "values": (8, 4)},
        {"groups": 4, "keys": (6, 2), "values": (8, 2), "length": 32},
    ],
    ids=str,
)
def test_kernel_on_the_gpu_matches_float64(options):
    given = {"size": 128, "length": 128, "dtype": torch.bfloat16, "blocks": (40, 33)} | options
    check(case(device="cuda", exact=(130, 64), **given), device="cuda")


@pytest.mark.gpu
def test_kernel_on_the_gpu_splits_a_long_row():
    fitted = case(device="cuda", size=128, length=128, groups=4, dtype=torch.bfloat16)
    check(replace(fitted, blocks=(300, 1), exact=(130, 0)), device="cuda")
