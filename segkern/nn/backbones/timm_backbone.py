"""Any model of timm with four maps at doubling strides, as a backbone."""

import torch
from torch import Tensor, nn

from ...weights.timm_names import check_timm_name
from .swin import VARIANTS

OWN_SMALL = "resnet_digits"


class TimmBackbone(nn.Module):
    """The last four maps of a timm model.

    Args:
        name: of the model in timm.
        pretrained: whether to download its weights.
        freeze_norm: keep the statistics, scales and shifts of batch norms as they are in training,
            as the paper does for its ResNets.
        options: further arguments of `timm.create_model`.

    Raises:
        ValueError: no such model, or without four maps at doubling strides.
    """

    def __init__(
        self,
        name: str,
        pretrained: bool = False,
        freeze_norm: bool = False,
        options: dict | None = None,
    ):
        super().__init__()
        import timm  # here, because it takes as long to import as torch

        own = (*VARIANTS, OWN_SMALL)
        rule = f"build_backbone: backbone must be {', '.join(own)} or a timm model"
        check_timm_name(name, rule, own)
        try:
            self.body = timm.create_model(
                name,
                pretrained=pretrained,
                features_only=True,
                out_indices=(-4, -3, -2, -1),
                **(options or {}),
            )
        except (AssertionError, AttributeError, IndexError, RuntimeError) as error:
            raise ValueError(
                f"build_backbone: timm cannot give four maps of '{name}': {error}"
            ) from error
        self.channels = tuple(self.body.feature_info.channels())
        self.strides = tuple(self.body.feature_info.reduction())
        if any(2 * a != b for a, b in zip(self.strides, self.strides[1:])):
            raise ValueError(
                f"build_backbone: backbone must have four maps, each at twice the stride of the "
                f"one before, got strides {self.strides} from '{name}'"
            )
        self.channels_last = getattr(self.body, "output_fmt", None) == "NHWC"
        self.freeze_norm = freeze_norm
        if freeze_norm:
            for norm in self._norms():
                norm.requires_grad_(False)
        self.to(memory_format=torch.channels_last)

    def _norms(self) -> list[nn.Module]:
        return [m for m in self.body.modules() if isinstance(m, nn.BatchNorm2d)]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep less for backward and compute it again there.

        Batch norms that are not frozen then see each batch twice, as everywhere in timm.
        """
        self.body.set_grad_checkpointing(enable)

    def train(self, mode: bool = True) -> "TimmBackbone":
        """Batch norms that are frozen stay in eval mode."""
        super().train(mode)
        if self.freeze_norm:
            for norm in self._norms():
                norm.eval()
        return self

    def forward(self, x: Tensor) -> list[Tensor]:  # [B, 3, H, W]
        maps = self.body(x.contiguous(memory_format=torch.channels_last))
        return [m.permute(0, 3, 1, 2) for m in maps] if self.channels_last else list(maps)
