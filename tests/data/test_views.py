"""Views of pictures with segments: against torchvision's own resize and crop; seeds; drops."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as F

from segkern.data import IdMaps, InstanceViews, Pictures, ViewConfig, collate
from segkern.data.pictures import Truth
from support.pictures import noise, rectangle, write

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
DENSE = np.stack([rectangle(2, 3, 20, 9), rectangle(10, 5, 25, 20), rectangle(0, 29, 1, 1)])


def sample():
    semantic = np.full((30, 40), 255, np.uint8)
    for label, mask in enumerate(DENSE):
        semantic[mask > 0] = label
    return {
        "image": noise(0),
        "masks": IdMaps.of_arrays(DENSE, (30, 40)),
        "labels": np.arange(3),
        "crowd": np.array([False, True, False]),
        "semantic": semantic,
        "id": 5,
        "path": "a.png",
    }


def view(seed=0, mean=MEAN, std=STD, **settings):
    settings = {"size": (24, 32), "flip": 0.0} | settings
    make = InstanceViews(ViewConfig(**settings), mean, std)
    return make(sample(), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("ratio", [0.3, 0.8, 1.0, 1.7])
def test_a_view_is_that_of_dense_masks(ratio, flip):
    found = view(ratios=(ratio, ratio), flip=flip)
    generator = torch.Generator().manual_seed(0)
    torch.rand((), generator=generator)  # the ratio
    size = [round(n * ratio * 0.8) for n in (30, 40)]
    y, x = (
        int(torch.randint(max(n - m, 0) + 1, (), generator=generator))
        for n, m in zip(size, (24, 32))
    )
    h, w = min(size[0], 24), min(size[1], 32)

    def cropped(t, mode, **more):
        t = F.crop(F.resize(t, size, mode, **more), y, x, h, w)
        return F.horizontal_flip(t) if flip else t

    nearest, linear = F.InterpolationMode.NEAREST_EXACT, F.InterpolationMode.BILINEAR
    pixels = cropped(torch.from_numpy(noise(0)).movedim(2, 0), linear, antialias=True)
    pixels = F.normalize(pixels.float() / 255, list(MEAN), list(STD))
    assert found["pixel_values"].shape == (3, 24, 32)
    assert torch.allclose(found["pixel_values"][:, :h, :w], pixels, atol=1e-6)
    assert not found["pixel_values"][:, h:].any()
    assert not found["pixel_values"][:, :, w:].any()
    masks = cropped(torch.from_numpy(DENSE), nearest)
    seen = masks.bool().flatten(1).any(1)
    want = torch.zeros(int(seen.sum()), 24, 32, dtype=torch.uint8)
    want[:, :h, :w] = masks[seen]
    assert np.array_equal(np.asarray(found["masks"]), want.numpy())
    assert found["labels"].tolist() == np.arange(3)[seen.numpy()].tolist()
    assert found["crowd"].tolist() == np.array([False, True, False])[seen.numpy()].tolist()
    assert found["dropped"] == int((~seen).sum())
    semantic = cropped(torch.from_numpy(sample()["semantic"])[None], nearest)[0]
    assert np.array_equal(found["semantic"][:h, :w], semantic)
    assert (found["semantic"][h:] == 255).all()
    assert (found["semantic"][:, w:] == 255).all()
    assert "image" not in found
    assert (found["id"], found["path"]) == (5, "a.png")


def test_jitter_reaches_from_a_tenth_to_twice_the_size():
    sides = []
    for seed in range(200):
        found = view(seed, ratios=(0.1, 2.0))
        filled = (found["pixel_values"] != 0).any(0).any(1).sum().item()
        sides.append(filled / 24)
    assert 0.08 < min(sides) < 0.2
    assert max(sides) == 1
    assert 0.4 < np.mean(np.array(sides) == 1) < 0.65  # ratio 1 to 2 is 10 of 19


def test_short_sides_are_chosen_and_long_sides_kept_in_bounds():
    settings = {"size": (99, 99), "short_sides": (9, 15), "long_side": 16}
    filled = [(view(s, **settings)["pixel_values"] != 0).any(0).nonzero() for s in range(20)]
    assert {tuple((x.amax(0) + 1).tolist()) for x in filled} == {(9, 12), (12, 16)}


def test_flips_and_colours_come_as_often_as_asked():
    plain, mirrored = view(ratios=(0.7, 0.7)), view(ratios=(0.7, 0.7), flip=1.0)
    drawn = [view(s, ratios=(0.7, 0.7), flip=0.5)["pixel_values"] for s in range(60)]
    both = [sum(torch.equal(x, y["pixel_values"]) for x in drawn) for y in (plain, mirrored)]
    assert sum(both) == 60
    assert 18 < both[0] < 42
    coloured = [view(s, ratios=(0.7, 0.7), colours=True)["pixel_values"] for s in range(20)]
    assert sum(torch.equal(x, plain["pixel_values"]) for x in coloured) < 8
    assert all(np.array_equal(x["masks"].maps, plain["masks"].maps) for x in [plain])


def test_no_class_fills_a_view_where_another_crop_is_found():
    """Of a picture of 160 columns 110 are of one class; crops are 40 wide."""
    semantic = np.repeat(np.uint8([0, 1, 2]), [110, 30, 20])[None].repeat(40, 0)
    semantic[:5] = 255  # what does not count is no share
    whole = {
        "image": noise(0, (40, 160)),
        "masks": IdMaps.of_map(semantic, [0, 1, 2]),
        "labels": np.arange(3),
        "crowd": np.zeros(3, bool),
        "semantic": semantic,
    }
    filled, dropped = [], 0
    for most in (0.75, 1.0):
        config = ViewConfig((40, 40), short_sides=(40,), most=most)
        make = InstanceViews(config, MEAN, STD)
        views = [make(whole, torch.Generator().manual_seed(seed)) for seed in range(60)]
        counts = [np.bincount(v["semantic"].ravel(), minlength=256)[:255] for v in views]
        filled.append(np.mean([max(c) >= 0.75 * sum(c) for c in counts]))
        # what a crop does not show is left out, and counted
        assert all(len(v["labels"]) + v["dropped"] == 3 for v in views)
        assert all({*v["labels"]} == {*np.flatnonzero(c)} for v, c in zip(views, counts))
        dropped += sum(v["dropped"] for v in views)
    assert filled[0] < 0.1
    assert 0.5 < filled[1] < 0.95
    assert dropped > 0


class Fixed:
    """Three masks on every picture."""

    def __call__(self, index, size):
        return Truth(IdMaps.of_arrays(DENSE, (30, 40)), np.arange(3), np.zeros(3, bool), [])


def test_views_depend_on_seed_sample_and_pass_and_not_on_workers(tmp_path):
    paths = [write(tmp_path / f"{i}.png", noise(i)) for i in range(4)]
    make = InstanceViews(ViewConfig((24, 32), colours=True), MEAN, STD)
    data = Pictures(paths, Fixed(), "abc", views=make, seed=3)
    order = [[(0, 0), (1, 0)], [(2, 0), (3, 0)], [(0, 1), (1, 1)]]
    batches = [
        list(DataLoader(data, batch_sampler=order, collate_fn=collate, num_workers=n))
        for n in (0, 2)
    ]
    for one, other in zip(*batches):
        assert torch.equal(one.pixel_values, other.pixel_values)
        assert all(torch.equal(x, y) for x, y in zip(one.targets[:4], other.targets[:4]))
    assert not torch.equal(batches[0][0].pixel_values, batches[0][2].pixel_values)  # two passes
    again = Pictures(paths, Fixed(), "abc", views=make, seed=4)
    assert not torch.equal(data[0]["pixel_values"], again[0]["pixel_values"])


@pytest.mark.parametrize("divisor", [8, 7])
def test_views_of_a_batch_lie_in_one_array(divisor, tmp_path):
    paths = [write(tmp_path / f"{i}.png", noise(i)) for i in range(3)]
    make = InstanceViews(ViewConfig((24, 32)), MEAN, STD)
    data, places = Pictures(paths, Fixed(), "abc", views=make), [(2, 1), (0, 1), (1, 2)]
    alone = collate([data[place] for place in places], divisor=divisor).pixel_values
    samples = data.__getitems__(places)
    found = collate(samples, divisor=divisor).pixel_values
    assert torch.equal(found, alone)
    there = found.data_ptr() == samples[0]["pixel_values"].data_ptr()
    assert there == (divisor == 8)  # 24 x 32 needs no padding then
    assert torch.equal(collate(samples[::-1], divisor=divisor).pixel_values, alone.flip(0))
    assert torch.equal(collate(samples[::2], divisor=divisor).pixel_values, alone[::2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": (0, 4)}, "size, short_sides and long_side must be >= 1"),
        ({"short_sides": (0,)}, "size, short_sides and long_side must be >= 1"),
        ({"ratios": (2.0, 0.5)}, r"ratios must be 0 < least <= largest, got \(2.0, 0.5\)"),
        ({"most": 0.0}, r"most must be in \(0, 1\], got 0.0"),
        ({"flip": 1.5}, r"flip must be in \[0, 1\], got 1.5"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ViewConfig(**settings)
