"""A data set of one's own: forms of its items, views, training on it, faults by item."""

import numpy as np
import pytest
import torch
from PIL import Image

from segkern.data import InstanceViews, ViewConfig, Wrapped, collate
from segkern.models import Mask2Former, Mask2FormerConfig
from support.pictures import noise, rectangle

DENSE = np.stack([rectangle(2, 3, 20, 9), rectangle(10, 5, 25, 20)])
LABELS = np.array([1, 0])


class Own(torch.utils.data.Dataset):
    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


ITEMS = {
    "arrays": (noise(0), DENSE, LABELS),
    "tensors": (
        torch.from_numpy(noise(0)).movedim(2, 0),
        torch.from_numpy(DENSE).bool(),
        torch.from_numpy(LABELS),
    ),
    "PIL and lists": (Image.fromarray(noise(0)), [DENSE[0] * 255.0, DENSE[1]], [1, 0]),
    "torchvision": (
        torch.from_numpy(noise(0)).movedim(2, 0) / 255,
        {"masks": torch.from_numpy(DENSE), "labels": torch.from_numpy(LABELS), "boxes": None},
    ),
}


@pytest.mark.parametrize("case", ITEMS)
def test_items(case, recwarn):
    data = Wrapped(Own(ITEMS[case]), ["a", "b"])
    sample = data[0]
    assert np.array_equal(sample["image"], noise(0))
    assert np.array_equal(np.asarray(sample["masks"]), DENSE)
    assert sample["labels"].tolist() == [1, 0]
    assert (len(data), data.classes, data.things, data.passes) == (1, ["a", "b"], (0, 1), False)
    assert not recwarn


def test_items_without_an_object_are_background():
    sample = Wrapped(Own((noise(0), np.zeros((0, 30, 40)), [])), ["a"])[0]
    assert sample["masks"].shape == (0, 30, 40)


def test_a_model_trains_on_it():
    views = InstanceViews(ViewConfig((32, 32)), (0.5,) * 3, (0.5,) * 3)
    data = Wrapped(Own(*[ITEMS["arrays"]] * 2), ["a", "b"], views=views)
    batch = collate([data[0, 0], data[1, 3]], 2)
    loss, _ = Mask2Former(Mask2FormerConfig.tiny(2)).loss(batch.pixel_values, batch.targets)
    assert loss.isfinite()
    with pytest.raises(ValueError, match="samples must have pixel_values, got those of sample 0"):
        collate([Wrapped(Own(ITEMS["arrays"]), "ab")[0]], 2)


FAULTS = {
    "sizes": ((noise(0), DENSE[:, :5], LABELS), r"masks must be \[n, 30, 40\], got \[2, 5, 40\]"),
    "number": ((noise(0), DENSE, [1]), r"labels must be 2 integers, one a mask, got \[1\]"),
    "floats": ((noise(0), DENSE, [1.0, 0.0]), r"labels must be 2 integers, .* float64"),
    "from 1": ((noise(0), DENSE, [1, 2]), r"must be in \[0, 2\), got 2 \(labels count from 0\)"),
    "negative": ((noise(0), DENSE, [-1, 0]), r"labels must be in \[0, 2\), got -1"),
    "image": (("none.png", DENSE, LABELS), "none.png: no such file"),
    "kind": ((3, DENSE, LABELS), "must be a path, PIL image, array or tensor, got int"),
    "item": (noise(0), r"must be \(image, masks, labels\), got ndarray"),
    "empty mask": ((noise(0), DENSE * 0, LABELS), "2 masks without a pixel are left out"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults(case):
    item, message = FAULTS[case]
    with pytest.warns(UserWarning, match=message):
        sample = Wrapped(Own(item, ITEMS["arrays"]), ["a", "b"])[0]
    assert len(sample["labels"]) == (0 if case == "empty mask" else 2)
    if case != "empty mask":
        with (
            pytest.warns(UserWarning, match=message),
            pytest.raises(ValueError, match="no picture is left"),
        ):
            Wrapped(Own(item), ["a", "b"])[0]


def test_nothing_to_wrap():
    with pytest.raises(ValueError, match="must not be empty, got 0 items and 1 names"):
        Wrapped(Own(), ["a"])


def test_findings_are_told_once_and_not_without_end(recwarn):
    data = Wrapped(Own(*[(noise(0), DENSE * 0, LABELS)] * 50), ["a", "b"])
    for _ in range(2):
        assert all(len(data[i]["labels"]) == 0 for i in range(50))
    told = [str(w.message) for w in recwarn]
    assert len(told) == len(set(told)) == 20
    assert told[-1].endswith("further findings are not told")
