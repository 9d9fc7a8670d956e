"""The contrastive loss of the paper's equation over a bank that is split over devices.

Flow: inside train_step's shard_map an objective takes the `pair_similarities` of queries and keys, and of them the
  `losses` it wants: `QueryLoss`, `BankLoss` or both.
Shapes: Q query views, P pairs, V key views, B global batch, b this device's part of it, D components, K
  bank rows, k this device's part of them, r a run of those. `sim` are cosines: products of unit vectors.
Paper: -log exp(q.k/t) / (exp(q.k/t) + sum_j exp(q.n_j/t) [+ sum of the batch's other keys]).
Holds: bank and keys are summed apart and never concatenated, so no device ever sees another's rows;
  every row of the loss is computed by the device that owns its query. One product of queries and bank
  serves both losses. A loss gives a gradient to its own player alone.
Not here: gradients' signs and which player sees which temperature (objectives).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adco_jax.config.pairing import Pair
from adco_jax.objectives.sums import bank_sums, query_sums
from adco_jax.runtime import sharding
from adco_jax.runtime.dtypes import Tree, at_least_float32
from adco_jax.runtime.runs import run_length
from adco_jax.runtime.sharding import AXIS

HIGHEST = jax.lax.Precision.HIGHEST  # TPU would round to bfloat16, GPU to TF32
TIE = 16  # units of rounding by which two products of equal vectors may differ
RUN = 2**17  # cosines of a run of bank rows: half a megabyte, half of a core's cache
LARGEST = 70.0  # exponents above the shift: exp(70) times 2^20 rows is still a float32
SAFE_RANGE = 150.0  # 2 / temperature up to which make_shift serves any pairs


def l2_normalize(x: jax.Array, epsilon: float = 1e-12) -> jax.Array:
  """x / max(|x|, epsilon) along the last axis, in float32 or better (torch's F.normalize)."""
  x = x.astype(at_least_float32(x.dtype))
  squares = jnp.sum(jnp.square(x), -1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(squares, epsilon**2))


def gather(x: jax.Array) -> jax.Array:
  """Every device's part of axis 1, in device order: [Q, b, ...] -> [Q, B, ...]."""
  return jax.lax.all_gather(x, AXIS, axis=1, tiled=True)


@jax.custom_vjp
def gather_with_gradient(x: jax.Array) -> jax.Array:
  """As `gather`; the gradient of every device's copy comes back, summed, to where a part came from."""
  return gather(x)


gather_with_gradient.defvjp(
  lambda x: (gather(x), None), lambda _, gradient: (_scatter_sum(gradient),)
)


def select_static(x_Qx: jax.Array, positions: np.ndarray) -> jax.Array:
  """x_Qx[positions] of known positions, without the gather whose gradient would be a scatter."""
  return jnp.stack([jax.lax.index_in_dim(x_Qx, i, keepdims=False) for i in positions.tolist()])


class PairSimilarities(NamedTuple):
  """What is known of queries and keys before any bank is looked at."""

  pairs: tuple[np.ndarray, ...]  # columns: query positions, key positions, weights
  queries_QxbxD: jax.Array
  gathered_QxBxD: jax.Array  # all queries, without gradient
  sim_PxbxB: jax.Array  # cosines of this device's queries with all keys of their pair
  positive_PxB: jax.Array  # cosines of all queries with their own keys, without gradient


def pair_similarities(
  queries_QxbxD: jax.Array, keys_VxBxD: jax.Array, pairs: Sequence[Pair]
) -> PairSimilarities:
  """Those of a device's queries with everybody's keys; `pairs`: (query, key, weight)."""
  columns = tuple(np.array(column) for column in zip(*pairs, strict=True))
  query, key, _ = columns
  gathered = gather(jax.lax.stop_gradient(queries_QxbxD))
  sim = jnp.einsum(
    "pbd,pcd->pbc",
    select_static(queries_QxbxD, query),
    select_static(keys_VxBxD, key),
    precision=HIGHEST,
  )
  positive = jnp.einsum(
    "pbd,pbd->pb", select_static(gathered, query), select_static(keys_VxBxD, key), precision=HIGHEST
  )
  return PairSimilarities(columns, queries_QxbxD, gathered, sim, positive)


def losses(
  similarities: PairSimilarities, bank_kxD: jax.Array, in_batch: bool, *wanted: "Loss"
) -> list[tuple[jax.Array, ...]]:
  """[what `loss` of each wanted one returns]: all go over the bank, of unit rows, in one pass."""
  still = jax.lax.stop_gradient(bank_kxD)
  shifts = [make_shift(similarities, still, each.temperature, in_batch) for each in wanted]

  def over_rows(rows, sim):
    return [each.over_rows(s, rows, sim) for each, s in zip(wanted, shifts, strict=True)]

  sums = _by_runs(over_rows, similarities.gathered_QxBxD, still)
  return [
    each.loss(similarities, bank_kxD, shift, own, in_batch)
    for each, shift, own in zip(wanted, shifts, sums, strict=True)
  ]


# What a loss takes of a run of rows: what is added up over runs, what is largest, what every row keeps.
RowSums = tuple[Tree, Tree, Tree]


class QueryLoss(NamedTuple):
  """What the queries descend; the bank stands still."""

  temperature: float

  def over_rows(self, shift_QxB: jax.Array, rows_rxD: jax.Array, sim_rxQxB: jax.Array) -> RowSums:
    """Sums of exponentials and of exponentials times rows; the nearest row's cosine."""
    terms = jnp.exp((sim_rxQxB - shift_QxB[None]) / self.temperature)
    pull = jnp.einsum("rqb,rd->qbd", terms, rows_rxD, precision=HIGHEST)
    return (jnp.sum(terms, 0), pull), jnp.max(sim_rxQxB, 0), ()

  def loss(
    self,
    similarities: PairSimilarities,
    bank_kxD: jax.Array,
    shift_QxB: jax.Array,
    row_sums: RowSums,
    in_batch: bool,
  ) -> tuple[jax.Array, ...]:
    """(loss, mass, accuracy): see `_pair_loss` and `_accuracy`."""
    del bank_kxD
    added, nearest, _ = row_sums
    sums, pull = (_scatter_sum(x) for x in added)
    sums = query_sums(similarities.queries_QxbxD, sums, pull / self.temperature)
    loss = _pair_loss(
      similarities, similarities.sim_PxbxB, sums, shift_QxB, self.temperature, in_batch
    )
    return *loss, _accuracy(similarities, nearest, in_batch)


class BankLoss(NamedTuple):
  """What the bank ascends; queries and keys stand still."""

  temperature: float

  def over_rows(self, shift_QxB: jax.Array, rows_rxD: jax.Array, sim_rxQxB: jax.Array) -> RowSums:
    """Sums of exponentials; the exponentials, of which its gradient is made."""
    del rows_rxD
    terms = jnp.exp((sim_rxQxB - shift_QxB[None]) / self.temperature)
    return jnp.sum(terms, 0), (), terms

  def loss(
    self,
    similarities: PairSimilarities,
    bank_kxD: jax.Array,
    shift_QxB: jax.Array,
    row_sums: RowSums,
    in_batch: bool,
  ) -> tuple[jax.Array, ...]:
    """(loss, mass): see `_pair_loss`."""
    sums, _, terms = row_sums
    slope = similarities.gathered_QxBxD / self.temperature
    sums = _scatter_sum(bank_sums(bank_kxD, sums, terms, slope))
    sim = jax.lax.stop_gradient(similarities.sim_PxbxB)
    return _pair_loss(similarities, sim, sums, shift_QxB, self.temperature, in_batch)


Loss = QueryLoss | BankLoss


def _accuracy(similarities, nearest_QxB, in_batch):
  """This device's part of the share of queries to which their key is nearer than any other candidate.

  Compared, not sorted: the (B + K)-way accuracy that the authors log as Acc@1. It measures how hard the
  bank is, not how good the encoder. Candidates as near as the key, up to rounding, count against it, so that
  an encoder whose embeddings are all alike has 0 and not what rounding makes of them.
  """
  sim = jax.lax.stop_gradient(similarities.sim_PxbxB)
  key_PxB = similarities.positive_PxB - TIE * jnp.finfo(sim.dtype).eps
  nearer = select_static(nearest_QxB, similarities.pairs[0]) > key_PxB
  right = _scatter_sum(nearer.astype(sim.dtype)) == 0
  if in_batch:
    right &= jnp.all(_own_column(sim.shape) | (sim <= own_rows(key_PxB)[..., None]), -1)
  return jnp.sum(right).astype(sim.dtype) / similarities.positive_PxB.size


def alignment(similarities: PairSimilarities) -> jax.Array:
  """This device's part of the mean |q - k|^2 of queries and their own keys: 0 if alike, 4 if opposite.

  The alignment of Wang and Isola (2020), between the two encoders and the two views that training compares.
  """
  return jnp.sum(2 - 2 * own_rows(similarities.positive_PxB)) / similarities.positive_PxB.size


def make_shift(
  similarities: PairSimilarities, bank_kxD: jax.Array, temperature: float, in_batch: bool
) -> jax.Array:
  """What is subtracted from the cosines of a query before exp: the same on all devices, [Q, B].

  The lowest cosine with an own key, but at least 1 - 70 temperature. It costs no communication, no term
  exceeds exp(70), and as long as 2 / temperature <= 150 the positive's stays above exp(-80): sums are
  positive and finite. At lower temperatures: the largest of what is summed, over all devices, which is gathered.
  """
  pairs_of = [similarities.pairs[0] == q for q in range(len(similarities.queries_QxbxD))]
  if 2 / temperature <= SAFE_RANGE:
    lowest = [jnp.min(similarities.positive_PxB[mine], 0) for mine in pairs_of]
    return jnp.maximum(jnp.stack(lowest), 1 - LARGEST * temperature)
  nearest_key = (
    jnp.max(similarities.sim_PxbxB, -1) if in_batch else own_rows(similarities.positive_PxB)
  )
  keys = gather(jax.lax.stop_gradient(nearest_key))
  keys = jnp.stack([jnp.max(keys[mine], 0) for mine in pairs_of])
  largest = lambda rows, sim: [((), jnp.max(sim, 0), ())]
  ((_, nearest, _),) = _by_runs(largest, similarities.gathered_QxBxD, bank_kxD)
  return jnp.maximum(keys, jax.lax.pmax(nearest, AXIS))


def own_rows(x: jax.Array) -> jax.Array:
  """This device's part of axis 1: [Q, B, ...] -> [Q, b, ...]."""
  size = x.shape[1] // jax.lax.axis_size(AXIS)
  return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(AXIS) * size, size, 1)


