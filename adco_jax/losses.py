"""The contrastive loss of the paper's equation over a bank that is split over devices.

Flow: inside train_step's shard_map an objective lets queries and keys `meet`, takes `bank_similarity`,
  and asks for `query_loss` and `bank_loss`.
Shapes: Q query views, P pairs, V key views, B global batch, b this device's part of it, D components, K
  bank rows, k this device's part of them. `sim` are cosines: products of unit vectors.
Paper: -log exp(q.k/t) / (exp(q.k/t) + sum_j exp(q.n_j/t) [+ sum of the batch's other keys]).
Holds: bank and keys are summed apart and never concatenated, so no device ever sees another's rows;
  every row of the loss is computed by the device that owns its query. One product of queries and bank
  serves both players.
Not here: gradients' signs and which player sees which temperature (objectives).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adco_jax import sharding
from adco_jax.dtypes import at_least_float32
from adco_jax.plan import SAFE_RANGE
from adco_jax.sharding import AXIS

HIGHEST = jax.lax.Precision.HIGHEST  # TPU would round to bfloat16, GPU to TF32
TIE = 16  # units of rounding by which two products of equal vectors may differ
LARGEST = 70.0  # exponents above the shift: exp(70) times 2^20 rows is still a float32


def normalize(x, epsilon=1e-12):
  """x / max(|x|, epsilon) along the last axis, in float32 or better (torch's F.normalize)."""
  x = x.astype(at_least_float32(x.dtype))
  squares = jnp.sum(jnp.square(x), -1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(squares, epsilon**2))


def gather(x):
  """Every device's part of axis 1, in device order: [Q, b, ...] -> [Q, B, ...]."""
  return jax.lax.all_gather(x, AXIS, axis=1, tiled=True)


def pick(x_Qx, positions):
  """x_Qx[positions] of known positions, without the gather whose gradient would be a scatter."""
  return jnp.stack([jax.lax.index_in_dim(x_Qx, i, keepdims=False) for i in positions.tolist()])


class Meeting(NamedTuple):
  """What is known of queries and keys before any bank is looked at."""

  pairs: tuple  # NumPy columns (query positions, key positions, weights)
  queries_QxbxD: jax.Array
  gathered_QxBxD: jax.Array  # all queries, without gradient
  sim_PxbxB: jax.Array  # cosines of this device's queries with all keys of their pair
  positive_PxB: jax.Array  # cosines of all queries with their own keys, without gradient


def meet(queries_QxbxD, keys_VxBxD, pairs):
  """The `Meeting` of a device's queries with everybody's keys; `pairs`: (query, key, weight)."""
  columns = tuple(np.array(column) for column in zip(*pairs, strict=True))
  query, key, _ = columns
  gathered = gather(jax.lax.stop_gradient(queries_QxbxD))
  sim = jnp.einsum(
    "pbd,pcd->pbc", pick(queries_QxbxD, query), pick(keys_VxBxD, key), precision=HIGHEST
  )
  positive = jnp.einsum(
    "pbd,pbd->pb", pick(gathered, query), pick(keys_VxBxD, key), precision=HIGHEST
  )
  return Meeting(columns, queries_QxbxD, gathered, sim, positive)


def bank_similarity(meeting, bank_kxD):
  """Cosines of all queries with this device's bank rows, [Q, B, k]; only the bank gets a gradient."""
  return jnp.einsum("qbd,kd->qbk", meeting.gathered_QxBxD, bank_kxD, precision=HIGHEST)


def query_loss(meeting, bank_kxD, sim_QxBxk, temperature, in_batch):
  """The loss as the queries see it (the bank stands still): see `_pair_loss`."""
  shift = make_shift(meeting, sim_QxBxk, temperature)
  sums = _query_sums(
    meeting.queries_QxbxD, jax.lax.stop_gradient(bank_kxD), jax.lax.stop_gradient(sim_QxBxk),
    shift, temperature,
  )  # fmt: skip
  return _pair_loss(meeting, meeting.sim_PxbxB, sums, shift, temperature, in_batch)


def bank_loss(meeting, sim_QxBxk, temperature, in_batch):
  """The loss as the bank sees it (queries and keys stand still): see `_pair_loss`."""
  shift = make_shift(meeting, sim_QxBxk, temperature)
  sums = _scatter_sum(jnp.sum(jnp.exp((sim_QxBxk - shift[..., None]) / temperature), -1))
  sim = jax.lax.stop_gradient(meeting.sim_PxbxB)
  return _pair_loss(meeting, sim, sums, shift, temperature, in_batch)


def accuracy(meeting, sim_QxBxk, in_batch):
  """This device's part of the share of queries to which their key is nearer than any other candidate.

  Counted, not sorted: the (B + K)-way accuracy that the authors log as Acc@1. It measures how hard the
  bank is, not how good the encoder. Candidates as near as the key, up to rounding, count against it, so that
  an encoder whose embeddings are all alike has 0 and not what rounding makes of them.
  """
  query, *_ = meeting.pairs
  sim = jax.lax.stop_gradient(meeting.sim_PxbxB)
  positive_PxB = meeting.positive_PxB - TIE * jnp.finfo(sim.dtype).eps
  nearer = pick(sim_QxBxk, query) > positive_PxB[..., None]
  harder = _scatter_sum(jnp.sum(nearer, -1).astype(sim.dtype))
  if in_batch:
    own = _own_column(sim.shape)
    nearer = ~own & (sim > own_rows(positive_PxB)[..., None])
    harder += jnp.sum(nearer, -1).astype(sim.dtype)
  return jnp.sum(harder == 0).astype(sim.dtype) / meeting.positive_PxB.size


def alignment(meeting):
  """This device's part of the mean |q - k|^2 of queries and their own keys: 0 if alike, 4 if opposite.

  The alignment of Wang and Isola (2020), between the two encoders and the two views that training compares.
  """
  return jnp.sum(2 - 2 * own_rows(meeting.positive_PxB)) / meeting.positive_PxB.size


def make_shift(meeting, sim_QxBxk, temperature):
  """What is subtracted from the cosines of a query before exp: the same on all devices, [Q, B].

  The lowest cosine with an own key, but at least 1 - 70 temperature. It costs no communication, no term
  exceeds exp(70), and as long as 2 / temperature <= 150 the positive's stays above exp(-80): sums are
  positive and finite. At lower temperatures: the row's maximum over all devices, which is gathered.
  """
  pairs_of = [meeting.pairs[0] == q for q in range(len(sim_QxBxk))]
  if 2 / temperature <= SAFE_RANGE:
    lowest = [jnp.min(meeting.positive_PxB[mine], 0) for mine in pairs_of]
    return jnp.maximum(jnp.stack(lowest), 1 - LARGEST * temperature)
  keys = gather(jax.lax.stop_gradient(jnp.max(meeting.sim_PxbxB, -1)))
  keys = jnp.stack([jnp.max(keys[mine], 0) for mine in pairs_of])
  bank = jax.lax.pmax(jax.lax.stop_gradient(jnp.max(sim_QxBxk, -1)), AXIS)
  return jnp.maximum(keys, bank)


def own_rows(x):
  """This device's part of axis 1: [Q, B, ...] -> [Q, b, ...]."""
  size = x.shape[1] // jax.lax.axis_size(AXIS)
  return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(AXIS) * size, size, 1)


