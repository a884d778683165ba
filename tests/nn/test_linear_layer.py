"""The layer on the op `linear`: torch.nn.Linear to whoever looks at it."""

from copy import deepcopy

import torch
from torch import nn

from segkern.nn.linear import Linear, use_own_products


def test_a_model_keeps_its_weights_names_and_hooks():
    model = nn.Sequential(nn.Linear(5, 7), nn.Sequential(nn.Linear(7, 3, bias=False)))
    plain, x, seen = deepcopy(model), torch.randn(4, 5), []
    use_own_products(model)
    assert [type(m) for m in (model[0], model[1][0])] == [Linear, Linear]
    model.load_state_dict(plain.state_dict())
    model[0].register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(deepcopy(model)(x), plain(x))
    assert seen == [1]


def test_another_layer_in_its_place_stays():
    class Special(nn.Linear):
        pass

    model = nn.Sequential(Special(2, 2))
    use_own_products(model)
    assert type(model[0]) is Special


def test_what_lies_beside_is_added():
    layer, x, beside = Linear(5, 7), torch.randn(2, 3, 5), torch.randn(2, 3, 7)
    wanted = nn.functional.linear(x, layer.weight, layer.bias) + beside
    torch.testing.assert_close(layer(x, beside), wanted)
