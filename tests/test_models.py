"""torchvision's arithmetic: convolutions and BatchNorm against NumPy, initialisation, sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from adco_jax.models import layers, norm, sums
from adco_jax.models.heads import Encoder
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


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("side", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("size, stride", [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)])
def test_convolution_pads_like_torch(float64, size, stride, side, platform):
  """Against loops; with stride 2 'SAME' would start one pixel later."""
  rng = np.random.RandomState(0)
  x, pad = rng.standard_normal((2, side, side, 3)), size // 2
  conv = layers.Conv(4, size, stride, jnp.float64, platform)
  variables = conv.init(jax.random.key(0), x)
  kernel = np.asarray(variables["params"]["kernel"])
  padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  out = np.stack([
    [np.einsum("bijc,ijcf->bf", padded[:, i : i + size, j : j + size], kernel)
     for j in range(0, side, stride)] for i in range(0, side, stride)
  ])  # fmt: skip
  assert np.abs(conv.apply(variables, x) - out.transpose(2, 0, 1, 3)).max() < 1e-12


@pytest.mark.parametrize("count, side, channels, kernel, stride", [
  (6, 9, (4, 8), 3, 1), (6, 9, (8, 4), 3, 2), (5, 8, (3, 64), 7, 2), (4, 6, (16, 8), 1, 1), (4, 7, (8, 16), 1, 2),
  (7, 2, (4, 4), 3, 1), (2, 7, (256, 512), 3, 1), (1, 5, (4, 4), 3, 1),
])  # fmt: skip
def test_gradients_of_a_convolution_on_a_cpu(
  float64, monkeypatch, count, side, channels, kernel, stride
):
  """In one block, in several and image by image: autodiff of the plain convolution, in float64 and, in several, in others."""
  rng = np.random.default_rng(0)
  x, k = rng.normal(size=(count, side, side, channels[0])), rng.normal(size=(kernel, kernel, *channels))  # fmt: skip
  x, k = (np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in (x, k))
  conv = layers.Conv(channels[1], kernel, stride, jnp.float64)
  y, plain = jax.vjp(lambda *a: layers._convolve(*a, stride), x, k)
  dy = np.asarray(jnp.asarray(rng.normal(size=y.shape), jnp.bfloat16), np.float64)
  wanted = plain(dy)
  limits = {jnp.float64: 1e-12, jnp.float32: 1e-5, jnp.bfloat16: 2**-7}
  several = 2 * x[0].size
  for block, dtype in [(1, jnp.float64), (2**30, jnp.float64), *((several, d) for d in limits)]:
    monkeypatch.setattr(layers, "BLOCK", block)
    layer = conv.clone(dtype=dtype)
    run = lambda x, k, layer=layer: layer.apply({"params": {"kernel": k}}, x)
    pull = jax.jit(lambda *a, run=run: jax.vjp(run, *a[:2])[1](a[2]))
    found = pull(*(jnp.asarray(a, dtype) for a in (x, k, dy)))
    for a, b in zip(found, wanted, strict=True):
      assert a.dtype == dtype
      assert np.abs(np.asarray(a, np.float64) - b).max() <= limits[dtype] * np.abs(b).max()


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("groups, shape", [(2, (4, 16, 16, 3)), (1, (3, 17, 13, 2)), (1, (1, 113, 113, 2)), (2, (64, 32, 32, 4)), (1, (8, 7, 7, 16)), (4, (4, 1, 1, 2)), (1, (8, 112, 112, 1))])  # fmt: skip
def test_sums_of_groups(float64, platform, groups, shape):
  """float64 to rounding; float32 within 2e-6 for numbers around 3, however many they are."""
  numbers = np.float32(np.random.default_rng(0).normal(size=(2, *shape)) + 3)
  wanted = numbers.reshape(2, groups, -1, shape[-1]).mean(2, dtype=np.float64)
  form = norm.Form(groups, False, platform)
  for dtype, limit in ((np.float64, 1e-14), (np.float32, 2e-6)):
    found = jax.jit(lambda a, b: sums.means(form, a, b))(*numbers.astype(dtype))
    for a, b in zip(found, wanted, strict=True):
      assert a.dtype == dtype and a.shape == b.shape and np.abs(a - b).max() <= limit


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


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("running_from", ["mean", "first"])
def test_batchnorm_works_on_groups(float64, strict, running_from, platform):
  """Four groups of two equal four calls of two; running statistics as torch updates them."""
  rng = np.random.RandomState(0)
  x = rng.standard_normal((8, 3, 3, 5)) * np.arange(1, 9)[:, None, None, None]
  layer = norm.BatchNorm(2, running_from, jnp.float64, platform)
  variables = layer.init(jax.random.key(0), x, True)
  found, state = layer.apply(variables, x, True, mutable=["batch_stats"])
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
  still = layer.apply(variables | state, x, False)
  assert np.abs(still - (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)).max() < 1e-12


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_batchnorm_survives_a_large_mean(platform):
  """Variance is computed around the mean: 100 +- .01 in float32 keeps three digits."""
  x = jnp.asarray(
    100 + 0.01 * np.random.RandomState(0).standard_normal((4, 16, 16, 1)), jnp.float32
  )
  layer = norm.BatchNorm(4, platform=platform)
  found, _ = layer.apply(layer.init(jax.random.key(0), x, True), x, True, mutable=["batch_stats"])
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


def plainly(groups, branches, shortcut, relu):
  """batch_norm by its definition, for autodiff."""
  total = 0 if shortcut is None else shortcut
  for x, scale, bias, _ in branches:
    g = x.reshape(groups, -1, *x.shape[1:])
    apart = g - g.mean((1, 2, 3), keepdims=True)
    unit = apart / jnp.sqrt(jnp.square(apart).mean((1, 2, 3), keepdims=True) + norm.BN_EPSILON)
    expand = lambda v: v.reshape(1, 1, 1, 1, -1)
    total += (unit * expand(scale) + expand(bias)).reshape(x.shape)
  return jnp.maximum(total, 0) if relu else total


def branches_and_shortcut(count, with_shortcut, shape=(4, 12, 12, 3)):
  """Float32 numbers in float64 arrays, means far from the running ones, scales of both signs."""
  rng = np.random.RandomState(0)
  draw = lambda *shape: np.float32(rng.standard_normal(shape)).astype(np.float64)
  make = lambda: norm.Branch(draw(*shape) + 3, draw(shape[-1]), draw(shape[-1]), draw(shape[-1]))
  return tuple(make() for _ in range(count)), draw(*shape) if with_shortcut else None


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("count, with_shortcut, relu", [(1, False, False), (1, False, True), (1, True, True), (2, False, True)])  # fmt: skip
def test_gradient_of_batch_norm(float64, count, with_shortcut, relu, platform):
  """Written out = autodiff of the definition: float64, and float32 within 1e-5."""
  args = branches_and_shortcut(count, with_shortcut)
  shape = args[0][0].x.shape
  cotangent = np.random.RandomState(1).standard_normal(shape)
  pull = lambda f, args: jax.jit(jax.grad(lambda a: jnp.sum(f(*a) * cotangent)))(args)
  wanted = pull(lambda b, s: plainly(2, b, s, relu), args)
  form = norm.Form(2, relu, platform)
  for dtype, limit in ((np.float64, 1e-11), (np.float32, 1e-5)):
    cast = jax.tree.map(lambda x, d=dtype: np.asarray(x, d), args)
    found = pull(lambda b, s: norm.batch_norm(form, b, s)[0], cast)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
      assert a.dtype == dtype and np.abs(a - b).max() <= limit * max(1, np.abs(b).max())


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_moments_of_narrow_numbers_take_one_pass(float64, platform):
  """bfloat16 in, float32 sums around any guess of the mean: nearer to the truth than x was rounded."""
  x = jnp.asarray(branches_and_shortcut(1, False, (4, 16, 16, 3))[0][0].x, jnp.bfloat16)
  exact = np.asarray(x, np.float64).reshape(2, -1, 3)
  for centre in (np.zeros(3, np.float32), np.full(3, 3, np.float32)):
    found = norm._moments(norm.Form(2, True, platform), x, jnp.asarray(centre))
    assert np.abs(found.mean - exact.mean(1)).max() < 1e-5
    assert np.abs(found.var / exact.var(1) - 1).max() < 2**-9


@pytest.mark.parametrize("side", [8, 7, 2, 1])
def test_the_stem_s_tail_is_its_three_parts(float64, side):
  """BatchNorm, ReLU and pooling in one equal them one after another; rising and falling channels."""
  (branch,), _ = branches_and_shortcut(1, False, (4, side, side, 3))
  cotangent = np.random.RandomState(1).standard_normal((4, -(-side // 2), -(-side // 2), 3))

  def one(branch):
    return norm.batch_norm_and_pool(norm.Form(2, True, "gpu"), branch)[0]

  def three(branch):
    return layers.max_pool(plainly(2, (branch,), None, True), "tpu")

  assert np.abs(one(branch) - three(branch)).max() < 1e-12
  pull = lambda f: jax.jit(jax.grad(lambda b: jnp.sum(f(b) * cotangent)))(branch)
  for a, b in zip(pull(one), pull(three), strict=True):
    assert np.abs(a - b).max() < 1e-11 * max(1, np.abs(b).max())


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_what_is_no_number_is_not_lost(platform):
  """A NaN in one image reaches everything of its group, through the stem's tail as well."""
  x = jnp.ones((2, 8, 8, 4)).at[0, 3, 3].set(jnp.nan)
  layer = norm.BatchNorm(1, platform=platform)
  found, _ = layer.apply(layer.init(jax.random.key(0), x, True), x, True, None, True, True, mutable=["batch_stats"])  # fmt: skip
  assert jnp.isnan(found[0]).all() and not jnp.isnan(found[1]).any()


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (1, 7, 9, 2), (2, 1, 1, 2), (1, 2, 5, 1)])
@pytest.mark.parametrize("levels", [3, 1000])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_max_pool_equals_torch(shape, levels, float64, platform):
  """Forward and gradient, with many ties (3 levels) and none, on even, odd and tiny maps."""
  x = np.random.RandomState(0).randint(levels, size=shape).astype(np.float64)
  theirs = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
  y = torch.nn.functional.max_pool2d(theirs, 3, 2, 1)
  gradient = np.random.RandomState(1).standard_normal(y.shape)
  y.backward(torch.tensor(gradient))
  found, pull = jax.vjp(lambda x: layers.max_pool(x, platform), jnp.asarray(x))
  assert np.array_equal(found, y.detach().numpy().transpose(0, 2, 3, 1))
  (back,) = pull(jnp.asarray(gradient.transpose(0, 2, 3, 1)))
  assert np.abs(back - theirs.grad.numpy().transpose(0, 2, 3, 1)).max() < 1e-14
