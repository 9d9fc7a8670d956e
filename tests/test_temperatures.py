"""Losses at soft and sharp temperatures, of float32 and of bfloat16 embeddings: finite, and one on 1 and on 8 devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from adco_jax.config import method
from adco_jax.config.plan import Sizes
from adco_jax.objectives.base import Context, Embeddings
from adco_jax.runtime import sharding
from adco_jax.runtime.sharding import AXIS
from tests import settings

pytestmark = [pytest.mark.steps, pytest.mark.usefixtures("strict")]

B, D = 16, 8
TEMPERATURES, EPSILONS = (0.05, 0.12, 0.5), (0.01, 0.05, 0.1)
SMALL = {
  "moco": {"queue_size": 32},
  "mochi": {"queue_size": 32, "hardest": 6, "mixed": 4, "mixed_with_query": 2, "start_epochs": 0.0},
  "simclr": {},
  "swav": {"prototypes": 5, "queue_size": 32},
  "mocov3": {"predictor_width": 6},
  "caco": {"bank": {"size": 32}},
  "query_softmax": {"bank": {"size": 32}},
  "adco": {"bank": {"size": 32}},
}


def objectives(name):
  """The objective at every temperature; a bank's is the same, Sinkhorn's epsilon goes from sharp to soft with it."""
  cls = method.find(name)
  for temperature, epsilon in zip(TEMPERATURES, EPSILONS, strict=True):
    own = {"temperature": temperature} | ({"epsilon": epsilon} if name == "swav" else {})
    bank = {"bank": {"temperature": temperature}} if "bank" in SMALL[name] else {}
    values = method.laid_over(method.laid_over(SMALL[name], own), bank)
    yield method.create(cls, method.laid_over(method.table(cls), values))


def make_losses(name, devices, dtype):
  """((queries, keys [2, B, D]) -> [(loss, its gradient to the queries, metrics) at every temperature], jitted; chances)."""
  sizes = Sizes(B, D, 4 * B, 0, devices, "symmetric", 2, group_size=2)
  mesh = sharding.create_mesh(jax.devices()[:devices])

  def one(objective, queries, keys):
    phase = objective.phases(sizes)[-1]
    variables = objective.init(jax.random.key(0), sizes, jnp.float32)
    full = lambda x: jax.random.normal(jax.random.key(1), x.shape, x.dtype)
    if name == "swav":
      variables = variables._replace(memory=jax.tree.map(full, variables.memory))
    c = Context(phase.pairing.pairs, jnp.int32(2), jnp.float32(9), jax.random.key(2), sizes, None)

    def local(queries, keys, variables):
      own = lambda x: jax.lax.pcast(x, AXIS, to="varying")  # as the step does
      variables = variables._replace(params=jax.tree.map(own, variables.params))

      def loss(queries):
        seen = queries if objective.keys_from == "online" else keys
        value, written = objective.loss(variables, Embeddings(queries, seen), c, phase)
        return value, written.metrics

      (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(queries)
      value, metrics = jax.lax.psum((value, metrics), AXIS)
      return value, gradient, metrics

    specs = P(None, AXIS), P(), objective.specs()
    run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(P(), P(None, AXIS), P()))
    return run(queries, keys, variables)

  chances = [objective.chance(sizes, objective.phases(sizes)[-1]) for objective in objectives(name)]
  return jax.jit(lambda *given: [one(objective, *given) for objective in objectives(name)]), chances


def embeddings(kind, dtype):
  """Queries and keys [2, B, D]: spread, nearly all alike (a collapse), or all the same but for their lengths."""
  rng = np.random.RandomState(0)
  spread = rng.standard_normal((2, 2, B, D))
  centre, lengths = (
    rng.standard_normal(D),
    2.0 ** rng.randint(-6, 7, (2, 2, B, 1)),
  )  # which round alike
  found = {
    "spread": spread, "alike": centre + 0.01 * spread, "same": np.broadcast_to(centre, spread.shape),
  }[kind] * lengths  # fmt: skip
  return tuple(jnp.asarray(x, dtype) for x in found)


IN_THE_DAY = ("swav", "simclr")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in IN_THE_DAY else pytest.mark.slow) for name in SMALL])  # fmt: skip
def test_losses_are_finite_and_one_on_any_devices(name, dtype):
  (one, chances), (eight, _) = (make_losses(name, devices, dtype) for devices in (1, 8))
  for kind in ("spread", "alike", "same"):
    given = embeddings(kind, dtype)
    alone, together = jax.device_get((one(*given), eight(*given)))
    assert jax.tree.all(jax.tree.map(lambda x: np.isfinite(np.float64(x)).all(), (alone, together)))
    for (loss, gradient, told), (other, others, _), chance in zip(
      alone, together, chances, strict=True
    ):
      assert abs(loss - other) <= 2e-5 * max(1, abs(loss)), (kind, loss, other)
      largest = np.abs(np.float64(gradient)).max()
      assert settings.difference(gradient, others) <= max(1e-5, jnp.finfo(dtype).eps) * largest + 1e-5  # fmt: skip
      assert gradient.dtype == dtype and loss.dtype == np.float32
      right = told.get("train/accuracy", 0.0)
      assert 0 <= right <= 1 + 1e-6
      if (
        kind == "same"
      ):  # tells nothing apart, so finds nothing among the batch, whatever rounding makes of it
        assert right == 0 or name not in ("simclr", "mocov3", "adco", "query_softmax")
        assert loss == pytest.approx(chance, abs=1e-5) or name not in ("simclr", "mocov3")
