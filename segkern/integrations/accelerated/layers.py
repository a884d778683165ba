"""Layers of torch.nn on our kernels: products, small convolutions, group norms."""

from torch import Tensor, nn

from ...nn.maps import normed, pointwise
from ...ops import conv3x3


class PointwiseConv2d(nn.Conv2d):
    """A 1 x 1 convolution as the matrix product that it is; its result is channels last."""

    def forward(self, input: Tensor) -> Tensor:
        return pointwise(self, input)


class Conv3x3(nn.Conv2d):
    """A 3 x 3 convolution by Winograd's filters; its result is channels last."""

    def forward(self, input: Tensor) -> Tensor:
        out = conv3x3(input, self.weight)
        return out if self.bias is None else out.add_(self.bias.to(out.dtype)[:, None, None])


class GroupNorm(nn.GroupNorm):
    """A group norm of a channels-last map."""

    def forward(self, input: Tensor) -> Tensor:
        return normed(input, self)


def convolution(layer: nn.Module) -> type[nn.Module] | None:
    """The class above that computes what a layer does, if there is one."""
    if type(layer) is nn.GroupNorm and layer.affine:
        return GroupNorm
    if type(layer) is not nn.Conv2d or layer.groups > 1 or layer.stride != (1, 1):
        return None
    if layer.dilation != (1, 1) or layer.padding_mode != "zeros":
        return None
    shape = layer.kernel_size, layer.padding
    return {((1, 1), (0, 0)): PointwiseConv2d, ((3, 3), (1, 1)): Conv3x3}.get(shape)
