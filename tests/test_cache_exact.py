"""The exact tokens of a layer lie where one launch moves keys and values."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from squeeze.cache.exact import ExactTokens

SINKS, WHOLE = 2, 64


class Launches(TorchDispatchMode):
    """Names the operators that compute or copy, each a kernel on a GPU."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if not function.is_view and not name.startswith(("empty", "new_empty")):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def filled(rows=2, values_size=8, tokens=50):
    """Take a first call of some tokens, and the next."""
    torch.manual_seed(0)
    keys, values = torch.randn(rows, 3, tokens, 8), torch.randn(rows, 3, tokens, values_size)
    made = ExactTokens(keys, values, WHOLE, SINKS)
    made.keep(made.extend(keys, values, [0] * rows, in_place=True), [0] * rows)
    more = torch.randn(rows, 3, 1, 8), torch.randn(rows, 3, 1, values_size)
    span = made.extend(*more, [0] * rows, in_place=True)
    return made, span, [torch.cat(pair, 2) for pair in ((keys, more[0]), (values, more[1]))]


@pytest.mark.parametrize("values_size", [8, 4])
@pytest.mark.parametrize("packed", [[16, 16], [30, 30], [0, 16], [32, 16]])
def test_what_is_packed_goes_and_the_rest_closes_up(packed, values_size):
    made, span, truth = filled(values_size=values_size)
    made.keep(span, packed)
    for buffer, whole in zip((made.keys, made.values), truth, strict=True):
        for row, gone in enumerate(packed):
            expected = torch.cat([whole[row, :, :SINKS], whole[row, :, SINKS + gone :]], 1)
            assert torch.equal(buffer[row, :, : 51 - gone], expected)
    assert made.counts.host == made.counts.device.tolist() == [51 - gone for gone in packed]


@pytest.mark.parametrize(("values_size", "copies"), [(8, 1), (4, 2)])
def test_keys_and_values_of_one_shape_move_together(values_size, copies):
    made, span, _ = filled(values_size=values_size)
    with Launches() as launches:
        made.keep(span, [30, 30])
    assert sorted(launches.names) == ["add_"] + ["copy_"] * copies
    assert (made.both is None) == (values_size == 4)


@pytest.mark.parametrize("change", [copy.deepcopy, lambda made: made.select([1]) or made])
def test_the_halves_stay_one_buffer(change):
    made, _, truth = filled()
    copied = change(made)
    assert copied.keys.data_ptr() == copied.both.data_ptr()
    copied.both.fill_(7)
    assert copied.keys.eq(7).all() and copied.values.eq(7).all()
    if copied is not made:
        assert torch.equal(made.keys[:, :, :51], truth[0])


def test_rows_are_chosen_in_place_where_as_many_stay():
    made, _, truth = filled()
    place = made.keys.data_ptr()
    made.select([1, 1])
    assert made.keys.data_ptr() == place
    assert all(torch.equal(row, truth[0][1]) for row in made.keys[:, :, :51])
    made.select([0])
    assert torch.equal(made.values[:, :, :51], truth[1][1:])
