"""What a GPU would be asked: launches, bytes and operations of an inference or a training step.

    python bench/count_launches.py                                 # both, of Mask2Former
    python bench/count_launches.py --model segmenter --size 512 --batch 8
    python bench/count_launches.py --save build/before.json        # and, after a change:
    python bench/count_launches.py --against build/before.json

No GPU is needed, and none is used: the work runs on tensors without values (FakeTensorMode), whose
ops are counted; Triton's launchers run up to the launch. By rule, not by measurement:

- an op of PyTorch is one launch, a view is none; of CUDA C++ see LAUNCHES;
- a launch reads each tensor that it is given once, and writes each that it returns once;
- its least time is the larger of those that its bytes and its operations take at given rates (of
  an H200, by default: 4.3 TB/s as copies reach, 800 TFLOP/s in half precision, 55 in float32);
- its estimate is that, but no less than a small kernel takes in a CUDA graph (2 us by default).

What would wait for the device, such as reading a value, has no value to read and fails. The memory
that is in use at once is counted as live_bytes.py says.
"""

import argparse
import contextlib
import importlib
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from math import prod
from pathlib import Path
from unittest import mock

import torch
from live_bytes import Live, boxed, release
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry
from triton.runtime.jit import JITFunction

from segkern.data.collate import Batch
from segkern.kernels import _launch
from segkern.models import Mask2Former, Mask2FormerConfig, Segmenter, SegmenterConfig
from segkern.ops import _library
from segkern.structures.targets import Targets
from segkern.training.config import TrainConfig
from segkern.training.optimizer import build_optimizer
from segkern.training.step import PRECISIONS, Step

FAKE = FakeTensorMode()  # one for all: segkern keeps position embeddings between calls
KINDS = ("inference", "training step")
LABELS, TARGETS = 133, 16
NO_LAUNCH = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach"}
NO_LAUNCH |= {"lift_fresh", "_unsafe_view", "device", "set_", "resize_"}
SAME = {torch.ops.aten._addmm_activation: torch.ops.aten.addmm}  # operations
ONLY_WRITES = {"zero_", "fill_", "copy_"}  # their first argument


def _side(arguments: tuple) -> int:
    """Of a window: the first number among the arguments of window_attn."""
    return next(x for x in arguments if isinstance(x, int))


# operations of the kernels that multiply, of their arguments; every key counts as open
OPERATIONS = {
    "mask_bits": lambda q, f, *_: 2 * q.numel() * f.shape[2],
    "masked_attn": lambda q, k, *_: 4 * q.numel() * k.shape[1],
    "masked_attn_backward": lambda g, q, k, *_: 10 * q.numel() * k.shape[1],
    "query_layer": lambda x, attended, position, layer, prediction, *_: (
        2 * x[..., 0].numel() * sum(t.numel() for t in (*layer, *prediction) if t.ndim == 2)
        + 4 * x.numel() * x.shape[1]
    ),
    "window_attn": lambda *args: 4 * args[0].numel() // 3 * _side(args) ** 2,
    "window_attn_backward": lambda *args: 10 * args[1].numel() // 3 * _side(args) ** 2,
    "neighborhood_attn": lambda q, k, v, bias, kernel, *_: 4 * q.numel() * prod(kernel),
    "neighborhood_attn_backward": lambda grad, q, k, v, bias, kernel, *_: (
        10 * q.numel() * prod(kernel)
    ),
    "matching_cost": lambda logits, embed, f, labels, masks, points, *_: (
        2 * embed[..., 0].numel() * points.shape[2] * (f.shape[1] + 2 * labels.shape[1])
    ),
}


