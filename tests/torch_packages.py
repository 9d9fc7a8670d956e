"""torchvision and timm, which tests load exports into, beside a PyTorch that was built for the CPU.

torchvision's compiled operators are of the CUDA build and cannot be loaded there; none is used here, but their names must be
known when it is imported.
"""

import contextlib
import importlib

import torch

_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
  with contextlib.suppress(RuntimeError):  # it is known already
    _OPERATORS.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

torchvision = importlib.import_module("torchvision")
timm = importlib.import_module("timm")
