"""mask_bits against the product and comparison in PyTorch, without and with a mask a head."""

import torch
from _rows import main, measure

from segkern.ops import mask_bits
from segkern.testing import mask_bits_inputs

HEADS = 8


def compared(queries, features):
    return queries @ features >= 0


def repeated(queries, features):
    """As transformers makes it: sigmoid, comparison, one mask a head."""
    closed = (queries @ features).sigmoid() < 0.5
    return closed.unsqueeze(1).repeat(1, HEADS, 1, 1).flatten(0, 1)


def run(runs: int) -> list[dict]:
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for S in (256, 1024, 4096, 16384):
            inputs = mask_bits_inputs(B=1, Q=100, C=256, S=S, dtype=dtype)
            impls = {
                "segkern": lambda i=inputs: mask_bits(*i),
                "product, compare": lambda i=inputs: compared(*i),
                "transformers' way": lambda i=inputs: repeated(*i),
            }
            name = str(dtype).removeprefix("torch.")
            rows += measure("mask_bits", f"B=1 Q=100 C=256 S={S}", name, impls, runs)
    return rows


if __name__ == "__main__":
    main(run, __doc__)
