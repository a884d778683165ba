"""A process of bench_processes.py, which trains: python _train_steps.py CASE IMAGES FOLDER

Each line that it reads lets it make one more step, from reading its images on; it then writes a
line. IMAGES are those of a step in each process.
"""

import os
import sys
from dataclasses import replace

import segkern
from segkern.data import DigitsConfig, build_dataset
from segkern.models import Mask2FormerConfig
from segkern.runtime.processes import started

CASES = ("digits 64", "swin_tiny 256")


def config(case: str, images: int, folder: str):
    """The digits recipe, or a Swin-T on the same scenes, larger."""
    made = segkern.recipes.digits()
    if case != CASES[0]:
        labels = {name: getattr(made.model, name) for name in ("num_labels", "id2label", "stuff")}
        made.model = replace(Mask2FormerConfig.preset("swin_tiny"), **labels)
        made.data = DigitsConfig(size=(256, 256), level="mixed")
    quiet = {"evaluate_every": 0, "checkpoint_every": 10**9, "tensorboard": False}
    return replace(
        made,
        output=folder,
        batch_size=images * started(),
        steps=10**6,
        log_every=10**9,
        device="cpu",
        threads=int(os.environ["OMP_NUM_THREADS"]),
        **quiet,
    )


class Gated:
    """A data set that waits for a line before the images of a step."""

    def __init__(self, data, images: int):
        self.data, self.images, self.read = data, images, 0

    def __getattr__(self, name):
        return getattr(self.data, name)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        if self.read % self.images == 0:
            print("ready", flush=True)
            if not sys.stdin.readline():
                sys.exit()
        self.read += 1
        return self.data[index]


if __name__ == "__main__":
    case, images, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    made = config(case, images, folder)
    data = build_dataset(made.data, "train", made.model)
    segkern.train(made, dataset=Gated(data, images), progress=False)
