"""What a model returns: Hugging Face's manners, and gradients that DDP averages."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.distributed as dist
from test_opening import convolutions, levels, pixels, pyramid, queries, sequence, tasks, tokens
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from segkern.models import (
    EoMTOutput,
    Mask2FormerOutput,
    SegFormerOutput,
    SegmenterOutput,
    TwoHeadOutput,
)
from segkern.structures.logits import PixelLogits
from segkern.structures.outputs import Product
from segkern.structures.targets import Targets
from support.inputs import random_targets
from support.processes import in_two_processes

KINDS = {
    "Mask2Former": queries,
    "MaskFormer": pyramid,
    "OneFormer": tasks,
    "Segmenter": pixels,
    "SegFormer": levels,
    "Seq2Seg": partial(sequence, head="instance"),
    "U-Net": convolutions,
    "EoMT": tokens,
}


def asked(kind, rank=0):
    """A model, and the arguments of its forward that differ with the rank."""
    torch.manual_seed(0)
    model = KINDS[kind]()
    side = 32 if kind == "EoMT" else 64
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(rank))
    if model.config.logits is PixelLogits:
        labels = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
        return model, {"pixel_values": x, "labels": labels}
    masks, labels = random_targets((2, 1), 3, side, side)
    targets = Targets.from_lists(masks, labels, (side, side), 3, ids=[2 * rank, 2 * rank + 1])
    return model, {"pixel_values": x, "targets": targets}


@pytest.mark.parametrize("kind", KINDS)
def test_an_output_is_read_by_attribute_name_and_place(kind):
    model, arguments = asked(kind)
    out = model(**arguments)
    assert out.loss is out["loss"] is out[0] is out.get("loss")
    assert "loss" in out
    assert "nothing" not in out
    plain = model.eval()(arguments["pixel_values"])
    assert plain.loss is None
    assert "loss" not in plain
    pixels = model.config.logits is PixelLogits
    name = "logits" if pixels else "class_queries_logits"
    assert plain[0] is getattr(plain, name) is plain[name]
    assert list(plain) == list(plain.keys()) == list(dict(plain)) == list({**plain})
    together = zip(plain.to_tuple(), plain[:], plain.values(), dict(plain).values(), strict=True)
    for values in together:
        assert all(v is values[0] for v in values)
    assert len(plain) == len(plain.to_tuple())
    assert plain[:1] == (plain[0],)
    for key in ("loss", 9):
        with pytest.raises(LookupError):
            plain[key]


@pytest.mark.parametrize("kind", KINDS)
def test_a_tuple_is_what_is_not_none(kind):
    model, arguments = asked(kind)
    model.eval()
    out = model(**arguments)
    for value, want in zip(model(**arguments, return_dict=False), out.to_tuple(), strict=True):
        if isinstance(want, torch.Tensor):
            assert torch.equal(value, want)


def lazy(cls=Mask2FormerOutput):
    embeddings = torch.randn(1, 2, 3, requires_grad=True)
    return cls(
        loss=torch.ones(()), masks_queries_logits=Product(embeddings, torch.ones(1, 3, 4, 5))
    )


READ = {
    "attribute": lambda out: out.masks_queries_logits,
    "name": lambda out: out["masks_queries_logits"],
    "place": lambda out: out[1],
    "slice": lambda out: out[:2][1],
    "tuple": lambda out: out.to_tuple()[1],
    "get": lambda out: out.get("masks_queries_logits"),
    "values": lambda out: list(out.values())[1],
    "items": lambda out: dict(out.items())["masks_queries_logits"],
    "dict": lambda out: dict(out)["masks_queries_logits"],
    "keywords": lambda out: {**out}["masks_queries_logits"],
    "pickle": lambda out: pickle.loads(pickle.dumps(out)).masks_queries_logits,
    "copy": lambda out: copy.copy(out).masks_queries_logits,
}


@pytest.mark.parametrize("way", READ)
def test_what_was_not_read_is_computed_once(way):
    out = lazy()
    assert list(out) == ["loss", "masks_queries_logits"]
    assert len(out) == 2
    assert "masks_queries_logits" in out
    assert out[0] is out.loss
    assert isinstance(vars(out)["masks_queries_logits"], Product)
    value = READ[way](out)
    assert value.shape == (1, 2, 4, 5)
    if way not in ("pickle", "copy"):
        assert value is out.masks_queries_logits is READ[way](out)


def test_an_output_is_changed_as_a_dict():
    out = lazy()
    out.masks_queries_logits = None
    assert list(out) == ["loss"]
    out["class_queries_logits"] = torch.zeros(2)
    assert list(out.keys()) == ["loss", "class_queries_logits"]  # in the order of the fields
    with pytest.raises(TypeError, match="set a value, or to None what shall not be there"):
        out.pop("loss")
    again = Mask2FormerOutput({"loss": 2.0})  # as libraries rebuild a dict that they have mapped
    assert Mask2FormerOutput(again.items()).loss == again.loss == 2.0
    assert out == out
    assert out != again
    for wrong in (
        lambda: Mask2FormerOutput(nothing=1),
        lambda: out["nothing"],
    ):
        with pytest.raises(KeyError):
            wrong()


@pytest.mark.parametrize(
    "cls",
    [Mask2FormerOutput, SegmenterOutput, SegFormerOutput, TwoHeadOutput, EoMTOutput],
)
def test_an_output_is_a_tree_of_tensors(cls):
    out = cls(loss=torch.ones(()))
    doubled = pytree.tree_map_only(torch.Tensor, lambda t: 2 * t, out)
    assert isinstance(doubled, cls)
    assert isinstance(doubled, dict)
    assert doubled.loss.item() == 2
    assert doubled.to_tuple() == (2,)
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(out)[0]]
    assert paths == ["['loss']"]


def test_a_tree_has_the_factors_of_what_was_not_read():
    out = lazy()
    doubled = pytree.tree_map(lambda t: 2 * t, out)
    assert torch.equal(doubled.masks_queries_logits, 4 * out.masks_queries_logits)


LONG = ("Mask2Former", "MaskFormer", "SegFormer")  # to trace


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.slow] * (k in LONG)) for k in KINDS]
)
def test_one_graph_is_compiled_of_forward(kind):
    model, arguments = asked(kind)
    want = model.eval()(arguments["pixel_values"])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    have = compiled(arguments["pixel_values"])
    assert type(have) is type(want)
    assert list(have) == list(want)
    torch.testing.assert_close(have[0], want[0])


WRAPPED = {
    "static_graph": {"static_graph": True},
    "find_unused_parameters": {"find_unused_parameters": True},
}


def work(rank):
    found = {}
    for kind in KINDS:
        for name, options in WRAPPED.items():
            for checkpointing in (False, True):
                model, arguments = asked(kind, rank)
                model.gradient_checkpointing_enable(checkpointing)
                wrapped = DistributedDataParallel(model.train(), **options)
                for _ in range(2):  # the first step of a static graph differs from the others
                    model.zero_grad()
                    wrapped(**arguments).loss.backward()
                    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
                    case = f"{kind}, {name}, checkpointing {checkpointing}"
                    found.setdefault(case, []).append(torch.cat(grads).tolist())
    return found


@pytest.mark.slow
def test_processes_average_the_gradients(tmp_path):
    found = in_two_processes(work, tmp_path)
    assert len(found[0]) == 4 * len(KINDS)
    for case, steps in found[0].items():
        for step, mine, other in zip((1, 2), steps, found[1][case], strict=True):
            assert mine == other, f"{case}, step {step}"


@pytest.mark.parametrize("kind", KINDS)
def test_contiguous_weights_are_sharded(kind, tmp_path):
    """FSDP takes no channels-last weights; the maps stay channels-last without them."""
    plain, arguments = asked(kind)
    model = asked(kind)[0].to(memory_format=torch.contiguous_format)
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        for one in (plain, model):
            torch.manual_seed(2)
            one(**arguments).loss.backward()
        for (name, want), got in zip(plain.named_parameters(), model.parameters(), strict=True):
            if want.grad is not None:
                assert torch.equal(got.grad.full_tensor(), want.grad), name
    finally:
        dist.destroy_process_group()
