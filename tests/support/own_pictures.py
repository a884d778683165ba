"""A small set of one's own: shapes drawn on cuts of two photographs, in COCO's format."""

import json

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as coco
from sklearn.datasets import load_sample_image

from support.pictures import id_pixels, write

SIDE = 96
SHAPES = ("disc", "box", "triangle")  # categories 1, 2, 3
COLOURS = ((190, 20, 20), (20, 190, 20), (30, 30, 190))  # at least, of each shape
PHOTOS = ("china.jpg", "flower.jpg")  # categories 11, 12, which have no instances
COUNTS = {"train": 48, "val": 12}


def write_shapes(root, task):
    """Pictures of both splits and their annotation files.

    Args:
        root: folder to write to.
        task: "instance" or "panoptic".
    """
    rng = np.random.default_rng(0)
    photos = [load_sample_image(name) for name in PHOTOS]
    for split, count in COUNTS.items():
        images, annotations = [], []
        for i in range(count):
            photo = int(rng.integers(2))
            pixels, ids, shapes = _scene(photos[photo], rng)
            write(root / split / f"{i}.png", pixels)
            images.append({"id": i, "file_name": f"{i}.png", "height": SIDE, "width": SIDE})
            if task == "panoptic":
                name = root / f"annotations/panoptic_{split}" / f"{i}.png"
                write(name, id_pixels(ids + 1))
                kinds = [photo + 11, *shapes]
                segments = [{"id": n + 1, "category_id": k} for n, k in enumerate(kinds)]
                row = {"image_id": i, "file_name": name.name, "segments_info": segments}
                annotations.append(row)
                continue
            for n, shape in enumerate(shapes):
                code = coco.encode(np.asfortranarray(ids == n + 1, np.uint8))
                code = code | {"counts": code["counts"].decode()}
                row = {"id": len(annotations) + 1, "image_id": i, "category_id": shape}
                annotations.append(row | {"segmentation": code, "iscrowd": 0})
        kinds = [(i + 1, name, 1) for i, name in enumerate(SHAPES)]
        if task == "panoptic":
            kinds += [(i + 11, name.removesuffix(".jpg"), 0) for i, name in enumerate(PHOTOS)]
        categories = [{"id": i, "name": name, "isthing": thing} for i, name, thing in kinds]
        prefix = "panoptic" if task == "panoptic" else "instances"
        path = root / f"annotations/{prefix}_{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"images": images, "annotations": annotations, "categories": categories}
        path.write_text(json.dumps(content))


def _scene(photo, rng):
    """Pixels [SIDE, SIDE, 3], the number of the shape of each (0: none), and their categories."""
    y, x = (int(rng.integers(n - 2 * SIDE)) for n in photo.shape[:2])
    cut = Image.fromarray(photo[y : y + 2 * SIDE, x : x + 2 * SIDE]).resize((SIDE, SIDE))
    ids = Image.new("L", cut.size)
    shapes = []
    corners = [(a, b) for a in (0, SIDE // 2) for b in (0, SIDE // 2)]
    for place in rng.permutation(4)[: rng.integers(2, 5)]:
        shape = int(rng.integers(1, 4))
        shapes.append(shape)
        side = int(rng.integers(30, 43))
        x, y = (int(a + rng.integers(4, SIDE // 2 + 4 - side)) for a in corners[place])
        colour = tuple(int(c + rng.integers(60)) for c in COLOURS[shape - 1])
        for picture, fill in ((cut, colour), (ids, len(shapes))):
            draw = ImageDraw.Draw(picture)
            if shape == 1:
                draw.ellipse((x, y, x + side, y + side), fill)
            elif shape == 2:
                draw.rectangle((x, y, x + side, y + side), fill)
            else:
                draw.polygon([(x, y + side), (x + side / 2, y), (x + side, y + side)], fill)
    return np.asarray(cut), np.asarray(ids).astype(int), shapes
