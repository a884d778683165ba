"""Programs of torch.export with int8 weights and activations, or int8 weights alone.

The recipe is torchao's PT2E with the quantiser for Inductor on x86: products and convolutions
between pairs of quantise and dequantise, which torch.compile fuses into int8 kernels. Run as they
are, the pairs cost time.
"""

import warnings
from collections.abc import Sequence
from fnmatch import fnmatch

import torch
from torch import Tensor, fx

from .decompositions import decomposed
from .export import traced
from .graph import INPUT, Graph

_PREFIX = "model."  # of the model in a `Graph`


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
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    class Kept(x86.X86InductorQuantizer):
        """Leaves out the products of what `keep` names, and of operands that no weight made."""

        def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
            model = super().annotate(model)
            made_of = _origins(model.graph)
            for node in model.graph.nodes:
                note = node.meta.get("quantization_annotation")
                if note is None or not note._annotated:
                    continue
                names = made_of.get(node)
                if not names or any(fnmatch(n, p) for n in names for p in keep):
                    node.meta.pop("quantization_annotation")
                    continue
                note.output_qspec = None
                if weights_alone:
                    weight = node.args[1]
                    note.input_qspec_map = {weight: note.input_qspec_map[weight]}
            return model

    program = decomposed(traced(graph, size, batches=True, sides=sides))
    quantizer = Kept().set_global(x86.get_default_x86_inductor_quantization_config())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        observed = prepare_pt2e(program.module(check_guards=False), quantizer)
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


def _origins(graph: fx.Graph) -> dict[fx.Node, frozenset[str]]:
    """Of each product and convolution, of which weights of the model its second operand is made;
    none where it is no constant."""
    known: dict[fx.Node, frozenset[str]] = {}
    found = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            known[node] = frozenset({str(node.target).removeprefix(_PREFIX)})
        elif node.op == "call_function":
            inputs = node.all_input_nodes
            if all(x in known for x in inputs):
                known[node] = frozenset().union(*(known[x] for x in inputs))
            elif len(node.args) > 1 and node.args[1] in known:
                found[node] = known[node.args[1]]
    return found
