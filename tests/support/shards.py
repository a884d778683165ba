"""Small data sets of every format that shards are made of, and shards of numbered pictures."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from segkern.data import CocoConfig, FolderConfig, ReadConfig, find_format
from segkern.recipes.shard_data import shard_data
from support.pictures import (
    SIZE,
    annotation,
    box,
    coded_values,
    id_pixels,
    in_base64,
    labelme_shape,
    noise,
    rectangle,
    uncompressed,
    write,
    write_coco,
    write_labelme,
    write_maps,
    write_panoptic,
    write_yolo,
)

ALL = ReadConfig(val_share=0)


def both(make):
    def written(root):
        for split in ("train", "val"):
            make(root, name=split)
        return find_format(root)[0]

    return written


def write_with_embedded(root):
    """LabelMe: overlapping shapes, and a file that holds its picture."""
    shapes = [
        labelme_shape("a", [[1, 1], [9, 9]], "rectangle", 1),
        labelme_shape("a", [[20, 1], [29, 9]], "rectangle", 1),
        labelme_shape("b", [[1, 1], [30, 9], [3, 20]]),
    ]
    for split in ("train", "val"):
        write_labelme(root / split, shapes)
        inside = {"imageData": in_base64(noise(5)), "imagePath": "b.png"}
        write_labelme(root / split, shapes[2:], "b", picture=False, **inside)
    return find_format(root)[0]


def write_class_maps(root, wide=False):
    for split in ("train", "val"):
        write(root / f"images/{split}/a.jpg", noise(0))
        labels = np.full(SIZE, 2, np.uint16 if wide else np.uint8)
        labels[:5], labels[:, :3] = 299 if wide else 0, 65535 if wide else 255
        write(root / f"labels/{split}/a.png", labels)
    (root / "classes.txt").write_text("\n".join(f"class {k}" for k in range(300 if wide else 3)))
    return FolderConfig(root)


def write_ade20k(root):
    """Of the challenge: a bed over some wall, two chairs, and a chair that is no object."""
    classes, objects = np.ones(SIZE, np.uint8), np.zeros((*SIZE, 3), np.uint8)
    classes[:2], classes[2:8], classes[12:18, 4:20], classes[20:26] = 0, 3, 8, 20
    objects[10:17, 4:20], objects[20:26, :10] = (1, 3, 0), (8, 1, 0)
    objects[20:26, 15:25] = 8, 2, 0
    for split in ("training", "validation"):
        write(root / f"images/{split}/a.jpg", noise(0))
        write(root / f"annotations/{split}/a.png", classes)
        write(root / f"annotations_instance/{split}/a.png", objects)
    return find_format(root)[0]


def write_cityscapes(root):
    """Road, sky, two cars, a group of them, a person, and what does not count."""
    values = np.full(SIZE, 7, np.uint16)
    values[:9], values[12:18, 2:10], values[12:18, 12:20] = 23, 26000, 26001
    values[12:16, 24:34], values[8:20, 15:18], values[27:] = 26, 24000, 1
    labels = np.where(values >= 1000, values // 1000, values).astype(np.uint8)
    for split in ("train", "val"):
        name = f"{split}/ulm/ulm_0_0"
        write(root / f"leftImg8bit/{name}_leftImg8bit.png", noise(0))
        write(root / f"gtFine/{name}_gtFine_instanceIds.png", values)
        write(root / f"gtFine/{name}_gtFine_labelIds.png", labels)
    return find_format(root)[0]


def write_pascal_context(root):
    values = np.full(SIZE, 1, np.uint8)
    values[:3], values[5:9], values[12:20, 4:30] = 0, 255, 59
    lists = root / "ImageSets/SegmentationContext"
    lists.mkdir(parents=True)
    for split, name in (("train", "a"), ("val", "b")):
        write(root / f"JPEGImages/{name}.jpg", noise(0))
        write(root / f"SegmentationClassContext/{name}.png", values)
        (lists / f"{split}.txt").write_text(name)
    return find_format(root)[0]


def write_turned(root):
    """COCO: pictures that their EXIF tag turns, drawn on the upright one, on the raw one, and on
    one whose size does not tell."""
    H, W = SIZE
    sizes, exif = {1: (H, W), 2: (W, H), 3: (H, W)}, Image.Exif()
    images = [
        {"id": i, "file_name": f"{i}.jpg", "height": h, "width": w} for i, (h, w) in sizes.items()
    ]
    rows = [
        annotation(i, i, 3, uncompressed(rectangle(1, 2, 9, 20, size)))
        for i, size in sizes.items()
    ]
    for split in ("train", "val"):
        write_coco(root, rows, images, name=split)
        for i in sizes:
            exif[0x0112] = 3 if i == 3 else 6
            path = root / f"{split}2017/{i}.jpg"
            Image.fromarray(noise(i)).save(path, exif=exif, quality=95)
    return CocoConfig(root)


def write_bands(root):
    """COCO: pictures of five channels."""
    images = [{"id": 1, "file_name": "1.tif", "height": SIZE[0], "width": SIZE[1]}]
    for split in ("train", "val"):
        write_coco(root, [annotation(1, 1, 3, box(2, 3, 9, 9))], images, name=split)
        first, *rest = (Image.fromarray(noise(c)[..., 0]) for c in range(5))
        first.save(root / f"{split}2017/1.tif", save_all=True, append_images=rest)
    return CocoConfig(root, read=ReadConfig(channels=5))


FORMATS = {
    "coco": both(write_coco),
    "coco panoptic": both(write_panoptic),
    "labelme": write_with_embedded,
    "yolo": lambda root: find_format(write_yolo(root))[0],
    "instance maps": lambda root: find_format(write_maps(root, coded_values().astype(np.uint16)))[
        0
    ],
    "class maps": write_class_maps,
    "wide class maps": lambda root: write_class_maps(root, wide=True),
    "ade20k": write_ade20k,
    "cityscapes": write_cityscapes,
    "pascal context": write_pascal_context,
    "turned": write_turned,
    "five channels": write_bands,
}


def write_numbered(root: Path, count: int, size=(24, 32)) -> CocoConfig:
    """Pictures of noise or one grey, with a box and what is not in it, of the panoptic kind."""
    H, W = size
    categories = [
        {"id": 1, "name": "box", "isthing": 1},
        {"id": 2, "name": "ground", "isthing": 0},
    ]
    for split, number in (("train", count), ("val", 2)):
        images, rows = [], []
        for i in range(number):
            pixels = noise(i, size) if i % 3 == 0 else np.full((H, W, 3), i % 256, np.uint8)
            values = np.full(size, 2)
            values[2 + i % 5 : 12, 3:20] = 1
            write(root / f"{split}/{i:04}.png", pixels)
            write(root / f"annotations/panoptic_{split}/{i:04}.png", id_pixels(values))
            images.append({"id": i, "file_name": f"{i:04}.png", "height": H, "width": W})
            segments = [{"id": 1, "category_id": 1}, {"id": 2, "category_id": 2}]
            rows.append({"image_id": i, "file_name": f"{i:04}.png", "segments_info": segments})
        content = {"images": images, "annotations": rows, "categories": categories}
        (root / f"annotations/panoptic_{split}.json").write_text(json.dumps(content))
    return CocoConfig(root, "panoptic")


def shards_of(config, target: Path, size: int = 20_480, **settings):
    """Shards of a set, written as the command writes them, and their config."""
    shard_data(config, target, size, workers=0, **settings)
    return find_format(target)[0]


def members(path: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    """What a tar file holds."""
    with tarfile.open(path) as tar:
        return [(head, tar.extractfile(head).read()) for head in tar if head.isreg()]


def rewrite(path: Path, change) -> None:
    """Changes a shard as another tool would: `change` gets the list of its (name, bytes), and
    returns another. The file of places is removed, and the index told of the size."""
    held = [(head.name, data) for head, data in members(path)]
    with tarfile.open(path, "w") as tar:
        for name, data in change(held):
            head = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            head.size = len(data)
            tar.addfile(head, io.BytesIO(data))
    path.with_suffix(".idx").unlink(missing_ok=True)
    index = path.parent / "index.json"
    content = json.loads(index.read_text())
    for rows in content["splits"].values():
        for row in rows:
            if row["file"] == path.name:
                row["bytes"] = path.stat().st_size
    index.write_text(json.dumps(content))
