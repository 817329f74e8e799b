import pytest
import torch

from squeeze.registry import get
from squeeze.sparsify import selection
from squeeze.sparsify.prefill.sparge import Sparge, self_similarity
from tests.sparsify.policies import SCALING, check_against, check_dense, choose, inputs, lists


def similarity(block):
    """Average the cosines of all pairs of a block's tokens."""
    lengths = block.norm(dim=1)
    return float((block @ block.T / lengths / lengths[:, None]).mean())


def oracle(policy, query, keys):
    """Read the lists of one head off the policy's words."""
    size = policy.block_size
    query, keys = query.double(), keys.double()
    firsts = range(0, len(query), size)
    q, k = ([x[a : a + size].mean(0) for a in firsts] for x in (query, keys))
    smooth = keys - keys.mean(0)
    varied_q, varied_k = (
        [similarity(x[a : a + size]) <= policy.similarity for a in firsts] for x in (query, smooth)
    )
    result = []
    for i in range(len(q)):
        # The last block may have fewer keys than the others.
        filled = torch.tensor([min(size, len(keys) - a) / size for a in firsts][: i + 1])
        logits = torch.stack([SCALING * q[i] @ k[j] for j in range(i + 1)]) + filled.log()
        known = torch.tensor([not varied for varied in varied_k[: i + 1]])
        weights = logits.masked_fill(~known, -torch.inf).softmax(0).nan_to_num(0.0).tolist()
        require = [j for j in range(i + 1) if varied_q[i] or varied_k[j]]
        result.append(choose(weights, policy.max_density, 16, policy.mass, require=require))
    return result


@pytest.mark.parametrize(
    ("T", "heads", "mass", "threshold", "size", "starts"),
    [
        (300, (2, 2), 0.8, -1.0, 64, None),
        (657, (3, 1), 0.6, 0.015, 64, [0, 100]),
        (200, (4, 1), 0.5, 0.016, 64, [136, 3]),
        (390, (8, 1), 0.7, 0.0078, 128, None),
        (40, (1, 1), 0.5, 0.5, 64, None),
    ],
)
def test_against_the_words(T, heads, mass, threshold, size, starts):
    policy = Sparge(mass, threshold, block_size=size)
    check_against(policy, oracle, T=T, heads=heads, starts=starts, seed=T)


def test_self_similarity_by_hand():
    # Two tokens at right angles: cosines 1, 0, 0, 1. Equal tokens: 1. One real token of two: 1.
    x = torch.tensor([[1.0, 0], [0, 3], [2, 2], [5, 5], [0, 7], [0, 0]]).view(1, 1, 6, 2)
    values = self_similarity(x, torch.tensor([[1, 1, 1, 1, 1, 0]]), 2, None)
    assert values.flatten().tolist() == pytest.approx([0.5, 1.0, 1.0])


def test_a_varied_block_of_keys_is_read_by_all():
    query, keys = torch.full((1, 1, 640, 4), 20.0), torch.zeros(1, 1, 640, 4)
    generator = torch.Generator().manual_seed(0)
    keys[..., 0], keys[:, :, 128:192] = 1.0, torch.randn(64, 4, generator=generator)
    keys[:, :, :64, 0] = 2.0  # the heaviest; in all blocks but block 2 the tokens are alike
    rows = lists(Sparge(0.5, 0.5).index(query, keys, None, 1.0), 0, 0)
    assert all(row == sorted({0, 2, i}) for i, row in enumerate(rows) if i >= 2)


def test_a_varied_block_of_queries_reads_everything():
    query, keys = torch.ones(1, 1, 640, 4), torch.zeros(1, 1, 640, 4)
    keys[..., 0], keys[:, :, :64, 0] = 1.0, 40.0
    query[:, :, 448:512] = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    rows = lists(Sparge(0.5, 0.5).index(query, keys, None, 1.0), 0, 0)
    assert rows[7] == list(range(8))
    assert rows[8] == [0, 8]


def test_more_mass_reads_more():
    query, keys = inputs(1, 2, 2, 1000)
    few, many = (Sparge(mass, -1.0).index(query, keys, None, SCALING) for mass in (0.5, 0.9))
    for h in range(2):
        pairs = list(zip(lists(few, 0, h), lists(many, 0, h), strict=True))
        assert all(set(a) <= set(b) for a, b in pairs)
        assert sum(len(a) for a, _ in pairs) < sum(len(b) for _, b in pairs)


def test_a_full_budget_is_dense():
    check_dense(Sparge(mass=1.0, max_density=1.0))
    check_dense(Sparge(mass=0.1, similarity=1.0, max_density=1.0))


def test_it_is_registered():
    assert get("prefill", "sparge") is Sparge


def test_few_keys_at_the_end_weigh_as_few():
    # The last queries like the block before their own as much as the 8 keys of their own. Without
    # the count these 8, which their mean describes best, would take the weight of 64.
    query, keys = torch.ones(1, 1, 584, 4), torch.zeros(1, 1, 584, 4)
    keys[:, :, 448:512], keys[:, :, 576:] = 1.0, 1.1
    rows = lists(Sparge(0.8, -1.0).index(query, keys, None, 1.0), 0, 0)
    assert rows[9] == [0, 7, 9]


def test_similarity_is_the_same_in_parts(monkeypatch):
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(2, 3, 5 * 64, 16, generator=generator)
    center = torch.randn(2, 3, 1, 16, generator=generator)
    counts = (torch.arange(5 * 64) < torch.tensor([[320], [201]])).long()
    whole = [self_similarity(x, counts, 64, c) for c in (None, center)]
    monkeypatch.setattr(selection, "SCRATCH_BYTES", 1)
    parts = [self_similarity(x, counts, 64, c) for c in (None, center)]
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert (whole[0][1, :, 4] == 0).all() and (whole[0][0] > 0).all()


def test_what_rows_have_in_common_serves_with_and_without_gradients():
    # A length of its own, so that the first call makes what the second one uses.
    query, keys = inputs(1, 2, 1, 777)
    with torch.inference_mode():
        first = Sparge(0.8).index(query, keys, None, SCALING)
    second = Sparge(0.8).index(query.requires_grad_(), keys.requires_grad_(), None, SCALING)
    assert lists(first, 0, 1) == lists(second, 0, 1)
