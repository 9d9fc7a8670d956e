"""Where each view is cut: RandomResizedCrop as torchvision draws it, for a whole batch at once.

Flow: a loader takes `random_draws` of (seed, step) and, once it knows an image's size, turns them into
  a box with `boxes`; where all images have one size `random_boxes` does both. Evaluation cuts `centre_boxes`.
Shapes: a box is (top, left, height, width) in pixels of the decoded image; in training of that and what views.pad puts around it.
Holds: all loaders receive the same boxes; no loader draws.
Not here: cutting and resizing (pipeline, resident).
"""

import math
from collections.abc import Sequence

import numpy as np

from adco_jax.runtime import rng

Size = np.ndarray | np.float64  # of one image or of many

TRIES = 10  # torchvision.transforms.RandomResizedCrop.get_params


def random_draws(
  seed: int,
  step: int,
  batch_size: int,
  scales: Sequence[tuple[float, float]],
  ratio: tuple[float, float],
) -> np.ndarray:
  """Everything a box needs but the image's size, float64 [B, V, TRIES, 4].

  `scales`: per view the (smallest, largest) share of the image's area; `ratio`: bounds of width over
  height, drawn log-uniformly. Components: width and height over sqrt(image area), and the uniform
  draws that place the box vertically and horizontally.
  """
  views = [
    _shares(_uniform(seed, step, view, batch_size), scale, ratio)
    for view, scale in enumerate(scales)
  ]
  return np.stack(views, 1)


def random_boxes(
  seed: int,
  steps: Sequence[int],
  batch_size: int,
  scales: Sequence[tuple[float, float]],
  ratio: tuple[float, float],
  height: np.float64,
  width: np.float64,
) -> np.ndarray:
  """`boxes` of the `random_draws` of n steps where all images are of one size, float64 [n, B, V, 4].

  Nearly all first tries fit, and nothing else is computed for those.
  """
  views = range(len(scales))
  uniform = np.array([[_uniform(seed, step, v, batch_size) for v in views] for step in steps])
  low, high = (np.broadcast_to(x[:, None, None], (*uniform.shape[:3], 1)) for x in np.array(scales).T)  # fmt: skip
  tries, fits = _tries(_shares(uniform[..., :1, :], (low, high), ratio), height, width)
  first, rest = tries[..., 0, :], ~fits[..., 0]
  draws = _shares(uniform[rest], (low[rest], high[rest]), ratio)
  first[rest] = boxes(draws, height, width, ratio)
  return first.swapaxes(1, 2)


def _uniform(seed, step, view, batch_size):
  """All that is drawn for a view, [B, TRIES, 4] in [0, 1)."""
  return rng.host_rng_for(seed, rng.CROPS, step, view).random_sample((batch_size, TRIES, 4))


def _shares(uniform, scale, ratio):
  """Uniform numbers [..., 4] as the components of `random_draws`."""
  area = scale[0] + (scale[1] - scale[0]) * uniform[..., 0]
  low, high = np.log(ratio)
  aspect = np.exp(low + (high - low) * uniform[..., 1])
  sides = np.stack([np.sqrt(area * aspect), np.sqrt(area / aspect)], -1)
  return np.concatenate([sides, uniform[..., 2:]], -1)


def _tries(draws, height, width):
  """Draws [..., T, 4], sizes that broadcast to [..., T] -> boxes [..., T, 4], whether each fits [..., T]."""
  root = np.sqrt(height * width)
  w, h = np.round(root * draws[..., 0]), np.round(root * draws[..., 1])
  fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
  top, left = np.floor(draws[..., 2] * (height - h + 1)), np.floor(draws[..., 3] * (width - w + 1))
  return np.stack([top, left, h, w], axis=-1), fits


def boxes(draws: np.ndarray, height: Size, width: Size, ratio: tuple[float, float]) -> np.ndarray:
  """Draws [..., TRIES, 4] and float64 sizes that broadcast to [...] -> boxes float64 [..., 4].

  The first try that fits inside the image wins; if none does, the largest centred box within `ratio`.
  Values are whole numbers.
  """
  tries, fits = _tries(draws, np.expand_dims(height, -1), np.expand_dims(width, -1))
  first = np.take_along_axis(tries, fits.argmax(-1)[..., None, None], -2)[..., 0, :]
  box_w = np.where(width > height * ratio[1], np.round(height * ratio[1]), width)
  box_h = np.where(width < height * ratio[0], np.round(width / ratio[0]), height)
  centred = _centred(height, width, box_h, box_w)
  return np.where(fits.any(-1)[..., None], first, centred)


def box(
  draws: Sequence[Sequence[float]], height: int, width: int, ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
  """`boxes` of one image, for loaders that meet a new size at every step: draws as nested lists [TRIES][4]."""
  root = math.sqrt(height * width)
  for w_share, h_share, u_top, u_left in draws:
    w, h = round(root * w_share), round(root * h_share)
    if 0 < w <= width and 0 < h <= height:
      return int(u_top * (height - h + 1)), int(u_left * (width - w + 1)), h, w
  w = round(height * ratio[1]) if width > height * ratio[1] else width
  h = round(width / ratio[0]) if width < height * ratio[0] else height
  return (height - h) // 2, (width - w) // 2, h, w


def centre_boxes(height: Size, width: Size, fraction: float) -> np.ndarray:
  """The centred square whose side is `fraction` of the shorter one, float64 [..., 4]; 0: the whole image, which is then
  squeezed into a square.

  The same pixels as torchvision's Resize(s / fraction) and CenterCrop(s), resized once to s.
  """
  if not fraction:
    return _centred(height, width, height, width)
  side = np.maximum(np.round(np.minimum(height, width) * fraction), 1.0)
  return _centred(height, width, side, side)


def _centred(height, width, box_h, box_w):
  top, left = np.floor((height - box_h) / 2), np.floor((width - box_w) / 2)
  return np.stack([top, left, box_h, box_w], axis=-1)
