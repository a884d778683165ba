"""Backbones: four maps of an image, each at twice the stride of the one before.

Our own Swin; a small ResNet for small images; any other that timm has with such maps. All have
`channels` and `strides`, and give a list of maps [B, C_i, h_i, w_i], finest first.

Letters: B image, C channels, h w map size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..weights.names import check_timm_name
from .swin import VARIANTS, Swin

_DIGITS = "resnet_digits"


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut (He et al., CVPR 2016).

    Args:
        channels: of the input.
        out: channels of the output.
        stride: of the first convolution.
    """

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.shortcut = None
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:  # [B, C, h, w] -> [B, out, h / stride, w / stride]
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = self.norm2(self.conv2(y))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)), inplace=True)


class ResNetDigits(nn.Module):
    """A small ResNet for images of about 64 x 64 pixels.

    Args:
        channels: of the four maps.
        depths: blocks of each map.
    """

    strides = (2, 4, 8, 16)

    def __init__(
        self,
        channels: tuple[int, int, int, int] = (32, 64, 96, 128),
        depths: tuple[int, int, int, int] = (1, 1, 1, 1),
    ):
        super().__init__()
        self.channels = tuple(channels)
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels[0], 3, 2, 1, bias=False), nn.BatchNorm2d(channels[0])
        )
        self.stages = nn.ModuleList()
        before = channels[0]
        for i, (out, depth) in enumerate(zip(channels, depths)):
            first = BasicBlock(before, out, 1 if i == 0 else 2)
            rest = [BasicBlock(out, out, 1) for _ in range(depth - 1)]
            self.stages.append(nn.Sequential(first, *rest))
            before = out
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.to(memory_format=torch.channels_last)  # halves the time of a step on a CPU

    def forward(self, x: Tensor) -> list[Tensor]:  # [B, 3, H, W]
        x = F.relu(self.stem(x.contiguous(memory_format=torch.channels_last)), inplace=True)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


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

        own = (*VARIANTS, _DIGITS)
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


def build_backbone(config) -> nn.Module:
    """The backbone that a model's configuration asks for.

    Args:
        config: has `backbone` ("swin_tiny", "swin_small", "swin_base", "swin_large",
            "resnet_digits" or the name of a timm model), `backbone_pretrained` (timm's weights),
            `backbone_options` (arguments of `Swin`, `ResNetDigits` or `timm.create_model`, and
            "freeze_norm" for the last) and `drop_path_rate`.

    Returns:
        A module from [B, 3, H, W] to four maps, with `channels` and `strides`.

    Raises:
        ValueError: unknown name, no four maps at doubling strides, or pretrained weights of a
            backbone that has none.
    """
    name, options = config.backbone, dict(config.backbone_options)
    if config.drop_path_rate:
        options["drop_path_rate"] = config.drop_path_rate
    if name not in VARIANTS and name != _DIGITS:
        freeze_norm = options.pop("freeze_norm", False)
        return TimmBackbone(name, config.backbone_pretrained, freeze_norm, options)
    if config.backbone_pretrained:
        raise ValueError(
            f"build_backbone: backbone_pretrained must be False for '{name}', whose weights come "
            "with whole models; timm's names have pretrained backbones"
        )
    if name == _DIGITS:
        options.pop("drop_path_rate", None)
        return ResNetDigits(**options)
    return Swin(**VARIANTS[name] | options)
