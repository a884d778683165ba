"""Backbones: four maps of an image, each at twice the stride of the one before.

Our own Swin and DiNAT; a small ResNet for small images; any other that timm has with such maps.
All have `channels`, `strides` and `levels` (names of the parts at which the maps end), and give a
list of maps [B, C_i, h_i, w_i], finest first. Convolutions keep their weights channels-last in
memory, as they read maps; FSDP's `fully_shard` takes a model after
`model.to(memory_format=torch.contiguous_format)`, which changes no result.

Letters: B image, C channels, h w map size.
"""

from torch import nn

from . import dinat
from .dinat import Dinat
from .resnet_digits import ResNetDigits
from .swin import VARIANTS, Swin
from .swin_timm import load_pretrained
from .timm_backbone import OWN_SMALL, TimmBackbone


def build_backbone(config, channels: int = 3) -> nn.Module:
    """The backbone that a model's configuration asks for.

    Args:
        config: has `backbone` ("swin_tiny", "swin_small", "swin_base", "swin_large",
            "dinat_mini", "dinat_tiny", "dinat_small", "dinat_base", "dinat_large",
            "resnet_digits" or the name of a timm model), `backbone_pretrained` (timm's weights),
            `backbone_options` (arguments of `Swin`, `Dinat`, `ResNetDigits` or
            `timm.create_model`, and "freeze_norm" for the last), `drop_path_rate`, `size_divisor`
            and `longest_edge`, or `input` where that is None.
        channels: of the images; timm fits pretrained weights of the first layer to them.

    Returns:
        A module from [B, channels, H, W] to four maps, with `channels` and `strides`.

    Raises:
        ValueError: unknown name, no four maps at doubling strides, or pretrained weights that a
            backbone does not have or that cannot be downloaded.
    """
    name, options = config.backbone, dict(config.backbone_options)
    if config.drop_path_rate:
        options["drop_path_rate"] = config.drop_path_rate
    if channels != 3:
        options["in_chans"] = channels
    if name not in VARIANTS | dinat.VARIANTS and name != OWN_SMALL:
        freeze_norm = options.pop("freeze_norm", False)
        longest = config.longest_edge or max(config.input.resized((1024, 1024)))
        sizes = config.size_divisor, longest
        return TimmBackbone(name, config.backbone_pretrained, freeze_norm, options, *sizes)
    if config.backbone_pretrained and name not in VARIANTS:
        raise ValueError(
            f"build_backbone: backbone_pretrained must be False for '{name}', of which timm "
            "has no weights"
        )
    if name == OWN_SMALL:
        options.pop("drop_path_rate", None)
        return ResNetDigits(**options)
    if name in dinat.VARIANTS:
        return Dinat(**dinat.VARIANTS[name] | options)
    backbone = Swin(**VARIANTS[name] | options)
    if config.backbone_pretrained:
        load_pretrained(backbone, name)
    return backbone
