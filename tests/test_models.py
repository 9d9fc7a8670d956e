"""torchvision's arithmetic: convolutions and BatchNorm against NumPy, initialisation, sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from adco_jax.models import layers
from adco_jax.models.heads import Encoder
from adco_jax.models.layers import max_pool
from tests import settings  # noqa: F401 (registers the tiny architecture)

# Parameters of torchvision's models without their classifier (its documentation, less 513 or 2,049 thousand).
BACKBONES = {
  "resnet18": 11_176_512,
  "resnet34": 21_284_672,
  "resnet50": 23_508_032,
  "resnet101": 42_500_160,
}


def shapes(arch, stem="imagenet", width=1.0, size=32):
  encoder = Encoder(arch, width, stem, dim=128, group_size=1)
  images = jnp.zeros((1, size, size, 3))
  return encoder, jax.eval_shape(lambda: encoder.init(jax.random.key(0), images, False))


@pytest.mark.parametrize("arch", BACKBONES)
def test_parameters_are_torchvision_s(arch):
  _, variables = shapes(arch)
  count = sum(x.size for x in jax.tree.leaves(variables["params"]["backbone"]))
  assert count == BACKBONES[arch]
  features = 2048 if arch in ("resnet50", "resnet101") else 512
  head = variables["params"]["head"]
  assert head["fc0"]["kernel"].shape == (features, features) and head["fc2"]["kernel"].shape == (
    features,
    128,
  )


@pytest.mark.parametrize("stem, width, features", [("imagenet", 1.0, 512), ("small", 0.25, 128)])
def test_feature_maps(stem, width, features):
  """A 64-pixel image shrinks 32-fold behind the ImageNet stem and 8-fold behind the small one."""
  encoder, variables = shapes("resnet18", stem, width, 64)
  images = jnp.zeros((2, 64, 64, 3))
  found = jax.eval_shape(lambda v: encoder.apply(v, images, method="features"), variables)
  assert found.shape == (2, features)
  _, state = jax.eval_shape(
    lambda v: encoder.apply(
      v, images, False, capture_intermediates=True, mutable=["intermediates"]
    ),
    variables,
  )
  last = state["intermediates"]["backbone"]["layer4_1"]["__call__"][0]
  assert last.shape[1] == (2 if stem == "imagenet" else 8)


@pytest.mark.parametrize("side", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("size, stride", [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)])
def test_convolution_pads_like_torch(float64, size, stride, side):
  """Against loops; with stride 2 'SAME' would start one pixel later."""
  rng = np.random.RandomState(0)
  x, pad = rng.standard_normal((2, side, side, 3)), size // 2
  conv = layers.Conv(4, size, stride, jnp.float64)
  variables = conv.init(jax.random.key(0), x)
  kernel = np.asarray(variables["params"]["kernel"])
  padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  out = np.stack([
    [np.einsum("bijc,ijcf->bf", padded[:, i : i + size, j : j + size], kernel)
     for j in range(0, side, stride)] for i in range(0, side, stride)
  ])  # fmt: skip
  assert np.abs(conv.apply(variables, x) - out.transpose(2, 0, 1, 3)).max() < 1e-12


@pytest.mark.parametrize("side", [8, 2])
def test_a_bfloat16_convolution_is_rounded_once(side):
  """Against float64 on the same bfloat16 numbers: half a unit of the result's eight bits, on small maps too."""
  rng = np.random.RandomState(0)
  x = jnp.asarray(rng.standard_normal((16, side, side, 64)), jnp.bfloat16)
  conv = layers.Conv(64, 3, 1, jnp.bfloat16)
  variables = conv.init(jax.random.key(0), x)
  kernel = variables["params"]["kernel"].astype(jnp.bfloat16)
  wide = np.pad(np.asarray(x, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
  windows = np.lib.stride_tricks.sliding_window_view(wide, (3, 3), (1, 2))
  exact = np.einsum("bxycij,ijcf->bxyf", windows, np.asarray(kernel, np.float64), optimize=True)
  found = np.asarray(jax.jit(conv.apply)(variables, x), np.float64)
  assert np.all(np.abs(found - exact) <= np.abs(exact) * 2**-8 + 1e-5)


def test_initialisation_is_torch_s():
  """Kaiming normal over fan-out for convolutions, U(+-1/sqrt(fan-in)) for dense kernels and biases."""
  encoder = Encoder("resnet18", 1.0, "imagenet", 128, 1)
  params = jax.jit(lambda: encoder.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), False))()[
    "params"
  ]
  conv1 = params["backbone"]["conv1"]["kernel"]
  assert conv1.std() == pytest.approx(np.sqrt(2 / (64 * 49)), rel=0.03)
  deep = params["backbone"]["layer4_1"]["conv2"]["kernel"]
  assert deep.std() == pytest.approx(np.sqrt(2 / (512 * 9)), rel=0.01)
  for leaf in (params["head"]["fc0"]["kernel"], params["head"]["fc0"]["bias"]):
    bound = 1 / np.sqrt(512)
    assert 0.98 * bound < jnp.abs(leaf).max() <= bound and abs(leaf.mean()) < 0.1 * bound
    assert leaf.std() == pytest.approx(bound / np.sqrt(3), rel=0.06)
  assert (params["backbone"]["bn1"]["scale"] == 1).all() and (
    params["backbone"]["bn1"]["bias"] == 0
  ).all()


