"""Settings for models that tests make up."""

from types import SimpleNamespace

from segkern.structures.labels import Labels
from segkern.structures.logits import QueryLogits
from segkern.structures.settings import InputConfig


def model_config(num_labels=2, names=None, stuff=(), logits=QueryLogits, **settings):
    """A `ModelConfig`; settings are those of `InputConfig`, by default of images kept as they
    are."""
    settings = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)} | settings
    return SimpleNamespace(
        kind="made up",
        tasks=("panoptic", "instance", "semantic") if logits is QueryLogits else ("semantic",),
        logits=logits,
        num_labels=num_labels,
        backbone_pretrained=False,
        labels=Labels(names, tuple(stuff)),
        input=InputConfig(**settings),
    )
