"""Random views of labelled images."""

import pytest
import torch

from segkern.data.transforms import SemanticViews

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
    make.colours = torch.nn.Identity()
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
        found = [make(image, labels)["semantic"] for _ in range(60)]
        shares.append(sum((x == 3).float().mean() >= 0.75 for x in found) / 60)
    assert shares[0] < 0.2 < shares[1]


def test_both_mirror_images_occur_and_the_generator_decides():
    make = views(size=(40, 53), ratios=(1, 1))
    seen = []
    for _ in range(2):
        torch.manual_seed(5)
        seen.append([make(*scene())["semantic"][0, 0].item() for _ in range(12)])
    assert seen[0] == seen[1]
    assert {0, 9} <= set(seen[0])


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
