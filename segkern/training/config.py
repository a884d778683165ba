"""The settings of a training run."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from ..data import DataConfig, DigitsConfig, FolderConfig
from ..models import CLASSES, Config, Mask2FormerConfig, SegmenterConfig, kind_of
from .step import PRECISIONS


@dataclass
class TrainConfig:
    """How to train.

    Attributes:
        output: folder of the run: last.pt and model/, both of the last checkpoint, and log.jsonl.
        overwrite: start anew in a folder that holds a run; its files are removed.
        steps: batches to train on. A resumed run that gets more follows the longer schedule from
            there on.
        batch_size: images of a step.
        lr: highest learning rate.
        backbone_lr_factor: the backbone's rate over the others'.
        min_lr: least learning rate of the schedule.
        optimizer: "adamw", "sgd", or "muon" for the matrices inside blocks with AdamW for the
            rest, which takes fewer steps from scratch and more time for each.
        momentum: of SGD and Muon.
        weight_decay: of the optimizer.
        schedule: "cosine" or "poly" (power 0.9) to min_lr, or "steps": a tenth at 8/9 of the steps
            and again at 26/27.
        warmup: steps in which the rate rises.
        clip: largest norm of the gradient; 0 does not clip.
        precision: "fp32", "bf16" for autocast, or "fp16" for autocast with a scaled loss.
        cuda_graphs: on a GPU capture the whole step in a CUDA graph for each size of a batch; not
            with Muon, whose rate is a number of the host.
        gradient_checkpointing: keep only the inputs of blocks and layers for backward, and compute
            the rest again: less memory, more time.
        seed: of the weights, the order of the samples and dropout.
        device: "cpu", "cuda", or "auto" for cuda where there are kernels for it.
        threads: of the CPU; 0 keeps torch's own choice.
        workers: processes that load data; 0 loads in this one.
        log_every: steps between lines of the log.
        checkpoint_every: steps between checkpoints; the last step has one.
        evaluate_every: steps between evaluations on the val split; 0 for none.
        evaluate_scenes: images of each.
        threshold: least score of a segment in evaluation, 0 to 1.
        tensorboard: write curves for it, too, where it is installed.
        data: the data set.
        model: the model.
    """

    output: Path = Path("runs/digits")
    overwrite: bool = False
    steps: int = 2000
    batch_size: int = 8
    lr: float = 1e-4
    backbone_lr_factor: float = 0.1
    min_lr: float = 0.0
    optimizer: Literal["adamw", "sgd", "muon"] = "adamw"
    momentum: float = 0.9
    weight_decay: float = 0.05
    schedule: Literal["cosine", "poly", "steps"] = "cosine"
    warmup: int = 10
    clip: float = 0.01
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    cuda_graphs: bool = True
    gradient_checkpointing: bool = False
    seed: int = 0
    device: str = "auto"
    threads: int = 0
    workers: int = 0
    log_every: int = 10
    checkpoint_every: int = 500
    evaluate_every: int = 0
    evaluate_scenes: int = 100
    threshold: float = 0.8
    tensorboard: bool = True
    data: DataConfig = field(default_factory=DigitsConfig)
    model: Config = field(default_factory=lambda: Mask2FormerConfig.tiny(11))

    def __post_init__(self):
        self.output = Path(self.output)
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"TrainConfig: threshold must be in [0, 1], got {self.threshold}")
        for names, least in (
            ("steps batch_size log_every checkpoint_every evaluate_scenes", 1),
            ("lr min_lr backbone_lr_factor momentum weight_decay warmup clip seed", 0),
            ("threads workers evaluate_every", 0),
        ):
            for name in names.split():
                if not getattr(self, name) >= least:
                    raise ValueError(
                        f"TrainConfig: {name} must be >= {least}, got {getattr(self, name)}"
                    )
        for name, known in (
            ("schedule", ("cosine", "poly", "steps")),
            ("precision", tuple(PRECISIONS)),
            ("optimizer", ("adamw", "sgd", "muon")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"TrainConfig: {name} must be one of {', '.join(known)}, "
                    f"got {getattr(self, name)!r}"
                )
        if isinstance(self.data, FolderConfig) and not isinstance(self.model, SegmenterConfig):
            raise ValueError(
                "TrainConfig: model must be a SegmenterConfig where data is a FolderConfig, "
                f"got a {type(self.model).__name__}"
            )

    def to_dict(self) -> dict:
        """Nested plain types, as checkpoints keep it."""
        model = {"type": kind_of(self.model)} | asdict(self.model)
        data = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self.data).items()}
        return asdict(self) | {"output": str(self.output), "data": data, "model": model}

    @classmethod
    def from_dict(cls, settings: dict) -> "TrainConfig":
        """The config that `to_dict` described.

        Raises:
            ValueError: there are settings that this version does not know or allow.
        """
        try:
            model, data = dict(settings["model"]), settings["data"]
            parts = {
                "data": (FolderConfig if "root" in data else DigitsConfig)(**data),
                "model": CLASSES[model.pop("type")][0](**model),
            }
            return cls(**(settings | parts))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"settings of another version of segkern ({error})") from error
