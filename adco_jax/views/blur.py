"""Gaussian blur as Pillow and torchvision do it: a matrix per image and axis, and two products.

Flow: augment calls `gaussian`.
Shapes: images [B, H, 3, W], so that both products run along whole rows; sigma [B] in pixels.
Paper: Pillow's BoxBlur.c (Gwosdek et al., 2011), torchvision's gaussian_blur; certified in docs/augmentation.md.
Not here: who is blurred (augment).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BLUR_SHARE = 0.1  # side of torchvision's kernel over the image's, as SimCLR and BYOL have it
BLUR_PASSES = 3  # of Pillow's box
LARGEST_SIGMA = 4.0
PILLOW_REACH = 4  # pixels that one pass reaches at the largest sigma


def gaussian(images: jax.Array, sigma: jax.Array, kernel: str, largest: float) -> jax.Array:
  """[B, H, 3, W] blurred by `sigma` pixels [B] (Pillow: radius), of which none is above `largest`; `kernel`: 'pillow' or 'torchvision'.

  Two banded matrix products along whole rows. HIGH precision is TF32 on a GPU, whose float32 products take five
  times as long: it is off by a tenth of a level.
  """
  product = lambda spec, a, b: jnp.einsum(spec, a, b, precision=jax.lax.Precision.HIGH)
  make = {"pillow": _pillow_blur, "torchvision": _torchvision_blur}[kernel]
  rows, columns = (make(sigma, images.shape[axis], largest) for axis in (1, 3))
  return product("bscw,btw->bsct", product("bsh,bhcw->bscw", rows, images), columns)


def _torchvision_blur(sigma, size, _):
  """[B, size, size]: the Gaussian at whole pixels over an odd tenth of the side, edges mirrored."""
  reach = max(1, int(size * BLUR_SHARE) // 2)
  offsets = np.arange(-reach, reach + 1)
  weights = jnp.exp(-0.5 * jnp.square(jnp.array(offsets, sigma.dtype)[None] / sigma[:, None]))
  weights /= jnp.sum(weights, -1, keepdims=True)
  pixels = np.abs(np.arange(size)[:, None] + offsets)
  return _banded(weights, np.minimum(pixels, 2 * (size - 1) - pixels))


def _pillow_blur(sigma, size, largest):
  """[B, size, size]: three passes of a box whose ends weigh less than its inside, edges repeated each time."""
  reach = 1 + int((np.sqrt(12 * largest**2 / BLUR_PASSES + 1) - 1) / 2)
  offsets = np.arange(-reach, reach + 1)
  distance = jnp.array(np.abs(offsets)[None], sigma.dtype)
  radius = _box_radius(jnp.square(sigma) / BLUR_PASSES)[:, None]
  weights = jnp.clip(radius + 1 - distance, 0, 1) / (2 * radius + 1)
  blur = _banded(weights, np.clip(np.arange(size)[:, None] + offsets, 0, size - 1))
  for _ in range(BLUR_PASSES - 1):
    rows = jnp.pad(blur, ((0, 0), (reach, reach), (0, 0)), mode="edge")
    terms = (weights[:, i, None, None] * rows[:, i : i + size] for i in range(len(offsets)))
    blur = sum(terms)
  return blur


def _box_radius(variance):
  """The box's radius, up to PILLOW_REACH, as Pillow's BoxBlur.c takes it from Gwosdek et al., 2011.

  Whole pixels and a rest; the rest beyond `whole` runs from 0 to 1 as the variance grows to that of the next
  whole radius. Their sum, unlike the whole part alone, has no jumps that rounding could fall over.
  """
  radius: Any = 0
  for whole in range(PILLOW_REACH):
    rest = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    rest /= 6 * (variance - (whole + 1) ** 2)
    beyond = variance >= (whole + 1) * (whole + 2) / 3
    radius += jnp.where(beyond, 1, jnp.clip(rest, 0, 1))
  return radius


def _banded(weights, pixels):
  """Weights [B, O] of the pixels [size, O] that each row sums -> matrices [B, size, size]."""
  size, offsets = pixels.shape
  bands = np.zeros((offsets, size, size), np.float32)
  np.add.at(bands, (np.arange(offsets), np.arange(size)[:, None], pixels), 1)
  return jnp.einsum(
    "bd,dij->bij", weights, jnp.array(bands, weights.dtype), precision=jax.lax.Precision.HIGHEST
  )
