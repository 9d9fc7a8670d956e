"""Cutting a box out of a decoded image and resizing it to a square, antialiased where it shrinks.

Flow: the loaders, per view, with boxes from crops; `CUTS` holds the two ways to do it, `scale_for` how much smaller the
  image may be decoded for one of them.
Shapes: image uint8 [H, W, 3]; a box is (top, left, height, width), in whole pixels, of an image that was decoded smaller
  in parts of them; the result uint8 [size, size, 3].
Holds: `cut_exactly` is Pillow's bilinear resize to the bit, as torchvision has it; `cut_fast` differs
  from it by about one level of 255 on photographs (docs/augmentation.md) and takes a third of its time.
Not here: where to cut (crops); the same on a device (resident).
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from adco_jax.data.images import Scratch
from adco_jax.views import crops

SCRATCH = Scratch()
Box = Sequence[float] | np.ndarray  # top, left, height, width in pixels

COARSE = 8  # scale beyond which pixels are averaged first: the blur's cost grows with it
STEPS = 32  # scales per octave that get a filter of their own
SMALLEST = 8  # libjpeg decodes the 8 x 8 pixels of a block to 4 x 4, 2 x 2 or 1 in vector code


def cut_exactly(
  image: np.ndarray, box: Box, size: int, out: np.ndarray | None = None
) -> np.ndarray:
  """Pillow's resize: a triangle filter, widened by the scale where it shrinks."""
  top, left, height, width = (int(x) for x in box)
  part = Image.fromarray(image[top : top + height, left : left + width])
  resized = np.asarray(part.resize((size, size), Image.Resampling.BILINEAR))
  if out is None:
    return resized
  out[...] = resized
  return out


def cut_fast(image: np.ndarray, box: Box, size: int, out: np.ndarray | None = None) -> np.ndarray:
  """A blur, then bilinear interpolation: together the triangle filter's width, in OpenCV's vector code.

  Interpolation alone has the filter of scale 1; the blur adds the variance that is missing.
  """
  top, left, height, width = box
  part = image[int(top) : math.ceil(top + height), int(left) : math.ceil(left + width)]
  if min(height, width) > COARSE * size:
    part = _reduced(part, size)
    height, width = part.shape[:2]
  if height > size or width > size:
    across, down = _taps(_step(width / size)), _taps(_step(height / size))
    edge = cv2.BORDER_REPLICATE | cv2.BORDER_ISOLATED  # pixels outside of the box play no part
    blurred = SCRATCH.array(part.shape)
    part = cv2.sepFilter2D(part, -1, across, down, dst=blurred, borderType=edge)
  if part.shape[:2] == (height, width):
    return cv2.resize(part, (size, size), dst=out, interpolation=cv2.INTER_LINEAR)
  return _resized_between(part, (top % 1, left % 1, height, width), size, out)


def cut_centre(image: np.ndarray, size: int, fraction: float = 1.0) -> np.ndarray:
  """The centred square of this share of the short side, resized exactly: an image as evaluation sees it."""
  height, width = np.array(image.shape[:2], float)
  return cut_exactly(image, crops.centre_boxes(height, width, fraction), size)


def scale_for(boxes: Iterable[Box], sizes: Sequence[int]) -> int:
  """The scale at which an image is decoded, 1, 2, 4 or 8: the most by which each of these boxes shrinks, on both sides."""
  scale = SMALLEST
  for box, size in zip(boxes, sizes, strict=True):
    while scale > 1 and min(box[2:]) < scale * size:
      scale //= 2
    if scale == 1:
      break  # most images are not that large, and say so in their first box
  return scale


class Way(NamedTuple):
  """One way to cut views: `crop_and_resize` as above, and `scale_for`, how much smaller it lets an image be decoded."""

  crop_and_resize: Callable[..., np.ndarray]
  scale_for: Callable[[Iterable[Box], Sequence[int]], int]


CUTS = {"fast": Way(cut_fast, scale_for), "pillow": Way(cut_exactly, lambda boxes, sizes: 1)}


def _resized_between(part, box, size, out):
  """Bilinear interpolation of a box that begins or ends between pixels."""
  top, left, height, width = box
  down, across = height / size, width / size
  to_part = np.array([[across, 0, left + across / 2 - 0.5], [0, down, top + down / 2 - 0.5]], float)
  how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
  edge = cv2.BORDER_REPLICATE
  return cv2.warpAffine(part, to_part, (size, size), dst=out, flags=how, borderMode=edge)


def _reduced(part, size):
  """Averages of whole pixels, so many that a scale of about three is left."""
  height, width = (side // (side // (3 * size)) for side in part.shape[:2])
  return cv2.resize(part, (width, height), interpolation=cv2.INTER_AREA)


def _step(scale):
  return max(0, round(STEPS * np.log2(scale)))


@functools.cache
def _taps(step):
  """Symmetric blur, float32 [2 r + 1], of variance (scale^2 - 1) / 6 for scale = 2^(step / STEPS).

  A triangle of half-width w has variance w^2 / 6; those of sampled triangles are looked up.
  """
  scale = 2 ** (step / STEPS)
  widths, variances = _sampled_triangles(4 * scale)
  width = np.interp((scale**2 - 1) / 6, variances, widths)
  reach = max(0, int(np.ceil(width)) - 1)
  taps = 1 - np.abs(np.arange(-reach, reach + 1)) / width
  return np.float32(taps / taps.sum())


def _sampled_triangles(largest):
  """Half-widths from 1 to `largest`, and the variance of each triangle sampled at whole numbers."""
  widths = np.arange(1, largest + 1, 1 / 64)[:, None]
  at = np.arange(-int(largest) - 1, int(largest) + 2)[None]
  taps = np.maximum(0, 1 - np.abs(at) / widths)
  return widths[:, 0], (taps * at**2).sum(1) / taps.sum(1)
