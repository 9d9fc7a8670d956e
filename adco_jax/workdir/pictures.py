"""Sheets of small images as PNG, for people.

Flow: pretrain draws augmented view pairs, evaluate nearest neighbours, gallery rows of negatives; report embeds the files.
Shapes: a sheet is a list of rows, a row a list of uint8 [H, W, 3] or None (a gap).
Not here: curves (report).
"""

from collections.abc import Sequence

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from adco_jax.runtime.files import whole

GAP = 4  # pixels between images
LETTERS = 13  # height of a text


def save_sheet(
  path: str,
  rows: Sequence[Sequence[np.ndarray | None]],
  side: int,
  labels: Sequence[str] = (),
  titles: Sequence[str] = (),
  note: str = "",
) -> None:
  """Draws every image as `side` x `side` pixels (enlarged without smoothing) and writes `path`.

  `labels`: a text of some lines left of each row, a heading where a row has no images; `titles`: one above each column, which
  may run on over those whose own are empty; `note`: kept in the file.
  """
  font, step = _font(), side + GAP
  heights = [step if row else LETTERS + 3 * GAP for row in rows]
  top = GAP + (_lines(titles) * (LETTERS + GAP) if titles else 0)
  left = GAP + _width([text for text, row in zip(labels, rows, strict=False) if row], font)
  columns = max(len(row) for row in rows)
  sheet = Image.new("RGB", (left + columns * step, top + sum(heights)), "white")
  pen = ImageDraw.Draw(sheet)
  for c, text in enumerate(titles):
    pen.text((left + c * step, GAP), text, "black", font)
  for r, row in enumerate(rows):
    y = top + sum(heights[:r])
    if labels:
      pen.text((GAP, y if row else y + GAP), labels[r], "black", font)
    for c, image in enumerate(row):
      if image is not None:
        drawn = Image.fromarray(np.asarray(image)).resize((side, side), _filter(image, side))
        sheet.paste(drawn, (left + c * step, y))
  info = PngImagePlugin.PngInfo()
  if note:
    info.add_text("Description", note)
  with whole(path) as part:
    sheet.save(part, "PNG", pnginfo=info)


def to_uint8(
  images: jax.Array | np.ndarray, mean: Sequence[float], std: Sequence[float]
) -> np.ndarray:
  """Normalised float images -> uint8."""
  shown = np.asarray(images, np.float32) * np.array(std, np.float32) + np.array(mean, np.float32)
  return np.clip(np.round(shown * 255), 0, 255).astype(np.uint8)


def _font():
  """DejaVu Sans, which comes with matplotlib: Pillow's own lacks most letters that names of classes are written in."""
  import matplotlib

  return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", LETTERS - 1)


def _lines(texts):
  """Of the longest text."""
  return max(text.count("\n") + 1 for text in texts)


def _width(labels, font):
  """Of the column of labels, in pixels."""
  lines = [font.getlength(line) for text in labels for line in text.splitlines()]
  return round(max(lines)) + 4 * GAP if lines else 0


def _filter(image, side):
  return Image.Resampling.NEAREST if image.shape[0] < side else Image.Resampling.BILINEAR