def metrics(
  similarities: PairSimilarities, loss: jax.Array, mass: jax.Array, accuracy: jax.Array
) -> dict[str, jax.Array]:
  """This device's parts of what every loss of queries tells."""
  return {
    "train/query_loss": loss,
    "train/accuracy": accuracy,
    "train/alignment": alignment(similarities),
    "train/in_batch_mass": mass,
  }


def _pair_loss(similarities, sim_PxbxB, sums_Qxb, shift_QxB, temperature, in_batch):
  """This device's part of (loss over weighted pairs, mean softmax mass on the batch's keys).

  All devices' parts add up to the sum over pairs of weight * mean over the batch. The positive of query
  i is key i of the global batch (the authors' `choose_match` takes the local GPU's number and is right
  on one node only). in_batch=False leaves the other keys out: the paper's equation.
  """
  query, _, weight = similarities.pairs
  shift = select_static(own_rows(shift_QxB), query)
  exponents = (sim_PxbxB - shift[..., None]) / temperature
  own = _own_column(sim_PxbxB.shape)
  positive = jnp.sum(jnp.where(own, exponents, 0), -1)
  keys = jnp.sum(jnp.exp(exponents), -1) if in_batch else jnp.exp(positive)
  total = select_static(sums_Qxb, query) + keys
  loss = jnp.log(total) - positive
  weight = jnp.array(weight, loss.dtype)[:, None]
  count = similarities.positive_PxB.shape[1]
  return jnp.sum(weight * loss) / count, jnp.sum(keys / total) / similarities.positive_PxB.size


