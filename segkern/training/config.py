"""The settings of a training run."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from ..data import DataConfig, DigitsConfig, data_config
from ..data.joint_tasks import EVEN
from ..models import Config, default_config, model_config
from ..structures.logits import PixelLogits
from .step import PRECISIONS

# figures of a task that evaluation during training shows, the first the one that matters
METRICS = {
    "panoptic": ("pq", "class_accuracy", "dice"),
    "instance": ("ap", "ap50"),
    "semantic": ("miou", "pixel_accuracy"),
}


@dataclass
class TrainConfig:
    """How to train.

    Attributes:
        output: folder of the run: checkpoints/, model/ of the last of them, log.jsonl, and best/
            where there are evaluations.
        init: model to start from, of the same kind: a folder of a run or a model, or a name on the
            hub. The class head starts anew where the number of labels differs. None starts from
            the backbone that the model's config asks for.
        fresh_head: with init, start the class head anew also where the number of labels is equal.
        keep_zeros: weights that pruning made 0 stay 0 (`segkern prune --zeros`), of linear layers
            and convolutions.
        freeze: parts of the model that stay as they are: of a mask2former, maskformer or oneformer
            backbone, pixel_decoder and query_decoder, of a oneformer also task_queries and
            text_encoder, of a segmenter encoder and decoder, of an eomt encoder; or parts of
            these, such as backbone.layers.0. They have no gradient and no state of the optimizer,
            and run as in evaluation.
        overwrite: start anew in a folder that holds a run; its files are removed.
        steps: of the optimizer. A resumed run that gets more follows the longer schedule from
            there on.
        batch_size: images of a batch, which several processes share equally.
        accumulate: batches whose gradients make one step, as one batch of all their images would:
            for a batch that does not fit into memory.
        lr: highest learning rate.
        backbone_lr_factor: the backbone's rate over the others'.
        backbone_level_decay: the rate of a level of the backbone over that of the next, above 0
            and at most 1: what lies near the image changes less. A level is what gives a map, or a
            block of a plain transformer. 1 for one rate.
        min_lr: least learning rate of the schedule.
        optimizer: "adamw", "sgd", or "muon" for the matrices inside blocks with AdamW for the
            rest, which takes fewer steps from scratch and more time for each.
        momentum: of SGD and Muon.
        weight_decay: of the optimizer.
        schedule: "cosine" or "poly" to min_lr, "steps": a tenth at 8/9 of the steps and again at
            26/27, or "thirds": half at a third of the steps and a tenth at two.
        power: of "poly".
        warmup: steps in which the rate rises.
        backbone_warmup: steps after those in which the backbone's rate rises, which stays 0
            before; 0 lets it rise with the others.
        clip: largest norm of the gradient; 0 does not clip.
        precision: "fp32", "bf16" for autocast, or "fp16" for autocast with a scaled loss.
        cuda_graphs: on a GPU capture the whole step in a CUDA graph for each size of a batch; not
            with Muon, whose rate is a number of the host, nor with accumulated batches.
        gradient_checkpointing: keep only the inputs of blocks and layers for backward, and compute
            the rest again: less memory, more time.
        parallel: of several processes: "ddp", where each holds the model and the optimizer's
            state, or "fsdp", where each holds a part of them and gathers a block's weights when
            its turn comes. No effect with one.
        sync_batch_norm: batch norms in training take their moments over the images of all
            processes, as one process would; else over those of their own.
        ema: decay of a moving average of the weights, such as 0.9999, whose first steps decay
            faster; what is evaluated and saved as a model is the average then. It takes the memory
            of another model. 0 for none.
        seed: of the weights, the order of the samples and dropout.
        device: "cpu", "cuda", or "auto" for cuda where there are kernels for it.
        threads: of the CPU; 0 keeps torch's own choice.
        workers: processes that load data; 0 loads in this one.
        log_every: steps between lines of the log.
        checkpoint_every: steps between checkpoints; the last step has one.
        keep: checkpoints that stay, the newest; an older one is removed when a new one is whole.
        evaluate_every: steps between evaluations on the val split, each after a checkpoint; 0 for
            none.
        best_metric: of the evaluations, by which best/ holds the best model: pq, class_accuracy or
            dice; ap or ap50; miou or pixel_accuracy. Its task is the one that is measured. None
            takes pq, ap or miou, by the task of the data.
        patience: evaluations without a better figure after which training stops; 0 never stops.
        evaluate_scenes: images of each.
        threshold: least score of a segment in evaluation, 0 to 1.
        void: what pixels without a label and crowds are to a model that finds masks: "background",
            as in the paper's code, or "ignore", without weight in matching and loss.
        task_shares: how often a model that learns all tasks together, as a oneformer does, sees a
            picture for each, in proportion: panoptic, instance, semantic.
        tensorboard: write curves for it, too, where it is installed.
        data: the data set.
        model: the model.
    """

    output: Path = Path("runs/digits")
    init: str | None = None
    fresh_head: bool = False
    keep_zeros: bool = False
    freeze: tuple[str, ...] = ()
    overwrite: bool = False
    steps: int = 2000
    batch_size: int = 8
    accumulate: int = 1
    lr: float = 1e-4
    backbone_lr_factor: float = 0.1
    backbone_level_decay: float = 1.0
    min_lr: float = 0.0
    optimizer: Literal["adamw", "sgd", "muon"] = "adamw"
    momentum: float = 0.9
    weight_decay: float = 0.05
    schedule: Literal["cosine", "poly", "steps", "thirds"] = "cosine"
    power: float = 0.9
    warmup: int = 10
    backbone_warmup: int = 0
    clip: float = 0.01
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    cuda_graphs: bool = True
    gradient_checkpointing: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    sync_batch_norm: bool = False
    ema: float = 0.0
    seed: int = 0
    device: str = "auto"
    threads: int = 0
    workers: int = 0
    log_every: int = 10
    checkpoint_every: int = 500
    keep: int = 1
    evaluate_every: int = 0
    best_metric: str | None = None
    patience: int = 0
    evaluate_scenes: int = 100
    threshold: float = 0.8
    void: Literal["background", "ignore"] = "background"
    task_shares: tuple[float, float, float] = EVEN
    tensorboard: bool = True
    data: DataConfig = field(default_factory=DigitsConfig)
    model: Config = field(default_factory=default_config)

    def __post_init__(self):
        self.output = Path(self.output)
        self.init = None if self.init is None else str(self.init)
        self.freeze = tuple(self.freeze)
        self.task_shares = tuple(self.task_shares)
        if self.fresh_head and self.init is None:
            raise ValueError("TrainConfig: fresh_head must be False without init, got True")
        if not 0 < self.backbone_level_decay <= 1:
            raise ValueError(
                "TrainConfig: backbone_level_decay must be in (0, 1], "
                f"got {self.backbone_level_decay}"
            )
        if not 0 <= self.ema < 1:
            raise ValueError(f"TrainConfig: ema must be in [0, 1), got {self.ema}")
        if self.patience and not self.evaluate_every:
            raise ValueError(
                "TrainConfig: patience must be 0 without evaluations (evaluate_every), "
                f"got {self.patience}"
            )
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"TrainConfig: threshold must be in [0, 1], got {self.threshold}")
        shares = self.task_shares
        if len(shares) != 3 or not all(0 <= x < float("inf") for x in shares) or not any(shares):
            raise ValueError(
                "TrainConfig: task_shares must be three finite numbers >= 0, not all of them 0, "
                f"got {shares}"
            )
        for names, least in (
            ("steps batch_size accumulate log_every checkpoint_every keep evaluate_scenes", 1),
            ("lr min_lr backbone_lr_factor momentum weight_decay power warmup clip seed", 0),
            ("threads workers evaluate_every patience backbone_warmup", 0),
        ):
            for name in names.split():
                if not getattr(self, name) >= least:
                    raise ValueError(
                        f"TrainConfig: {name} must be >= {least}, got {getattr(self, name)}"
                    )
        for name, known in (
            ("schedule", ("cosine", "poly", "steps", "thirds")),
            ("precision", tuple(PRECISIONS)),
            ("optimizer", ("adamw", "sgd", "muon")),
            ("void", ("background", "ignore")),
            ("parallel", ("ddp", "fsdp")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"TrainConfig: {name} must be one of {', '.join(known)}, "
                    f"got {getattr(self, name)!r}"
                )
        known = [name for task in self.model.tasks for name in METRICS[task]]
        if self.best_metric not in (None, *known):
            raise ValueError(
                f"TrainConfig: best_metric must be one of {', '.join(known)}, "
                f"got {self.best_metric!r}"
            )
        needs = "semantic" if self.model.logits is PixelLogits else "masks"
        if needs not in self.data.targets:
            raise ValueError(
                f"TrainConfig: a {self.model.kind} trains on {needs}, which data of kind "
                f"{self.data.kind} does not have; it has {', '.join(self.data.targets)}"
            )

        if getattr(self.model, "joint_tasks", False) and self.data.task == "semantic":
            raise ValueError(
                f"TrainConfig: data.task must be panoptic or instance for a {self.model.kind}, "
                "which learns all tasks from objects, got semantic"
            )

    @property
    def task(self) -> str:
        """What evaluations during training measure."""
        if self.best_metric is not None:
            return next(task for task, names in METRICS.items() if self.best_metric in names)
        tasks = self.model.tasks
        return self.data.task if self.data.task in tasks else tasks[0]

    def to_dict(self) -> dict:
        """Nested plain types, as checkpoints keep it."""
        parts = {
            name: {"kind": part.kind}
            | {k: str(v) if isinstance(v, Path) else v for k, v in asdict(part).items()}
            for name, part in (("data", self.data), ("model", self.model))
        }
        return asdict(self) | {"output": str(self.output)} | parts

    @classmethod
    def from_dict(cls, settings: dict) -> "TrainConfig":
        """The config that `to_dict` described.

        Raises:
            ValueError: there are settings that this version does not know or allow.
        """
        try:
            settings = _with_kinds(settings)
            parts = {
                "data": data_config(settings["data"]),
                "model": model_config(settings["model"]),
            }
            return cls(**(settings | parts))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"settings of another version of segkern ({error})") from error


def _with_kinds(settings: dict) -> dict:
    """Settings of before configs had a kind, as they are now.

    Then a model had a "type" and data none, and `backbone_lr_factor` did nothing where the
    backbone was called otherwise: in the one model of then that gives class logits of pixels.
    """
    if "type" not in settings["model"]:
        return settings
    model, data = dict(settings["model"]), dict(settings["data"])
    model["kind"] = model.pop("type")
    data["kind"] = "folder" if "root" in data else "digits"
    changed = {"model": model, "data": data}
    if model_config(model).logits is PixelLogits:
        changed["backbone_lr_factor"] = 1.0
    return settings | changed
