"""Loading of COCO-shaped data for training, against transformers and torchvision; run-length codes
against pycocotools.

Pictures are JPEGs of 640 x 480 with seven polygons each; a batch of them is decoded, jittered to
1024 x 1024 (0.1 to 2 times, crop, mirror), normalised and packed, by one thread. "CPU time" is
what that thread computed, which other work on the machine moves less. `peak_mb` is the memory that
a worker of a loader has for itself, with the annotations of 5,000 pictures.
transformers' processor has no jitter: it resizes to 1024 x 1024.
"""

import json
import shutil
import tempfile
import time
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from _measure import DEVICE, Work, pick
from PIL import Image
from torch.utils.data import DataLoader

from segkern.data import CocoConfig, ReadConfig, build_dataset, collate
from segkern.io import rle
from segkern.structures.labels import IMAGENET_MEAN, IMAGENET_STD
from support.models import model_config

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the loader has no work for a GPU")
IMPLS = ("segkern", "transformers", "torchvision")
FILES, PICTURES, BATCH, SIZE = pick((2, 4, 2, 64), (8, 5000, 8, 1024), (8, 5000, 8, 1024))
OBJECTS = 7
MAP, SEGMENTS = pick(((64, 128), 9), ((1024, 2048), 100), ((1024, 2048), 100))


def photo(seed: int) -> Image.Image:
    """Something as smooth and as rough as a photo is."""
    rng = np.random.default_rng(seed)
    layers = [
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).resize((640, 480), 3)
        for h, w in ((6, 8), (30, 40), (120, 160))
    ]
    return Image.blend(Image.blend(layers[0], layers[1], 0.4), layers[2], 0.15)


@cache
def coco_set(pictures: int = PICTURES, files: int = FILES) -> Path:
    """A folder in COCO's format, of files that pictures share where they are fewer."""
    root, rng = Path(tempfile.mkdtemp(prefix="segkern-bench-")), np.random.default_rng(0)
    (root / "train2017").mkdir()
    (root / "annotations").mkdir()
    for i in range(files):
        if i < FILES:
            photo(i).save(root / f"train2017/{i}.jpg", quality=92)
        else:
            shutil.copy(root / f"train2017/{i % FILES}.jpg", root / f"train2017/{i}.jpg")
    images, annotations = [], []
    turn = np.linspace(0, 2 * np.pi, 31)[:-1]
    for i in range(pictures):
        images.append({"id": i, "file_name": f"{i % files}.jpg", "height": 480, "width": 640})
        for k in range(OBJECTS):
            r = rng.uniform(15, 110) * rng.uniform(0.7, 1.3, 30)
            x, y = rng.uniform(0, 640), rng.uniform(0, 480)
            corners = np.stack([x + r * np.cos(turn), y + r * np.sin(turn)], -1)
            corners = corners.clip(0, (640, 480)).round(2)
            low, high = corners.min(0), corners.max(0)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": 1 + k,
                    "segmentation": [corners.ravel().tolist()],
                    "bbox": [*low.tolist(), *(high - low).tolist()],
                    "area": float(np.prod(high - low)),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": 1 + k, "name": f"class {k}"} for k in range(OBJECTS)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations/instances_train2017.json").write_text(json.dumps(content))
    return root


@cache
def ours():
    config = CocoConfig(coco_set(), read=ReadConfig(val_share=0))
    config.views.size = (SIZE, SIZE)
    return build_dataset(config, "train", model_config(OBJECTS))


class Torchvision:
    """Its own COCO data set, and the transforms of its detection reference with LSJ."""

    def __init__(self):
        from torchvision import datasets, tv_tensors
        from torchvision.transforms import v2

        fill = {tv_tensors.Image: 0, "others": 0}
        change = v2.Compose(
            [
                v2.ToImage(),
                v2.ScaleJitter((SIZE, SIZE), (0.1, 2.0), antialias=True),
                v2.RandomCrop((SIZE, SIZE), pad_if_needed=True, fill=fill),
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )
        root = coco_set()
        plain = datasets.CocoDetection(
            root / "train2017", root / "annotations/instances_train2017.json", transforms=change
        )
        self.data = datasets.wrap_dataset_for_transforms_v2(plain, target_keys=("masks", "labels"))

    def __len__(self):
        return len(self.data)

    def __getitem__(self, place):
        pixels, target = self.data[place[0]]
        return pixels, target["masks"], target["labels"]

    def collate(self, items):
        pixels, masks, labels = zip(*items)
        return torch.stack(pixels), masks, labels


class Transformers:
    """Decoded by PIL, masks by pycocotools, the rest by the image processor of Mask2Former."""

    def __init__(self):
        from pycocotools.coco import COCO
        from transformers import Mask2FormerImageProcessor

        self.root = coco_set()
        self.coco = COCO(self.root / "annotations/instances_train2017.json")
        self.ids = sorted(self.coco.imgs)
        size = {"height": SIZE, "width": SIZE}
        self.processor = Mask2FormerImageProcessor(size=size, ignore_index=255)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, place):
        row = self.coco.imgs[self.ids[place[0]]]
        image = np.array(Image.open(self.root / "train2017" / row["file_name"]).convert("RGB"))
        instances = np.zeros(image.shape[:2], np.uint8)
        classes = {0: 255}
        for i, part in enumerate(self.coco.imgToAnns[row["id"]], 1):
            instances[self.coco.annToMask(part) > 0] = i
            classes[i] = part["category_id"] - 1
        return image, instances, classes

    def collate(self, items):
        images, maps, classes = map(list, zip(*items))
        return self.processor(
            images, segmentation_maps=maps, instance_id_to_semantic_id=classes, return_tensors="pt"
        )


