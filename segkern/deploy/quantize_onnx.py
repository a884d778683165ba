"""ONNX files with fewer bits: int8 weights and activations, int8 weights alone, bfloat16 weights.

Products and convolutions whose weights are constants get fewer bits; all else, the products of
attention and the norms among it, stays in float32. Constants that an export left to be computed
are computed first, and each knows from which weights of the model it comes.
"""

import ast
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from .formats import quiet
from .graph import INPUT

_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")  # their second input is the weight
_UNLIMITED = 2**62
_PREFIX = "model."  # of the model in a `Graph`
_SCOPES = "pkg.torch.onnx.name_scopes"  # of a node: modules, and the node of the program


class Weight(NamedTuple):
    """A constant operand.

    Attributes:
        node: name of the product or convolution.
        made_of: names of the model's weights that it is computed from.
        axis: of the output channels.
    """

    node: str
    made_of: frozenset[str]
    axis: int


class Prepared(NamedTuple):
    """A file in float32, ready for fewer bits.

    Attributes:
        model: an onnx.ModelProto whose constants are all initializers.
        weights: the operands of more than one dimension that come from weights of the model.
    """

    model: object
    weights: list[Weight]

    def wanted(self, keep: Sequence[str]) -> list[Weight]:
        """Those that come from no weight whose name a pattern fits.

        Raises:
            ValueError: there are none.
        """
        found = [
            w
            for w in self.weights
            if not any(fnmatch(name, pattern) for name in w.made_of for pattern in keep)
        ]
        if not found:
            raise ValueError(
                f"quantize: keep must leave a weight to make smaller, got {', '.join(keep)}"
            )
        return found


def made_from(program: torch.export.ExportedProgram) -> dict[str, frozenset[str]]:
    """By the names of a program's nodes: of each constant, and of the second operand of whatever
    has a constant there, of which weights of the model it is made."""
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    known: dict[torch.fx.Node, frozenset[str]] = {}
    operands = {}
    for node in program.graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "placeholder" and node.name in names:
            known[node] = frozenset({names[node.name].removeprefix(_PREFIX)})
        elif node.op == "call_function" and inputs and all(x in known for x in inputs):
            known[node] = frozenset().union(*(known[x] for x in inputs))
        elif node.op == "call_function" and len(node.args) > 1 and node.args[1] in inputs:
            operands[node.name] = known.get(node.args[1], frozenset())
    return operands | {node.name: made_of for node, made_of in known.items()}


def prepared(path: Path, names: dict[str, frozenset[str]]) -> Prepared:
    """Opens a file of `write_onnx`.

    Args:
        path: the file.
        names: `made_from` of its program.
    """
    import onnx

    model = onnx.load(path)
    made_of = _origins(model.graph, names)
    model = _folded(model)
    sizes = {x.name: len(x.dims) for x in model.graph.initializer}
    weights = []
    for node in model.graph.node:
        del node.metadata_props[:]  # how torch traced it
        node.doc_string = ""
        names = made_of.get(node.name)
        if node.op_type in _OPS and names and sizes.get(node.input[1], 0) > 1:
            weights.append(Weight(node.name, names, _axis(node, sizes[node.input[1]])))
    return Prepared(model, weights)


def _origins(graph, names: dict[str, frozenset[str]]) -> dict[str, frozenset[str]]:
    """Of each product and convolution by its name, of which weights its constant is made.

    An export computes small constants and gives them new names: then the node of the program that
    a product comes from tells. One that nothing tells of is left out, and stays in float32.
    """
    nothing = frozenset()
    known = {}
    for x in graph.initializer:
        own = frozenset({x.name.removeprefix(_PREFIX)}) if x.name.startswith(_PREFIX) else nothing
        known[x.name] = names.get(x.name, own)
    found = {}
    for node in graph.node:
        inputs = [name for name in node.input if name]
        if all(name in known for name in inputs):
            made_of = nothing.union(*(known[name] for name in inputs))
            known |= dict.fromkeys(node.output, made_of)
        elif node.op_type in _OPS and node.input[1] in known:
            scopes = [p.value for p in node.metadata_props if p.key == _SCOPES]
            traced = ast.literal_eval(scopes[0])[-1] if scopes else ""
            found[node.name] = known[node.input[1]] or names.get(traced, nothing)
    return found


def _folded(model):
    """The same with every constant computed and held as an initializer."""
    import onnx_ir as ir
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants

    found = True
    while found:  # what depends on a split is computed after it, another split among it
        made = ir.serde.deserialize_model(model)
        with quiet():
            fold_constants(made, input_size_limit=_UNLIMITED, output_size_limit=_UNLIMITED)
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(made)
        common.RemoveUnusedNodesPass()(made)
        model = ir.serde.serialize_model(made)
        found = _split(model.graph)
    return model


