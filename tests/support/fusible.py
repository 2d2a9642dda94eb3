"""Models written as people write them, for the tests of fusing: ResNets, MobileNetV2, DenseNet, timm's habits."""
# ruff: noqa: RET504

from __future__ import annotations

import torch
import torch.nn.functional as F
from networks import BasicBlock
from torch import Tensor, nn


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class Bottleneck(nn.Module):
    """torchvision's, with its forward in another method."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        width = outputs // 4
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(inputs, outputs, stride)

    def _forward_impl(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        identity = self.downsample(x) if self.downsample is not None else x
        out = out + identity
        return self.relu(out)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)


class Cifar(nn.Module):
    """The ResNet block most often copied for CIFAR: functions, and a shortcut that may be empty."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(inputs, outputs, stride), conv(outputs, outputs)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.shortcut = shortcut(inputs, outputs, stride) or nn.Sequential()

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        out = F.relu(out)
        return out


class PreActivation(nn.Module):
    """He et al. 2016b: batch norm and activation before the convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1, self.conv2 = conv(inputs, outputs, stride), conv(outputs, outputs)
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        out = F.relu(self.bn1(x))
        identity = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out += identity
        return out


class ConvBNReLU(nn.Sequential):
    """torchvision's: a Sequential with an __init__ of its own."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, activation: type[nn.Module] = nn.ReLU6) -> None:
        super().__init__(conv(inputs, outputs, stride), nn.BatchNorm2d(outputs), activation(inplace=True))
        self.out_channels = outputs


class InvertedResidual(nn.Module):
    """torchvision's block of MobileNetV2."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.use_res_connect = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            ConvBNReLU(inputs, 2 * inputs),
            ConvBNReLU(2 * inputs, 2 * inputs, stride),
            nn.Conv2d(2 * inputs, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.use_res_connect:
            return x + self.conv(x)
        return self.conv(x)


class DenseLayer(nn.Module):
    """torchvision's layer of DenseNet: lists, a helper, checkpointing."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(inputs), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inputs, 8, 1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.conv2 = conv(8, outputs - inputs)
        self.memory_efficient = False

    def bn_function(self, inputs: list[Tensor]) -> Tensor:
        concated_features = torch.cat(inputs, 1)
        return self.conv1(self.relu1(self.norm1(concated_features)))

    def forward(self, input: Tensor | list[Tensor]) -> Tensor:
        prev_features = [input] if isinstance(input, Tensor) else input
        if self.memory_efficient:

            def closure(*inputs):
                return self.bn_function(list(inputs))

            bottleneck_output = torch.utils.checkpoint.checkpoint(closure, *prev_features, use_reentrant=False)
        else:
            bottleneck_output = self.bn_function(prev_features)
        new_features = self.conv2(self.relu2(self.norm2(bottleneck_output)))
        return torch.cat([*prev_features, new_features], 1)


class Timm(nn.Module):
    """timm's habits: Identities in the middle, parts that may be None, an attribute for the activation."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, act_layer: type[nn.Module] = nn.SiLU) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(inputs, outputs, stride), conv(outputs, outputs)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.drop_block = nn.Identity()
        self.act1, self.act2 = act_layer(inplace=True), act_layer(inplace=True)
        self.se = None
        self.drop_path = None
        self.downsample = shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.drop_block(x)
        x = self.act1(x)
        x = self.conv2(x)
        x = self.bn2(x)
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        x = self.act2(x)
        return x


class Forms(nn.Module):
    """Every way of writing an activation and an addition."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.bns = nn.ModuleList(nn.BatchNorm2d(inputs) for _ in range(9))
        self.named = nn.BatchNorm2d(inputs)
        self.last = conv(inputs, outputs)
        self.function = F.silu

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bns[0](x) + x)
        x = F.leaky_relu(x + self.bns[1](x), 0.2)
        x = F.elu(torch.add(self.bns[2](x), x), alpha=0.5, inplace=True)
        x = self.bns[3](x).add_(x).relu_()
        y = self.bns[4](x)
        y.add_(x)
        x = F.gelu(y, approximate="tanh")
        w = self.bns[5](x).add(x)
        z = torch.sigmoid(w)
        h = self.bns[6](z)
        x = self.function(h)
        for i in range(7, 9):
            x = self.bns[i](x)
            x = x + z
            x = x.tanh()
        x = self.named(x)
        return self.last(F.relu6(x, inplace=True))


BLOCKS = {
    # how many calls of batch norms carry an activation, without and with a shortcut of its own
    BasicBlock: (2, 2),
    Bottleneck: (3, 3),
    Cifar: (2, 2),
    PreActivation: (2, 2),
    InvertedResidual: (2, 2),
    DenseLayer: (2, 2),
    Timm: (2, 2),
    Forms: (10, 10),
}


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradients and buffers of one training step."""
    x = x.clone().requires_grad_()
    y = model(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()]), *model.buffers()]


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    """Raise unless what `step` returned of two models in float64 is the same."""
    for a, b in zip(found, expected, strict=True):
        # float64 on both sides: sums of some hundred products of numbers below 1e3
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
