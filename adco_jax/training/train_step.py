"""One update of both players: a pure function of (state, batch) that one jit compiles.

Flow: build calls `make_update` with what makes views of what a loader ships (prepare), replay and tests without, for views
  that come ready; pretrain calls the result once per batch.
Shapes: on each device b = B / devices slots; queries [Q, b, D], keys [V, B, D] after the gather.
Paper: training/train.py of the authors. Order: query forward with the old parameters; key parameters
  move towards the query's from before the update (or, if the objective says so, from after it); key forward; both
  gradients from the old state.
Holds: one shard_map; parameters become varying once, gradients and statistics are summed once; keys are gathered before
  the loss sees them.
Not here: losses and what an objective keeps (objectives), views (prepare), curves (optimizers).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from adco_jax.config.plan import Phase, Sizes
from adco_jax.data.batch import Batch
from adco_jax.objectives import infonce
from adco_jax.objectives.base import Context, Embeddings, Objective, Variables, averages
from adco_jax.runtime.dtypes import Tree
from adco_jax.runtime.rng import NOISE, OBJECTIVE, rng_for
from adco_jax.runtime.sharding import AXIS
from adco_jax.training.microbatch import embed_parts, image_keys, pull_parts, take
from adco_jax.training.optimizers import Clip
from adco_jax.training.prepare import Prepare
from adco_jax.training.state import TrainState, state_specs

Metrics = dict[str, jax.Array]
Update = Callable[..., tuple[TrainState, Metrics]]  # see `make_update`


class StepSpec(NamedTuple):
  """What build decides and every update needs."""

  # (params, stats, images, noise=) -> (projections [b, D], stats), see models.heads.embed
  embed: Callable[..., tuple[jax.Array, Tree]]
  objective: Objective
  sizes: Sizes
  descender: optax.GradientTransformationExtraArgs
  rate: Callable[[jax.Array], jax.Array]  # step -> learning rate of the encoder
  ema_rate: Callable[[jax.Array], jax.Array]  # step -> 1 - decay of the key encoder
  fill_steps: int
  running_from: str
  mesh: Mesh
  num_microbatches: int = 1  # of a device's slots, see microbatch
  decay: Callable[[jax.Array], jax.Array] | None = None  # step -> weight decay, None: constant
  clip: Clip | None = None  # of what descends, see optimizers.make_clip
  drops: bool = False  # whether the query encoder draws (stochastic depth)


class StepOutputs(NamedTuple):
  """What comes out of the shard_map, or its specs."""

  gradients: Tree
  adversary_gradients: Tree
  query_stats: Tree
  key_stats: Tree
  memory: Tree
  adversary: Tree  # what stands in the adversary's place, or {}
  metrics: Tree
  finite: Tree  # whether the adversary's gradient is, on all devices


def make_update(spec: StepSpec, phase: Phase, prepare: Prepare | None = None) -> Update:
  """update(state, batch, constants=None) -> (state, metrics), to be jitted with the state donated.

  `prepare`: what makes views ready, on each device, see `make_prepare`; None: they are.
  A step whose losses or gradients are not finite leaves everything as it was and only counts itself.
  """
  prepare = prepare or (lambda step, batch, *_: batch)
  objective = spec.objective
  has_key, average = objective.keys_from == "momentum", averages(objective)

  def update(old, batch, constants=None):
    trained_steps = old.step - spec.fill_steps
    ema_rate = spec.ema_rate(trained_steps)
    state, before = old, objective.momentum_update == "before_keys"
    if (has_key and before) or average:
      state = old.replace(key_params=_ema(old.key_params, old.query_params, ema_rate))
    seen = state.replace(optimizer=())  # the step does not read it, and it may be sharded
    seen = seen.replace(key_params={}, key_stats={}) if average else seen
    specs = state_specs(seen, objective)
    own = specs.objective
    outputs = jax.shard_map(
      lambda *args: _local_step(spec, phase, prepare, *args),
      mesh=spec.mesh,
      in_specs=(specs, Batch.specs(), P()),
      out_specs=StepOutputs(
        P(), own.adversary, P(), P(), own.memory, objective.specs().adversary, P(), P()
      ),
    )(seen, batch, constants)
    curves = {"learning_rate": spec.rate, "weight_decay": spec.decay}
    given = {name: curve(trained_steps) for name, curve in curves.items() if curve}
    context = _make_context(spec, phase, state, constants)
    clipping, moving = dict[str, jax.Array](), outputs
    if spec.clip and phase.trains_encoder:
      shortened, clipping = spec.clip(outputs.gradients, objective.trains(context))
      moving = outputs._replace(gradients=shortened)
    new = _apply(spec, phase, context, old, state, moving, given)
    if average:
      memory = _ema(old.objective.memory, old.objective.params, ema_rate)
      stats = _ema(old.key_stats, old.query_stats, ema_rate)
      new = new.replace(key_stats=stats, objective=new.objective._replace(memory=memory))
    if has_key and not before:
      new = new.replace(key_params=_ema(old.key_params, new.query_params, ema_rate))
    finite = outputs.finite & _all_finite((outputs.gradients, outputs.metrics))
    state = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old).replace(step=new.step)
    if phase.copies_query_to_key:  # finite or not: another chance does not come
      last = state.step == phase.stop
      copied = lambda q, k: jnp.where(last, q, k)
      state = state.replace(key_params=jax.tree.map(copied, state.query_params, state.key_params))
    facts = {f"train/{name}": value for name, value in given.items()} | {"train/finite": finite}
    if has_key or average:
      facts["train/ema_decay"] = 1 - ema_rate
    return state, outputs.metrics | facts | clipping

  return update


def _local_step(spec, phase, prepare, state, batch, constants):
  """One device's part: views -> embeddings -> losses -> gradients, reduced over devices."""
  objective, variables = spec.objective, state.objective
  embed = _make_embed(spec, prepare, state, batch, constants)
  keys, key_stats = None, state.key_stats
  if objective.keys_from == "momentum":
    key_params, key_stats = _varying((state.key_params, state.key_stats))
    keys_Vxbxd, key_stats = embed("keys", key_params, key_stats)
    keys = _in_slot_order(infonce.gather(keys_Vxbxd), batch.key_positions)
  query_stats = _varying(state.query_stats)
  context = _make_context(spec, phase, state, constants)

  def loss_from_embeddings(queries_QxbxD, params, adversary):
    seen = queries_QxbxD if objective.keys_from == "online" else keys
    own = variables._replace(params=params, adversary=adversary)
    with jax.named_scope("objective"):
      return objective.loss(own, Embeddings(queries_QxbxD, seen, batch.labels), context, phase)

  def loss_from_images(trained, adversary):
    queries_QxbxD, stats = embed("queries", trained["encoder"], query_stats)
    value, written = loss_from_embeddings(queries_QxbxD, trained["objective"], adversary)
    return value, (stats, written)

  trained = _varying({"encoder": state.query_params, "objective": variables.params})
  if spec.num_microbatches == 1:
    gradient = jax.value_and_grad(loss_from_images, argnums=(0, 1), has_aux=True)
    (_, (stats, written)), (gradients, ascent) = gradient(trained, variables.adversary)
  else:
    queries_QxbxD, stats = embed("queries", trained["encoder"], query_stats)
    gradient = jax.value_and_grad(loss_from_embeddings, argnums=(0, 1, 2), has_aux=True)
    (_, written), (pulled, params, ascent) = gradient(queries_QxbxD, trained["objective"], variables.adversary)  # fmt: skip
    again = lambda params, part: embed("queries", params, query_stats, part)[0]
    encoder = pull_parts(again, trained["encoder"], pulled, spec.num_microbatches, _unrolled(spec))
    gradients = {"encoder": encoder, "objective": params}
  broken = jnp.logical_not(_all_finite(ascent)).astype(jnp.float32)
  gradients, metrics, broken = jax.lax.psum((gradients, written.metrics, broken), AXIS)
  stats, key_stats = _reduce_stats(spec.running_from, (stats, key_stats))
  overwritten = {} if written.adversary is None else written.adversary
  return StepOutputs(
    gradients, ascent, stats, key_stats, written.memory, overwritten, metrics, broken == 0
  )