def _by_runs(over_rows, queries_QxBxD, bank_kxD):
  """over_rows(rows [r, D], their cosines [r, Q, B]) -> [(what is added up, what is largest, what every row keeps)].

  On CPU a run of rows at a time, whose cosines stay in its cache; elsewhere all rows at once. Rows come first in
  the cosines because XLA's CPU turns a side of other products before it multiplies.
  """
  queries_DxQxB = jnp.moveaxis(queries_QxBxD, -1, 0)
  at_once = lambda rows: over_rows(
    rows, jnp.einsum("rd,dqb->rqb", rows, queries_DxQxB, precision=HIGHEST)
  )
  most = max(1, RUN * len(queries_DxQxB) // queries_DxQxB.size)
  size = run_length(len(bank_kxD), most)
  if size == len(bank_kxD):
    return at_once(bank_kxD)

  def in_runs(bank):
    runs = jax.lax.map(at_once, bank.reshape(-1, size, bank.shape[-1]))
    over = lambda combine, tree: jax.tree.map(combine, tree)
    whole = lambda x: x.reshape(-1, *x.shape[2:])
    return [
      (over(lambda x: jnp.sum(x, 0), added), over(lambda x: jnp.max(x, 0), largest), over(whole, kept))
      for added, largest, kept in runs
    ]  # fmt: skip

  return jax.lax.platform_dependent(bank_kxD, cpu=in_runs, default=at_once)


def _own_column(shape):
  """Where row i of this device meets key i of the global batch: bool [1, b, B]."""
  _, rows, columns = shape
  labels = jax.lax.axis_index(AXIS) * rows + jnp.arange(rows, dtype=jnp.int32)
  return (jnp.arange(columns, dtype=jnp.int32)[None] == labels[:, None])[None]


def _scatter_sum(x_QxB):
  """Sums over devices; each keeps its own rows of axis 1."""
  if sharding.over_gloo():
    rows = x_QxB.shape[1] // jax.lax.axis_size(AXIS)
    own = jax.lax.axis_index(AXIS) * rows
    return jax.lax.dynamic_slice_in_dim(jax.lax.psum(x_QxB, AXIS), own, rows, 1)
  return jax.lax.psum_scatter(x_QxB, AXIS, scatter_dimension=1, tiled=True)