@pytest.mark.parametrize("running_from", ["mean", "first"])
def test_batchnorm_works_on_groups(float64, strict, running_from):
  """Four groups of two equal four calls of two; running statistics as torch updates them."""
  rng = np.random.RandomState(0)
  x = rng.standard_normal((8, 3, 3, 5)) * np.arange(1, 9)[:, None, None, None]
  norm = layers.BatchNorm(2, running_from, jnp.float64)
  variables = norm.init(jax.random.key(0), x, True)
  found, state = norm.apply(variables, x, True, mutable=["batch_stats"])
  means, variances = [], []
  for i in range(0, 8, 2):
    group = x[i : i + 2].reshape(-1, 5)
    wanted = (x[i : i + 2] - group.mean(0)) / np.sqrt(group.var(0) + 1e-5)
    assert np.abs(found[i : i + 2] - wanted).max() < 1e-12
    means.append(group.mean(0))
    variances.append(group.var(0, ddof=1))
  pick = (lambda v: v[0]) if running_from == "first" else (lambda v: np.mean(v, 0))
  stats = jax.device_get(state["batch_stats"])
  assert np.abs(stats["mean"] - 0.1 * pick(means)).max() < 1e-12
  assert np.abs(stats["var"] - (0.9 + 0.1 * pick(variances))).max() < 1e-12
  still = norm.apply(variables | state, x, False)
  assert np.abs(still - (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)).max() < 1e-12


def test_batchnorm_survives_a_large_mean():
  """Variance is computed around the mean: 100 +- .01 in float32 keeps three digits."""
  x = jnp.asarray(
    100 + 0.01 * np.random.RandomState(0).standard_normal((4, 16, 16, 1)), jnp.float32
  )
  norm = layers.BatchNorm(4)
  found, _ = norm.apply(norm.init(jax.random.key(0), x, True), x, True, mutable=["batch_stats"])
  exact = np.asarray(x, np.float64)
  exact = (exact - exact.mean()) / np.sqrt(exact.var() + 1e-5)
  assert np.abs(found - exact).max() < 2e-2


def test_compute_dtype_leaves_parameters_alone():
  encoder = Encoder("tiny", 0.125, "small", 8, 2, dtype=jnp.bfloat16)
  images = jnp.zeros((2, 8, 8, 3))
  variables = encoder.init(jax.random.key(0), images, False)
  assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
  z, state = encoder.apply(variables, images, True, mutable=["batch_stats"])
  assert z.dtype == jnp.bfloat16
  assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}


def test_names_are_torchvision_s():
  """Weights will travel by these names."""
  _, variables = shapes("resnet50")
  backbone = variables["params"]["backbone"]
  assert set(backbone) == {"conv1", "bn1"} | {
    f"layer{s + 1}_{i}" for s, n in enumerate((3, 4, 6, 3)) for i in range(n)
  }
  block = {f"{kind}{i}" for kind in ("conv", "bn") for i in (1, 2, 3)}
  assert set(backbone["layer2_1"]) == block
  assert set(backbone["layer2_0"]) == block | {"downsample_conv", "downsample_bn"}


def plain_normalise(x, scale, bias):
  """The same as normalise_groups, for autodiff."""
  mean = x.mean((1, 2, 3), keepdims=True)
  var = jnp.square(x - mean).mean((1, 2, 3), keepdims=True)
  expand = lambda v: v.reshape(1, 1, 1, 1, -1)
  return (x - mean) * jax.lax.rsqrt(var + layers.BN_EPSILON) * expand(scale) + expand(bias)


def pulled(normalise, x, scale, bias, cotangent):
  """Gradients of <y, cotangent>."""
  loss = lambda *args: jnp.sum(normalise(*args) * cotangent)
  return jax.grad(loss, argnums=(0, 1, 2))(x, scale, bias)


def test_gradient_of_batch_norm(float64):
  """Written out = autodiff, in float64; in float32 within 1e-5 although it adds up 8,192 numbers."""
  rng = np.random.RandomState(0)
  x, cotangent = rng.standard_normal((2, 2, 8, 32, 32, 3)).astype(np.float32)
  scale, bias = rng.standard_normal((2, 3)).astype(np.float32)
  args = (x + 3, scale, bias, cotangent)
  wanted = pulled(plain_normalise, *(np.asarray(a, np.float64) for a in args))
  ours = lambda *a: layers.normalise_groups(*a)[0]
  for dtype, limit in ((np.float64, 1e-12), (np.float32, 1e-5)):
    found = jax.jit(lambda *a: pulled(ours, *a))(*(np.asarray(a, dtype) for a in args))
    for a, b in zip(found, wanted, strict=True):
      assert a.dtype == dtype and np.abs(a - b).max() < limit * np.abs(b).max()


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (1, 7, 9, 2), (2, 1, 1, 2), (1, 2, 5, 1)])
@pytest.mark.parametrize("levels", [3, 1000])
def test_max_pool_equals_torch(shape, levels, float64):
  """Forward and gradient, with many ties (3 levels) and none, on even, odd and tiny maps."""
  x = np.random.RandomState(0).randint(levels, size=shape).astype(np.float64)
  theirs = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
  y = torch.nn.functional.max_pool2d(theirs, 3, 2, 1)
  gradient = np.random.RandomState(1).standard_normal(y.shape)
  y.backward(torch.tensor(gradient))
  found, pull = jax.vjp(max_pool, jnp.asarray(x))
  assert np.array_equal(found, y.detach().numpy().transpose(0, 2, 3, 1))
  (back,) = pull(jnp.asarray(gradient.transpose(0, 2, 3, 1)))
  assert np.abs(back - theirs.grad.numpy().transpose(0, 2, 3, 1)).max() < 1e-14
