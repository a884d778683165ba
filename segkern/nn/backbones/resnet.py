"""timm's ResNets with frozen norms: what follows a convolution in one step.

Letters: B image, C channels, h w map size.
"""

from torch import Tensor, nn

from ...ops._norm_relu import Norm, norm_relu

STAGES = ("layer1", "layer2", "layer3", "layer4")
_SIMPLE = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.Identity)


def suits(body: nn.Module) -> bool:
    """Whether a timm model with four maps is a plain ResNet whose norms keep their statistics, of
    which nothing would be left out: no hooks, no other layers."""
    if [name for name, _ in body.named_children()] != ["conv1", "bn1", "act1", "maxpool", *STAGES]:
        return False
    blocks = [block for stage in STAGES for block in body[stage]]
    outer = [body[name] for name in ("conv1", "bn1", "act1", "maxpool")]
    return all(map(_plain_block, blocks)) and all(map(_plain, outer))


def _hooked(layer: nn.Module) -> bool:
    forward = layer._forward_hooks or layer._forward_pre_hooks
    return bool(forward or layer._backward_hooks or layer._backward_pre_hooks)


def _plain(layer: nn.Module) -> bool:
    if type(layer) is nn.BatchNorm2d and not (
        layer.affine and layer.track_running_stats and not layer.training
    ):
        return False
    return type(layer) in _SIMPLE and not _hooked(layer)


def _plain_block(block: nn.Module) -> bool:
    from timm.models.resnet import BasicBlock, Bottleneck  # here: it takes long to import

    if type(block) not in (BasicBlock, Bottleneck) or block.se is not None:
        return False
    if _hooked(block):
        return False
    shortcut = block.downsample
    if shortcut is not None and [type(m) for m in shortcut] != [nn.Conv2d, nn.BatchNorm2d]:
        return False
    return all(_plain(m) for m in block.modules() if m is not block and m is not shortcut)


def _norm(layer: nn.BatchNorm2d) -> Norm:
    return [layer.running_mean, layer.running_var, layer.weight, layer.bias], layer.eps


def maps_of(body: nn.Module, x: Tensor) -> list[Tensor]:
    """The four maps [B, C_i, h_i, w_i] of images [B, C, H, W], of a model that `suits`."""
    x = body["maxpool"](norm_relu(body["conv1"](x), _norm(body["bn1"])))
    maps = []
    for name in STAGES:
        for block in body[name]:
            x = _block(block, x)
        maps.append(x)
    return maps


def _block(block: nn.Module, x: Tensor) -> Tensor:
    shortcut, norm = x, None
    if block.downsample is not None:
        convolution, layer = block.downsample
        shortcut, norm = convolution(x), _norm(layer)
    x = norm_relu(block.conv1(x), _norm(block.bn1))
    if hasattr(block, "conv3"):  # a bottleneck
        x = norm_relu(block.conv2(x), _norm(block.bn2))
        return norm_relu(block.conv3(x), _norm(block.bn3), shortcut, norm)
    return norm_relu(block.conv2(x), _norm(block.bn2), shortcut, norm)
