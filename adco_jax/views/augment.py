"""Colour, blur and flip on the device, by the recipes of AdCo and its rivals, of views that the host has cut.

Flow: train_step's `prepare` -> `make_views` -> encoders. `adjust_x(images, amount)` does one operation
  with given amounts; `draw` draws the amounts of a whole batch.
Shapes: images float [B, H, W, 3] in [0, 1] until `standardize`; amounts [B].
Paper: torchvision's transforms on Pillow images as listed by MoCo v2 and AdCo (main_worker.py:152-165);
  certified operation by operation in docs/augmentation.md.
Holds: amounts are drawn for the global batch in slot order and travel with the images, so the same slot
  looks the same on any number of devices, shuffled or not.
Not here: crops (data/crops).
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from adco_jax.views import rand
from adco_jax.views.blur import LARGEST_SIGMA, gaussian
from adco_jax.views.rand import GRAY


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
  blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels
  blur_kernel: str = "pillow"
  solarize_probability: float = 0.0
  gray_first: bool = False
  flip_probability: float = 0.0
  rand_count: int = 0  # of RandAugment's operations, at rand_strength of 30
  rand_strength: int = 9


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
  # without blur, which leaves little of 32 pixels
  "cifar": (CIFAR,),
  "cifar_byol": tuple(dataclasses.replace(p, blur_probability=0.0) for p in (BYOL, BYOL_SECOND)),
  # strokes on black: a mirrored digit is no digit, and there is no colour to disturb
  "digits": (Policy(0.4, 0.4, 0.0, 0.0, 0.8),),
  "flip": (Policy(flip_probability=0.5),),
  "rand": (Policy(flip_probability=0.5, rand_count=2),),  # RandAugment, torchvision's numbers
  "none": (Policy(),),
}
BLUR_KERNELS = ("pillow", "torchvision")


def policies_for(name: str, views: int, blur_kernel: str = "") -> tuple[Policy, ...]:
  """The `Policy` of each view; `blur_kernel` replaces theirs where it is not empty."""
  family = (POLICIES[name][view % len(POLICIES[name])] for view in range(views))
  return tuple(
    dataclasses.replace(policy, blur_kernel=blur_kernel or policy.blur_kernel) for policy in family
  )


def make_views(
  rng: jax.Array,
  crops: jax.Array,
  policy: Policy,
  slots: jax.Array,
  mean: Sequence[float],
  std: Sequence[float],
  batch_size: int,
) -> jax.Array:
  """uint8 crops [b, H, W, 3] of the given `slots` [b] -> augmented, normalised float32 views."""
  amounts = jax.tree.map(lambda x: x[slots], draw(rng, batch_size, policy))
  images = crops.astype(jnp.float32) / 255
  return standardize(augment(images, amounts, policy), mean, std)


def draw(rng: jax.Array, batch_size: int, policy: Policy) -> dict[str, jax.Array]:
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
  if policy.rand_count:
    shape = (batch_size, policy.rand_count)
    amounts["rand"] = jax.random.randint(next(rngs), shape, 0, rand.CHOICES)
  return amounts


def augment(images: jax.Array, amounts: dict[str, jax.Array], policy: Policy) -> jax.Array:
  """Jitter, gray, blur, solarisation, flip in torchvision's order, then RandAugment, where the drawn amounts say so.

  Colours are computed in planes, three [B, H, W], so that a pixel is read once for all of them.
  """
  planes = _planes(images)
  if "gray" in amounts and policy.gray_first:
    planes = _choose(amounts["gray"], [_luma(planes)] * 3, planes)
  if "jitter" in amounts:
    planes = _choose(amounts["jitter"], _jitter(planes, amounts), planes)
  if "gray" in amounts and not policy.gray_first:
    planes = _choose(amounts["gray"], [_luma(planes)] * 3, planes)
  if "blur" in amounts:
    rows = jnp.stack(planes, 2)  # [B, H, 3, W]
    blurred = gaussian(rows, amounts["sigma"], policy.blur_kernel, policy.blur_sigma[1])
    planes = _choose(amounts["blur"], [blurred[:, :, i] for i in range(3)], planes)
  if "solarize" in amounts:
    planes = _choose(amounts["solarize"], map(solarize, planes), planes)
  if "flip" in amounts:
    planes = _choose(amounts["flip"], [plane[:, :, ::-1] for plane in planes], planes)
  images = jnp.stack(planes, -1)
  return rand.apply(images, amounts["rand"], policy.rand_strength) if "rand" in amounts else images


def jitter(images: jax.Array, amounts: dict[str, jax.Array]) -> jax.Array:
  """Brightness (0), contrast (1), saturation (2) and hue (3), in each image's own order [B, 4]."""
  return jnp.stack(_jitter(_planes(images), amounts), -1)


def adjust_brightness(images: jax.Array, factor: jax.Array) -> jax.Array:
  """factor * image, cut to [0, 1]."""
  return _on_planes(lambda planes: _blend(planes, 0.0, factor), images)


def adjust_contrast(images: jax.Array, factor: jax.Array) -> jax.Array:
  """Blend with the mean of the image's gray version."""
  return _on_planes(lambda planes: _blend(planes, _mean_luma(planes), factor), images)


