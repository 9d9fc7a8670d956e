"""Lines with which another program makes the network that a file was exported from, and loads it.

Flow: export asks `refusal` before any work; card prints `lines`, tests run them.
Holds: what torchvision and timm make by name is made by name; another width, stem or depth is their own
  class with the parts replaced, so that the file loads strictly.
Not here: names inside a file (torch_weights, detectron2).
"""

import os
from collections.abc import Sequence

from adco_jax.models import vit as transformers
from adco_jax.models.resnet import ARCHITECTURES, base_channels
from adco_jax.models.vit import Form

NONE = Form()
NAMED = ("resnet18", "resnet34", "resnet50", "resnet101")  # by torchvision and by timm


def refusal(form: str, arch: str, width: float, stem: str, vit: Form = NONE) -> str:
  """Why a program has no such network; '' where `form` can be made of it. `vit`: what a ViT looks like."""
  if arch in transformers.ARCHITECTURES:
    more = vit.pool != "token" or vit.registers or vit.layer_scale
    what = "a mean of patches, registers or LayerScale"
    none = {
      "detectron2": f"detectron2 has no {arch}",
      "torchvision": f"torchvision has no ViT with {what}" if more else "",
    }
    return none.get(form, "")
  if arch not in ARCHITECTURES and form != "stablehlo":
    return f"only stablehlo holds {arch}, whose names no other program knows"
  if form != "detectron2":
    return ""
  if arch not in NAMED:
    return f"detectron2 has no {arch}"
  if stem != "imagenet":
    return f"detectron2 has no {stem} stem"
  if ARCHITECTURES[arch][0] == "basic" and base_channels(width) != 64:
    return f"detectron2 makes {arch} at width 1 only, this is {width:g}"
  return ""


def lines(
  form: str,
  file: str,
  *,
  arch: str,
  width: float,
  stem: str,
  classes: int,
  size: int,
  mean: Sequence[float],
  std: Sequence[float],
  vit: Form = NONE,
) -> list[str]:
  """A fenced block for `file` in format `form`; `classes`: of a classifier, 0 without; `vit`: what a ViT looks like."""
  name = os.path.basename(file)
  if arch in transformers.ARCHITECTURES and form in ("timm", "torchvision"):
    make = {"timm": _timm_vit, "torchvision": _torchvision_vit}[form]
    made = make(transformers.sizes(arch, width, vit), vit, classes)
    return ["```python", *made, *_load(name), "```"]
  network = (*ARCHITECTURES.get(arch, ("", ())), base_channels(width), stem == "small")
  made = {
    "torchvision": lambda: [*_torchvision(arch, *network, classes), *_load(name)],
    "timm": lambda: [*_timm(arch, *network, classes), *_load(name)],
    "detectron2": lambda: _detectron2(name, arch, network[2], mean, std),
    "npz": lambda: _npz(name, classes),
    "stablehlo": lambda: _stablehlo(name, size),
  }[form]()
  return ["```yaml" if form == "detectron2" else "```python", *made, "```"]


def classifier(form: str, arch: str) -> str:
  """What a classifier is called in a file."""
  if arch not in transformers.ARCHITECTURES:
    return "fc"
  return {"timm": "head", "torchvision": "heads.head"}.get(form, "fc")


def _timm_vit(sizes, form, classes):
  dim, depth, heads = sizes
  pool = {"token": "token", "mean": "avg"}[form.pool]
  more = [f"init_values={form.layer_scale:g}"] if form.layer_scale else []
  more += [f"reg_tokens={form.registers}", "no_embed_class=True"] if form.registers else []
  arguments = [
    f"img_size={form.grid * form.patch}", f"patch_size={form.patch}", f"embed_dim={dim}", f"depth={depth}", f"num_heads={heads}",
    f"num_classes={classes}", f'global_pool="{pool}"', "fc_norm=False", "dynamic_img_size=True", *more,
  ]  # fmt: skip
  return [
    "from timm.models.vision_transformer import VisionTransformer  # timm 1.0 or newer",
    f"model = VisionTransformer({', '.join(arguments)})",
  ]


def _torchvision_vit(sizes, form, classes):
  dim, depth, heads = sizes
  arguments = (
    f"image_size={form.grid * form.patch}, patch_size={form.patch}, num_layers={depth}, num_heads={heads}, "
    f"hidden_dim={dim}, mlp_dim={4 * dim}, num_classes={classes or 1}"
  )
  made = [
    "from torch import nn",
    "from torchvision.models import VisionTransformer",
    f"model = VisionTransformer({arguments})",
  ]
  return made if classes else [*made, "model.heads = nn.Identity()"]


