"""The block of a Vision Transformer against timm's, with one set of weights and one seed."""

import pytest
import torch
from timm.models.vision_transformer import Block as Theirs
from torch import nn

from segkern.nn import vit_block
from support.comparison import one_thread

CASES = {
    "evaluation": ({"dropout": 0.3, "drop_path": 0.4}, False),
    "training": ({"dropout": 0.0, "drop_path": 0.0}, True),
    "images left out": ({"dropout": 0.0, "drop_path": 0.4}, True),
    "values dropped": ({"dropout": 0.3, "drop_path": 0.0}, True),
    "both": ({"dropout": 0.3, "drop_path": 0.4}, True),
}


@pytest.mark.parametrize("case", CASES)
def test_as_timms(case):
    options, training = CASES[case]
    drops = {"proj_drop": options["dropout"], "attn_drop": options["dropout"]}
    theirs = Theirs(
        64, 2, qkv_bias=True, norm_layer=nn.LayerNorm, drop_path=options["drop_path"], **drops
    )
    ours = vit_block.Block(64, 2, **options)
    ours.load_state_dict(theirs.state_dict())
    x, found = torch.randn(16, 5, 64, dtype=torch.float64), []
    for block in (theirs, ours):
        block.double().train(training)
        torch.manual_seed(3)
        given = x.clone().requires_grad_()
        with one_thread():
            out = block(given)
            found.append(
                (out, *torch.autograd.grad(out.square().sum(), (given, *block.parameters())))
            )
    for have, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-10)