def chance_level(bank_size, batch_size, in_batch):
  """The loss of an encoder that tells nothing apart: log of the number of candidates."""
  return math.log(bank_size + (batch_size if in_batch else 1))


def _pair_loss(meeting, sim_PxbxB, sums_Qxb, shift_QxB, temperature, in_batch):
  """This device's part of (loss over weighted pairs, mean softmax mass on the batch's keys).

  All devices' parts add up to the sum over pairs of weight * mean over the batch. The positive of query
  i is key i of the global batch (the authors' `choose_match` takes the local GPU's number and is right
  on one node only). in_batch=False leaves the other keys out: the paper's equation.
  """
  query, _, weight = meeting.pairs
  shift = pick(own_rows(shift_QxB), query)
  exponents = (sim_PxbxB - shift[..., None]) / temperature
  own = _own_column(sim_PxbxB.shape)
  positive = jnp.sum(jnp.where(own, exponents, 0), -1)
  keys = jnp.sum(jnp.exp(exponents), -1) if in_batch else jnp.exp(positive)
  total = pick(sums_Qxb, query) + keys
  loss = jnp.log(total) - positive
  weight = jnp.array(weight, loss.dtype)[:, None]
  count = meeting.positive_PxB.shape[1]
  return jnp.sum(weight * loss) / count, jnp.sum(keys / total) / meeting.positive_PxB.size


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _query_sums(queries_Qxbxd, bank_kxD, sim_QxBxk, shift_QxB, temperature):
  """sum_j exp((q.n_j - shift) / temperature) over the whole bank for this device's rows, [Q, b].

  Its gradient with respect to q is the sum of the same terms times n_j / temperature. Both sums are
  made together and reduce-scattered to the rows' owner, so the backward pass sends nothing.
  """
  return _query_sums_forward(queries_Qxbxd, bank_kxD, sim_QxBxk, shift_QxB, temperature)[0]


def _query_sums_forward(queries_Qxbxd, bank_kxD, sim_QxBxk, shift_QxB, temperature):
  del queries_Qxbxd
  terms = jnp.exp((sim_QxBxk - shift_QxB[..., None]) / temperature)
  pull = jnp.einsum("qbk,kd->qbd", terms, bank_kxD, precision=HIGHEST)
  return _scatter_sum(jnp.sum(terms, -1)), _scatter_sum(pull)


def _query_sums_backward(temperature, pull_QxbxD, gradient_Qxb):
  return gradient_Qxb[..., None] * pull_QxbxD / temperature, None, None, None


_query_sums.defvjp(_query_sums_forward, _query_sums_backward)


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