def _of_deform_backward(grad, value, shapes, reference, offsets, *_) -> int:
    """A memset and four kernels for each chunk of planes with up to 2**21 samples."""
    B, Q, H, L, P, _ = offsets.shape
    return 5 * -(-B * H // max(1, min(B * H, 2**21 // (Q * L * P))))


# the others launch once; the first of point_mask_loss packs the masks
LAUNCHES = {"ms_deform_attn_backward": _of_deform_backward, "point_mask_loss": lambda *_: 2}
# the most bytes that those of CUDA C++ take for themselves: records of samples, counts of pixels
# and the gradient in the precision of the values; masks as bits
SCRATCH = {
    "ms_deform_attn_backward": lambda grad, value, shapes, reference, offsets, *_: (
        48 * max(2**21, offsets[0, :, 0, ..., 0].numel()) + 2**26 + size_of(grad)
    ),
    "point_mask_loss": lambda logits, masks, *_: masks.numel() // 4,
}
UNREAD = {"point_mask_loss_backward": {6}}  # arguments of which only the shape is read: masks


@dataclass
class Rates:
    """Of a GPU: bytes and operations a second, and the seconds of a small launch."""

    bandwidth: float = 4.3e12
    half: float = 800e12
    single: float = 55e12
    launch: float = 2e-6


@dataclass
class Total:
    """Of all calls of an op; seconds at least, and estimated."""

    launches: int = 0
    bytes: int = 0
    operations: int = 0
    least: float = 0.0
    estimate: float = 0.0


def size_of(values) -> int:
    """Bytes of the tensors among values; what a stride of 0 repeats is there once."""
    tensors = [x for x in tree_leaves(values) if isinstance(x, Tensor)]
    return sum(
        x.element_size() * prod(n for n, step in zip(x.shape, x.stride()) if step) for x in tensors
    )


def _as_cudnn_lays(out, args: tuple):
    """Maps of a convolution on a GPU: channels last where one of those it reads is."""
    last = {"memory_format": torch.channels_last}
    maps = [x for x in args if isinstance(x, Tensor) and x.ndim == 4]
    if not any(x.is_contiguous(**last) for x in maps):
        return out
    return tree_map_only(Tensor, lambda x: x.contiguous(**last) if x.ndim == 4 else x, out)


def _dtype(values) -> torch.dtype:
    """Of the first floating tensor."""
    found = (x.dtype for x in tree_leaves(values) if isinstance(x, Tensor))
    return next((dtype for dtype in found if dtype.is_floating_point), torch.float32)


class Count(TorchDispatchMode):
    """Adds up in `totals`, by op, what is launched inside; `live` counts its memory."""

    def __init__(self, rates: Rates, live: Live | None = None):
        super().__init__()
        self.rates = rates
        self.totals: defaultdict[str, Total] = defaultdict(Total)
        self.live = live or Live()
        self._of: str | None = None  # the op of segkern whose launches are being counted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, packet = kwargs or {}, func._overloadpacket
        name, own = packet.__name__, func.namespace == "segkern"
        if own and (kernel := _kernel(name)):
            return self._inside(name, kernel, args)
        if func.namespace == "aten":
            with self:  # what is only a name for other ops counts as those
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        # works in place, and PyTorch knows no other way to run it than on values
        out = None if name == "_fused_adamw_" else func(*args, **kwargs)
        if name.startswith("convolution"):
            out = _as_cudnn_lays(out, args)
        self.live.see((args, kwargs, out))
        on_gpu = any(x.is_cuda for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor))
        if on_gpu and not (func.is_view or name in NO_LAUNCH):
            operations, launches = 0, 1
            if own:
                launches = LAUNCHES.get(name, lambda *_: 1)(*args)
                self.live.within(SCRATCH.get(name, lambda *_: 0)(*args))
            elif (packet := SAME.get(packet, packet)) in flop_registry:
                operations = flop_registry[packet](*args, **kwargs, out_val=out)
            left_out = {0} if name in ONLY_WRITES else UNREAD.get(name, set())
            read = [a for i, a in enumerate(args) if i not in left_out]
            outs = {a.name for a in func._schema.arguments if a.is_out}
            others = [value for key, value in kwargs.items() if key not in outs]
            size = size_of((read, others)) + size_of(out)
            self._add(name, launches, size, operations, _dtype(args))
        return out

    def _inside(self, name: str, kernel: Callable, args: tuple):
        """Counts as the op's own what its kernel, which is Python, launches."""

        def launched(kernel, *values, grid, warmup, **constants):
            if prod(grid):
                self._add(kernel.__name__, 1, size_of(values), 0, torch.float32)

        outer, self._of = self._of, self._of or name
        with self, mock.patch.object(JITFunction, "run", launched):
            out = kernel(*args)
        self._of = outer
        if name in OPERATIONS:
            self._add(name, 0, 0, OPERATIONS[name](*args), _dtype(args))
        return out

    def _add(self, name: str, launches: int, size: int, operations: int, dtype) -> None:
        rate = self.rates.half if dtype.itemsize < 4 else self.rates.single
        least = max(size / self.rates.bandwidth, operations / rate)
        total = self.totals[self._of or name]
        total.launches += launches
        total.bytes += size
        total.operations += operations
        total.least += least
        total.estimate += max(least, launches * self.rates.launch)


