"""Every operation against Pillow or colorsys on a photograph; the draws and who gets them."""

import colorsys
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from adco_jax.views import augment, blur
from tests.test_data import photograph

pytestmark = pytest.mark.steps  # the slow ones' group

LEVEL = 1 / 255


@pytest.fixture
def images():
  return np.stack([photograph(24, 30, seed) for seed in range(3)])


def to_float(images):
  return jnp.asarray(images, jnp.float32) / 255


def by_pillow(images, operation):
  return np.stack([np.asarray(operation(Image.fromarray(image))) for image in images]) / 255


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.4])
@pytest.mark.parametrize("name, enhance", [
  ("brightness", ImageEnhance.Brightness), ("contrast", ImageEnhance.Contrast), ("saturation", ImageEnhance.Color),
])  # fmt: skip
def test_blends_equal_pillow(strict, images, name, enhance, factor):
  adjust = getattr(augment, f"adjust_{name}")
  found = adjust(to_float(images), jnp.full(3, factor, jnp.float32))
  wanted = by_pillow(images, lambda image: enhance(image).enhance(factor))
  assert np.abs(found - wanted).max() <= 1.01 * LEVEL  # Pillow rounds, and rounds the mean
  assert factor == 1 or np.abs(found - to_float(images)).max() > 0.05


@pytest.mark.parametrize("turn", [-0.1, 0.0, 0.07, 0.5])
def test_hue_equals_colorsys(strict, images, turn):
  images = to_float(images)[:, :6, :6]
  found = augment.adjust_hue(images, jnp.full(3, turn, jnp.float32))
  for pixel, new in zip(
    np.asarray(images).reshape(-1, 3), np.asarray(found).reshape(-1, 3), strict=True
  ):
    h, s, v = colorsys.rgb_to_hsv(*pixel.astype(float))
    assert np.abs(np.array(colorsys.hsv_to_rgb((h + turn) % 1, s, v)) - new).max() < 1e-5


def test_gray_equals_pillow(strict, images):
  wanted = by_pillow(images, lambda image: image.convert("L").convert("RGB"))
  assert np.abs(augment.to_gray(to_float(images)) - wanted).max() <= 1.01 * LEVEL


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.0, 3.5])
def test_torchvision_s_blur_is_the_gaussian(strict, sigma):
  """Against a direct sum with mirrored edges; 44 and 60 pixels have kernels of 5 and 7."""
  images = np.stack([photograph(44, 60, seed) for seed in range(3)])
  found = augment.adjust_blur(to_float(images), jnp.full(3, sigma, jnp.float32), "torchvision")
  wanted = images / 255
  for axis, reach in ((1, 2), (2, 3)):
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    edges = [(0, 0)] * 4
    edges[axis] = (reach, reach)
    wanted = np.apply_along_axis(
      lambda v, w=weights: np.convolve(v, w / w.sum(), "valid"),
      axis,
      np.pad(wanted, edges, "reflect"),
    )
  assert np.abs(found - wanted).max() < 1e-5


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0, 4.0])
def test_pillow_s_blur_is_pillow_s(strict, images, sigma):
  """Pillow rounds after each of its six passes over the image, hence three levels; edges included."""
  found = augment.adjust_blur(to_float(images), jnp.full(3, sigma, jnp.float32), "pillow")
  wanted = by_pillow(images, lambda image: image.filter(ImageFilter.GaussianBlur(sigma)))
  assert np.abs(found - wanted).max() <= 3 * LEVEL and np.abs(found - wanted).mean() <= 0.6 * LEVEL
  other = augment.adjust_blur(to_float(images), jnp.full(3, sigma, jnp.float32), "torchvision")
  assert sigma < 1 or np.abs(found - other).max() > 6 * LEVEL  # the two kernels are not the same


def test_solarize_equals_pillow(strict, images):
  assert (
    np.abs(augment.solarize(to_float(images)) - by_pillow(images, ImageOps.solarize)).max() < 1e-6
  )


def test_policies_differ_between_views_where_their_authors_say_so():
  first, second, third = augment.policies_for("byol", 3)
  assert first == third != second and first.solarize_probability == 0 < second.solarize_probability
  assert first.blur_probability == 1 and second.blur_probability == 0.1
  assert len(set(augment.policies_for("simclr", 4))) == 1
  assert augment.policies_for("moco_v2", 1)[0].blur_kernel == "pillow"
  assert augment.policies_for("moco_v2", 1, "torchvision")[0].blur_kernel == "torchvision"


def test_gray_comes_first_in_moco_v1(images):
  """A gray image has no colour left that the jitter could turn."""
  amounts = augment.draw(jax.random.key(0), 3, augment.POLICIES["moco_v1"][0])
  amounts |= {"gray": jnp.ones(3, bool), "jitter": jnp.ones(3, bool)}
  gray_first = augment.augment(to_float(images), amounts, augment.POLICIES["moco_v1"][0])
  assert np.abs(gray_first[..., 0] - gray_first[..., 2]).max() < 1e-5
  later = dataclasses.replace(augment.POLICIES["moco_v1"][0], gray_first=False)
  assert np.abs(augment.augment(to_float(images), amounts, later) - gray_first).max() > 0.02


