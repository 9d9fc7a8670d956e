"""What a careful colleague would say of a run that can be run all the same.

Flow: build.warnings adds the objective's own -> pretrain and --plan say them.
Not here: what is refused (ranges, plan).
"""

from ml_collections import ConfigDict

from adco_jax.config.plan import Plan

# Of a method: when something of it begins, and what says that there is such a thing.
BEGINNINGS = {"start_epochs": ("mixed", "mixed_with_query"), "queue_epochs": ("queue_size",)}


def warnings(config: ConfigDict, plan: Plan, short_side: float = 0) -> list[str]:
  """Lines a careful colleague would say; `short_side`: of the median image in pixels, where it is known."""
  group = config.bn.group_size
  largest = max(plan.view_sizes)
  told = (
    (short_side and largest > 2 * short_side, f"views of {largest} pixels are enlarged from images of {short_side}: use a smaller side (views.crops, eval.size), about the images' own"),
    (short_side > 8 * largest, f"views of {largest} pixels are cut from images of {short_side}: details are lost and time goes into decoding; use a larger side (views.crops), or configs/pack.py"),
    (group == 1, "BatchNorm groups of one image: statistics of a single image; use 8 or more"),
    (plan.train_pairing.key_views and 0 < plan.shuffle_block <= group, f"bn.shuffle_block={plan.shuffle_block} lies inside of a BatchNorm group: keys meet the same images as queries; use 0 or several groups"),
    (1 < group < 8, f"BatchNorm groups of {group} images are noisy; 8 or more are usual"),
    (plan.batch_size > 512 and not config.optim.warmup_epochs, f"batch {plan.batch_size} without warm-up (optim.warmup_epochs)"),
  )  # fmt: skip
  late = [
    name
    for name, of in BEGINNINGS.items()
    if config.method.get(name, 0) >= config.epochs and any(config.method.get(key) for key in of)
  ]
  never = [f"method.{n}={config.method[n]:g} never comes in {config.epochs:g} epochs" for n in late]
  found = [text for condition, text in told if condition]
  return [f"warning: {text}" for text in (*found, *never)]
