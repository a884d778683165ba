"""Programs of torch.export with int8 weights and activations, or int8 weights alone.

The recipe is torchao's PT2E with the types and observers of its quantiser for Inductor on x86:
products and convolutions between pairs of quantise and dequantise, made for torch.compile to fuse.
Run as they are, the pairs cost time. That quantiser itself tells products by the
modules that they were traced from, and the ops that segkern's stand for come from none.
"""

import operator
import warnings
from collections.abc import Sequence
from fnmatch import fnmatch

import torch
from torch import Tensor, fx

from .decompositions import decomposed
from .export import traced
from .graph import INPUT, Graph

_PREFIX = "model."  # of the model in a `Graph`
_OPS = (torch.ops.aten.linear.default, torch.ops.aten.conv2d.default)


def to_int8(
    graph: Graph,
    keep: Sequence[str],
    pixels: Sequence[Tensor],
    size: tuple[int, int],
    sides: bool,
    weights_alone: bool = False,
) -> torch.export.ExportedProgram:
    """A program for any number of pictures.

    Args:
        graph: of a model in float32 on the CPU.
        keep: patterns of names of the model's weights that stay in float32, with what they
            multiply.
        pixels: [B, C, h, w] each, of which the ranges of activations are taken.
        size: (h, w) of the pictures.
        sides: any sides.
        weights_alone: activations stay in float32.
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, Quantizer
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    specs = x86.get_default_x86_inductor_quantization_config()

    class Products(Quantizer):
        """Marks products and convolutions by weights that `keep` does not name."""

        def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
            """Says of each what is observed."""
            for node, parts in _origins(model.graph, names).items():
                if any(fnmatch(name, pattern) for name in parts for pattern in keep):
                    continue
                wanted = {node.args[1]: specs.weight}
                if not weights_alone:
                    wanted[node.args[0]] = specs.input_activation
                node.meta["quantization_annotation"] = QuantizationAnnotation(
                    input_qspec_map=wanted, _annotated=True
                )
            return model

        def validate(self, model: fx.GraphModule) -> None:
            """Nothing else is marked."""

    program = decomposed(traced(graph, size, batches=True, sides=sides))
    module = program.module(check_guards=False)
    names = _fold(module)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        observed = prepare_pt2e(module, Products())
        for picture in pixels:
            observed(picture)
        module = _without_unused(convert_pt2e(observed))
        axes = [0, 2, 3] if sides else [0]
        shapes = {INPUT: dict.fromkeys(axes, torch.export.Dim.DYNAMIC)}
        example = program.example_inputs[0]
        return torch.export.export(module, example, dynamic_shapes=shapes)


def _without_unused(module: fx.GraphModule) -> fx.GraphModule:
    """The same without the weights in whose place int8 ones stand."""
    used = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    held = [*module.named_parameters(), *module.named_buffers()]
    for name in [name for name, _ in held if name not in used]:
        place, _, last = name.rpartition(".")
        delattr(module.get_submodule(place), last)
    return module


@torch.no_grad()
def _fold(module: fx.GraphModule) -> dict[str, frozenset[str]]:
    """Computes what depends on weights alone, in place.

    Returns:
        of each weight and each of the new constants by its name, of which weights it is made.
    """
    known: dict[fx.Node, frozenset[str]] = {}
    values: dict[fx.Node, Tensor] = {}
    names = {}
    for node in list(module.graph.nodes):
        if node.target == torch.ops.aten._assert_tensor_metadata.default:
            module.graph.erase_node(node)  # of a weight it would keep the float32 one
            continue
        inputs = node.all_input_nodes
        if node.op == "get_attr":
            known[node] = names[node.target] = frozenset({node.target.removeprefix(_PREFIX)})
            values[node] = operator.attrgetter(node.target)(module)
        elif node.op == "call_function" and inputs and all(x in known for x in inputs):
            known[node] = frozenset().union(*(known[x] for x in inputs))
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    for node, value in values.items():
        if node.op == "get_attr" or all(user in known for user in node.users):
            continue
        name = f"folded_{node.name}"
        module.register_buffer(name, value.clone())
        names[name] = known[node]
        with module.graph.inserting_before(node):
            new = module.graph.get_attr(name)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
    module.graph.eliminate_dead_code()
    module.recompile()
    return names


def _origins(graph: fx.Graph, names: dict[str, frozenset[str]]) -> dict[fx.Node, frozenset[str]]:
    """Of each product and convolution, of which weights of the model its second operand is made;
    none where it is no constant."""
    found = {}
    for node in graph.nodes:
        if node.target in _OPS:
            weight = node.args[1]
            if isinstance(weight, fx.Node) and weight.op == "get_attr":
                found[node] = names[weight.target]
    return found
