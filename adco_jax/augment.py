"""Colour, blur and flip on the device, by the recipes of AdCo and its rivals, of views that the host has cut.

Flow: train_step's `prepare` -> `make_views` -> encoders. `adjust_x(images, amount)` does one operation
  with given amounts; `draw` draws the amounts of a whole batch.
Shapes: images float [B, H, W, 3] in [0, 1] until `normalise`; amounts [B].
Paper: torchvision's transforms on Pillow images as listed by MoCo v2 and AdCo (main_worker.py:152-165);
  certified operation by operation in docs/augmentation.md.
Holds: amounts are drawn for the global batch in slot order and travel with the images, so the same slot
  looks the same on any number of devices, shuffled or not.
Not here: crops (data/crops).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

GRAY = (0.299, 0.587, 0.114)  # ITU-R 601, Pillow's 'L'
BLUR_SHARE = 0.1  # side of torchvision's kernel over the image's, as SimCLR and BYOL have it
BLUR_PASSES = 3  # of Pillow's box
PILLOW_REACH = 4  # pixels that one pass reaches, enough up to sigma 4


@dataclasses.dataclass(frozen=True)
class Policy:
  """Strengths and probabilities; a factor is uniform in 1 +- strength, the hue's turn in +- hue.

  `gray_first`: gray before the jitter; `blur_kernel`: 'pillow' (three boxes, edges repeated) or
  'torchvision' (a Gaussian over a tenth of the image, edges mirrored).
  """

  brightness: float = 0.0
  contrast: float = 0.0
  saturation: float = 0.0
  hue: float = 0.0
  jitter_probability: float = 0.0
  gray_probability: float = 0.0
  blur_probability: float = 0.0
  blur_sigma: tuple = (0.1, 2.0)  # pixels
  blur_kernel: str = "pillow"
  solarize_probability: float = 0.0
  gray_first: bool = False
  flip_probability: float = 0.0


MOCO_V2 = Policy(0.4, 0.4, 0.4, 0.1, 0.8, 0.2, 0.5, flip_probability=0.5)
CIFAR = dataclasses.replace(MOCO_V2, blur_probability=0.0)
SWAV = Policy(0.8, 0.8, 0.8, 0.2, 0.8, 0.2, 0.5, flip_probability=0.5)
BYOL = Policy(0.4, 0.4, 0.2, 0.1, 0.8, 0.2, 1.0, blur_kernel="torchvision", flip_probability=0.5)
BYOL_SECOND = dataclasses.replace(BYOL, blur_probability=0.1, solarize_probability=0.2)

# Name -> a policy per view; views beyond the last begin again with the first.
POLICIES = {
  "moco_v2": (MOCO_V2,),  # AdCo's as well
  "moco_v1": (Policy(0.4, 0.4, 0.4, 0.4, 1.0, 0.2, gray_first=True, flip_probability=0.5),),
  "simclr": (dataclasses.replace(SWAV, blur_kernel="torchvision"),),
  "byol": (BYOL, BYOL_SECOND),  # blur and solarisation differ between the views
  "swav": (SWAV,),  # SimCLR's strengths, Pillow's blur
  "cifar": (CIFAR,),  # without blur, which leaves little of 32 pixels
  # strokes on black: a mirrored digit is no digit, and there is no colour to disturb
  "digits": (Policy(0.4, 0.4, 0.0, 0.0, 0.8),),
  "flip": (Policy(flip_probability=0.5),),
  "none": (Policy(),),
}
BLUR_KERNELS = ("pillow", "torchvision")


def policies_for(name, views, blur_kernel=""):
  """The `Policy` of each view; `blur_kernel` replaces theirs where it is not empty."""
  family = (POLICIES[name][view % len(POLICIES[name])] for view in range(views))
  return tuple(
    dataclasses.replace(policy, blur_kernel=blur_kernel or policy.blur_kernel) for policy in family
  )


def make_views(rng, crops, policy, slots, mean, std, batch_size):
  """uint8 crops [b, H, W, 3] of the given `slots` [b] -> augmented, normalised float32 views."""
  amounts = jax.tree.map(lambda x: x[slots], draw(rng, batch_size, policy))
  images = crops.astype(jnp.float32) / 255
  return normalise(augment(images, amounts, policy), mean, std)


def draw(rng, batch_size, policy):
  """Amounts of every operation for every slot; operations that a policy never does are left out."""
  rngs = iter(jax.random.split(rng, 12))
  uniform = lambda low, high: jax.random.uniform(next(rngs), (batch_size,), jnp.float32, low, high)
  happens = lambda p: uniform(0.0, 1.0) < p
  amounts = {}
  if policy.jitter_probability:
    amounts["jitter"] = happens(policy.jitter_probability)
    for name in ("brightness", "contrast", "saturation"):
      strength = getattr(policy, name)
      amounts[name] = uniform(max(0.0, 1 - strength), 1 + strength)
    if policy.hue:
      amounts["hue"] = uniform(-policy.hue, policy.hue)
    order = jax.random.uniform(next(rngs), (batch_size, 4))
    amounts["order"] = jnp.argsort(order, -1)
  if policy.gray_probability:
    amounts["gray"] = happens(policy.gray_probability)
  if policy.blur_probability:
    amounts["blur"] = happens(policy.blur_probability)
    amounts["sigma"] = uniform(*policy.blur_sigma)
  if policy.flip_probability:
    amounts["flip"] = happens(policy.flip_probability)
  if policy.solarize_probability:
    amounts["solarize"] = happens(policy.solarize_probability)
  return amounts


def augment(images, amounts, policy):
  """Jitter, gray, blur, solarisation, flip in torchvision's order, where the drawn amounts say so."""
  if "gray" in amounts and policy.gray_first:
    images = _where(amounts["gray"], to_gray(images), images)
  if "jitter" in amounts:
    images = _where(amounts["jitter"], jitter(images, amounts), images)
  if "gray" in amounts and not policy.gray_first:
    images = _where(amounts["gray"], to_gray(images), images)
  if "blur" in amounts:
    blurred = adjust_blur(images, amounts["sigma"], policy.blur_kernel)
    images = _where(amounts["blur"], blurred, images)
  if "solarize" in amounts:
    images = _where(amounts["solarize"], solarize(images), images)
  if "flip" in amounts:
    images = _where(amounts["flip"], images[:, :, ::-1], images)
  return images


