"""What transformers' OneFormer does otherwise than the paper's code, or refuses, and ours not.

Each test first shows that the reference still has the fault, so that it speaks up when it is gone.
"""

from dataclasses import replace

import pytest
import torch
from test_oneformer_parity import (
    CONTEXT,
    LABELS,
    LEARNED,
    NAMES,
    QUERIES,
    Reference,
    error,
    generator,
    images,
    in_float64,
    noisy_reference,
    task_rows,
    texts,
    tokens,
    with_causal_text,
)
from transformers import OneFormerImageProcessor, OneFormerProcessor

from segkern.models import OneFormer, OneFormerConfig
from segkern.models.oneformer.prompts import sentences
from segkern.nn.contrastive import ContrastiveLoss
from segkern.structures.targets import TASKS, Targets


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    reference, folder = noisy_reference("small"), tmp_path_factory.mktemp("faults")
    reference.save_pretrained(folder)
    return reference.double(), OneFormer.from_pretrained(folder).double()


@torch.no_grad()
def test_a_texts_are_read_causally(pair, monkeypatch):
    reference, ours = pair
    said = texts([2, 0], "semantic")[None]
    free = reference.model.text_mapper(said)
    with_causal_text(monkeypatch)
    causal = reference.model.text_mapper(said)
    assert error(free, causal) > 1e-3
    have = ours.text_encoder.queries(ours.text_encoder(said[0])[None])
    assert error(have, causal) < 1e-10
    # so what follows the end of a text does not count
    assert error(ours.text_encoder(said[0][:, :10]), causal[0, :-LEARNED]) < 1e-10


def theirs_of(labels, task):
    """The sentences that transformers makes of a batch of labels."""
    processor = OneFormerImageProcessor(num_text=QUERIES - LEARNED)
    info = {str(k): name for k, name in enumerate(NAMES)}
    processor.metadata = info | {"thing_ids": [0, 1, 2, 6], "class_names": list(NAMES)}
    counts, made = dict.fromkeys(NAMES, 0), []
    for image in labels:  # `encode_inputs` makes the counts once
        label = {"classes": list(torch.tensor(image)), "masks": list(torch.ones(len(image), 2, 2))}
        made.append(getattr(processor, f"get_{task}_annotations")(label, counts)[2])
    return made


def ours_of(ours, labels, task, monkeypatch):
    """Row numbers of the sentences that ours are made of."""
    monkeypatch.setattr(
        ours.text_encoder, "forward", lambda rows: torch.arange(len(rows))[:, None]
    )
    monkeypatch.setattr(ours.text_encoder, "queries", lambda texts: texts)
    rows = torch.tensor([tokens(text) for text in sentences(NAMES)])
    monkeypatch.setitem(ours._buffers, "sentences", rows)
    masks = [torch.ones(len(image), 2, 2) for image in labels]
    targets = Targets.from_lists(masks, [torch.tensor(image) for image in labels])
    task = torch.full((len(labels),), TASKS.index(task))
    return ours.text_queries(targets._replace(task=task))[..., 0].tolist()


def test_b_an_image_has_the_sentences_of_its_own_classes(pair, monkeypatch):
    labels = [[2, 0, 2], [6]]
    said = theirs_of(labels, "semantic")
    assert "a photo with a person" in said[1]  # which the first image shows
    names = sentences(NAMES)
    have = [[names[k] for k in row] for row in ours_of(pair[1], labels, "semantic", monkeypatch)]
    first = [
        "a photo with a person",
        "a photo with a traffic light",
        "a photo with a traffic light",
    ]
    rest = ["a semantic photo"] * 12
    assert have == [(first + rest)[:9], (["a photo with a potted plant"] + rest)[:9]]


def test_c_it_says_a_panoptic_photo(pair, monkeypatch):
    (said,) = theirs_of([[0]], "panoptic")
    assert said[-1] == "an panoptic photo"
    (have,) = ours_of(pair[1], [[0]], "panoptic", monkeypatch)
    assert sentences(NAMES)[have[-1]] == "a panoptic photo"


def test_d_images_of_other_processes_count(pair):
    """As tests/nn/test_contrastive.py shows of ours; the reference compares those of its own."""
    data = torch.randn(2, 4, 3, 5, generator=generator(3))
    criterion, ours = pair[0].criterion, ContrastiveLoss()
    criterion.logit_scale.data.copy_(ours.logit_scale[0])
    whole = ours(*data).item()
    theirs = [criterion.loss_contrastive(*part)["loss_contrastive"] for part in data.split(2, 1)]
    assert abs(sum(theirs).item() / 2 - whole) > 0.1
    joined = criterion.loss_contrastive(*data)["loss_contrastive"].item()
    assert joined == pytest.approx(whole, rel=1e-5)


def test_e_nothing_is_fetched_to_make_a_model_that_trains(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a file or an address was asked for")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", never)
    monkeypatch.setattr("huggingface_hub.snapshot_download", never)
    monkeypatch.setattr("socket.socket.connect", never)
    monkeypatch.setattr("builtins.open", never)
    config = OneFormerConfig.preset("swin_tiny", "cityscapes").with_prompts()
    with torch.device("meta"):
        model = OneFormer(config)
    assert model.sentences.shape == (22, 8)
    for dataset, count in (("coco", 133), ("ade20k", 150), ("cityscapes", 19)):
        config = OneFormerConfig.preset("swin_large", dataset).with_prompts()
        assert len(config.prompts) == count + 3
        assert len(config.labels.names) == count


@torch.no_grad()
def test_f_a_task_is_given_by_its_name(pair, monkeypatch):
    processor = object.__new__(OneFormerProcessor)
    with pytest.raises(ValueError, match="must be semantic, instance, or panoptic"):
        processor(images=[], task_inputs="semantic")  # is looked at letter by letter
    _, ours = pair
    x = images(2, 64, 64)
    want = ours(x, task_rows("semantic", "semantic"))
    for given in ("semantic", ["semantic"] * 2):
        assert torch.equal(ours(x, given).class_queries_logits, want.class_queries_logits)


def test_g_a_tuple_comes_with_labels_too(pair, monkeypatch):
    reference, ours = pair
    in_float64(monkeypatch)
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *a, **k: rand(*a, **k).double())
    x, rows = images(1, 64, 64), task_rows("panoptic")
    labels = {
        "mask_labels": [torch.ones(1, 64, 64).double()],
        "class_labels": [torch.tensor([LABELS - 1])],
        "text_inputs": texts([LABELS - 1], "panoptic")[None],
    }
    with pytest.raises(TypeError):
        reference(x, rows, **labels, return_dict=False)
    loss, *rest = ours(x, rows, **labels, return_dict=False)
    assert loss.shape == ()
    assert rest[0].shape == (1, QUERIES, LABELS + 1)


@torch.no_grad()
def test_evaluation_is_the_same_each_time(pair):
    reference, _ = pair
    config = reference.config.to_dict() | {"dropout": 0.5}
    theirs = Reference(type(reference.config)(**config)).eval()
    said = torch.zeros(1, QUERIES - LEARNED, CONTEXT, dtype=torch.int64)
    x, rows = images(1, 64, 64).float(), task_rows("panoptic")
    twice = [theirs(x, rows, said).class_queries_logits for _ in range(2)]
    assert error(*twice) > 1e-4  # its pixel decoder drops in evaluation where is_training is set
    ours = OneFormer(replace(OneFormerConfig.tiny(3), dropout=0.5)).eval()
    twice = [ours(x, "panoptic").class_queries_logits for _ in range(2)]
    assert torch.equal(*twice)
