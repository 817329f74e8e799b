import pytest
import torch

from squeeze import recipe
from squeeze.errors import RecipeError
from squeeze.registry import get
from squeeze.sparsify.prefill.custom import Custom
from tests.sparsify.policies import SCALING, check_dense, inputs, lists

HERE = "tests.sparsify.prefill.test_custom"


def checkered(row, head, query_block, key_block):
    """Every second block of the first head, every third of the second, from the row's number on."""
    return (key_block + row) % (head + 2) == 0


def of_tokens(row, head, query_block, key_block):
    return (query_block - key_block).float()


def too_wide(row, head, query_block, key_block):
    return torch.ones(3, 5, 7, 11, dtype=torch.bool)


@pytest.mark.parametrize("mask", [f"{HERE}:checkered", checkered])
def test_the_function_says_which_blocks_are_read(mask, monkeypatch):
    monkeypatch.setattr("squeeze.sparsify.selection.SCRATCH_BYTES", 1)
    query, keys = inputs(2, 2, 1, 700)
    index = Custom(mask).index(query, keys, None, SCALING)
    for b in range(2):
        for h in range(2):
            for i, row in enumerate(lists(index, b, h)):
                wanted = {j for j in range(i + 1) if (j + b) % (h + 2) == 0}
                assert row == sorted(wanted | {0, i})


def test_a_budget_keeps_the_nearest():
    query, keys = inputs(1, 1, 1, 64 * 64)
    index = Custom(max_density=0.25).index(query, keys, None, SCALING)
    for i, row in enumerate(lists(index, 0, 0)):
        limit = max(16, -(-(i + 1) // 4))
        assert row == sorted({0, *range(max(0, i + 2 - limit), i + 1)})


@pytest.mark.parametrize("name", ["of_tokens", "too_wide"])
def test_what_is_no_mask_is_refused(name):
    query, keys = inputs(1, 2, 1, 300)
    with pytest.raises(RecipeError, match=r"returned torch\.\w+ .*Allowed: bool that broadcasts"):
        Custom(f"{HERE}:{name}").index(query, keys, None, SCALING)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ("nowhere.at_all:f", "cannot be imported"),
        (f"{HERE}:missing", "has no function 'missing'"),
        ("", "cannot be imported"),
    ],
)
def test_a_function_that_is_not_there_is_said_before_any_work(mask, message):
    with pytest.raises(RecipeError, match=message):
        Custom(mask)


def test_a_recipe_names_the_function():
    made = recipe.load(
        {"attention": {"prefill": {"method": "custom", "mask": f"{HERE}:checkered"}}}
    )
    assert made.attention.prefill.build() == Custom(f"{HERE}:checkered")


def test_the_default_is_dense():
    check_dense(Custom())


def test_it_is_registered():
    assert get("prefill", "custom") is Custom
