"""The picture of what a ViT's class token looks at, which the task `knn` draws beside its result.

Flow: evaluate calls `save_attention` of its result; report shows the file.
Shapes: a row is a test image, the mean over the heads and up to six heads, each map [h, w] of patches scaled to its own maximum.
Paper: Caron et al. 2021 (DINO, visualize_attention.py): the last block's softmax(q k / sqrt(f)) of the class token.
Holds: colours are cividis, which the colour-blind read as others do; one file a result, drawn again only for another number of
  images or after it was taken away.
Not here: the shares (evaluation.features), where files lie (results).
"""

import functools
import json

import numpy as np
from ml_collections import ConfigDict

from adco_jax.evaluation import results, signals
from adco_jax.report import feature_map
from adco_jax.runtime import sharding
from adco_jax.runtime.console import tell
from adco_jax.tasks.scoring import Frozen
from adco_jax.workdir import pictures

HEADS, SIDE = 6, 96  # heads that are shown, pixels of an image and of a map
LETTERS = 20  # of a class's name


def save_attention(frozen: Frozen, config: ConfigDict, path: str) -> None:
  """Draws the picture of the result at `path`, if the encoder is a ViT, it is wanted and not there."""
  picture = results.picture_of(path, "attention")
  rows = signals.evenly(frozen.test.num_examples, config.attention)
  note = json.dumps({"images": len(rows)})
  if frozen.attend is None or not len(rows) or feature_map.note_of(picture) == note:
    return
  images, shares = _look(frozen, rows)
  if not np.isfinite(shares).all():
    tell("no picture of attention: it is not finite")
    return
  classes, targets = frozen.test.classes, frozen.test.targets[rows]
  sheet = [[image, *map(colour, maps(s))] for image, s in zip(images, shares, strict=True)]
  labels = [describe(str(classes[t]), s) for t, s in zip(targets, shares, strict=True)]
  heads = [f"head {number}" for number in range(1, min(HEADS, shares.shape[1]) + 1)]
  titles = ["image", *(["mean of heads"] if len(heads) > 1 else []), *heads]
  pictures.save_sheet(picture, sheet, SIDE, labels, titles, note)
  tell(f"attention: {picture}")


def _look(frozen, rows):
  """(uint8 [n, H, W, 3] as the encoder sees them, shares [n, heads, h, w])."""
  attend = functools.partial(frozen.attend, frozen.trained)
  view = frozen.view | {"batch_size": min(frozen.view["batch_size"], sharding.round_up(len(rows)))}
  images, shares = [], []
  for x, count in frozen.loaders.of("test").evaluation(rows, **view):
    images.append(np.asarray(x)[:count])
    shares.append(np.asarray(attend(x))[:count])
  return np.concatenate(images), np.concatenate(shares)


def maps(shares: np.ndarray) -> np.ndarray:
  """[1 + heads, h, w] of shares [heads, h, w] of one image: the mean, then the first HEADS; of one head that alone."""
  if len(shares) == 1:
    return shares
  return np.concatenate([shares.mean(0, keepdims=True), shares[:HEADS]])


def colour(shares: np.ndarray) -> np.ndarray:
  """uint8 [h, w, 3] of shares [h, w]: cividis, from 0 to their maximum."""
  from matplotlib import colormaps

  painted = colormaps["cividis"](shares / max(shares.max(), 1e-30), bytes=True)
  return painted[..., :3]


def describe(name: str, shares: np.ndarray) -> str:
  """Beside a row: its class, the peak of the mean over the heads in even shares of the patches, and what all patches get."""
  mean = shares.mean(0)
  total = mean.sum()
  short = name if len(name) <= LETTERS else f"{name[: LETTERS - 3]}..."
  return (
    f"{short}\npeak {mean.max() * mean.size / max(total, 1e-30):.1f} x even\n{total:.0%} on patches"
  )