def _kernel(name: str) -> Callable | None:
    """The kernel of an op where it is Python: a launcher of Triton, or made of PyTorch's ops."""
    if name in _library.TRITON:
        module = importlib.import_module(f"segkern.kernels.{_library.TRITON[name]}")
        return getattr(module, name)
    return _library.COMPOSED.get(name)


def _attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None) -> Tensor:
    """The kernel that PyTorch takes on a GPU; without one it would take several products."""
    training = torch.is_grad_enabled() and q.requires_grad
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, attn_mask, training, dropout_p, is_causal, scale=scale
    )[0]


@torch.no_grad()
def _backward(loss: Tensor, *_, **__) -> None:
    """`Tensor.backward`, whose own engine asks the device for its streams."""
    waits: defaultdict = defaultdict(int)  # of a node, how many gradients are still to come
    seen, found = {loss.grad_fn}, [loss.grad_fn]
    while found:
        for node, _ in found.pop().next_functions:
            waits[node] += 1
            if node not in seen and node is not None:
                seen.add(node)
                found.append(node)
    grads: defaultdict = defaultdict(dict)  # of a node, by the number of its output
    grads[loss.grad_fn] = {0: torch.ones_like(loss)}
    ready = [loss.grad_fn]
    while ready:
        node = ready.pop()
        given = grads.pop(node, {})
        if hasattr(node, "variable"):
            for grad in given.values():
                node.variable.grad = grad
            del given
            continue
        inputs = [given.get(i) for i in range(len(node._input_metadata))]
        python = hasattr(node, "apply")  # and then it also returns what is for no tensor
        outputs = node.apply(*inputs) if python else node(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if python:
            outputs = [x for x, wanted in zip(outputs, node.needs_input_grad) if wanted]
        else:
            outputs = [x for x, (to, _) in zip(outputs, node.next_functions) if to is not None]
        nexts = [(to, number) for to, number in node.next_functions if to is not None]
        for (following, number), grad in zip(nexts, outputs, strict=True):
            if grad is not None:
                wanted = following._input_metadata[number]
                grad = grad.sum_to_size(wanted.shape).to(wanted.dtype)
                before = grads[following].get(number)
                grads[following][number] = grad if before is None else before + grad
            waits[following] -= 1
            if not waits[following]:
                ready.append(following)
        del given, inputs, outputs, nexts
        release()


def _apply(module: nn.Module, change: Callable, recurse: bool = True) -> nn.Module:
    """`Module._apply`, which would exchange tensors in place, as those without values cannot."""
    for m in module.modules():
        for name, p in m._parameters.items():
            if p is not None:
                m._parameters[name] = nn.Parameter(change(p.detach()), p.requires_grad)
        for name, b in m._buffers.items():
            m._buffers[name] = b if b is None else change(b)
    return module


@contextlib.contextmanager
def imaginary_gpu(dtype: torch.dtype):
    """Inside, tensors are on a GPU that is not there and have no values; `dtype` is the usual."""
    nothing, usual = contextlib.nullcontext(), torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        for name, value in {
            "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
            "torch.cuda.is_bf16_supported": lambda *_: True,
            "torch.cuda.device_of": lambda _: nothing,
            "torch.nn.functional.scaled_dot_product_attention": _attention,
            "torch.nn.utils.clip_grad._has_foreach_support": lambda *_: True,
            "torch.Tensor.backward": _backward,
            "torch._C._current_graph_task_id": lambda: (
                1
            ),  # a backward is underway, say checkpoints
            "torch.autograd.graph.saved_tensors_hooks.__init__": boxed,
            "torch.nn.Module._apply": _apply,
            "torch.nn.init.trunc_normal_": lambda x, *_, **__: x,  # reads what it drew
        }.items():
            stack.enter_context(mock.patch(name, value))
        stack.enter_context(mock.patch.object(_launch, "_device", return_value=_launch.ASSUMED))
        stack.enter_context(mock.patch.dict(_library.MISSING, clear=True))
        stack.enter_context(FAKE)
        stack.enter_context(saved_tensors_hooks(lambda x: x, lambda x: x))
        stack.enter_context(torch.device("cuda"))
        stack.callback(torch.set_default_dtype, usual)
        torch.set_default_dtype(dtype)
        yield


def counted(
    config, kind: str, size: tuple[int, int], batch: int, precision: str, rates: Rates
) -> Count:
    """Counts the second inference or training step of a model.

    Args:
        config: of a Mask2Former or a Segmenter.
        kind: of KINDS.
        size: height and width.
        precision: of `training.step.PRECISIONS`: of the step's autocast, or of the weights that
            the inference has.
    """
    Model = Mask2Former if isinstance(config, Mask2FormerConfig) else Segmenter
    training = kind == "training step"
    with imaginary_gpu(torch.float32 if training else PRECISIONS[precision]):
        model, x = Model(config).train(training), torch.randn(batch, 3, *size)
        run = _training_step(model, x, precision) if training else partial(_predict, model, x)
        live = Live()
        for _ in range(2):  # the first keeps position embeddings, and makes the optimizer's state
            live.most = live.now
            with Count(rates, live) as count:
                run()
    return count


@torch.no_grad()  # in inference mode, ops would be seen before they become others
def _predict(model: nn.Module, x: Tensor) -> None:
    type(model).predict(model, x)


def _training_step(model: nn.Module, x: Tensor, precision: str) -> Callable:
    B, _, H, W = x.shape
    targets = Targets(
        labels=torch.zeros(B, TARGETS, dtype=torch.int64),
        masks=torch.zeros(B, TARGETS, H, W, dtype=torch.uint8),
        count=torch.full((B,), TARGETS),
        ids=torch.arange(B),
        semantic=torch.zeros(B, H, W, dtype=torch.uint8),
    )
    optimizer = build_optimizer(model, TrainConfig())
    step = Step(model, optimizer, clip=0.01, precision=precision, graphs=False)
    return lambda: step(Batch(x, targets), 1e-4)


def table(totals: dict[str, Total], earlier: dict, rows: int) -> str:
    """Lines of text: the whole first, then the ops that take most by estimate."""
    whole = Total(*(sum(getattr(t, f.name) for t in totals.values()) for f in fields(Total)))
    known = {"all": asdict(whole)} | {name: asdict(total) for name, total in totals.items()}
    order = sorted(known, key=lambda name: -known[name]["estimate"])[: rows + 1]
    head = ("", "launches", "MB", "GFLOP", "least ms", "estimate ms")
    lines = ["{:<34}{:>10}{:>10}{:>10}{:>10}{:>13}".format(*head)]
    for name in order:
        a = known[name]
        line = f"{name:<34}{a['launches']:>10}{a['bytes'] / 1e6:>10.1f}"
        line += (
            f"{a['operations'] / 1e9:>10.1f}{1e3 * a['least']:>10.3f}{1e3 * a['estimate']:>13.3f}"
        )
        if before := earlier.get(name):
            line += f"   before: {before['launches']} launches, {before['bytes'] / 1e6:.1f} MB"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="mask2former", choices=("mask2former", "segmenter"))
    parser.add_argument("--backbone", default="swin_tiny", help="of Mask2Former")
    parser.add_argument("--kind", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--size", type=int, nargs="+", default=[1024], help="height [width]")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precision", default="bf16", choices=PRECISIONS)
    parser.add_argument("--bandwidth", type=float, default=Rates.bandwidth / 1e12, help="TB/s")
    parser.add_argument(
        "--half", type=float, default=Rates.half / 1e12, help="TFLOP/s in half precision"
    )
    parser.add_argument(
        "--single", type=float, default=Rates.single / 1e12, help="TFLOP/s in float32"
    )
    parser.add_argument(
        "--launch", type=float, default=Rates.launch / 1e-6, help="us of a small launch"
    )
    parser.add_argument("--rows", type=int, default=25)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--against", type=Path)
    options = parser.parse_args()
    rates = Rates(
        1e12 * options.bandwidth, 1e12 * options.half, 1e12 * options.single, 1e-6 * options.launch
    )
    size = (options.size[0], options.size[-1])
    if options.model == "mask2former":
        # norms as in the paper
        frozen = {"freeze_norm": True} if options.backbone in ("resnet50", "resnet101") else {}
        config = Mask2FormerConfig(
            num_labels=LABELS, backbone=options.backbone, backbone_options=frozen
        )
    else:
        config = SegmenterConfig(num_labels=LABELS, image_size=size)
    earlier = json.loads(options.against.read_text()) if options.against else {}
    found = {}
    for kind in options.kind:
        count = counted(config, kind, size, options.batch, options.precision, rates)
        totals = count.totals
        print(f"\n== {options.model}, {kind}, {size[0]} x {size[1]}, B = {options.batch}")
        print(f"memory in use at once: {count.live.most / 1e9:.2f} GB at most")
        print(table(totals, earlier.get(kind, {}), options.rows))
        found[kind] = {name: asdict(total) for name, total in totals.items()}
    if options.save:
        options.save.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
