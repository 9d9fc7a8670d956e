"""One update of both players: a pure function of (state, batch) that one jit compiles.

Flow: build calls `make_update` (views come ready: replays, benchmarks, tests) or `make_train_step`
  (views are cut and augmented first); pretrain calls the result once per batch.
Shapes: on each device b = B / devices slots; queries [Q, b, D], keys [V, B, D] after the gather.
Paper: training/train.py of the authors. Order: query forward with the old parameters; key parameters
  move towards the query's from before the update; key forward; both gradients from the old state.
Holds: one shard_map; parameters become varying once, gradients and statistics are summed once; q and k
  are gathered, dq comes back reduce-scattered; no array with K rows ever travels.
Not here: losses and second players (infonce, objectives), colour (augment), curves (optimizers).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from adco_jax.objectives import infonce
from adco_jax.runtime.rng import AUGMENT, rng_for
from adco_jax.runtime.sharding import AXIS
from adco_jax.training.microbatch import embed_parts, pull_parts, take
from adco_jax.training.state import state_specs
from adco_jax.views.augment import make_views


class Views(NamedTuple):
  """Normalised float images of one device: a list per query view and one per key view."""

  queries: list
  keys: list


class Players(NamedTuple):
  """What build decides and every update needs."""

  encoder: Any
  objective: Any
  descender: Any
  ascender: Any
  rate: Any  # step -> learning rate of the encoder
  ema_rate: Any  # step -> 1 - decay of the key encoder
  fill_steps: int
  alternating: bool
  running_from: str
  mesh: Any
  parts: int = 1  # of a device's slots, see accumulate


class Played(NamedTuple):
  """What comes out of the shard_map."""

  gradients: Any
  ascend_gradients: Any
  query_stats: Any
  key_stats: Any
  slots: Any
  metrics: dict
  finite: Any  # whether the second player's gradient is, on all devices


def make_update(players, pairs, prepare=None):
  """update(state, split, shared) -> (state, metrics), to be jitted with the state donated.

  `split`: tree whose arrays are cut along their first axis over the devices; `shared`: tree that every
  device sees whole, with `key_orders` int32 [V, B]: the slot whose key sits at each position.
  `prepare(step, split, shared, part, parts)` -> Views, run on each device; None: `split` is a `Views` already.
  A step whose losses or gradients are not finite leaves everything as it was and only counts itself.
  """
  prepare = prepare or (lambda step, split, *_: split)

  def update(old, split, shared):
    trained_steps = old.step - players.fill_steps
    ema_rate = players.ema_rate(trained_steps)
    state = old.replace(key_params=_ema(old.key_params, old.query_params, ema_rate))
    seen = state.replace(optimizer=())  # nothing in there needs it, and it may lie in parts
    specs = state_specs(seen)
    played = jax.shard_map(
      lambda *args: _play(players, pairs, prepare, *args),
      mesh=players.mesh,
      in_specs=(specs, P(AXIS), P()),
      out_specs=Played(P(), specs.ascend, P(), P(), specs.slots, P(), P()),
    )(seen, split, shared)
    rate = players.rate(trained_steps)
    new = _apply(players, state, played, rate)
    finite = played.finite & _all_finite((played.gradients, played.metrics))
    state = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old).replace(step=new.step)
    facts = {"train/learning_rate": rate, "train/ema_decay": 1 - ema_rate, "train/finite": finite}
    return state, played.metrics | facts

  return update


def make_train_step(players, pairing, plan, **views):
  """`make_update` from what a loader ships; `views`: see `make_prepare`."""
  return make_update(players, pairing.pairs, make_prepare(pairing, plan, **views))


def make_prepare(pairing, plan, *, cut, policies, mean, std):
  """prepare(step, split, shared, part=0, parts=1) -> Views, on one device, `split` being that part's; `shared` has `seed` and the loader's own arrays.

  `cut(item, size, shared)` -> uint8 crops of one view (the loader's); `policies`: augmentation of each view;
  see data/order.ship for `split`.
  """

  def view(step, number, item, slots, shared):
    rng = jax.random.fold_in(rng_for(shared["seed"], AUGMENT, step), number)
    crops = cut(item, plan.view_sizes[number], shared)
    with jax.named_scope("augmentation"):
      return make_views(rng, crops, policies[number], slots, mean, std, plan.batch_size)

  def prepare(step, split, shared, part=0, parts=1):
    size = split["queries"][0][0].shape[0]
    own = (jax.lax.axis_index(AXIS) * parts + part) * size + jnp.arange(size)
    queries = [
      view(step, v, item, own, shared)
      for v, item in zip(pairing.query_views, split["queries"], strict=True)
    ]
    keys, shipped = [], iter(split["keys"])
    for v, order in zip(pairing.key_views, shared["key_orders"], strict=True):
      if plan.shuffle_block or v not in pairing.query_views:
        keys.append(view(step, v, next(shipped), order[own], shared))
      else:
        keys.append(queries[pairing.query_views.index(v)])
    return Views(queries, keys)

  return prepare


def make_fill_update(update, fill_steps, trained):
  """The bank's initialisation around an `update` that plays Fill.

  The bank stands in the slots while it is filled. After the last step the key encoder takes over the
  query's parameters (not its statistics). trained=False writes the bank and leaves all else alone.
  """

  def fill(state, split, shared):
    bare = state.replace(slots=state.ascend, ascend={}, ascend_optimizer=optax.EmptyState())
    new, metrics = update(bare, split, shared)
    bank = new.slots
    if trained:
      last = new.step == fill_steps
      key_params = jax.tree.map(
        lambda q, k: jnp.where(last, q, k), new.query_params, new.key_params
      )
      new = new.replace(key_params=key_params)
    else:
      new = state.replace(step=new.step)
    kept = {"slots": state.slots, "ascend_optimizer": state.ascend_optimizer}
    return new.replace(ascend=bank, **kept), metrics

  return fill


def _play(players, pairs, prepare, state, split, shared):
  """One device's part: views -> embeddings -> losses -> gradients, reduced over devices."""
  embed = _make_embed(players, prepare, state, split, shared)
  key_params, key_stats = _varying((state.key_params, state.key_stats))
  keys_Vxbxd, key_stats = embed("keys", key_params, key_stats)
  keys_VxBxD = _in_slot_order(infonce.gather(keys_Vxbxd), shared["key_orders"])
  query_stats = _varying(state.query_stats)
  respond = _make_respond(players, state) if players.alternating else None

  def game(queries_QxbxD, descend, ascend):
    with jax.named_scope("objective"):
      return players.objective.loss(descend, ascend, state.slots, queries_QxbxD, keys_VxBxD, pairs, respond)  # fmt: skip

  def whole(trained, ascend):
    queries_QxbxD, stats = embed("queries", trained["encoder"], query_stats)
    value, aux = game(queries_QxbxD, trained["descend"], ascend)
    return value, (stats, aux)

  trained = _varying({"encoder": state.query_params, "descend": state.descend})
  if players.parts == 1:
    gradient = jax.value_and_grad(whole, argnums=(0, 1), has_aux=True)
    (_, (stats, aux)), (gradients, ascend_gradients) = gradient(trained, state.ascend)
  else:
    queries_QxbxD, stats = embed("queries", trained["encoder"], query_stats)
    gradient = jax.value_and_grad(game, argnums=(0, 1, 2), has_aux=True)
    (_, aux), (pulled, descend, ascend_gradients) = gradient(queries_QxbxD, trained["descend"], state.ascend)  # fmt: skip
    again = lambda params, part: embed("queries", params, query_stats, part)[0]
    encoder = pull_parts(again, trained["encoder"], pulled, players.parts, _unrolled(players))
    gradients = {"encoder": encoder, "descend": descend}
  slots = players.objective.write(state.slots, keys_VxBxD, state.step)
  broken = jnp.logical_not(_all_finite(ascend_gradients)).astype(keys_VxBxD.dtype)
  gradients, aux, broken = jax.lax.psum((gradients, aux, broken), AXIS)
  stats, key_stats = _reduce_stats(players.running_from, (stats, key_stats))
  return Played(gradients, ascend_gradients, stats, key_stats, slots, aux, broken == 0)


def _make_embed(players, prepare, state, split, shared):
  """embed(role, params, stats, part=None) -> ([V, b, D], stats): of all parts, or of one."""
  parts = players.parts
  if parts == 1:
    views = prepare(state.step, split, shared, 0, 1)  # once: a view may be both query and key
    return lambda role, params, stats: _encode(players.encoder, params, stats, getattr(views, role))

  def embed(role, params, stats, part=None):
    if part is None:
      one = lambda part: embed(role, params, stats, part)
      return embed_parts(one, parts, players.running_from, _unrolled(players))
    views = prepare(state.step, take(split, part, parts), shared, part, parts)
    return _encode(players.encoder, params, stats, getattr(views, role))

  return embed


def _unrolled(players):
  """XLA's CPU takes convolutions' gradients 50 times slower inside of a loop."""
  return players.mesh.devices.flat[0].platform == "cpu"


def _encode(encoder, params, stats, views):
  """Unit embeddings [V, b, D] of each view in turn; statistics are threaded through the views."""
  embeddings = []
  for images in views:
    variables = {"params": params, "batch_stats": stats}
    z, mutated = encoder.apply(variables, images, train=True, mutable=["batch_stats"])
    stats = mutated["batch_stats"]
    embeddings.append(infonce.normalize(z))
  return jnp.stack(embeddings), stats


def _in_slot_order(keys_VxBxD, orders_VxB):
  """Undoes the shuffle: position p of view v holds the key of slot orders[v, p]."""
  return jnp.take_along_axis(keys_VxBxD, jnp.argsort(orders_VxB, -1)[..., None], 1)


def _make_respond(players, state):
  def respond(ascend, gradient):
    updates, _ = players.ascender.update(gradient, state.ascend_optimizer, ascend)
    return optax.apply_updates(ascend, updates)

  return respond


def _apply(players, state, played, rate):
  """Both optimisers, elementwise, outside the shard_map."""
  trained = {"encoder": state.query_params, "descend": state.descend}
  updates, optimizer = players.descender.update(
    played.gradients, state.optimizer, trained, learning_rate=rate
  )
  trained = optax.apply_updates(trained, updates)
  ascend, ascend_optimizer = state.ascend, state.ascend_optimizer
  if jax.tree.leaves(ascend):
    updates, ascend_optimizer = players.ascender.update(
      played.ascend_gradients, ascend_optimizer, ascend
    )
    ascend = optax.apply_updates(ascend, updates)
  return state.replace(
    step=state.step + 1,
    query_params=trained["encoder"],
    query_stats=played.query_stats,
    key_stats=played.key_stats,
    descend=trained["descend"],
    ascend=ascend,
    slots=played.slots,
    optimizer=optimizer,
    ascend_optimizer=ascend_optimizer,
  )


def _ema(average, new, rate):
  return jax.tree.map(
    lambda a, n: a * (1 - rate).astype(a.dtype) + n * rate.astype(a.dtype), average, new
  )


def _all_finite(tree):
  return jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)], bool))


def _varying(tree):
  """Marks replicated values as each device's own, so that their gradients are not summed per use."""
  return jax.tree.map(lambda x: jax.lax.pcast(x, AXIS, to="varying"), tree)


def _reduce_stats(running_from, stats):
  """Running statistics of all devices: their mean, or those of the first one (its first group)."""
  if running_from == "mean":
    return jax.lax.pmean(stats, AXIS)
  first = jax.lax.axis_index(AXIS) == 0
  return jax.lax.psum(jax.tree.map(lambda x: jnp.where(first, x, 0), stats), AXIS)
