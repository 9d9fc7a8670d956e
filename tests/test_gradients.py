"""Gradients of the whole compiled encoder against the same network of plain operations, at every crop size.

XLA fuses a whole program otherwise than its parts: a law of a layer that holds in a test of its own may
not hold in there, and at another size or in another type it is another program. So these programs are
compiled as training's are, with all optimisations, without which nothing is fused.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from adco_jax.interop import torch_weights
from adco_jax.models.heads import Encoder
from tests import plain_network
from tests import torch_reference as reference

pytestmark = [pytest.mark.gradients, pytest.mark.usefixtures("optimised", "float64")]
SIDES = (224, 192, 160, 128, 96, 64, 48, 32)
OFTEN = (32,)  # the others with the slow tests
BATCH, GROUP, DIM = 4, 2, 32
# Largest error of any parameter's gradient, over its norm. In float32 it is 3e-6 unless an input of some ReLU is
# zero up to rounding, open in one program and shut in the other: then torch's own float32 is .02 off as well.
LIMITS = {"float64": 1e-11, "float32": 0.05}


def slow(value):
  """A parameter whose test is for the night."""
  return pytest.param(value, marks=pytest.mark.slow)


def pictures(side, batch=BATCH):
  """Smooth patches, each image of its own brightness and contrast, float64 [B, side, side, 3]."""
  rng = np.random.RandomState(side)
  coarse = rng.standard_normal((batch, 4, 4, 3)) * rng.uniform(0.5, 2, (batch, 1, 1, 1))
  coarse += rng.standard_normal((batch, 1, 1, 3))
  smooth = np.kron(coarse, np.ones((1, side // 4, side // 4, 1)))
  return smooth + 0.3 * rng.standard_normal(smooth.shape)


def target(batch=BATCH):
  """The gradients are of the sum of unit embeddings times these, float64 [B, D]."""
  return np.random.RandomState(1).standard_normal((batch, DIM))


@functools.cache
def network(arch, width):
  """(PyTorch's network in float64, its variables as ours): BatchNorm's scales and biases are random."""
  torch.manual_seed(0)
  model = reference.scramble(reference.ResNet(arch, round(64 * width), DIM)).double()
  encoder = Encoder(arch, width, "imagenet", DIM, GROUP, dtype=jnp.float64)
  images = jnp.zeros((1, 32, 32, 3))
  blank = jax.eval_shape(lambda: encoder.init(jax.random.key(0), images, False))
  state = {name: value.numpy() for name, value in model.state_dict().items()}
  variables, report = torch_weights.import_encoder(state, blank)
  assert not report["missing"] and not report["unexpected"]
  return model, variables


def exact(arch, width, side):
  """{torch's name: gradient} by PyTorch's own operations and autograd, in float64."""
  model, _ = network(arch, width)
  model.zero_grad()
  (images,) = reference.images([pictures(side)])
  z = torch.cat([model(group) for group in images.split(GROUP)])
  (torch.nn.functional.normalize(z) * torch.tensor(target())).sum().backward()
  return {name: torch_weights.to_here(p.grad.numpy()) for name, p in model.named_parameters()}


def gradients(embed, variables, images):
  """{torch's name: gradient} of `embed` (params, images) in one compiled program."""

  def loss(params, images):
    z = embed(params, images).astype(params["head"]["fc0"]["bias"].dtype)
    unit = z / jnp.linalg.norm(z, axis=-1, keepdims=True)
    return jnp.sum(unit * target(len(images)).astype(z.dtype))

  found = jax.jit(jax.grad(loss))(variables["params"], images)
  names = torch_weights.torch_names({"params": found, "batch_stats": {}})
  leaf = lambda keys: functools.reduce(lambda tree, key: tree[key], keys, found)
  return {name: np.asarray(leaf(keys), np.float64) for name, (_, keys) in names.items()}


def ours(arch, width, side, dtype, platform="cpu", batch=BATCH, group=GROUP):
  """As training computes them in `dtype`, in a platform's form."""
  encoder = Encoder(arch, width, "imagenet", DIM, group, dtype=jnp.dtype(dtype), platform=platform)
  variables, images = in_type(network(arch, width)[1], pictures(side, batch), dtype)

  def embed(params, images):
    return encoder.apply({**variables, "params": params}, images, True, mutable=["batch_stats"])[0]

  return gradients(embed, variables, images)


def plain(arch, width, side, dtype, batch=BATCH, group=GROUP):
  """The same by JAX's plain operations and its autodiff."""
  variables, images = in_type(network(arch, width)[1], pictures(side, batch), dtype)
  embed = lambda params, x: plain_network.embed(params, x, arch, group, jnp.dtype(dtype))
  return gradients(embed, variables, images)


def in_type(variables, images, dtype):
  """Parameters and images of a run that computes in `dtype`: float32 at least."""
  kept = jnp.promote_types(dtype, jnp.float32)
  return jax.tree.map(lambda x: jnp.asarray(x, kept), (variables, images))


def errors(found, exact):
  """{torch's name: |found - exact| / |exact|}."""
  norm = np.linalg.norm
  return {name: float(norm(found[name] - exact[name]) / norm(exact[name])) for name in exact}


def assert_exact(arch, width, side, platform="cpu"):
  wanted = exact(arch, width, side)
  for dtype, limit in LIMITS.items():
    found = errors(ours(arch, width, side, dtype, platform), wanted)
    worst = max(found, key=found.get)
    assert found[worst] < limit, f"{dtype}: {worst} is {found[worst]:.1e} off"


@pytest.mark.parametrize("side", [side if side in OFTEN else slow(side) for side in SIDES])
def test_every_crop_size(side):
  assert_exact("resnet10", 0.25, side)


@pytest.mark.parametrize("side", [36, slow(96), slow(224)])
def test_the_form_of_a_gpu(side):
  """At 36 pixels the maps are 18, 9, 5, 3 and 2 wide."""
  assert_exact("resnet10", 0.25, side, "gpu")


@pytest.mark.slow
@pytest.mark.parametrize("arch, width", [("resnet18", 0.5), ("resnet50", 0.25)])
@pytest.mark.parametrize("side", [224, 160, 96, 64, 48])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_other_networks(arch, width, side, platform):
  assert_exact(arch, width, side, platform)


@pytest.mark.parametrize("side", [48, slow(96)])
@pytest.mark.parametrize("platform", ["cpu", slow("gpu")])
def test_bfloat16_is_as_exact_as_plain_bfloat16(side, platform):
  """Against float64, all parameters together and the first convolution: at most 1.5 times the plain error."""
  wanted = exact("resnet10", 0.25, side)
  whole = lambda g: {
    "all": np.concatenate([g[n].ravel() for n in wanted]),
    "conv1": g["conv1.weight"],
  }
  found = (
    ours("resnet10", 0.25, side, "bfloat16", platform),
    plain("resnet10", 0.25, side, "bfloat16"),
  )
  mine, theirs = (errors(whole(gradients), whole(wanted)) for gradients in found)
  for name, error in mine.items():
    assert error < 1.5 * theirs[name]
