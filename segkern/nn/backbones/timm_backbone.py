"""Any model of timm with four maps at doubling strides, as a backbone."""

from functools import partial

import torch
from torch import Tensor, nn

from ...ops._norm_relu import trains
from ...runtime.modes import evaluated
from ...weights.timm_names import check_timm_name, pretrained_model
from ..maps import keep_channels_last
from . import resnet
from .swin import VARIANTS

OWN_SMALL = "resnet_digits"
# of timm's models, where they cannot be built or do not take a size
_FAULTS = (AssertionError, AttributeError, IndexError, RuntimeError)


class TimmBackbone(nn.Module):
    """The last four maps of a timm model.

    Args:
        name: of the model in timm.
        pretrained: whether to download its weights.
        freeze_norm: keep the statistics, scales and shifts of batch norms as they are in training,
            as the paper does for its ResNets.
        options: further arguments of `timm.create_model`.
        divisor: sides of images are multiples of it.
        longest: no side is longer before it is padded to such a multiple.

    Raises:
        ValueError: no such model, without four maps at doubling strides, or one that takes images
            of fewer sizes.
    """

    def __init__(
        self,
        name: str,
        pretrained: bool = False,
        freeze_norm: bool = False,
        options: dict | None = None,
        divisor: int = 32,
        longest: int = 1333,
    ):
        super().__init__()
        self.in_chans = (options or {}).get("in_chans", 3)
        own = (*VARIANTS, OWN_SMALL)
        rule = f"build_backbone: backbone must be {', '.join(own)} or a timm model"
        check_timm_name(name, rule, own)
        try:
            self.body = _created(name, pretrained, options or {})
        except _FAULTS as error:
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
        self.levels = self._level_names()
        self.channels_last = getattr(self.body, "output_fmt", None) == "NHWC"
        self.freeze_norm = freeze_norm
        if freeze_norm:
            for norm in self._norms():
                norm.requires_grad_(False)
        keep_channels_last(self)
        self._check_sizes(name, divisor, longest)

    def _check_sizes(self, name: str, divisor: int, longest: int) -> None:
        """Raises ValueError where images whose sides are multiples of the divisor do not go
        through, or their maps do not lie at the strides."""
        most = -(-longest // divisor)  # multiples
        h, w = divisor * min(2, most), divisor * min(3, most)
        fault = self._fault(h, w)
        if fault is None:
            return
        advice = "choose another backbone"
        side = next((n for n in (64, 128, 192, 224, 256, 384) if self._fault(n, n) is None), None)
        if side is not None:
            advice = f"size_divisor, shortest_edge and longest_edge must all be {side}"
            if self._fault(side, 2 * side) is None:
                advice = f"size_divisor must be {side}, got {divisor}"
        raise ValueError(
            f"build_backbone: backbone '{name}' does not take images of {h} x {w} ({fault}): "
            f"{advice}"
        )

    @torch.no_grad()
    def _fault(self, *size: int) -> str | None:
        try:
            maps = evaluated(self)(next(self.parameters()).new_zeros(1, self.in_chans, *size))
        except (*_FAULTS, ValueError) as error:
            return str(error).partition("\n")[0] or type(error).__name__
        for found, stride in zip(maps, self.strides):
            if any(abs(n - side / stride) >= 1 for n, side in zip(found.shape[2:], size)):
                return f"a map of {tuple(found.shape[2:])} does not have stride {stride}"
        return None

    def _level_names(self) -> tuple[str, ...]:
        """The modules that give the maps, as far as they have weights, under the names that timm's
        wrappers give them."""
        own = [name for name, _ in self.named_parameters()]
        names = [
            name
            for stage in self.body.feature_info.module_name()
            for name in (f"body.{stage.replace('.', '_')}", f"body.{stage}", f"body.model.{stage}")
            if any(path.startswith(f"{name}.") for path in own)
        ]
        return tuple(dict.fromkeys(names))

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

    def _in_steps(self, x: Tensor) -> bool:
        if torch.is_grad_enabled() and (
            not trains(x) or getattr(self.body, "grad_checkpointing", False)
        ):
            return False
        return resnet.suits(self.body)

    def forward(self, x: Tensor) -> list[Tensor]:  # [B, in_chans, H, W]
        x = x.contiguous(memory_format=torch.channels_last)
        if self._in_steps(x):
            return resnet.maps_of(self.body, x)
        maps = self.body(x)
        return [m.permute(0, 3, 1, 2) for m in maps] if self.channels_last else list(maps)


def _created(name: str, pretrained: bool, options: dict) -> nn.Module:
    """timm's model of a name, for images of any size where it has that option."""
    import timm  # here, because it takes as long to import as torch

    create = pretrained_model if pretrained else partial(timm.create_model, pretrained=False)
    places = {"features_only": True, "out_indices": (-4, -3, -2, -1)}
    try:
        return create(name, **places, **({"strict_img_size": False} | options))
    except TypeError as error:
        if "strict_img_size" not in str(error):
            raise
    return create(name, **places, **options)