def test_jitter_follows_each_image_s_order(strict, images):
  """All 24 orders, against the four operations one after another."""
  import itertools

  amounts = {"brightness": 1.3, "contrast": 0.7, "saturation": 1.35, "hue": 0.08}
  orders = np.array(list(itertools.permutations(range(4))))
  many = jnp.broadcast_to(to_float(images)[:1], (24, 24, 30, 3))
  drawn = {k: jnp.full(24, v, jnp.float32) for k, v in amounts.items()} | {
    "order": jnp.asarray(orders)
  }
  found = augment.jitter(many, drawn)
  for i, sequence in enumerate(orders):
    one = to_float(images)[:1]
    for kind in sequence:
      name = ("brightness", "contrast", "saturation", "hue")[kind]
      one = getattr(augment, f"adjust_{name}")(one, jnp.full(1, amounts[name], jnp.float32))
    assert np.abs(found[i] - one[0]).max() < 1e-5
  assert np.abs(found[0] - found[-1]).max() > 0.01  # the order is not a formality here


def test_policy_applies_what_was_drawn(images):
  """Flip and gray where the draw says so, untouched elsewhere."""
  policy = augment.Policy(gray_probability=0.5, flip_probability=0.5)
  amounts = {"gray": jnp.array([True, False, False]), "flip": jnp.array([False, True, False])}
  found, plain = augment.augment(to_float(images), amounts, policy), to_float(images)
  assert np.array_equal(found[0], augment.to_gray(plain)[0])
  assert np.array_equal(found[1], plain[1, :, ::-1])
  assert np.array_equal(found[2], plain[2])


@pytest.mark.parametrize(
  "policy", [p for family in augment.POLICIES.values() for p in family], ids=str
)
def test_amounts_are_within_the_policy(policy):
  amounts = augment.draw(jax.random.key(0), 4000, policy)
  for key, probability in (("jitter", policy.jitter_probability), ("gray", policy.gray_probability),
                           ("blur", policy.blur_probability), ("flip", policy.flip_probability),
                           ("solarize", policy.solarize_probability)):  # fmt: skip
    assert (key in amounts) == (probability > 0)
    if probability:
      assert abs(float(amounts[key].mean()) - probability) < 0.03
  if policy.jitter_probability:
    low, high = 1 - policy.brightness, 1 + policy.brightness
    assert (
      low <= amounts["brightness"].min() < low + 0.01
      and high - 0.01 < amounts["brightness"].max() <= high
    )
    counts = np.unique(np.asarray(amounts["order"]), axis=0, return_counts=True)[1]
    assert len(counts) == 24 and counts.min() > 100


def test_draws_travel_with_slots(images):
  """A slot looks the same wherever it sits in the batch."""
  crops, policy = jnp.asarray(images), augment.MOCO_V2
  setting = (policy, (0.5,) * 3, (0.2,) * 3)
  make = lambda slots: augment.make_views(
    jax.random.key(1), crops[slots], *setting[:1], slots, *setting[1:], batch_size=3
  )
  plain, mixed = make(jnp.arange(3)), make(jnp.array([2, 0, 1]))
  assert np.abs(plain[jnp.array([2, 0, 1])] - mixed).max() < 1e-6
  assert np.abs(plain[0] - mixed[0]).max() > 0.1


@pytest.mark.parametrize("side", [48, *(pytest.param(s, marks=pytest.mark.slow) for s in (16, 96))])
@pytest.mark.parametrize("name", ["moco_v2", "byol"])
def test_one_program_equals_its_operations(optimised, name, side):
  """Fused or one after the other: no pixel may hang on how a value is rounded."""
  policy = augment.POLICIES[name][0]
  images = to_float(np.stack([photograph(side, side, seed) for seed in range(8)]))
  amounts = augment.draw(jax.random.key(1), 8, policy)
  with jax.disable_jit():
    wanted = augment.augment(images, amounts, policy)
  found = jax.jit(lambda *args: augment.augment(*args, policy))(images, amounts)
  assert np.abs(found - wanted).max() < 1e-5


def test_the_box_radius_has_no_jumps():
  """Against the published formula, and across the variances of whole radii, where floor would jump."""
  variance = np.linspace(0.01, 5.3, 1000)
  whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
  rest = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
  rest /= 6 * (variance - (whole + 1) ** 2)
  found = blur._box_radius(jnp.asarray(variance, jnp.float32))
  assert np.abs(found - (whole + rest)).max() < 1e-5
  for radius in (1, 2, 3):
    around = radius * (radius + 1) / 3 * (1 + np.float32([-1e-7, 0, 1e-7]))
    assert np.abs(blur._box_radius(jnp.asarray(around)) - radius).max() < 1e-5
