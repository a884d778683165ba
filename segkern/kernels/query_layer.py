"""The launchers of query_layer: a decoder's layer in four launches, its first prediction in one.

Letters: B image, Q query, R = B Q rows, H head, D channels a head, C channels, F hidden channels,
M channels of the mask features.

`project_rows`, `attend`, `hidden_rows` and `predict_rows` each wait for all of the one before; in
between stand [R, C] of rows, three [R, C] of queries, keys and values, and, in float32, the parts
of H heads and of the hidden channels' chunks, which the reader adds up in order: no atomics, the
same bits each run.
"""

import torch
import triton
from torch import Tensor

from ._launch import FUSED, device, on
from .query_attend import attend
from .query_hidden import hidden_rows
from .query_predict import predict_rows
from .query_project import project_rows
from .query_rows import ROWS

# kind of device: values of a tile of a weight (times 2 bytes in half precision), stages, warps.
# Chosen by arithmetic, not yet measured: what is on the way to a multiprocessor should be more
# than latency x bandwidth, 45 KB on an H200.
TABLE = {
    "99 KB": (8192, 4, 8),
    "163 KB": (16384, 3, 8),
    "227 KB": (16384, 4, 8),
    "227 KB, 10.x": (16384, 4, 8),
}
CHUNK = 128  # hidden channels a program: of 2048 and 100 rows 112 programs, which leave 16 parts


def _constants(x: Tensor, K: int) -> dict:
    """What all launches share: tiles of weights for K inputs."""
    values, stages, warps = TABLE[device(x).kind]
    block = min(values // K, x.shape[2])
    return {"BLOCK_N": block, "STAGES": stages, "num_warps": warps, "maxnreg": 255} | FUSED


def _predict(x, parts, layer, position, prediction, eps, constants) -> tuple[Tensor, ...]:
    """x, normed, embedding, query: of rows x, or where there are parts of what x becomes."""
    (B, Q, C), M = x.shape, prediction[6].shape[0]
    out, normed, query = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    between, embedding = x.new_empty((2, B, Q, C)), x.new_empty((B, Q, M))
    more = len(prediction) > 8
    predict_rows[(triton.cdiv(B * Q, ROWS.value) * (1 + more),)](
        *(x, parts, *layer, position.contiguous(), *prediction[:8]),
        *(prediction[8:] if more else prediction[:2]),
        *(out, normed, between, embedding, query, eps, B * Q, Q, 1 + more),
        P=len(parts),
        M=M,
        C=C,
        **constants,
    )
    return out, normed, embedding, query if more else x.new_empty((0, Q, C))


def query_prediction(
    x: Tensor, position: Tensor, prediction: list[Tensor], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `segkern::query_prediction`."""
    x, none = x.contiguous(), x.new_empty((0,))
    prediction = [t.contiguous() for t in prediction]
    with on(x):
        parts, constants = x.new_empty((0,), dtype=torch.float32), _constants(x, x.shape[2])
        return _predict(x, parts, 3 * [none], position, prediction, eps, constants)[1:]


def query_layer(
    x: Tensor,
    attended: Tensor,
    position: Tensor,
    layer: list[Tensor],
    prediction: list[Tensor],
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `segkern::query_layer`."""
    (B, Q, C), F, H = x.shape, layer[14].shape[0], heads
    x, attended, position = x.contiguous(), attended.contiguous(), position.contiguous()
    layer, prediction = ([t.contiguous() for t in tensors] for tensors in (layer, prediction))
    first, second = torch.empty_like(x), torch.empty_like(x)
    projected = x.new_empty((3, B, Q, C))
    chunks, tiles = triton.cdiv(F, CHUNK), triton.cdiv(B * Q, ROWS.value)
    of_heads = x.new_empty((H, B, Q, C), dtype=torch.float32)
    parts = x.new_empty((chunks, B, Q, C), dtype=torch.float32)
    with on(x):
        constants = _constants(x, C)
        project_rows[(3 * tiles,)](
            *(x, attended, position, *layer[:10], first, projected, eps, B * Q, Q),
            C=C,
            BLOCK_C=constants["BLOCK_N"],
            **constants,
        )
        attend[(B * triton.cdiv(Q, ROWS.value) * H,)](
            *(projected, layer[10], of_heads, B, Q), H=H, D=C // H, **_constants(x, C // H)
        )
        hidden_rows[(tiles * chunks,)](
            *(first, of_heads, *layer[11:17], second, parts, eps, B * Q),
            H=H,
            F=F,
            C=C,
            CHUNK=CHUNK,
            **constants,
        )
        return _predict(second, parts, layer[17:], position, prediction, eps, constants)
