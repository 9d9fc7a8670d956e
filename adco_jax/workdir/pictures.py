"""Sheets of small images as PNG, for people.

Flow: pretrain draws augmented view pairs, evaluate draws nearest neighbours; report embeds the files.
Shapes: a sheet is a list of rows, a row a list of uint8 [H, W, 3] or None (a gap).
Not here: curves (report).
"""

from collections.abc import Sequence

import jax
import numpy as np
from PIL import Image

GAP = 4  # pixels between images


def save_sheet(path: str, rows: Sequence[Sequence[np.ndarray | None]], side: int) -> None:
  """Draws every image as `side` x `side` pixels (enlarged without smoothing) and writes `path`."""
  columns = max(len(row) for row in rows)
  step = side + GAP
  sheet = np.full((len(rows) * step + GAP, columns * step + GAP, 3), 255, np.uint8)
  for r, row in enumerate(rows):
    for c, image in enumerate(row):
      if image is not None:
        drawn = Image.fromarray(np.asarray(image)).resize((side, side), _filter(image, side))
        top, left = GAP + r * step, GAP + c * step
        sheet[top : top + side, left : left + side] = np.asarray(drawn)
  Image.fromarray(sheet).save(path)


def to_uint8(
  images: jax.Array | np.ndarray, mean: Sequence[float], std: Sequence[float]
) -> np.ndarray:
  """Normalised float images -> uint8."""
  shown = np.asarray(images, np.float32) * np.array(std, np.float32) + np.array(mean, np.float32)
  return np.clip(np.round(shown * 255), 0, 255).astype(np.uint8)


def _filter(image, side):
  return Image.Resampling.NEAREST if image.shape[0] < side else Image.Resampling.BILINEAR
