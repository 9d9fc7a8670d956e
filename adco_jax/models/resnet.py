"""ResNet-8/10/18/34/50/101 with torchvision's arithmetic (v1.5: the stride sits on the 3x3).

Flow: heads.Encoder calls it on normalised images; its pooled features are what probes see.
Shapes: images [B, H, W, 3] -> features [B, F], F = 512 * width (basic) or 2048 * width (bottleneck).
Paper: He et al. 2016; names of the modules are torchvision's, so that weights travel by name.
Holds: with torchvision's weights it computes torchvision's features (padding is explicit: 'SAME' would
  shift every strided convolution).
Not here: the projection (heads), loading of weights.
"""

import functools
import re
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from adco_jax.models.layers import Conv
from adco_jax.models.norm import BatchNorm
from adco_jax.runtime.dtypes import at_least_float32

# name -> (block, blocks per stage). resnet8 (three stages, for 16 pixels) and resnet10 are not torchvision's.
ARCHITECTURES = {
  "resnet8": ("basic", (1, 1, 1)),
  "resnet10": ("basic", (1, 1, 1, 1)),
  "resnet18": ("basic", (2, 2, 2, 2)),
  "resnet34": ("basic", (3, 4, 6, 3)),
  "resnet50": ("bottleneck", (3, 4, 6, 3)),
  "resnet101": ("bottleneck", (3, 4, 23, 3)),
}
STEMS = ("imagenet", "small")


def layer_of(path: Sequence[str]) -> int:
  """Stage of an array below `backbone`, for layer-wise rates: 0 of the stem."""
  stage = re.match(r"layer(\d+)_", path[0])
  return int(stage[1]) if stage else 0


class BasicBlock(nn.Module):
  """3x3, 3x3, and the shortcut."""

  channels: int
  stride: int
  conv: Callable[..., nn.Module]
  norm: Callable[..., nn.Module]
  expansion = 1

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    y = self.conv(self.channels, 3, self.stride, name="conv1")(x)
    y = self.norm(name="bn1")(y, train, relu=True)
    y = self.conv(self.channels, 3, name="conv2")(y)
    return self.norm(name="bn2")(y, train, _shortcut(self, x), relu=True)


class BottleneckBlock(nn.Module):
  """1x1, 3x3 (strided), 1x1 to four times the channels, and the shortcut."""

  channels: int
  stride: int
  conv: Callable[..., nn.Module]
  norm: Callable[..., nn.Module]
  expansion = 4

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    y = self.conv(self.channels, 1, name="conv1")(x)
    y = self.norm(name="bn1")(y, train, relu=True)
    y = self.conv(self.channels, 3, self.stride, name="conv2")(y)
    y = self.norm(name="bn2")(y, train, relu=True)
    y = self.conv(self.channels * self.expansion, 1, name="conv3")(y)
    return self.norm(name="bn3")(y, train, _shortcut(self, x), relu=True)


def _shortcut(block, x):
  """What is added to a block's result: see BatchNorm."""
  channels = block.channels * block.expansion
  if block.stride == 1 and x.shape[-1] == channels:
    return x
  raw = block.conv(channels, 1, block.stride, name="downsample_conv")(x)
  return block.norm(name="downsample_bn"), raw


class ResNet(nn.Module):
  """The backbone f of the paper: images -> pooled features."""

  arch: str
  width: float
  stem: str
  group_size: int
  running_from: str = "mean"
  dtype: jnp.dtype = jnp.float32
  platform: str = "cpu"

  @nn.compact
  def __call__(self, images: jax.Array, train: bool) -> jax.Array:
    kind, stages = ARCHITECTURES[self.arch]
    block = {"basic": BasicBlock, "bottleneck": BottleneckBlock}[kind]
    conv = functools.partial(Conv, dtype=self.dtype, platform=self.platform)
    norm = functools.partial(
      BatchNorm, self.group_size, self.running_from, self.dtype, self.platform
    )
    size, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
    channels = base_channels(self.width)
    x = conv(channels, size, stride, name="conv1")(images.astype(self.dtype))
    x = norm(name="bn1")(x, train, relu=True, pool=self.stem == "imagenet")
    for stage, blocks in enumerate(stages):
      for i in range(blocks):
        stride = 2 if stage > 0 and i == 0 else 1
        name = f"layer{stage + 1}_{i}"
        x = block(channels * 2**stage, stride, conv, norm, name=name)(x, train)
    return jnp.mean(x, (1, 2), dtype=at_least_float32(self.dtype))


def base_channels(width: float) -> int:
  """Channels of the first stage, 64 in the papers."""
  return max(1, round(64 * width))