def _split(graph) -> bool:
    """Computes each Split of a constant, which constant folding leaves; says whether there was
    one."""
    from onnx import numpy_helper

    values = {x.name: x for x in graph.initializer}
    left = []
    for node in graph.node:
        constant = node.op_type == "Split" and all(name in values for name in node.input)
        if not constant:
            left.append(node)
            continue
        whole, *sizes = (numpy_helper.to_array(values[name]) for name in node.input)
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        count = len(node.output)
        equal = [-(-whole.shape[axis] // count)] * count  # the last may be less
        places = np.cumsum(sizes[0] if sizes else equal)[:-1]
        for name, part in zip(node.output, np.split(whole, places, axis)):
            graph.initializer.append(numpy_helper.from_array(part.copy(), name))
    found = len(left) < len(graph.node)
    del graph.node[:]
    graph.node.extend(left)
    return found


def _axis(node, dimensions: int) -> int:
    """Of the output channels in a weight."""
    if node.op_type == "MatMul":
        return dimensions - 1
    if node.op_type == "Gemm":
        turned = any(a.name == "transB" and a.i for a in node.attribute)
        return 0 if turned else 1
    return 1 if node.op_type == "ConvTranspose" else 0


class _Pixels:
    """What ONNX Runtime's calibration reads, one picture after the other."""

    def __init__(self, pixels: Sequence[torch.Tensor]):
        self.left = iter(pixels)

    def get_next(self) -> dict[str, np.ndarray] | None:
        found = next(self.left, None)
        return None if found is None else {INPUT: np.ascontiguousarray(found.numpy())}


def to_int8(
    source: Prepared, keep: Sequence[str], pixels: Sequence[torch.Tensor], path: Path
) -> None:
    """Weights in int8, symmetric, a scale an output channel; activations in uint8, by the least
    and greatest values that the pictures gave; as pairs of QuantizeLinear and DequantizeLinear.

    Args:
        source: is changed.
        keep: patterns of names of the model's weights that stay in float32, with what they
            multiply.
        pixels: [B, C, h, w] each, as the file takes them.
        path: where to.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    add_pre_process_metadata(source.model)  # or it asks for what `prepared` did
    quantize_static(
        source.model,
        path,
        _Pixels(pixels),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=list(_OPS),
        nodes_to_quantize=[w.node for w in source.wanted(keep)],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def to_int8_weights(source: Prepared, keep: Sequence[str], path: Path) -> None:
    """Weights in int8 as above, each followed by a DequantizeLinear; activations stay.

    Args:
        source: is changed.
        keep: as of `to_int8`.
        path: where to.
    """
    from onnx import helper, numpy_helper

    def stored(name: str, value: np.ndarray, axis: int) -> Iterator:
        others = tuple(i for i in range(value.ndim) if i != axis)
        scale = np.abs(value).max(others).astype(np.float32) / 127
        scale[scale == 0] = 1
        shape = [-1 if i == axis else 1 for i in range(value.ndim)]
        whole = np.round(value / scale.reshape(shape)).astype(np.int8)
        yield numpy_helper.from_array(whole, f"{name}_int8")
        yield numpy_helper.from_array(scale, f"{name}_scale")

    def restored(name: str, new: str, axis: int):
        inputs = [f"{name}_int8", f"{name}_scale"]
        return helper.make_node("DequantizeLinear", inputs, [new], f"{new}_node", axis=axis)

    _replaced(source, keep, stored, restored)
    _save(source.model, path)


def to_bf16(source: Prepared, keep: Sequence[str], path: Path) -> None:
    """Weights in bfloat16, each followed by a Cast: half the bytes, computed in float32.

    Args:
        source: is changed.
        keep: as of `to_int8`.
        path: where to.
    """
    from onnx import TensorProto, helper

    def stored(name: str, value: np.ndarray, axis: int) -> Iterator:
        half = torch.from_numpy(value.copy()).bfloat16().view(torch.int16).numpy()
        kind = TensorProto.BFLOAT16
        yield helper.make_tensor(f"{name}_bf16", kind, value.shape, half.tobytes(), raw=True)

    def restored(name: str, new: str, axis: int):
        to = TensorProto.FLOAT
        return helper.make_node("Cast", [f"{name}_bf16"], [new], f"{new}_node", to=to)

    _replaced(source, keep, stored, restored)
    _save(source.model, path)


def _replaced(
    source: Prepared,
    keep: Sequence[str],
    stored: Callable[[str, np.ndarray, int], Iterator],
    restored: Callable,
) -> None:
    """Puts fewer bits, and a node that makes float32 of them, in the place of weights."""
    from onnx import numpy_helper

    graph = source.model.graph
    wanted = {w.node: w.axis for w in source.wanted(keep)}
    values = {x.name: x for x in graph.initializer}
    made: dict[tuple[str, int], str] = {}
    first = []
    for node in graph.node:
        if node.name not in wanted:
            continue
        name, axis = node.input[1], wanted[node.name]
        if (name, axis) not in made:
            base, new = f"{name}_{axis}", f"{name}_{axis}_float"
            made[name, axis] = new
            graph.initializer.extend(stored(base, numpy_helper.to_array(values[name]), axis))
            first.append(restored(base, new, axis))
        node.input[1] = made[name, axis]
    nodes = [*first, *graph.node]
    used = {name for node in nodes for name in node.input} | {x.name for x in graph.output}
    kept = [x for x in graph.initializer if x.name in used]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)


def _save(model, path: Path) -> None:
    import onnx

    onnx.checker.check_model(model)
    onnx.save(model, path)
