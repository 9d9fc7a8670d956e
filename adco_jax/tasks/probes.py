"""How the task `linear` fits a probe: L-BFGS on features of whole images, SGD on crops, or a sweep of many SGDs at once.

Flow: evaluate looks a recipe up and calls it with the features and the frozen encoder; features of crops are made on the way.
Holds: what is chosen is chosen on train images left out of the fit, never on test; all that was tried is told.
Not here: the arithmetic (evaluation.linear, evaluation.sweep).
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from adco_jax.config import plan as planning
from adco_jax.config.plan import Plan
from adco_jax.data import order
from adco_jax.data.batch import Constants
from adco_jax.evaluation import confusion, linear, sweep
from adco_jax.evaluation.sweep import Setting
from adco_jax.runtime import rng
from adco_jax.runtime.console import tell
from adco_jax.runtime.files import Json
from adco_jax.runtime.progress import Progress
from adco_jax.tasks.scoring import Frozen, Scored
from adco_jax.training import optimizers
from adco_jax.views import augment

Fitted = tuple[
  dict[str, np.ndarray], dict[str, Json]
]  # (probe on features as they are, what was chosen)


def fit_lbfgs(scored: Scored, frozen: Frozen, config: ConfigDict) -> Fitted:
  """(probe on features as they are, {'penalty' chosen on held-out train images})."""
  labels, classes = frozen.train.targets, len(frozen.train.classes)
  scale = linear.scale_of(scored.train)
  train = scale(scored.train)
  searched, held_out = order.hold_out(config.seed, len(labels), config.hold_out)
  penalties = Progress("linear", len(config.penalties) + 1, "fits").over(config.penalties)
  penalty = linear.choose_penalty(
    train[searched], labels[searched], train[held_out], labels[held_out], classes, penalties
  )
  return scale.undo(linear.fit(train, labels, classes, penalty)), {"penalty": penalty}


def fit_sgd(scored: Scored, frozen: Frozen, config: ConfigDict) -> Fitted:
  """(probe, nothing chosen) by the recipe of `config.sgd`, on freshly cropped and flipped train images."""
  sgd, classes = config.sgd, len(frozen.train.classes)
  plan = _make_plan(frozen, config, (sgd.scale,))
  rate = optimizers.make_rate(
    sgd.schedule, base=sgd.learning_rate, final=sgd.lr_final, epochs=sgd.epochs,
    steps_per_epoch=plan.steps_per_epoch, warmup_epochs=0, step_epochs=sgd.step_epochs,
  )  # fmt: skip
  batches = ((x[0], y) for x, y, _ in cropped_features(frozen, config.seed, plan))
  start = rng.rng_for(config.seed, rng.PROBE)
  size = scored.train.shape[-1]
  return linear.fit_sgd(batches, start, size, classes, rate, sgd.momentum, sgd.weight_decay), {}


def fit_sweep(scored: Scored, frozen: Frozen, config: ConfigDict) -> Fitted:
  """(the probe that is best on held-out train images, its setting and accuracy there); `chosen['tried']` has all of them."""
  tried, sgd, labels = config.sweep, config.sgd, frozen.train.targets
  searched, held_out = order.hold_out(config.seed, len(labels), config.hold_out)
  learnt = np.zeros(len(labels), bool)
  learnt[searched] = True
  plan = _make_plan(frozen, config, [(least, 1.0) for least in tried.crops])
  settings = [
    Setting(rate, head, crop)
    for crop in range(len(tried.crops)) for head in sweep.HEADS for rate in tried.learning_rates
  ]  # fmt: skip
  batches = ((x, y, learnt[i]) for x, y, i in cropped_features(frozen, config.seed, plan))
  probes = sweep.fit(
    batches, rng.rng_for(config.seed, rng.PROBE), len(frozen.train.classes), linear.scale_of(scored.train[searched]), settings,
    steps=plan.total_steps, momentum=sgd.momentum, weight_decay=sgd.weight_decay,
  )  # fmt: skip
  score = lambda p: confusion.top(
    scored.train[held_out] @ p["kernel"] + p["bias"], labels[held_out], 1
  )
  held = [score(probe) for probe in probes]
  told = [{"rate": s.rate, "features": s.head, "crops from": tried.crops[s.crop], "held-out": h}
          for s, h in zip(settings, held, strict=True)]  # fmt: skip
  best = int(np.argmax(held))
  _warn_of_edge(settings[best].rate, tried.learning_rates)
  return probes[best], told[best] | {"tried": told}


def _warn_of_edge(rate, rates):
  """The best of a grid may lie outside it."""
  if len(rates) > 1 and rate in (min(rates), max(rates)):
    tell(f"the best rate, {rate:g}, is at the edge of sweep.learning_rates: more may lie beyond")


def _make_plan(frozen, config, scales):
  """The plan of batches of one crop per scale."""
  return planning.make_probe_plan(
    frozen.train.num_examples, len(frozen.train.classes), batch_size=config.batch_size,
    crops=[(frozen.view["size"], *scale) for scale in scales], epochs=config.sgd.epochs,
    devices=jax.device_count(), processes=1, process=0,
  )  # fmt: skip


def cropped_features(
  frozen: Frozen, seed: int, plan: Plan
) -> Iterator[tuple[jax.Array, np.ndarray, np.ndarray]]:
  """Yields (features [V, B, F] of all views, labels [B], numbers [B] of the images) of every step of a probe's plan."""
  loader, flip = frozen.loaders.of("train"), augment.policies_for("flip", 1)[0]
  constants = Constants.put(frozen.mesh, seed, loader.images)

  @jax.jit
  def forward_views(variables, batch, step, constants):
    return jnp.stack(
      [_features(v, variables, batch, step, constants) for v in range(len(plan.view_sizes))]
    )

  def _features(view, variables, batch, step, constants):
    crops = batch.queries[view].crops(plan.view_sizes[view], constants.images)
    key = rng.rng_for(constants.seed, rng.PROBE, step + 1)
    drawn = augment.draw(jax.random.fold_in(key, view) if view else key, len(crops), flip)
    return frozen.forward(variables, augment.augment(crops, drawn, flip))

  batches = loader.train(0, plan.total_steps, seed=seed, plan=plan, ratio=(3 / 4, 4 / 3))
  progress = Progress("probe", plan.total_steps * plan.batch_size)
  for step, loaded in enumerate(progress.over(batches, plan.batch_size)):
    features = forward_views(frozen.trained, loaded.batch.put(frozen.mesh), step, constants)
    yield features, frozen.train.targets[loaded.indices], loaded.indices


RECIPES = {"lbfgs": fit_lbfgs, "sgd": fit_sgd, "sweep": fit_sweep}