def jitter(images, amounts):
  """Brightness (0), contrast (1), saturation (2) and hue (3), in each image's own order [B, 4].

  The first three are one blend with different partners, so each runs in a slot before or after the only
  hue: three slots on either side, a slot of the wrong side blending with factor 1.
  """
  order = amounts["order"]
  factors = jnp.stack([amounts["brightness"], amounts["contrast"], amounts["saturation"]], -1)
  blends_Bx3 = _without_hue(order)
  hue_at = jnp.argmax(order == 3, -1)
  for side in ("before", "after"):
    for i in range(3):
      kind = blends_Bx3[:, i]
      here = (i < hue_at) if side == "before" else (i >= hue_at)
      factor = jnp.take_along_axis(factors, kind[:, None], -1)[:, 0]
      images = _blend_kind(images, kind, jnp.where(here, factor, 1.0))
    if side == "before" and "hue" in amounts:
      images = adjust_hue(images, amounts["hue"])
  return images


def adjust_brightness(images, factor):
  """factor * image, cut to [0, 1]."""
  return _blend(images, jnp.zeros_like(images), factor)


def adjust_contrast(images, factor):
  """Blend with the mean of the image's gray version."""
  return _blend(images, jnp.mean(to_gray(images), (1, 2, 3), keepdims=True), factor)


def adjust_saturation(images, factor):
  """Blend with the image's gray version."""
  return _blend(images, to_gray(images), factor)


def adjust_hue(images, turn):
  """Turns the hue by `turn` of a full circle, in HSV as torchvision does.

  The largest channel is found by comparing channels, not with their maximum; where two are alike, either
  one's formula gives the same hue.
  """
  red, green, blue = (images[..., i] for i in range(3))
  high = jnp.maximum(jnp.maximum(red, green), blue)
  spread = high - jnp.minimum(jnp.minimum(red, green), blue)
  safe = jnp.where(spread == 0, 1, spread)
  r, g, b = ((high - channel) / safe for channel in (red, green, blue))
  is_red, is_green = (red >= green) & (red >= blue), green >= blue
  hue = jnp.where(is_red, b - g, jnp.where(is_green, 2 + r - b, 4 + g - r))
  sixth = hue + 6 * turn[:, None, None]
  # Channel n in (5, 3, 1) of HSV: v - spread * clip(min(k, 4 - k), 0, 1) with k = (n + h) mod 6.
  k = (jnp.array([5, 3, 1], images.dtype).reshape(1, 1, 1, 3) + sixth[..., None]) % 6
  return high[..., None] - spread[..., None] * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)


