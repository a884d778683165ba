"""Labels, and what is known of data sets: names of their classes, which are stuff, their sizes.

The one place for such facts: data formats, presets, recipes and checkpoint formats take them
from here.
"""

from typing import NamedTuple

VOID = 255  # in a map of labels: the pixel does not count
WIDE_VOID = 65535  # the same in maps of 16 bits, which more than 255 classes need
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


def void_of(classes: int) -> int:
    """What stands for pixels that do not count in maps of so many classes."""
    return VOID if classes <= VOID else WIDE_VOID


def void_in(values) -> int:
    """The same of an array or tensor of labels: 65535 where it is uint16, else 255."""
    return WIDE_VOID if str(values.dtype).endswith("uint16") else VOID


class Facts(NamedTuple):
    """Of a data set.

    Attributes:
        labels: number of classes by task.
        images: of the training split.
        stuff: labels of the panoptic task that have no instances; () where they are not listed.
        things: labels of the panoptic task that are those of the instance task, in its order.
        edges: pixels, to which models of the paper's code resize the short side, and the most
            that the long side gets.
    """

    labels: dict[str, int]
    images: int
    stuff: tuple[int, ...] = ()
    things: tuple[int, ...] = ()
    edges: tuple[int, int] | None = None


# of ADE20K's 150 classes those of its instance challenge, in the order of both
_THINGS = """
    8 9 11 13 15 16 19 20 21 23 24 25 28 31 32 33 34 36 37 38 39 40 42 43 44 45 46 48 50 51 54
    56 57 58 59 63 65 66 67 68 70 71 72 73 74 75 76 77 79 81 82 83 84 86 87 88 89 90 91 93 94
    96 98 99 103 104 105 108 109 111 112 113 116 117 119 120 121 122 124 125 126 127 128 130
    131 133 134 135 136 137 138 139 140 143 144 145 147 148 149 150
"""
_ADE20K_THINGS = tuple(int(i) - 1 for i in _THINGS.split())
DATASETS = {
    "coco": Facts(
        {"panoptic": 133, "instance": 80}, 118_287, tuple(range(80, 133)), edges=(800, 1333)
    ),
    "ade20k": Facts(
        {"panoptic": 150, "instance": 100, "semantic": 150},
        20_210,
        tuple(k for k in range(150) if k not in _ADE20K_THINGS),
        _ADE20K_THINGS,
        edges=(512, 2048),
    ),
    "cityscapes": Facts(
        {"panoptic": 19, "instance": 8, "semantic": 19},
        2_975,
        tuple(range(11)),
        tuple(range(11, 19)),
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
# ids of Cityscapes' other labels, which do not count; what has none (-1) is not drawn
CITYSCAPES_VOID = {
    "unlabeled": 0,
    "ego vehicle": 1,
    "rectification border": 2,
    "out of roi": 3,
    "static": 4,
    "dynamic": 5,
    "ground": 6,
    "parking": 9,
    "rail track": 10,
    "guard rail": 14,
    "bridge": 15,
    "tunnel": 16,
    "polegroup": 18,
    "caravan": 29,
    "trailer": 30,
    "license plate": -1,
}
# the first of each class's synonyms, in the order of the values from 1 on
_NAMES = """
    wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk,
    person, earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf,
    house, sea, mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub,
    railing, cushion, base, box, column, signboard, chest of drawers, counter, sand, sink,
    skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table,
    pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower,
    book, hill, bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar,
    arcade machine, hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth,
    television receiver, airplane, dirt track, apparel, pole, land, bannister, escalator, ottoman,
    bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything,
    swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food,
    step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket,
    sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate,
    monitor, bulletin board, shower, radiator, glass, clock, flag
"""
ADE20K = [name.strip() for name in _NAMES.split(",")]
# of COCO's panoptic task, things before stuff, each in the order of their ids
_NAMES = """
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
    fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant,
    bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard,
    sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle,
    wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
    hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock,
    vase, scissors, teddy bear, hair drier, toothbrush,
    banner, blanket, bridge, cardboard, counter, curtain, door-stuff, floor-wood, flower, fruit,
    gravel, house, light, mirror-stuff, net, pillow, platform, playingfield, railroad, river, road,
    roof, sand, sea, shelf, snow, stairs, tent, towel, wall-brick, wall-stone, wall-tile,
    wall-wood, water-other, window-blind, window-other, tree-merged, fence-merged, ceiling-merged,
    sky-other-merged, cabinet-merged, table-merged, floor-other-merged, pavement-merged,
    mountain-merged, grass-merged, dirt-merged, paper-merged, food-other-merged,
    building-other-merged, rock-merged, wall-other-merged, rug-merged
"""
COCO = [name.strip() for name in _NAMES.split(",")]
CLASS_NAMES = {"coco": COCO, "ade20k": ADE20K, "cityscapes": list(CITYSCAPES)}  # panoptic
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

# of the 459 classes of the original's maps those of the 60, in their order; 0 and all others are
# background
_IDS = """
    0 2 9 18 19 22 23 25 31 33 34 44 45 46 59 65 68 72 80 85 98 104 105 113 115 144 158 159 162 187
    189 207 220 232 258 259 260 284 295 296 308 324 326 347 349 354 355 360 366 368 397 415 416 420
    424 427 440 445 454 458
"""
PASCAL_CONTEXT_IDS = tuple(map(int, _IDS.split()))


def known_stuff(names: dict[int, str]) -> tuple[int, ...]:
    """Labels without instances of a published list of labels, known by its order; else ()."""
    coco, cityscapes, ade20k = (DATASETS[name] for name in ("coco", "cityscapes", "ade20k"))
    if len(names) == coco.labels["panoptic"] and names[79] == "toothbrush":
        return coco.stuff if names[80].startswith("banner") else ()
    if len(names) == cityscapes.labels["panoptic"] and names[0] == "road":
        return cityscapes.stuff if names[11] == "person" else ()
    if len(names) == ade20k.labels["panoptic"] and (names[0], names[149]) == ("wall", "flag"):
        return ade20k.stuff
    return ()
