"""detectron2's names of a ResNet backbone, as its `R-50` models want them.

Flow: export -> `rename` -> pickle; `restore_names` is the way back, for the check.
Paper: detectron2/modeling/backbone/resnet.py (stem, res2..res5, shortcut, conv*.norm).
Holds: one name for one name; `num_batches_tracked` is left out, detectron2's frozen norms have none.
"""

import re

import numpy as np

COUNTER = "num_batches_tracked"


def rename(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """A state dict without fc in torchvision's names -> the same in detectron2's."""
  return {_there(name): value for name, value in state.items() if not name.endswith(COUNTER)}


def restore_names(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The inverse of `rename`."""
  return {_here(name): value for name, value in state.items()}


def _there(name):
  if not name.startswith("layer"):
    name = f"stem.{name}"
  name = re.sub(r"^layer(\d)", lambda m: f"res{int(m[1]) + 1}", name)
  name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
  return re.sub(r"bn(\d)", r"conv\1.norm", name)


def _here(name):
  name = name.removeprefix("stem.")
  name = re.sub(r"^res(\d)", lambda m: f"layer{int(m[1]) - 1}", name)
  name = name.replace("shortcut.norm", "downsample.1").replace("shortcut", "downsample.0")
  return re.sub(r"conv(\d)\.norm", r"bn\1", name)
