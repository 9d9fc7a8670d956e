"""Cutting a box out of a decoded image and resizing it to a square, antialiased where it shrinks.

Flow: the loaders, per view, with boxes from crops; `CUTS` holds the two ways to do it.
Shapes: image uint8 [H, W, 3]; a box is (top, left, height, width); the result uint8 [size, size, 3].
Holds: `cut_exactly` is Pillow's bilinear resize to the bit, as torchvision has it; `cut_fast` differs
  from it by about one level of 255 on photographs (docs/augmentation.md) and takes a quarter of its time.
Not here: where to cut (crops); the same on a device (resident).
"""

import functools

import cv2
import numpy as np
from PIL import Image

from adco_jax.data import crops
from adco_jax.data.images import Scratch

cv2.setNumThreads(1)  # the loader's threads are enough

SCRATCH = Scratch()
COARSE = 8  # scale beyond which pixels are averaged first: the blur's cost grows with it
STEPS = 32  # scales per octave that get a filter of their own


def cut_exactly(image, box, size, out=None):
  """Pillow's resize: a triangle filter, widened by the scale where it shrinks."""
  top, left, height, width = (int(x) for x in box)
  part = Image.fromarray(image[top : top + height, left : left + width])
  found = np.asarray(part.resize((size, size), Image.Resampling.BILINEAR))
  if out is None:
    return found
  out[...] = found
  return out


def cut_fast(image, box, size, out=None):
  """A blur, then bilinear interpolation: together the triangle filter's width, in OpenCV's vector code.

  Interpolation alone has the filter of scale 1; the blur adds the variance that is missing.
  """
  top, left, height, width = (int(x) for x in box)
  part = image[top : top + height, left : left + width]
  if min(height, width) > COARSE * size:
    part = _reduced(part, size)
    height, width = part.shape[:2]
  if height > size or width > size:
    across, down = _taps(_step(width / size)), _taps(_step(height / size))
    edge = cv2.BORDER_REPLICATE | cv2.BORDER_ISOLATED  # pixels outside of the box play no part
    blurred = SCRATCH.array(part.shape)
    part = cv2.sepFilter2D(part, -1, across, down, dst=blurred, borderType=edge)
  return cv2.resize(part, (size, size), dst=out, interpolation=cv2.INTER_LINEAR)


def cut_centre(image, size):
  """The largest centred square, resized exactly: an image as evaluation sees the whole of it."""
  return cut_exactly(image, crops.centre_boxes(*np.float64(image.shape[:2]), 1.0), size)


CUTS = {"fast": cut_fast, "pillow": cut_exactly}


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
