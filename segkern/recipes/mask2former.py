"""Recipes of Mask2Former: functions that return a `TrainConfig`."""

from ..data import DigitsConfig
from ..models import Mask2FormerConfig
from ..training.config import TrainConfig

# a query counts from this score on; after so few steps most are right well below the paper's 0.8
DIGITS_THRESHOLD = 0.5


def digits(level: str = "mixed", task: str = "panoptic", size: tuple[int, int] = (64, 64)):
    """A small Mask2Former on scenes of handwritten digits: minutes on two CPU cores.

    Args:
        level: "easy", "hard" or "mixed".
        task: "panoptic", "instance" or "semantic".
        size: height and width of a scene.

    Returns:
        a `TrainConfig`.
    """
    names = [str(k) for k in range(10)] + ["background"] * (task != "instance")
    model = Mask2FormerConfig.tiny(len(names))
    model.id2label = dict(enumerate(names))
    model.stuff = () if task == "instance" else (10,)
    model.shortest_edge, model.longest_edge = min(size), 2 * max(size)
    return TrainConfig(
        steps=1800,
        batch_size=8,
        lr=2e-3,
        backbone_lr_factor=1.0,
        schedule="cosine",
        warmup=50,
        clip=1.0,
        evaluate_every=300,
        threshold=DIGITS_THRESHOLD,
        data=DigitsConfig(size=size, level=level, task=task),
        model=model,
    )
