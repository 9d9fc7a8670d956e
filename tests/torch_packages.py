"""What an export's lines import: torchvision and timm where they are installed, else stand-ins of the same calls.

The stand-ins have the signatures, names and order of modules of torchvision.models.resnet and timm.models.resnet.
"""

import functools
import importlib
import types

import torch
from torch import nn

from tests.torch_reference import Block

DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}


class BasicBlock(Block):
  expansion, bottleneck = 1, False

  def __init__(self, inplanes, planes, stride=1, downsample=None):
    super().__init__(inplanes, planes, stride, self.bottleneck)
    self.downsample = downsample


class Bottleneck(BasicBlock):
  expansion, bottleneck = 4, True


def downsample_conv(inputs, outputs, kernel_size, stride=1):
  conv = nn.Conv2d(inputs, outputs, kernel_size, stride, bias=False)
  return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
  """torchvision's constructor; `channels` is timm's."""

  def __init__(self, block, layers, num_classes=1000, *, channels=(64, 128, 256, 512)):
    super().__init__()
    self.inplanes = 64
    self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
    self.bn1, self.maxpool = nn.BatchNorm2d(64), nn.MaxPool2d(3, 2, 1)
    for i, (planes, blocks) in enumerate(zip(channels, layers, strict=True)):
      setattr(self, f"layer{i + 1}", self._make_layer(block, planes, blocks, 2 if i else 1))
    features = channels[-1] * block.expansion
    self.fc = nn.Linear(features, num_classes) if num_classes else nn.Identity()

  def _make_layer(self, block, planes, blocks, stride=1):
    made = []
    for i in range(blocks):
      step, outputs = stride if not i else 1, planes * block.expansion
      more = step != 1 or self.inplanes != outputs
      down = downsample_conv(self.inplanes, outputs, 1, step) if more else None
      made.append(block(self.inplanes, planes, step, down))
      self.inplanes = outputs
    return nn.Sequential(*made)

  def forward(self, x):
    x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
    for i in range(4):
      x = getattr(self, f"layer{i + 1}")(x)
    return self.fc(x.mean((2, 3)))


def named(name, num_classes=1000):
  block = Bottleneck if name == "resnet50" else BasicBlock
  return ResNet(block, DEPTHS[name], num_classes)


def packages():
  """{module name: module} for sys.modules; empty where all are installed."""
  resnet = {"BasicBlock": BasicBlock, "Bottleneck": Bottleneck, "ResNet": ResNet}
  models = {name: functools.partial(named, name) for name in DEPTHS}
  made = {
    "torchvision": {"models": types.SimpleNamespace(**models)},
    "torchvision.models": models,
    "torchvision.models.resnet": resnet,
    "timm": {"create_model": named},
    "timm.models": {},
    "timm.models.resnet": resnet | {"downsample_conv": downsample_conv},
  }
  found = {}
  for name, content in made.items():
    if not _installed(name.split(".")[0]):
      found[name] = types.ModuleType(name)
      vars(found[name]).update(content)
  return found


def _installed(name):
  try:
    importlib.import_module(name)
  except (ImportError, RuntimeError):
    return False
  return True
