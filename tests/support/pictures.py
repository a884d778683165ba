"""Small sets of pictures with segments, written by others' tools, for tests of data formats."""

import base64
import io
import json

import numpy as np
import yaml
from PIL import Image
from pycocotools import mask as coco

SIZE = 30, 40
CATEGORIES = [
    {"id": 90, "name": "ring", "supercategory": "shapes", "isthing": 1},
    {"id": 3, "name": "box", "supercategory": "shapes", "isthing": 1},
    {"id": 0, "name": "ground", "supercategory": "stuff", "isthing": 0},
]


def write(path, pixels):
    """A picture, with the folders that it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def noise(seed, size=SIZE):
    """Pixels [H, W, 3] uint8."""
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def box(x, y, w, h):
    """A rectangle as one polygon of COCO."""
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def rectangle(x, y, w, h, size=SIZE):
    """A rectangle as a mask [H, W] uint8."""
    mask = np.zeros(size, np.uint8)
    mask[y : y + h, x : x + w] = 1
    return mask


def uncompressed(mask):
    """A mask as COCO's uncompressed run lengths."""
    flat = mask.ravel("F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    first = [0, 0] if flat[0] else [0]
    counts = np.diff([*first, *edges.tolist(), flat.size]).tolist()
    return {"size": list(mask.shape), "counts": counts}


def compressed(mask):
    """A mask as pycocotools writes it, its counts as text."""
    code = coco.encode(np.asfortranarray(mask))
    return {"size": list(map(int, code["size"])), "counts": code["counts"].decode()}


def annotation(i, image, category, segmentation, **more):
    return {
        "id": i,
        "image_id": image,
        "category_id": category,
        "segmentation": segmentation,
        "iscrowd": 0,
        "area": 1.0,
        "bbox": [0, 0, 1, 1],
    } | more


def instance_rows():
    """Annotations of pictures 7 and 9: overlapping, in every form, and a crowd."""
    return [
        annotation(1, 7, 90, [[5.5, 4.2, 20.1, 6.0, 12.3, 25.7], *box(25, 3, 6, 6)]),
        annotation(2, 9, 3, uncompressed(rectangle(2, 3, 20, 9))),
        annotation(3, 7, 3, compressed(rectangle(8, 8, 12, 12))),
        annotation(4, 7, 90, uncompressed(rectangle(0, 0, 40, 3)), iscrowd=1),
        annotation(5, 7, 90, box(10, 10, 4, 4)),
    ]


def image_rows(names=((7, "a.png"), (9, "b.png"), (11, "none.png"))):
    H, W = SIZE
    return [{"id": i, "file_name": name, "height": H, "width": W} for i, name in names]


def write_coco(
    root,
    annotations=None,
    images=None,
    categories=CATEGORIES,
    name="train",
    file="annotations/instances_{}2017.json",
    folder="{}2017",
):
    """A COCO instance file of a split and its pictures."""
    images = image_rows() if images is None else images
    for seed, row in enumerate(images):
        write(root / folder.format(name) / row["file_name"], noise(seed))
    path = root / file.format(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = instance_rows() if annotations is None else annotations
    content = {"images": images, "annotations": rows, "categories": categories}
    path.write_text(json.dumps(content))
    return path


def id_pixels(values):
    """[H, W] integers as the colours of COCO's panoptic PNGs."""
    return np.stack([values % 256, values // 256 % 256, values // 65536], -1).astype(np.uint8)


def panoptic_values():
    """Ids of a picture: void, ground, two boxes and a crowd of rings."""
    values = np.full(SIZE, 70_000)
    values[:4], values[5:9, 5:9], values[12:20, 5:30], values[25:] = 0, 256, 5, 16_777_215
    return values


SEGMENTS = [
    {"id": 70_000, "category_id": 0, "iscrowd": 0, "area": 1, "bbox": [0, 0, 1, 1]},
    {"id": 256, "category_id": 3, "iscrowd": 0, "area": 16, "bbox": [5, 5, 4, 4]},
    {"id": 5, "category_id": 3, "iscrowd": 0, "area": 1, "bbox": [0, 0, 1, 1]},
    {"id": 16_777_215, "category_id": 90, "iscrowd": 1, "area": 1, "bbox": [0, 0, 1, 1]},
]


def write_panoptic(root, segments=SEGMENTS, values=None, name="train", categories=CATEGORIES):
    """A COCO panoptic file of one picture, with its PNG."""
    write(root / f"{name}2017" / "a.jpg", noise(0))
    path = root / "annotations" / f"panoptic_{name}2017.json"
    values = panoptic_values() if values is None else values
    write(path.with_suffix("") / "a.png", id_pixels(values))
    rows = [{"image_id": 7, "file_name": "a.png", "segments_info": segments}]
    content = {"images": image_rows([(7, "a.jpg")]), "annotations": rows}
    path.write_text(json.dumps(content | {"categories": categories}))
    return path


def in_base64(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def labelme_shape(label, points, kind="polygon", group=None, **more):
    return {
        "label": label,
        "points": points,
        "group_id": group,
        "description": "",
        "shape_type": kind,
        "flags": {},
        "mask": None,
    } | more


def write_labelme(folder, shapes, name="a", picture=True, **more):
    """A file as LabelMe 5 writes it, with its picture beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    if picture:
        write(folder / f"{name}.png", noise(0))
    content = {
        "version": "5.5.0",
        "flags": {},
        "shapes": shapes,
        "imagePath": f"{name}.png",
        "imageData": None,
        "imageHeight": SIZE[0],
        "imageWidth": SIZE[1],
    } | more
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


RINGS = [[5.5, 4.2, 20.1, 6.0, 12.3, 25.7], [8, 8, 30, 8, 30, 20, 8, 20], [0, 0, 40, 0, 40, 30]]


def yolo_row(label, ring):
    H, W = SIZE
    return " ".join([str(label), *(repr(x / side) for x, side in zip(ring, [W, H] * 99))])


def write_yolo(root, text=None, content=None, pictures="images/{}", labels="labels/{}"):
    """A set as Ultralytics lays it: pictures and rows of train and val, and data.yaml."""
    rows = "\n".join(yolo_row(k % 2, ring) for k, ring in enumerate(RINGS))
    for split in ("train", "val"):
        for name in ("a.jpg", "b.png"):
            write(root / pictures.format(split) / name, noise(0))
        path = root / labels.format(split) / "b.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(rows if text is None else text)
    base = {"path": str(root), "nc": 2, "names": {0: "ring", 1: "box"}}
    base |= {split: pictures.format(split) for split in ("train", "val")}
    (root / "data.yaml").write_text(yaml.dump(base | (content or {})))
    return root


CODED_NAMES = ["car", "person"]


def coded_values():
    """Nothing, two cars, a person and a crowd of persons."""
    values = np.zeros(SIZE, np.int64)
    values[2:6, 2:9], values[2:6, 12:20], values[10:20, 3:30], values[25:] = 1001, 1002, 2001, 2
    return values


def write_maps(root, values, names=CODED_NAMES, labels=None, splits=("train", "val"), end=".png"):
    for split in splits:
        write(root / f"images/{split}/city/a.jpg", noise(0))
        path = root / f"instances/{split}/city/a{end}"
        write(path, values)
        if labels is not None:
            write(root / f"labels/{split}/city/a.png", labels)
    if names:
        (root / "classes.txt").write_text("\ufeff" + "\n".join(names) + "\n", encoding="utf-8")
    return root
