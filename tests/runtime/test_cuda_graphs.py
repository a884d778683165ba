"""CUDA graphs with torch.cuda stubbed: what is captured when, and what a replay follows."""

import copy
import pickle
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

import segkern
from segkern.models import (
    Mask2Former,
    Mask2FormerConfig,
    SegFormer,
    SegFormerConfig,
    Segmenter,
    SegmenterConfig,
)
from segkern.nn.position import pixel_centres
from segkern.runtime import cuda_graphs as graphs
from segkern.runtime.constants import recording
from support.cuda import OnDevice, alive


def test_a_replay_captures_each_size_once_and_takes_new_values(stubbed):
    calls = []

    def function(x, y):
        calls.append(x.shape)
        return [x + y, x * y]

    run = graphs.Replay(function, warmup=2)
    for size in (3, 5):
        for i in range(6):
            x = torch.full((size,), float(i)).as_subclass(OnDevice)
            total, product = run(x, x + 1)
            assert torch.equal(total, torch.full((size,), 2.0 * i + 1))
            assert torch.equal(product, torch.full((size,), i * (i + 1.0)))
            total.fill_(7)  # a caller may keep and change what it got
    assert len(stubbed) == 2


def test_a_replay_drops_the_size_that_was_unused_for_longest(stubbed):
    run = graphs.Replay(lambda x: [x + 1], warmup=1, keep=2)
    for size in (1, 1, 2, 2, 1, 3, 3, 1, 2):
        run(torch.zeros(size).as_subclass(OnDevice))
    assert len(stubbed) == 4, "1, 2, 3, and 2 again"


@pytest.mark.parametrize(("keep", "pools"), [(2, 1), (1, 3)])
def test_a_pool_is_shared_and_ends_with_its_last_graph(stubbed, keep, pools):
    run = graphs.Replay(lambda x: [x + 1], warmup=1, keep=keep)
    for size in (1, 1, 2, 2, 3, 3):
        run(torch.zeros(size).as_subclass(OnDevice))
    assert len({graph.pool for graph in stubbed}) == pools


def test_work_that_cannot_be_captured_says_so(stubbed, monkeypatch):
    def fails(x):
        if stubbed:
            raise RuntimeError("operation not permitted when stream is capturing")
        return x + 1

    run = graphs.Replay(fails, warmup=1)
    x = torch.zeros(2, 3).as_subclass(OnDevice)
    run(x)
    with pytest.raises(
        RuntimeError, match=r"work on \[\[2, 3\]\] cannot be captured .* not permi"
    ):
        run(x)


def test_a_replay_runs_the_function_on_a_cpu():
    run = graphs.Replay(lambda x: {"a": (x + 1, [x])}, warmup=1)
    for _ in range(4):
        assert torch.equal(run(torch.zeros(2))["a"][0], torch.ones(2))


@pytest.mark.parametrize("option", ["warmup", "keep"])
def test_replay_options(option):
    with pytest.raises(ValueError, match=r"warmup and keep must be >= 1, got .*0"):
        graphs.Replay(print, **{option: 0})


def mask2former():
    torch.manual_seed(0)
    config = Mask2FormerConfig.tiny(4)
    config.shortest_edge, config.longest_edge = 32, 96
    return Mask2Former(config).eval()


def segmenter():
    torch.manual_seed(0)
    sizes = {"image_size": (32, 32), "window_size": 32, "window_stride": 32, "shortest_edge": 32}
    config = SegmenterConfig(4, patch_size=8, embed_dim=64, depth=1, num_heads=1, **sizes)
    return Segmenter(config).eval()


def segformer():
    torch.manual_seed(0)
    config = replace(SegFormerConfig.tiny(4), shortest_edge=32, longest_edge=96)
    return SegFormer(config).eval()


MODELS = {"mask2former": mask2former, "segmenter": segmenter, "segformer": segformer}


def picture(seed=0, size=(32, 32)):
    return np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)


def scores(model, image, **options):
    found = segkern.segment(model, image, "semantic", return_scores=True, **options)
    return found.scores


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("kind", MODELS)
def test_segment_replays_the_third_picture_of_a_size(kind, mode, everywhere):
    model = MODELS[kind]().train(mode)
    wanted = [scores(model, picture(i), cuda_graphs=False) for i in range(5)]
    assert not torch.allclose(wanted[0], wanted[4])
    for i, want in enumerate(wanted):
        torch.testing.assert_close(scores(model, picture(i)), want, rtol=0, atol=0)
        assert len(everywhere) == (i >= 2)
    wide = picture(1, (32, 64))
    torch.testing.assert_close(scores(model, wide), scores(model, wide, cuda_graphs=False))


def test_evaluate_replays(everywhere):
    from segkern.data import Digits, DigitsConfig
    from segkern.evaluation.evaluate import evaluate

    model = Mask2Former(Mask2FormerConfig.tiny(11)).eval()
    data = Digits(DigitsConfig((32, 32)), "test")
    options = {"limit": 5, "batch_size": 1, "progress": False}
    value = evaluate(model, data, **options)
    assert len(everywhere) == 1
    eager = evaluate(model, data, **options, cuda_graphs=False)
    assert len(everywhere) == 1
    assert value["classes"] == eager["classes"]


