"""ResNet-50, -101 and -152, as in the paper, with torchvision's key names so that its weights load unchanged.

Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, table 1, figure 5.
"""

from itertools import islice

import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

# Bottleneck blocks in each of the four stages (table 1).
STAGE_DEPTHS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3), "resnet152": (3, 8, 36, 3)}
STAGE_WIDTHS = (64, 128, 256, 512)
EXPANSION = 4  # a block's output has four times as many channels as its 3x3 convolution


class Bottleneck(nn.Module):
    """One residual block: 1x1 to narrow, 3x3 to look around, 1x1 to widen, plus the shortcut.

    The stride sits in the 3x3 convolution, not in the first 1x1 as the paper has it: "ResNet v1.5", which is
    what torchvision's weights were trained with (about half a point better on ImageNet).

    In training, each image skips the residual branch with `drop_probability`.
    """

    def __init__(self, in_channels: int, width: int, stride: int, drop_probability: float) -> None:
        super().__init__()
        out_channels = width * EXPANSION
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.stochastic_depth = StochasticDepth(drop_probability, mode="row")
        self.downsample: nn.Sequential | None = None  # the identity shortcut
        if stride != 1 or in_channels != out_channels:
            # The projection shortcut, where shapes differ (option B in the paper).
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map features (N, in_channels, H, W) to (N, 4 * width, H / stride, W / stride)."""
        residual = self.relu(self.bn1(self.conv1(x)))
        residual = self.relu(self.bn2(self.conv2(residual)))
        residual = self.stochastic_depth(self.bn3(self.conv3(residual)))
        shortcut = x if self.downsample is None else self.downsample(x)
        output: Tensor = self.relu(residual + shortcut)
        return output


class ResNet(nn.Module):
    """A bottleneck ResNet: stem, four stages, average pooling, linear head.

    `stochastic_depth` is the probability of skipping the last block; it rises linearly from 0 at the first.
    Source: Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016, section 3.
    """

    def __init__(
        self,
        depths: tuple[int, int, int, int],
        num_classes: int,
        *,
        dropout: float = 0.0,
        stochastic_depth: float = 0.0,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        last = sum(depths) - 1
        blocks: list[Bottleneck] = []
        channels = 64
        for stage, (depth, width) in enumerate(zip(depths, STAGE_WIDTHS, strict=True)):
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(Bottleneck(channels, width, stride, stochastic_depth * len(blocks) / last))
                channels = width * EXPANSION
        stages = iter(blocks)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(*islice(stages, depth)) for depth in depths
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, Bottleneck):
                # Each block starts as the identity, which makes a deep network train from the first step on.
                # Source: Goyal et al., "Accurate, Large Minibatch SGD" (2017), section 5.1.
                nn.init.zeros_(module.bn3.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalized images float (N, 3, H, W), H and W of 32 or more, to logits (N, num_classes)."""
        return self.classify(self.begin(images))

    def begin(self, images: Tensor) -> Tensor:
        """Map normalized images to the features of the first stage, (N, 256, H / 4, W / 4)."""
        features: Tensor = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(images)))))
        return features

    def classify(self, features: Tensor) -> Tensor:
        """Map the features of the first stage to logits (N, num_classes)."""
        x = self.layer4(self.layer3(self.layer2(features)))
        # In fp32 whatever the precision of the rest: in bf16, the two highest logits are often equal.
        with torch.autocast(x.device.type, enabled=False):
            logits: Tensor = self.fc(self.dropout(self.avgpool(x.float()).flatten(1)))
        return logits


def build_resnet(
    arch: str, num_classes: int = 7, *, dropout: float = 0.0, stochastic_depth: float = 0.0
) -> ResNet:
    """Build `resnet50`, `resnet101` or `resnet152` with random weights; the options are those of `ResNet`.

    Raises:
        ValueError: `arch` is none of the three.
    """
    if arch not in STAGE_DEPTHS:
        raise ValueError(f"unknown arch {arch!r}; known are {', '.join(STAGE_DEPTHS)}")
    return ResNet(STAGE_DEPTHS[arch], num_classes, dropout=dropout, stochastic_depth=stochastic_depth)
