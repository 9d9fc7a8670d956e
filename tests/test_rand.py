"""RandAugment on the device against torchvision's, operation by operation and in a row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from adco_jax.views import augment, rand
from tests.torch_packages import torchvision

THEIRS = {
  "identity": "Identity", "shear_x": "ShearX", "shear_y": "ShearY", "translate_x": "TranslateX", "translate_y": "TranslateY",
  "rotate": "Rotate", "brightness": "Brightness", "color": "Color", "contrast": "Contrast", "sharpness": "Sharpness",
  "posterize": "Posterize", "solarize": "Solarize", "auto_contrast": "AutoContrast", "equalize": "Equalize",
}  # fmt: skip
SIZES = [(32, 32), (40, 56), (96, 96)]


def photographs(height, width, count=3):
  """uint8: smooth, of few levels, and noise; no two sides alike."""
  rng = np.random.RandomState(height)
  y, x = np.mgrid[:height, :width].astype(np.float64)
  smooth = np.stack([60 + 100 * y / height, 200 - 90 * x / width, 40 + 50 * np.sin(x / 5) + y / 2], -1)  # fmt: skip
  noise = rng.randint(0, 256, (height, width, 3))
  few = 20 * rng.randint(1, 9, (height, width, 3))
  return np.stack([smooth, few, noise])[:count].astype(np.uint8)


def ours(images, choices, strength=9):
  run = jax.jit(rand.apply, static_argnums=2)
  return np.asarray(run(jnp.asarray(images, jnp.float32) / 255, jnp.asarray(choices), strength)) * 255  # fmt: skip


def theirs(image, name, negative, strength):
  auto = torchvision.transforms.autoaugment
  chw = torch.from_numpy(image).permute(2, 0, 1)
  space = auto.RandAugment()._augmentation_space(31, image.shape[:2])
  values, signed = space[THEIRS[name]]
  amount = float(values[strength]) if values.ndim else 0.0
  amount = -amount if signed and negative else amount
  nearest = torchvision.transforms.InterpolationMode.NEAREST
  return auto._apply_op(chw, THEIRS[name], amount, nearest, None).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("strength", [9, 15, 30])
@pytest.mark.parametrize("name", rand.OPERATIONS)
def test_every_operation_is_torchvision_s(name, strength, size):
  """Whole levels: off by one where gray or a blend is rounded otherwise, by a neighbour where a map meets the middle of two pixels."""
  images = photographs(*size)
  for negative in (0, 1):
    choice = 2 * rand.OPERATIONS.index(name) + negative
    found = ours(images, np.full((len(images), 1), choice), strength)
    assert np.abs(found - np.round(found)).max() < 1e-3
    wanted = np.stack([theirs(image, name, negative, strength) for image in images]).astype(float)
    apart = np.abs(np.round(found) - wanted)
    assert (apart > 1).mean() < 0.004, (negative, apart.max(), (apart > 1).mean())
    limit = 0.2 if name in ("color", "contrast", "sharpness") else 0.01
    assert (apart > 0).mean() < limit, (apart > 0).mean()


def test_a_row_of_operations_is_done_in_order():
  """Each image its own; equal to one after the other."""
  images = photographs(40, 40)
  names = [("rotate", "solarize"), ("equalize", "shear_x"), ("brightness", "posterize")]
  choices = np.array([[2 * rand.OPERATIONS.index(n) for n in pair] for pair in names])
  found = ours(images, choices)
  first = ours(images, choices[:, :1])
  again = ours(np.round(first), choices[:, 1:])
  np.testing.assert_allclose(found, again, atol=1e-3)
  assert np.abs(found - ours(images, choices[:, ::-1])).max() > 10


def test_the_policy_draws_all_of_them_and_they_travel_with_slots():
  (policy,) = augment.policies_for("rand", 1)
  amounts = augment.draw(jax.random.key(0), 512, policy)
  assert amounts["rand"].shape == (512, 2)
  counts = np.bincount(np.asarray(amounts["rand"]).ravel(), minlength=rand.CHOICES)
  assert len(counts) == rand.CHOICES == 28 and counts.min() > 10
  crops = np.concatenate([photographs(32, 32)] * 3)[:8]
  mean, std = (0.5,) * 3, (0.25,) * 3
  views = jax.jit(lambda rng, x, slots: augment.make_views(rng, x, policy, slots, mean, std, 8))
  rng, order = jax.random.key(1), np.array([3, 1, 7, 0])
  whole = views(rng, crops, np.arange(8))
  np.testing.assert_array_equal(views(rng, crops[order], order), whole[order])
  assert float(jnp.abs(whole * 0.25 + 0.5 - crops / 255.0).max()) > 0.1