def _make_embed(spec, prepare, state, batch, constants):
  """embed(role, params, stats, part=None) -> ([V, b, D], stats): of all parts, or of one."""
  count = spec.num_microbatches
  rng = rng_for(constants.seed if constants else 0, NOISE, state.step)

  def noise(role, views, part=0):  # keys do not draw
    return image_keys(rng, views, part, count) if spec.drops and role == "queries" else None

  if count == 1:
    views = prepare(state.step, batch, constants)  # once: a view may be both query and key

    return lambda role, params, stats: _encode(
      spec.embed, params, stats, getattr(views, role), noise(role, getattr(views, role))
    )

  def embed(role, params, stats, part=None):
    if part is None:
      one = lambda part: embed(role, params, stats, part)
      return embed_parts(one, count, spec.running_from, _unrolled(spec))
    views = prepare(state.step, take(batch, part, count), constants, part, count)
    seen = getattr(views, role)
    return _encode(spec.embed, params, stats, seen, noise(role, seen, part))

  return embed


def _unrolled(spec):
  """XLA's CPU takes convolutions' gradients 50 times slower inside of a loop."""
  return spec.mesh.devices.flat[0].platform == "cpu"


def _encode(embed, params, stats, views, noise):
  """Projections [V, b, D] of each view in turn; statistics are threaded through the views."""
  projections = []
  for i, images in enumerate(views):
    z, stats = embed(params, stats, images, **({} if noise is None else {"noise": noise[i]}))
    projections.append(z)
  return jnp.stack(projections), stats


