"""Random views of labelled images."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from segkern.data.transforms import SemanticViews, normalised, pictured

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def views(**changes):
    return SemanticViews(
        **({"size": (32, 48), "scale": (40, 160), "mean": MEAN, "std": STD} | changes)
    )


def scene(h=60, w=80):
    """An image whose red tells the label: 10 bands."""
    labels = (torch.arange(w) * 10 // w).expand(h, w).to(torch.uint8)
    image = torch.stack((labels * 20, labels * 0 + 7, labels * 0 + 100), 2)
    return image, labels


def test_views_have_the_size_and_keep_pixels_and_labels_together():
    make = views(ratios=(0.9, 1.3))
    make.colours = lambda pixels, generator: pixels
    for _ in range(20):
        view = make(*scene())
        assert view["pixel_values"].shape == (3, 32, 48)
        assert view["semantic"].shape == (32, 48)
        red = (view["pixel_values"][0] * 0.5 + 0.5) * 255
        known = view["semantic"] != 255
        # antialiasing mixes neighbouring bands, which are 20 apart
        assert (red[known] - 20 * view["semantic"][known].float()).abs().max() <= 20


def test_small_images_are_padded_with_what_does_not_count():
    view = views(ratios=(0.5, 0.5))(*scene())
    assert (view["semantic"][20:] == 255).all()
    assert (view["semantic"][:20, :27] != 255).all()
    assert (view["pixel_values"][:, 20:] == 0).all()


def test_large_ratios_give_larger_objects():
    widths = []
    for ratio in (0.5, 1.0, 2.0):
        make = views(ratios=(ratio, ratio), size=(20, 27))
        widths.append(len(make(*scene())["semantic"][0].unique()))
    assert widths[0] > widths[1] > widths[2]


def test_no_class_fills_the_crop_where_another_crop_is_found():
    image, labels = scene(40, 160)
    labels[:, :110] = 3
    shares = []
    for most in (0.75, 1.0):
        make = views(size=(40, 40), scale=(40, 160), ratios=(1, 1), most=most)
        generator = torch.Generator().manual_seed(0)
        found = [make(image, labels, generator)["semantic"] for _ in range(60)]
        shares.append(sum((x == 3).float().mean() >= 0.75 for x in found) / 60)
    # 10 of the 50 places with two classes or more have too much of one
    assert shares[0] < 0.05
    assert 0.1 < shares[1] < 0.3


def test_both_mirror_images_occur_and_the_generator_decides():
    make = views(size=(40, 53), ratios=(1, 1))
    seen = []
    for _ in range(2):
        torch.manual_seed(5)
        seen.append([make(*scene())["semantic"][0, 0].item() for _ in range(12)])
    assert seen[0] == seen[1]
    assert {0, 9} <= set(seen[0])


def test_a_generator_of_ones_own_decides_alone():
    make, state = views(), torch.get_rng_state()
    first, again, other = (
        make(*scene(), torch.Generator().manual_seed(seed))["pixel_values"] for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_colours_change_a_little_and_never_change_places():
    """Red stays the strongest channel and green the weakest: hue turns by a tenth at most."""
    pixels = torch.tensor([0.7, 0.3, 0.35])[:, None, None].expand(3, 4, 4)
    generator = torch.Generator().manual_seed(0)
    found = torch.stack([views().colours(pixels, generator)[:, 0, 0] for _ in range(200)])
    assert found.min() >= 0
    assert found.max() <= 1
    assert (found.argmax(1) == 0).all()
    same = (found - pixels[:, 0, 0]).abs().amax(1) < 1e-6
    assert 0.02 < same.float().mean() < 0.15  # a sixteenth of the views
    light = found.mean(1)  # from the darkest, a half of 0.45 - 32/255, to the brightest
    assert 0.15 < light.min() < 0.25
    assert 0.65 < light.max() < 0.9


RESIZED = {  # size of the picture, channels, size that it is resized to
    "larger": ((23, 31), 3, (61, 80)),
    "smaller": ((61, 83), 3, (17, 23)),
    "much smaller": ((97, 131), 3, (5, 4)),
    "one side alone": ((40, 30), 3, (40, 77)),
    "as it is": ((30, 40), 3, (30, 40)),
    "grey": ((33, 21), 1, (50, 11)),
    "seven channels": ((33, 21), 7, (20, 50)),
    "a pixel": ((1, 1), 3, (9, 7)),
    "to a pixel": ((13, 9), 3, (1, 1)),
}


@pytest.mark.parametrize("host", ["built", "missing"])
@pytest.mark.parametrize("case", RESIZED)
def test_the_crop_alone_has_the_pixels_of_the_resized_picture(case, host, monkeypatch):
    """To the last bit, at every edge and in the middle, mirrored and not, changed and not."""
    if host == "missing":
        monkeypatch.setattr("segkern.data.transforms._host", None)
    (H, W), C, fitted = RESIZED[case]
    rng = np.random.default_rng(0)
    image = rng.choice(np.uint8([0, 1, 100, 254, 255]), (H, W, C))  # edges overshoot if they can
    whole = F.resize(torch.from_numpy(image).movedim(2, 0), fitted, antialias=True)
    look = (fitted[0] + 3, fitted[1] + 2), [0.4] * C, [0.3] * C
    for mirror in (False, True):
        for y, x in ((0, 0), (fitted[0] // 3, fitted[1] // 2), (fitted[0] - 1, fitted[1] - 1)):
            place = slice(y, y + fitted[0] // 2 + 1), slice(x, x + fitted[1] // 2 + 1)
            part = whole[:, *place].flip(2) if mirror else whole[:, *place]
            found = pictured(image, fitted, place, mirror, *look)
            assert torch.equal(found, normalised(part, look[1], look[2], look[0]))
            found = pictured(image, fitted, place, mirror, *look, lambda pixels: 1 - pixels)
            want = 1 - F.to_dtype(part, torch.float32, scale=True)
            assert torch.equal(found, normalised(want, look[1], look[2], look[0]))


@pytest.mark.parametrize("host", ["built", "missing"])
@pytest.mark.parametrize("change", [None, lambda pixels: pixels], ids=["bytes", "changed"])
def test_what_lies_beside_a_picture_has_the_padding(host, change, monkeypatch):
    if host == "missing":
        monkeypatch.setattr("segkern.data.transforms._host", None)
    whole, look = (slice(0, 5), slice(0, 6)), ((8, 9), [0.4] * 3, [0.3] * 3)
    found = pictured(
        np.zeros((5, 6, 3), np.uint8), (5, 6), whole, False, *look, change, None, (1.0, 2.0, 3.0)
    )
    for channel, value in zip(found, (1.0, 2.0, 3.0)):
        assert (channel[5:] == value).all()
        assert (channel[:, 6:] == value).all()
        assert (channel[:5, :6] < 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (0, 4)}, "size and scale must be >= 1"),
        ({"ratios": (2.0, 0.5)}, r"ratios must be 0 < least <= largest, got \(2.0, 0.5\)"),
        ({"most": 0.0}, r"most must be in \(0, 1\], got 0.0"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        views(**change)