def places():
    """A batch of one pass after the other."""
    return [[(i % PICTURES, step) for i in range(step, step + BATCH)] for step in range(1000)]


def own_memory(data, pack) -> float:
    """Megabytes that a worker has for itself after some batches."""

    def measured(items):
        pack(items)
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1024

    order = places()[:6]
    loader = DataLoader(data, batch_sampler=order, num_workers=1, collate_fn=measured)
    return max(loader)


def build(clock):
    sets = {"segkern": (ours(), collate)}
    missing = {}
    for name, make in (("transformers", Transformers), ("torchvision", Torchvision)):
        try:
            peer = make()
            sets[name] = peer, peer.collate
        except ImportError as error:
            missing[name] = str(error)
    impls = {}
    for name, (data, pack) in sets.items():
        batches = iter(DataLoader(data, batch_sampler=places(), collate_fn=pack))
        impls[name] = lambda batches=batches: next(batches)
    peaks = {name: own_memory(*part) for name, part in sets.items()}
    return Work(impls | missing, peaks=peaks, threads=1, clock=clock)


CLOCKS = {"": time.perf_counter, ", CPU time": time.process_time}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("clock", CLOCKS)
def test_loader(clock, impl, measured):
    case = f"COCO LSJ {SIZE} batch of {BATCH}, {OBJECTS} objects{clock}"
    measured("loader", case, "uint8", impl, partial(build, CLOCKS[clock]))


def parts():
    """The same batch, part by part."""
    data, at = ours(), [(i, 0) for i in range(BATCH)]
    whole = [data.examined(i)[0] for i, _ in at]
    views = data.__getitems__(at)
    impls = {
        "segkern": lambda: collate(data.__getitems__(at)),
        "decode": lambda: [data.pixels(i) for i, _ in at],
        "annotations": lambda: [data.truth(i, (480, 640)) for i, _ in at],
        "geometry": lambda: [
            data.views(sample, torch.Generator().manual_seed(k)) for k, sample in enumerate(whole)
        ],
        "packing": lambda: collate(views),
    }
    return Work(impls, threads=1, clock=time.process_time)


@pytest.mark.parametrize("impl", ["segkern", "decode", "annotations", "geometry", "packing"])
def test_loader_parts(impl, measured):
    measured("loader parts", f"COCO LSJ {SIZE} batch of {BATCH}, CPU time", "uint8", impl, parts)


@cache
def label_map() -> np.ndarray:
    """Discs that lie over each other, [H, W] int32."""
    (H, W), rng = MAP, np.random.default_rng(0)
    labels = np.zeros(MAP, np.int32)
    for i in range(1, SEGMENTS + 1):
        y, x, r = rng.uniform(0, H), rng.uniform(0, W), rng.uniform(0.03, 0.15) * H
        rows, columns = np.ogrid[:H, :W]
        labels[(rows - y) ** 2 + (columns - x) ** 2 < r**2] = i
    return labels


def encoding():
    from pycocotools import mask

    labels, ids = label_map(), list(range(1, SEGMENTS + 1))

    def peer():
        return [mask.encode(np.asfortranarray(labels == i, np.uint8)) for i in ids]

    return Work({"segkern": lambda: rle.encode(labels, ids), "pycocotools": peer}, threads=1)


def decoding():
    from pycocotools import mask

    ids = list(range(1, SEGMENTS + 1))
    codes = rle.encode(label_map(), ids)
    plain = [code | {"counts": code["counts"].encode()} for code in codes]

    def peer():
        labels = np.zeros(MAP, np.int32)
        for i, code in zip(ids, plain):
            labels[mask.decode(code) > 0] = i
        return labels

    return Work({"segkern": lambda: rle.decode(codes, ids, MAP), "pycocotools": peer}, threads=1)


@pytest.mark.parametrize("impl", ["segkern", "pycocotools"])
@pytest.mark.parametrize("work", [encoding, decoding], ids=["encode", "decode"])
def test_run_lengths(work, impl, measured):
    case = f"{work.__name__} {SEGMENTS} segments {MAP[0]}x{MAP[1]}"
    measured("run lengths", case, "int32", impl, work)
