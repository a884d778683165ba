"""Labels, and what is known of data sets: names of their classes, which are stuff, their sizes.

The one place for such facts: data formats, presets, recipes and checkpoint formats take them
from here.
"""

from typing import NamedTuple

VOID = 255  # in a map of labels: the pixel does not count
# of ImageNet's pixels in [0, 1], red, green, blue: what most backbones are trained on
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Labels(NamedTuple):
    """The labels of a model or a data set.

    Attributes:
        names: by label; None where nobody has named them.
        stuff: labels that have no instances.
    """

    names: dict[int, str] | None = None
    stuff: tuple[int, ...] = ()


class Facts(NamedTuple):
    """Of a data set.

    Attributes:
        labels: number of classes by task.
        images: of the training split.
        stuff: labels of the panoptic task that have no instances; () where they are not listed.
        edges: pixels, to which models of the paper's code resize the short side, and the most
            that the long side gets.
    """

    labels: dict[str, int]
    images: int
    stuff: tuple[int, ...] = ()
    edges: tuple[int, int] | None = None


DATASETS = {
    "coco": Facts(
        {"panoptic": 133, "instance": 80}, 118_287, tuple(range(80, 133)), edges=(800, 1333)
    ),
    "ade20k": Facts(
        {"panoptic": 150, "instance": 100, "semantic": 150}, 20_210, edges=(512, 2048)
    ),
    "cityscapes": Facts(
        {"panoptic": 19, "instance": 8, "semantic": 19},
        2_975,
        tuple(range(11)),
        edges=(1024, 2048),
    ),
    "pascal_context": Facts({"semantic": 60}, 4_996),
}
# names and ids of Cityscapes' 19 classes in the order of their train ids
CITYSCAPES = {
    "road": 7,
    "sidewalk": 8,
    "building": 11,
    "wall": 12,
    "fence": 13,
    "pole": 17,
    "traffic light": 19,
    "traffic sign": 20,
    "vegetation": 21,
    "terrain": 22,
    "sky": 23,
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
}
# in the order of the values: the converter's, alphabetical; Segmenter's code lists other names
PASCAL_CONTEXT = [
    "background",
    "aeroplane",
    "bag",
    "bed",
    "bedclothes",
    "bench",
    "bicycle",
    "bird",
    "boat",
    "book",
    "bottle",
    "building",
    "bus",
    "cabinet",
    "car",
    "cat",
    "ceiling",
    "chair",
    "cloth",
    "computer",
    "cow",
    "cup",
    "curtain",
    "dog",
    "door",
    "fence",
    "floor",
    "flower",
    "food",
    "grass",
    "ground",
    "horse",
    "keyboard",
    "light",
    "motorbike",
    "mountain",
    "mouse",
    "person",
    "plate",
    "platform",
    "pottedplant",
    "road",
    "rock",
    "sheep",
    "shelves",
    "sidewalk",
    "sign",
    "sky",
    "snow",
    "sofa",
    "table",
    "track",
    "train",
    "tree",
    "truck",
    "tvmonitor",
    "wall",
    "water",
    "window",
    "wood",
]


def known_stuff(names: dict[int, str]) -> tuple[int, ...]:
    """Labels without instances of a published list of labels, known by its order; else ()."""
    coco, cityscapes = DATASETS["coco"], DATASETS["cityscapes"]
    if len(names) == coco.labels["panoptic"] and names[79] == "toothbrush":
        return coco.stuff if names[80].startswith("banner") else ()
    if len(names) == cityscapes.labels["panoptic"] and names[0] == "road":
        return cityscapes.stuff if names[11] == "person" else ()
    return ()
