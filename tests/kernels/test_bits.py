import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from squeeze.kernels.bits import PLANES, pack, unpack, words

WIDTHS = sorted(PLANES)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    bits=st.sampled_from(WIDTHS),
    runs=st.integers(1, 9),
    leading=st.lists(st.integers(0, 3), max_size=2),
    seed=st.integers(0, 2**31),
)
def test_unpack_undoes_pack(bits, runs, leading, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2**bits, (*leading, 32 * runs), generator=generator)
    packed = pack(values.to(torch.uint8), bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (*leading, words(32 * runs, bits))
    assert torch.equal(unpack(packed, bits, 32 * runs), values.to(torch.uint8))


@pytest.mark.parametrize("bits", WIDTHS)
def test_extremes(bits):
    values = torch.full((64,), 2**bits - 1)
    assert pack(values, bits).eq(-1).all()
    assert pack(torch.zeros_like(values), bits).eq(0).all()


@pytest.mark.parametrize("bits", WIDTHS)
def test_planes_add_up_to_the_width_in_powers_of_two(bits):
    assert sum(PLANES[bits]) == bits
    assert set(PLANES[bits]) <= {1, 2, 4}


def test_textbook():
    # 64 values of 4 bits take 8 words; field i of word j is value 8 i + j.
    values = torch.arange(64) // 8
    assert pack(values, 4).tolist() == [0x76543210] * 8
    # 3 bits: a plane of the low two bits, then one of the high bit.
    assert pack(torch.full((32,), 5), 3).tolist() == [0x55555555, 0x55555555, -1]


def test_length_off_the_run_is_refused():
    with pytest.raises(ValueError, match="multiple of 32, got 33"):
        pack(torch.zeros(33, dtype=torch.int32), 4)
