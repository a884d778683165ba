"""Recomputation: functions of which training keeps little for backward, and runs again there.

Each megabyte that a forward pass keeps is fresh memory, whose first touch on a CPU costs about as
much as the cheap half of a network: norms, sums and the products beside a kernel.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from .. import ops  # noqa: F401  (declares the kernels)

# their results are kept where they are computed in a function that runs again: they cost the most
_NAMES = ("window_attn", "neighborhood_attn", "ms_deform_attn", "feed_forward", "conv3x3")
KERNELS = [getattr(torch.ops.segkern, name).default for name in _NAMES]
_contexts = functools.partial(create_selective_checkpoint_contexts, KERNELS)


def recomputed(function: Callable, *inputs) -> Tensor:
    """`function(*inputs)`, of which only the inputs and the results of `KERNELS` are kept.

    Backward runs it again, up to the last value that it needs: a product at the end is not formed
    twice. Gradients have the same bits as without.

    Args:
        function: draws nothing at random; its parameters may be captured.
        inputs: of any kind; tensors are kept.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    # a generator's state cannot be read in a CUDA graph
    return checkpoint(
        function, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts
    )


def plus(branch: Tensor, x: Tensor) -> Tensor:
    """x + branch, in the memory of the branch where the sum has its dtype.

    Args:
        branch: a tensor of its own and no view: autograd copies the gradient of a changed view.
        x: of the same shape.
    """
    if torch.promote_types(branch.dtype, x.dtype) == branch.dtype:
        return branch.add_(x)
    return x + branch