def _in_slot_order(keys_VxBxD, positions_VxB):
  """Undoes the shuffle: slot s of view v has its key at position positions[v, s]; None: at its own."""
  if positions_VxB is None:
    return keys_VxBxD
  return jnp.take_along_axis(keys_VxBxD, positions_VxB[..., None], 1)


def _make_context(spec, phase, state, constants):
  """What a loss may know besides variables and embeddings."""

  def ascend(adversary, gradient):
    optimizer = spec.objective.ascent(spec.sizes)
    updates, _ = optimizer.update(gradient, state.adversary_optimizer, adversary)
    return optax.apply_updates(adversary, updates)

  trained = jnp.maximum(state.step - spec.fill_steps, 0)
  epoch = trained.astype(jnp.result_type(float)) / max(1, spec.sizes.steps_per_epoch)
  rng = rng_for(constants.seed if constants else 0, OBJECTIVE, state.step)
  return Context(phase.pairing.pairs, state.step, epoch, rng, spec.sizes, ascend)


def _apply(spec, phase, context, old, state, outputs, given):
  """Both optimisers, elementwise, outside the shard_map."""
  objective = spec.objective
  adversary, adversary_optimizer = _moved(spec, state, outputs)
  if not phase.trains_encoder:
    variables = old.objective._replace(adversary=adversary, memory=outputs.memory)
    return old.replace(step=old.step + 1, objective=variables)
  trained = {"encoder": state.query_params, "objective": state.objective.params}
  updates, optimizer = spec.descender.update(outputs.gradients, state.optimizer, trained, **given)
  moved = optax.apply_updates(trained, updates)
  moved["objective"] = objective.project(moved["objective"])
  trains = objective.trains(context)
  if trains is not True:
    moved, optimizer = (
      _held(trains, *pair) for pair in ((trained, moved), (state.optimizer, optimizer))
    )
  return state.replace(
    step=state.step + 1,
    query_params=moved["encoder"],
    query_stats=outputs.query_stats,
    key_stats=outputs.key_stats,
    objective=Variables(moved["objective"], adversary, outputs.memory),
    optimizer=optimizer,
    adversary_optimizer=adversary_optimizer,
  )


def _held(trains, old, new):
  """`new`, but what belongs to the objective's parameters as in `old` where those do not train."""
  players = lambda path: [x.key for x in path if getattr(x, "key", "") in ("encoder", "objective")]
  own = lambda path: players(path)[:1] == ["objective"]  # below it, names are anyone's
  choose = lambda path, o, n: jnp.where(trains, n, o) if own(path) else n
  return jax.tree_util.tree_map_with_path(choose, old, new)


def _moved(spec, state, outputs):
  """(adversary, its optimiser's state) after the step: as its loss wrote it, or a step up its gradient."""
  adversary = state.objective.adversary
  if jax.tree.leaves(outputs.adversary):
    return outputs.adversary, state.adversary_optimizer
  if not jax.tree.leaves(adversary):
    return adversary, state.adversary_optimizer
  updates, optimizer = spec.objective.ascent(spec.sizes).update(
    outputs.adversary_gradients, state.adversary_optimizer, adversary
  )
  return optax.apply_updates(adversary, updates), optimizer


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