def to_gray(images):
  """Luma in all three channels."""
  luma = sum(w * images[..., i] for i, w in enumerate(GRAY))
  return jnp.broadcast_to(luma[..., None], images.shape)


def solarize(images):
  """Inverts what is at least half bright (Pillow's 128 of 255)."""
  return jnp.where(images < 0.5, images, 1 - images)


def adjust_blur(images, sigma, kernel):
  """Gaussian of `sigma` pixels [B] (Pillow: radius), as two banded matrix products; see `Policy`."""
  product = lambda spec, m, x: jnp.einsum(spec, m, x, precision=jax.lax.Precision.HIGHEST)
  make = {"pillow": _pillow_blur, "torchvision": _torchvision_blur}[kernel]
  rows, columns = make(sigma, images.shape[1]), make(sigma, images.shape[2])
  return product("btw,bhwc->bhtc", columns, product("bsh,bhwc->bswc", rows, images))


def normalise(images, mean, std):
  """(image - mean) / std per channel."""
  mean, std = (jnp.array(v, images.dtype).reshape(1, 1, 1, -1) for v in (mean, std))
  return (images - mean) / std


def _without_hue(order):
  """The blends' order with hue (3) taken out: [B, 4] -> [B, 3]."""
  place = jnp.argsort(jnp.where(order == 3, 4, jnp.arange(4)[None]), -1)[:, :3]
  return jnp.take_along_axis(order, place, -1)


def _blend_kind(images, kind, factor):
  gray = to_gray(images)
  kind = kind[:, None, None, None]
  mean = jnp.mean(gray, (1, 2, 3), keepdims=True)
  partner = jnp.where(kind == 0, 0.0, jnp.where(kind == 1, mean, gray))
  return _blend(images, partner, factor)


def _blend(images, partner, factor):
  factor = factor[:, None, None, None]
  return jnp.clip(factor * images + (1 - factor) * partner, 0, 1)


def _where(chosen, images, others):
  return jnp.where(chosen[:, None, None, None], images, others)


def _torchvision_blur(sigma, size):
  """[B, size, size]: the Gaussian at whole pixels over an odd tenth of the side, edges mirrored."""
  reach = max(1, int(size * BLUR_SHARE) // 2)
  offsets = np.arange(-reach, reach + 1)
  weights = jnp.exp(-0.5 * jnp.square(jnp.array(offsets, sigma.dtype)[None] / sigma[:, None]))
  weights /= jnp.sum(weights, -1, keepdims=True)
  pixels = np.abs(np.arange(size)[:, None] + offsets)
  return _banded(weights, np.minimum(pixels, 2 * (size - 1) - pixels))


def _pillow_blur(sigma, size):
  """[B, size, size]: three passes of a box whose ends weigh less than its inside, edges repeated each time."""
  radius = _box_radius(jnp.square(sigma) / BLUR_PASSES)[:, None]
  offsets = np.arange(-PILLOW_REACH, PILLOW_REACH + 1)
  distance = jnp.array(np.abs(offsets)[None], sigma.dtype)
  weights = jnp.clip(radius + 1 - distance, 0, 1) / (2 * radius + 1)
  pixels = np.clip(np.arange(size)[:, None] + offsets, 0, size - 1)
  box = _banded(weights, pixels)
  product = lambda a, b: jnp.einsum("bij,bjk->bik", a, b, precision=jax.lax.Precision.HIGHEST)
  return product(box, product(box, box))


def _box_radius(variance):
  """The box's radius, up to PILLOW_REACH, as Pillow's BoxBlur.c takes it from Gwosdek et al., 2011.

  Whole pixels and a rest; the rest beyond `whole` runs from 0 to 1 as the variance grows to that of the next
  whole radius. Their sum, unlike the whole part alone, has no jumps that rounding could fall over.
  """
  radius = 0
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
