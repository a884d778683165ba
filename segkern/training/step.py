"""One training step: forward, matching, loss, backward, clipping, optimizer.

    gradient = mean over parts of the step of the gradient of each
    seed of the random points: the same for all parts, so that each draws what one batch would

Nothing in it waits for the device, so that on a GPU the whole of it is captured in one CUDA graph
for each size of a batch (image size and bucket of targets) and replayed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..data.collate import Batch
from ..runtime.cuda_graphs import Replay
from ..runtime.processes import ALONE, Processes
from ..structures.targets import Targets
from .parallel import WARMUP, RunningStatistics, joining

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingLoss(nn.Module):
    """The loss of a model as a module's forward, which is what DDP, FSDP and compile wrap: they
    hook `forward`, and a call of `model.loss` would pass them by."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        return self.model.loss(pixel_values, targets)


class Step:
    """Trains a model on one batch a call, or on one in several parts.

    Args:
        model: in training mode; has `loss(pixel_values, targets)`.
        optimizer: of `build_optimizer`: rates are tensors, groups have a "factor".
        clip: largest norm of the gradient; 0 does not clip.
        precision: "fp32", "bf16" for autocast, or "fp16" for autocast with a scaled loss, whose
            scale falls when a gradient overflows (that step is left out) and rises after 2000
            steps without.
        graphs: capture the step in CUDA graphs; without effect on a CPU.
        loss: the `TrainingLoss` of the model as it is called, such as one that DDP wraps; None for
            one that is not.
        processes: that make each step together.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        clip: float = 0.0,
        precision: str = "fp32",
        graphs: bool = True,
        loss: nn.Module | None = None,
        processes: Processes = ALONE,
    ):
        self.model, self.optimizer, self.clip = model, optimizer, clip
        self.loss = TrainingLoss(model) if loss is None else loss
        self.statistics = RunningStatistics(model, processes)
        buffers = model.named_buffers()
        self.seeds = [buffer for name, buffer in buffers if name.rpartition(".")[2] == "seed"]
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.place = self.parameters[0].device
        self.device = self.place.type
        self.dtype = PRECISIONS[precision]
        self.scaler = torch.amp.GradScaler(self.device, enabled=precision == "fp16")
        warmup = WARMUP if processes.count > 1 else 3
        self._run = Replay(self._eager, warmup) if graphs else self._eager

    def __call__(
        self, batch: Batch | Sequence[Batch], rate: float, backbone_share: float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step.

        Args:
            batch: one, or its parts, which are moved to the model when their turn comes; several
                processes, or parts, first agree on `batch.targets.normalizer`
                (training.distributed).
            rate: learning rate; each group takes it times its factor.
            backbone_share: of it for the groups that warm up "later".

        Returns:
            What the model's loss returns, without gradient: its mean over the parts.
        """
        parts = [batch] if isinstance(batch, Batch) else batch
        if len(parts) == 1:
            parts = [parts[0].to(self.place)]  # where a graph reads it
        for group in self.optimizer.param_groups:
            share = backbone_share if group.get("later") else 1.0  # old checkpoints do not say
            group["lr"].fill_(rate * group["factor"] * share)
        return self._run([(part.pixel_values, part.targets) for part in parts])

    def _eager(self, parts: list[tuple[Tensor, Targets]]) -> tuple[Tensor, dict[str, Tensor]]:
        self.optimizer.zero_grad(set_to_none=True)
        seeds, found = [seed.clone() for seed in self.seeds], []
        for i, (pixel_values, targets) in enumerate(parts, 1):
            pixel_values, targets = pixel_values.to(self.place), targets.to(self.place)
            for seed, value in zip(self.seeds, seeds):
                seed.copy_(value)
            with joining(self.loss, i == len(parts)):
                with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
                    loss, losses = self.loss(pixel_values, targets)
                self.scaler.scale(loss / len(parts)).backward()
            found.append((loss.detach(), {name: x.detach() for name, x in losses.items()}))
            del loss, losses  # or its graph would lie beside that of the next part
        if self.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.clip, error_if_nonfinite=False)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.statistics.join()
        total = sum(loss for loss, _ in found) / len(parts)
        names = found[0][1]
        return total, {name: sum(x[name] for _, x in found) / len(parts) for name in names}
