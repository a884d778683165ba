"""Reading of shards, against the files that they were made of and the webdataset package.

COCO-shaped pictures (JPEGs of 640 x 480 with seven polygons each) are read in an order of chance
to the picture and its masks, without views, by one thread; 1000 times the batch over the time in
ms is images a second. Shards hold a fifth of the set each, and two fifths of it are shuffled
together: by segkern and webdataset alike. webdataset reads its shards one after the other, decodes
with Pillow, and pycocotools the masks. Files and shards lie in the page cache: what a network's
folder takes to open many small files is not in these figures. "CPU time" is what the thread
computed.
"""

import tempfile
import time
from functools import cache, partial
from itertools import islice

import pytest
from _measure import DEVICE, Work, pick
from bench_loader import coco_set

from segkern.data import CocoConfig, Order, ReadConfig, build_dataset, find_format, write_shards

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the reader has no work for a GPU")
IMPLS = ("segkern", "folder", "webdataset")
PICTURES, BATCH = pick((10, 2), (500, 8), (500, 8))
SHARDS, SHUFFLED = 5, PICTURES * 2 // 5


@cache
def sets():
    """The data set of files, and the shards that were written from it."""
    config = CocoConfig(coco_set(PICTURES, PICTURES), read=ReadConfig(val_share=0))
    files, folder = build_dataset(config, "train"), tempfile.mkdtemp(prefix="segkern-bench-")
    total = sum(path.stat().st_size for path in files.paths)
    write_shards({"train": files}, folder, "instance", config.views, size=total // SHARDS)
    found = find_format(folder)[0]
    found.buffer = SHUFFLED
    return files, build_dataset(found, "train")


def read(data):
    """Batches of a data set, in the order of training."""
    order = Order(len(data), BATCH, 0, 0, 10**9, shuffled=getattr(data, "shuffled", None))
    return ([data[i] for i in batch] for batch in order)


def streamed(shards):
    """Batches of the webdataset package."""
    import webdataset
    from pycocotools import mask

    def decoded(sample):
        codes = [row["segmentation"] for row in sample["json"]["annotations"]]
        return sample["jpg"], mask.decode(codes)

    paths = [f"{shards.config.root}/{shard.file}" for shard in shards.shards]
    stream = webdataset.WebDataset(paths, shardshuffle=SHARDS, seed=0, empty_check=False)
    samples = iter(stream.repeat().shuffle(SHUFFLED).decode("rgb8").map(decoded))
    while True:
        yield list(islice(samples, BATCH))


def build(clock):
    files, shards = sets()
    impls = {}
    for name, batches in (("segkern", read(shards)), ("folder", read(files))):
        impls[name] = partial(next, batches)
    try:
        batches = streamed(shards)
        next(batches)  # fills the buffer
        impls["webdataset"] = partial(next, batches)
    except ImportError as error:
        impls["webdataset"] = str(error)
    return Work(impls, threads=1, clock=clock)


CLOCKS = {"": time.perf_counter, ", CPU time": time.process_time}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("clock", CLOCKS)
def test_shards(clock, impl, measured):
    case = f"COCO 640x480 batch of {BATCH}{clock}"
    measured("shards", case, "uint8", impl, partial(build, CLOCKS[clock]))