CHANGES = {  # captures after three pictures before and three after
    "nothing": (lambda m: None, 1),
    "load_state_dict": (lambda m: m.load_state_dict(segmenter_of(1).state_dict()), 1),
    "assigned": (lambda m: m.load_state_dict(segmenter_of(1).state_dict(), assign=True), 2),
    "double": (lambda m: m.double(), 2),
    "a hook": (lambda m: m.encoder.blocks[0].register_forward_hook(lambda *_: None), 1),
    "a head": (lambda m: setattr(m, "decoder", copy.deepcopy(m.decoder)), 2),
}


def segmenter_of(seed):
    model = segmenter()
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.decoder.cls_emb)
    return model


@pytest.mark.parametrize("change", CHANGES)
def test_graphs_follow_the_weights(change, everywhere):
    model = segmenter()
    for i in range(3):
        scores(model, picture(i))
    apply, captures = CHANGES[change]
    apply(model)
    for i in range(3):
        found = scores(model, picture(i))
    assert len(everywhere) == captures
    want = scores(copy.deepcopy(model), picture(2), cuda_graphs=False)
    torch.testing.assert_close(found, want)


def test_autocast_is_captured_apart(everywhere):
    model = segmenter()
    for _ in range(3):
        plain = scores(model, picture())
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            half = scores(model, picture())
    assert len(everywhere) == 2
    assert torch.equal(scores(model, picture()), plain)
    assert not torch.equal(half, plain)
    assert len(everywhere) == 2


def patch_logits(model, side, enabled=True):
    with torch.no_grad():
        x = torch.ones(1, 3, side, 32)
        return graphs.replayed(Segmenter.patch_logits, model, x, enabled=enabled)


def test_ever_new_sizes_stay_eager_and_few_are_kept(everywhere):
    model = segmenter()
    for side in [*range(8, 8 * 20, 8)] * 3:  # each comes back after 18 others
        patch_logits(model, side)
    assert everywhere == []
    for side in [8 * i for i in range(1, 7) for _ in range(4)]:
        patch_logits(model, side)
    assert len(everywhere) == 6
    kept = alive(everywhere)
    assert kept() == 4
    patch_logits(model, 8, enabled=False)
    assert kept() == 0


UNSUITED = {
    "gradients": lambda m, x: graphs.replayed(Segmenter.patch_logits, m, x),
    "many pixels": lambda m, x: no_grad(m, x.expand(100, 3, 32, 32)),
}


def no_grad(model, x):
    with torch.no_grad():
        return graphs.replayed(Segmenter.patch_logits, model, x)


@pytest.mark.parametrize("case", UNSUITED)
def test_what_does_not_suit_runs_eagerly(case, everywhere, monkeypatch):
    monkeypatch.setattr(graphs, "_PIXELS", 2000)
    model = segmenter()
    for _ in range(4):
        UNSUITED[case](model, torch.ones(1, 3, 32, 32))
    assert everywhere == []


def test_a_model_of_any_class_is_captured(everywhere):
    model = segmenter()
    model.__class__ = type("Own", (Segmenter,), {})
    for _ in range(4):
        patch_logits(model, 32)
    assert len(everywhere) == 1


def test_a_capture_that_fails_is_said_once_and_the_model_goes_on(everywhere, monkeypatch):
    def fails(graph, **options):
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(torch.cuda, "graph", fails)
    model = segmenter()
    want = patch_logits(model, 32, enabled=False)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(8):
            assert torch.equal(patch_logits(model, 32), want)
    assert [str(w.message) for w in seen if "without CUDA graphs" in str(w.message)] == [
        "segkern: the model runs without CUDA graphs: Replay: the work on [[1, 3, 32, 32]] cannot "
        "be captured in a CUDA graph; run it eagerly instead (operation not permitted)"
    ]


def test_memory_that_runs_out_frees_the_graphs(everywhere):
    model, ran, kept = segmenter(), [], lambda: 0

    def scarce(model, x):
        if kept():
            raise torch.OutOfMemoryError("CUDA out of memory")
        ran.append(x.shape[2])
        return x + 1

    def run(side):
        with torch.no_grad():
            return graphs.replayed(scarce, model, torch.ones(1, 3, side, 32))

    for _ in range(3):
        run(32)
    kept = alive(everywhere)
    assert kept() == 1
    assert run(64).shape == (1, 3, 64, 32)
    assert ran[-1] == 64
    assert kept() == 0


def test_graphs_live_with_their_model_and_are_no_part_of_it(everywhere):
    model = segmenter()
    names = list(model.state_dict())
    for _ in range(3):
        patch_logits(model, 32)
    kept = alive(everywhere)
    again = pickle.loads(pickle.dumps(model))
    assert list(again.state_dict()) == list(model.state_dict()) == names
    patch_logits(copy.deepcopy(model), 32)
    assert everywhere == [], "a copy begins anew"
    assert kept() == 1
    del model
    assert kept() == 0


def test_a_recording_keeps_what_it_reads_and_leaves_nothing():
    def centres(n):
        return pixel_centres(((n, 1),), torch.device("cpu"), torch.float32)

    known = centres(1001)
    with recording() as read:
        assert centres(1001) is known
        assert centres(1002) is not centres(1002)
    assert len(read) == 1
    assert read[0] is known
    assert centres(1002) is centres(1002)


def test_a_recording_follows_position_embeddings():
    """Resized ones are kept between calls, but not in a graph, which is to follow the weights."""
    encoder = segmenter().encoder
    with torch.no_grad():
        kept = encoder.positions(3, 5)
        assert encoder.positions(3, 5) is kept
        with recording():
            assert encoder.positions(3, 5) is not kept
            assert encoder.positions(2, 7) is not encoder.positions(2, 7)
        assert encoder.positions(3, 5) is kept