def _torchvision(arch, kind, stages, channels, small, classes):
  block = {"basic": "BasicBlock", "bottleneck": "Bottleneck"}[kind]
  head = _head(kind, stages, channels, classes)
  if arch in NAMED and channels == 64:
    made = ["import torchvision", f"model = torchvision.models.{arch}()"]
  else:
    depths = [*stages, 1, 1, 1][:4]
    made = [
      f"from torchvision.models.resnet import {block}, ResNet",
      f"model = ResNet({block}, {depths})",
    ]
  made = ["from torch import nn", *made, *_stem(channels, small)]
  if channels != 64:
    made.append(f"model.inplanes = {channels}")
    for i, depth in enumerate(stages):
      stride = ", stride=2" if i else ""
      made.append(
        f"model.layer{i + 1} = model._make_layer({block}, {channels * 2**i}, {depth}{stride})"
      )
  made += [f"model.layer{i + 1} = nn.Identity()" for i in range(len(stages), 4)]
  return [*made, f"model.fc = {head}"]


def _timm(arch, kind, stages, channels, small, classes):
  block = {"basic": "BasicBlock", "bottleneck": "Bottleneck"}[kind]
  if arch in NAMED and channels == 64:
    made = ["import timm", f'model = timm.create_model("{arch}", num_classes={classes})']
    return ["from torch import nn", *made, *_stem(channels, small)]
  widths = tuple(channels * 2**i for i in range(len(stages)))
  made = [
    "from torch import nn",
    f"from timm.models.resnet import {block}, ResNet, downsample_conv  # timm 1.0 or newer",
    f"model = ResNet({block}, {stages}, num_classes={classes}, channels={widths})",
    *_stem(channels, small),
  ]
  if channels != 64:
    more = f", downsample=downsample_conv({channels}, {4 * channels}, 1)"
    more = more if kind == "bottleneck" else ""
    made.append(f"model.layer1[0] = {block}({channels}, {channels}{more})")
  return [*made, *(f"model.layer{i + 1} = nn.Identity()" for i in range(len(stages), 4))]


def _stem(channels, small):
  made = []
  if small or channels != 64:
    made.append(
      f"model.conv1 = nn.Conv2d(3, {channels}, {'3, 1, 1' if small else '7, 2, 3'}, bias=False)"
    )
  if channels != 64:
    made.append(f"model.bn1 = nn.BatchNorm2d({channels})")
  return [*made, "model.maxpool = nn.Identity()"] if small else made


def _head(kind, stages, channels, classes):
  features = channels * 2 ** (len(stages) - 1) * (4 if kind == "bottleneck" else 1)
  return f"nn.Linear({features}, {classes})" if classes else "nn.Identity()"


def _load(name):
  if name.endswith(".pth"):
    read = ["import torch", f'weights = torch.load("{name}")']
  else:
    read = ["from safetensors.torch import load_file", f'weights = load_file("{name}")']
  return [*read, "model.load_state_dict(weights, strict=True)", "model.eval()"]


def _detectron2(name, arch, channels, mean, std):
  out = channels * (4 if ARCHITECTURES[arch][0] == "bottleneck" else 1)
  pixels = lambda values: ", ".join(f"{255 * value:.6g}" for value in values)
  return [
    "INPUT:",
    "  FORMAT: RGB",
    "MODEL:",
    f"  WEIGHTS: {name}",
    f"  PIXEL_MEAN: [{pixels(mean)}]",
    f"  PIXEL_STD: [{pixels(std)}]",
    "  RESNETS:",
    f"    DEPTH: {arch.removeprefix('resnet')}",
    "    STRIDE_IN_1X1: False",
    f"    STEM_OUT_CHANNELS: {channels}",
    f"    RES2_OUT_CHANNELS: {out}",
    f"    WIDTH_PER_GROUP: {channels}",
  ]


def _npz(name, classes):
  head = "the classifier as fc, " if classes else ""
  head += f"the projection as a Sequential {'projection' if classes else 'fc'}"
  return [
    "import numpy",
    f'weights = dict(numpy.load("{name}"))  # names and layouts of torchvision, {head}',
  ]


def _stablehlo(name, size):
  return [
    "from jax import export",
    f'program = export.deserialize(bytearray(open("{name}", "rb").read()))',
    f"features = program.call(images)  # uint8 [b, {size}, {size}, 3] -> float32 [b, F]",
  ]
