"""RandAugment on the device: of fourteen operations each image gets some, drawn anew, at one strength.

Flow: augment calls `apply` after its own operations, with what `draw` drew; fine-tuning uses it (`augment.policy=rand`).
Shapes: images float [B, H, W, 3] in [0, 1], whole levels of 255 in between as Pillow and torchvision have them; choices [B, N].
Paper: Cubuk et al. 2020; operations and their ranges are torchvision's RandAugment (31 strengths, nearest neighbours, black outside).
Holds: one turn is a warp, then a blend, then a table of 256 levels, two of which leave the image as it is: what kind an image
  drew decides numbers, not which program runs, so all turns of all images are one.
Not here: crops and flips (augment).
"""

import jax
import jax.numpy as jnp

OPERATIONS = (
  "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast", "sharpness",
  "posterize", "solarize", "auto_contrast", "equalize",
)  # fmt: skip
CHOICES = 2 * len(OPERATIONS)  # choice = 2 * operation + (1 where the strength is negative)
STRENGTHS = 30  # the largest of them
HAIR = 1e-3  # of a level: where arithmetic ends on a whole one, floats may lie below it
GRAY = (0.299, 0.587, 0.114)  # ITU-R 601, Pillow's 'L'


def apply(images: jax.Array, choices: jax.Array, strength: int) -> jax.Array:
  """Images after the operations `choices` [B, N] of each, in order, at `strength` of 30."""
  levels = jnp.round(images * 255)
  for turn in range(choices.shape[1]):
    levels = _turn(levels, choices[:, turn], strength / STRENGTHS)
  return levels / 255


def _turn(levels, choice, share):
  """One operation per image on levels 0 to 255."""
  is_ = lambda name: choice // 2 == OPERATIONS.index(name)
  sign = 1 - 2.0 * (choice % 2)
  levels = _warp(levels, is_, share * sign)
  levels = _blend(levels, is_, 0.9 * share * sign)
  return _look_up(levels, is_, share)


def _warp(levels, is_, amount):
  """Nearest neighbours of an affine map: shears about the corner, turns about the centre, shifts by whole pixels."""
  _, height, width, _ = levels.shape
  y, x = (jnp.arange(n, dtype=jnp.float32) for n in (height, width))
  angle = jnp.where(is_("rotate"), amount * jnp.pi / 6, 0.0)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  across = -sin + jnp.where(is_("shear_x"), 0.3 * amount, 0.0)
  along = sin + jnp.where(is_("shear_y"), 0.3 * amount, 0.0)
  reach = lambda name, side: jnp.where(is_(name), jnp.trunc(amount * (150 / 331 * side)), 0.0)
  turns = is_("rotate")
  middle_x, middle_y = (jnp.where(turns, (n - 1) / 2, -0.5) for n in (width, height))
  at = lambda v: v[:, None, None]
  dx, dy = x[None, None] - at(middle_x), y[None, :, None] - at(middle_y)
  source_x = at(cos) * dx + at(across) * dy + at(middle_x - reach("translate_x", width))
  source_y = at(along) * dx + at(cos) * dy + at(middle_y - reach("translate_y", height))
  column, row = (jnp.round(s).astype(jnp.int32) for s in (source_x, source_y))
  inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
  place = jnp.clip(row, 0, height - 1) * width + jnp.clip(column, 0, width - 1)
  flat = levels.reshape(len(levels), height * width, 3)
  moved = jnp.take_along_axis(flat, place.reshape(len(levels), -1, 1), 1).reshape(levels.shape)
  return jnp.where(inside[..., None], moved, 0.0)


def _blend(levels, is_, amount):
  """partner + (1 + amount) (image - partner), where it is of this kind, cut to whole levels."""
  weights = jnp.array(GRAY, levels.dtype).reshape(1, 1, 1, 3)
  gray = jnp.floor((levels * weights).sum(-1, keepdims=True))
  at = lambda name: is_(name)[:, None, None, None]
  partner = jnp.where(at("color"), gray, 0.0)
  partner = jnp.where(at("contrast"), gray.mean((1, 2), keepdims=True), partner)
  partner = jnp.where(at("sharpness"), _smooth(levels), partner)
  kinds = at("brightness") | at("color") | at("contrast") | at("sharpness")
  mixed = partner + (1 + amount)[:, None, None, None] * (levels - partner)
  return jnp.where(kinds, jnp.floor(jnp.clip(mixed, 0, 255) + HAIR), levels)


def _smooth(levels):
  """Each inner pixel with its eight neighbours, weights 5 and 1; the border stays."""
  rows = levels[:, :-2] + levels[:, 1:-1] + levels[:, 2:]
  around = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
  inner = jnp.round((around + 4 * levels[:, 1:-1, 1:-1]) / 13)
  return levels.at[:, 1:-1, 1:-1].set(inner)


def _look_up(levels, is_, share):
  """Posterize, solarize, stretch and equalize: each a table of 256 levels per image and channel."""
  batch, height, width, _ = levels.shape
  values = levels.astype(jnp.int32).transpose(0, 3, 1, 2).reshape(batch, 3, height * width)
  level = jnp.arange(256, dtype=jnp.float32)[None, None]
  at = lambda name: is_(name)[:, None, None]
  step = 2.0 ** round(4 * share)  # keeps 8 to 4 bits
  table = jnp.where(at("posterize"), jnp.floor(level / step) * step, level)
  table = jnp.where(at("solarize") & (level >= 255 * (1 - share)), 255 - level, table)
  table = jnp.where(at("auto_contrast"), _stretched(values, level), table)
  table = jnp.where(at("equalize"), _equalized(values, level), table)
  found = jnp.take_along_axis(table, values, 2)
  return found.reshape(batch, 3, height, width).transpose(0, 2, 3, 1)


def _stretched(values, level):
  """The darkest level becomes 0 and the brightest 255; a channel of one level stays."""
  low, high = (f(values, 2, keepdims=True).astype(jnp.float32) for f in (jnp.min, jnp.max))
  scale = 255 / jnp.maximum(high - low, 1)
  return jnp.where(high == low, level, jnp.floor(jnp.clip((level - low) * scale, 0, 255) + HAIR))


def _equalized(values, level):
  """Levels by how many pixels are darker, in steps of a 255th of all but the brightest."""
  rows = jnp.arange(values.shape[0] * 3)[:, None]
  counts = jnp.zeros((values.shape[0] * 3, 256), jnp.int32)
  counts = counts.at[rows, values.reshape(-1, values.shape[2])].add(1)
  counts = counts.reshape(values.shape[0], 3, 256)
  brightest = jnp.take_along_axis(counts, values.max(2, keepdims=True), 2)
  step = (values.shape[2] - brightest) // 255
  darker = jnp.cumsum(counts, 2) - counts
  found = jnp.clip((darker + step // 2) // jnp.maximum(step, 1), 0, 255).astype(jnp.float32)
  return jnp.where(step == 0, level, found)
