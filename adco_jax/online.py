"""What is known of an encoder while it trains: kNN and linear probe on train images left out of the search.

Flow: pretrain makes the evaluation once and runs it at the steps that the plan names.
Not here: scores of a finished run (evaluate), the arithmetic of a score (evaluation/*).
"""

from adco_jax import sharding
from adco_jax.data import order
from adco_jax.evaluation import features, knn, linear
from adco_jax.metrics import say


def make_online_evaluation(config, plan, source, loader, encoder, mesh, guard):
  """state -> {'knn/top1', 'probe/top1'} on train images left out of the search; None without labels."""
  if not config.eval.every_epochs:
    return None
  if source.labels is None:
    say("no labels: kNN and probe are off; the loss against chance and the bank's norms remain")
    return None
  setting, num_classes = config.eval, plan.num_classes
  searched, scored = order.hold_out(
    config.seed, source.num_examples, setting.hold_out, setting.max_images
  )
  labels = source.labels[searched], source.labels[scored]
  forward = features.make_features(encoder, config.data.mean, config.data.std, mesh)
  view = dict(
    size=setting.size,
    fraction=setting.crop_fraction,
    batch_size=sharding.round_up(setting.batch_size),
  )

  def evaluate(state):
    variables = {"params": state.query_params, "batch_stats": state.query_stats}
    embed = lambda images: forward(variables, images)
    index, queries = (
      features.extract(embed, guard.over(loader.evaluation(i, **view))) for i in (searched, scored)
    )
    near = knn.predict(
      index, labels[0], queries,
      k=setting.knn_k, temperature=setting.knn_temperature, num_classes=num_classes,
    )  # fmt: skip
    index, queries = linear.scale(index, queries)
    probe = linear.predict(linear.fit(index, labels[0], num_classes), queries)
    return {"knn/top1": knn.accuracy(near, labels[1]), "probe/top1": knn.accuracy(probe, labels[1])}

  return evaluate
