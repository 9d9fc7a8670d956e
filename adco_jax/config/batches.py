"""Which batches can be: they divide over the devices, into whole groups of BatchNorm, parts and shuffled blocks.

Flow: plan asks `check` before it makes anything, and `shuffle_block` for the slots whose keys change places.
Holds: a batch that is refused is refused with one that would do.
Not here: the other sizes of a run (plan).
"""

import math

from ml_collections import ConfigDict

from adco_jax.errors import require


def check(config: ConfigDict, num_examples: int, devices: int, normalises: bool = True) -> None:
  """Refuses batches that do not fit the data, the devices or the BatchNorm groups, and groups where nothing `normalises`.
  Raises ConfigError."""
  remedy = f"{config.model.arch} and its head have no BatchNorm; use 0"
  require(normalises or not config.bn.group_size, "bn.group_size", config.bn.group_size, remedy)
  batch, group = config.data.batch_size, config.bn.group_size or 1  # 0: one over all devices
  most = num_examples // (devices * group) * devices * group
  few = num_examples // devices * devices or num_examples  # too few for a group of this size
  advice = f"{most} or less" if most else f"{few} or less, and no larger bn.group_size"
  require(
    num_examples >= batch, "data.batch_size", batch,
    f"the data has {num_examples} images, fewer than one batch; use a batch of {advice}",
  )  # fmt: skip
  count = "1 device" if devices == 1 else f"{devices} devices"
  for unit, what in ((devices, count),
                     (devices * group, f"{count} with BatchNorm groups of {group}")):  # fmt: skip
    lower, upper = batch // unit * unit, -(-batch // unit) * unit
    near = " or ".join(str(b) for b in dict.fromkeys((lower, upper)) if b)
    hint = f"use {near}" if unit == devices else f"use {near}, or another bn.group_size"
    require(batch % unit == 0, "data.batch_size", batch, f"does not divide over {what}; {hint}")
  local, parts = batch // devices, config.accumulate
  together = "a batch in parts has no statistics of all its images; use 1, or BatchNorm in groups"
  require(config.bn.group_size or parts == 1 or not normalises, "accumulate", parts, together)
  most = local // group
  fits = local % (parts * group) == 0
  require(
    fits,
    "accumulate",
    parts,
    f"{local} images per device do not divide into so many parts of whole BatchNorm groups of {group}; use {_divisors(most)}",
  )


def shuffle_block(config: ConfigDict, batch: int) -> int:
  """Slots per shuffled block; 0 where one group holds the batch and a shuffle could change nothing. Raises ConfigError."""
  if config.bn.group_size in (0, batch):
    return 0
  block = config.bn.shuffle_block or batch
  require(
    batch % block == 0,
    "bn.shuffle_block",
    block,
    f"must divide the batch of {batch}; use {math.gcd(block, batch)}",
  )
  return block


def mixup(config: ConfigDict, devices: int, asked: float) -> float:
  """What an objective `asked` for, where no pair lies on two devices or in two parts. Raises ConfigError."""
  batch = config.data.batch_size
  part = batch // (devices * config.accumulate)
  remedy = f"mixes pairs, and {part} images per device and part are no pairs; use another batch"
  require(not asked or part % 2 == 0, "data.batch_size", batch, remedy)
  return asked


def _divisors(count):
  return ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