def adjust_saturation(images: jax.Array, factor: jax.Array) -> jax.Array:
  """Blend with the image's gray version."""
  return _on_planes(lambda planes: _blend(planes, _luma(planes), factor), images)


def adjust_hue(images: jax.Array, turn: jax.Array) -> jax.Array:
  """Turns the hue by `turn` of a full circle, in HSV as torchvision does."""
  return _on_planes(lambda planes: _turn_hue(planes, turn), images)


def to_gray(images: jax.Array) -> jax.Array:
  """Luma in all three channels."""
  return _on_planes(lambda planes: [_luma(planes)] * 3, images)


def solarize(images: jax.Array) -> jax.Array:
  """Inverts what is at least half bright (Pillow's 128 of 255)."""
  return jnp.where(images < 0.5, images, 1 - images)


def adjust_blur(
  images: jax.Array, sigma: jax.Array, kernel: str, largest: float = LARGEST_SIGMA
) -> jax.Array:
  """Gaussian of `sigma` pixels [B] (Pillow: radius), none above `largest`; see `Policy`."""
  return jnp.moveaxis(gaussian(jnp.moveaxis(images, 3, 2), sigma, kernel, largest), 2, 3)


def standardize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
  """(image - mean) / std per channel."""
  centre, spread = (jnp.array(v, images.dtype).reshape(1, 1, 1, -1) for v in (mean, std))
  return (images - centre) / spread


def _planes(images):
  return [images[..., i] for i in range(3)]


def _on_planes(operation, images):
  return jnp.stack(operation(_planes(images)), -1)


def _jitter(planes, amounts):
  """Everything before the contrast once for the mean that the contrast needs, then everything."""
  contrast_at = jnp.argmax(amounts["order"] == 1, -1)
  mean = _mean_luma(_sequence(planes, amounts, contrast_at, 0.0))
  return _sequence(planes, amounts, 4, mean)


def _sequence(planes, amounts, end, mean):
  """The operations at places 0 to `end` - 1 of each image's order; `mean`: partner of the contrast's blend.

  Brightness, contrast and saturation are one blend with different partners, so each runs in a slot before or
  after the only hue: three slots on either side, a slot of the wrong side blending with factor 1.
  """
  order = amounts["order"]
  factors = jnp.stack([amounts["brightness"], amounts["contrast"], amounts["saturation"]], -1)
  blends_Bx3, hue_at = _without_hue(order), jnp.argmax(order == 3, -1)
  for side in ("before", "after"):
    for i in range(3):
      kind, place = blends_Bx3[:, i], i + (side == "after")
      here = ((i < hue_at) if side == "before" else (i >= hue_at)) & (place < end)
      factor = jnp.take_along_axis(factors, kind[:, None], -1)[:, 0]
      kind = _over_pixels(kind)
      partner = jnp.where(kind == 0, 0.0, jnp.where(kind == 1, mean, _luma(planes)))
      planes = _blend(planes, partner, jnp.where(here, factor, 1.0))
    if side == "before" and "hue" in amounts:
      planes = _turn_hue(planes, jnp.where(hue_at < end, amounts["hue"], 0.0))
  return planes


def _without_hue(order):
  """The blends' order with hue (3) taken out: [B, 4] -> [B, 3]."""
  place = jnp.argsort(jnp.where(order == 3, 4, jnp.arange(4)[None]), -1)[:, :3]
  return jnp.take_along_axis(order, place, -1)


def _turn_hue(planes, turn):
  """The largest channel is found by comparing channels, not with their maximum; where two are alike, either one's formula gives the same hue."""
  red, green, blue = planes
  high = jnp.maximum(jnp.maximum(red, green), blue)
  spread = high - jnp.minimum(jnp.minimum(red, green), blue)
  safe = jnp.where(spread == 0, 1, spread)
  r, g, b = ((high - channel) / safe for channel in planes)
  is_red, is_green = (red >= green) & (red >= blue), green >= blue
  hue = jnp.where(is_red, b - g, jnp.where(is_green, 2 + r - b, 4 + g - r))
  sixth = hue + 6 * _over_pixels(turn)
  # Channel n in (5, 3, 1) of HSV: v - spread * clip(min(k, 4 - k), 0, 1) with k = (n + h) mod 6.
  ks = [(n + sixth) % 6 for n in (5, 3, 1)]
  return [high - spread * jnp.clip(jnp.minimum(k, 4 - k), 0, 1) for k in ks]


def _luma(planes):
  return sum(weight * plane for weight, plane in zip(GRAY, planes, strict=True))


def _mean_luma(planes):
  return jnp.mean(_luma(planes), (1, 2), keepdims=True)


def _blend(planes, partner, factor):
  factor = _over_pixels(factor)
  return [jnp.clip(factor * plane + (1 - factor) * partner, 0, 1) for plane in planes]


def _choose(chosen, planes, others):
  chosen = _over_pixels(chosen)
  return [jnp.where(chosen, a, b) for a, b in zip(planes, others, strict=True)]


def _over_pixels(amount):
  """[B] -> [B, 1, 1]."""
  return amount[:, None, None]
