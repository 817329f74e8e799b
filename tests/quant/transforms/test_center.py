import torch

from squeeze.quant.kv.affine import Affine
from squeeze.quant.transforms.center import Center


def parameters(heads, size):
    generator = torch.Generator().manual_seed(0)
    mean = 30 * torch.randn(heads, size, generator=generator, dtype=torch.float64)
    return Center().fit({"key_mean": mean})


def test_textbook():
    # q . k = 2 * 5 + 1 * 7 = 17 = q . (k - c) + q . c = (2 * 1 + 1 * 1) + (2 * 4 + 1 * 6)
    fitted = Center().fit({"key_mean": torch.tensor([[4.0, 6.0]])})
    stored = Center().apply(torch.tensor([[[[5.0, 7.0]]]]), fitted)
    query, shift = Center().prepare_query(torch.tensor([[[[2.0, 1.0]]]]), fitted)
    assert stored.flatten().tolist() == [1.0, 1.0]
    assert shift.tolist() == [[[14.0]]]
    assert (query * stored).sum() + shift.sum() == 17


def test_scores_are_unchanged_with_grouped_heads():
    generator = torch.Generator().manual_seed(1)
    fitted = parameters(2, 16)
    assert fitted["center"].dtype == torch.float32
    keys = torch.randn(3, 2, 32, 16, generator=generator, dtype=torch.float64)
    query = torch.randn(3, 6, 4, 16, generator=generator, dtype=torch.float64)
    stored = Center().apply(keys, fitted)
    same, shift = Center().prepare_query(query, fitted)
    assert same is query
    assert shift.shape == (3, 6, 4)
    scores = query @ keys.repeat_interleave(3, dim=1).mT
    centred = query @ stored.repeat_interleave(3, dim=1).mT + shift.unsqueeze(-1)
    torch.testing.assert_close(scores, centred)
    torch.testing.assert_close(Center().invert(stored, fitted), keys)


def test_low_precision_keys_keep_what_differs():
    fitted = {"center": torch.full((1, 8), 600.0)}
    keys = torch.tensor(604.0).to(torch.bfloat16).expand(1, 1, 32, 8)
    stored = Center().apply(keys, fitted)
    assert stored.dtype == torch.float32
    assert stored.eq(4).all()


def test_centred_keys_quantize_better_per_token():
    generator = torch.Generator().manual_seed(2)
    fitted = parameters(2, 32)
    noise = torch.randn(2, 2, 64, 32, generator=generator)
    keys = noise + fitted["center"].unsqueeze(-2)
    format = Affine(4, "token", 32)
    direct = format.decode(format.encode(keys, {}), {}) - keys
    stored = Center().apply(keys, fitted)
    restored = Center().invert(format.decode(format.encode(stored, {}), {}), fitted)
    assert (restored - keys).pow(2).mean() < direct.pow(2).mean() / 100
