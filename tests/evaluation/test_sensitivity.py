from contextlib import contextmanager

import torch

from squeeze.evaluation.sensitivity import layer_sensitivity


def test_each_layer_is_squeezed_alone_and_the_loss_at_the_end_compared(trained, tokenizer, text):
    @contextmanager
    def scaled(layer):
        weight = trained.model.layers[layer].mlp.down_proj.weight
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(0 if layer == 0 else 1)
        yield
        with torch.no_grad():
            weight.copy_(kept)

    calls = []
    rises = layer_sensitivity(
        trained,
        tokenizer,
        scaled,
        [0, 1],
        length=64,
        limit=2,
        text=text,
        progress=lambda *call: calls.append(call),
    )
    assert list(rises) == [0, 1]
    assert rises[0] > 0.1
    assert rises[1] == 0
    assert calls == [("sensitivity", 1, 2), ("sensitivity", 2, 2)]
