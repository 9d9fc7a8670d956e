"""From a config and what the data set and the machine are to the sizes of a run, checked.

Flow: main has held the config against ranges; its task reads the source's size and counts devices, then `make_plan`; everything after takes
  numbers from the frozen `Plan`, not from the config.
Holds: a plan that was made can be run; what cannot is refused here, in one line, before anything compiles.
Not here: ranges of single keys (ranges), which batches can be (batches), file formats, arrays, learning-rate curves (optimizers).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from ml_collections import ConfigDict

from adco_jax.config import batches, method
from adco_jax.config.pairing import Pairing, make_pairing
from adco_jax.config.ranges import resolve_dtype
from adco_jax.errors import require
from adco_jax.runtime.files import Json

Crop = tuple[int, float, float]  # side of a view in pixels, least and largest share of the image

NO_LABELS = "needs one label per image, which the data has not; name data with such labels, and leave data.labels=True"

# What a resumed run may change: where things lie, how often they are looked at, on what they run.
MAY_CHANGE = (
  "stop_at_step", "watchdog_minutes", "max_bad_steps", "data.dir", "data.subset", "data.threads", "data.loader", "data.resident_share", "data.inspect_images",
  "data.num_examples", "data.max_bad_fraction", "save.every_steps", "save.every_minutes", "save.keep", "save.keep_every_epochs", "save.max_failures",
  "log.every_steps", "eval.batch_size", "compile_cache",
)  # fmt: skip

# What even --extend may not change, with all below it: what the state's arrays are and mean, which images come
# next, and what was done before the first step; of an objective's own keys see method.is_fixed.
FIXED = (
  "task", "seed", "init_from", "init_head", "model", "objective", "data.batch_size", "images", "labels_per_class", "label_share", "hold_out", "optim.name", "optim.no_decay",
)  # fmt: skip


class Machine(NamedTuple):
  """What a run is planned for."""

  backend: str  # JAX's name of the kind of devices
  devices: int  # of all processes
  processes: int = 1
  process: int = 0


class Sizes(NamedTuple):
  """The numbers of a run that an objective may need."""

  batch_size: int  # over all devices
  dim: int  # D
  num_examples: int
  num_classes: int
  devices: int
  mode: str  # of the views
  num_views: int
  reduction: str = "directions"  # of the pairs, see pairing
  group_size: int = 1  # of BatchNorm, 0: all of the batch

  @property
  def steps_per_epoch(self) -> int:
    """Whole batches in the data."""
    return self.num_examples // self.batch_size


@dataclasses.dataclass(frozen=True)
class Phase:
  """A stretch of a run with one kind of update: an objective lists its phases, `make_plan` puts them in place."""

  name: str  # as a user reads it
  pairing: Pairing
  steps: int = 0  # 0 of the last: until the run ends
  start: int = 0  # first update
  trains_encoder: bool = True  # False: only the adversary that its loss writes changes
  copies_query_to_key: bool = False  # parameters, when it ends
  counted: bool = True  # among the run's epochs, which schedules and batches follow

  @property
  def stop(self) -> int:
    """Number of the update behind its last one."""
    return self.start + self.steps


@dataclasses.dataclass(frozen=True)
class Plan:
  """The sizes of one run; `batch_size` is global, `slots` are this process's (first, how many)."""

  num_examples: int
  num_classes: int
  batch_size: int
  slots: tuple[int, int]
  steps_per_epoch: int
  total_steps: int
  view_sizes: tuple[int, ...]
  view_scales: tuple[tuple[float, float], ...]
  phases: tuple[Phase, ...]
  fill_steps: int = 0  # updates of phases that are not counted: no epoch and no schedule has them
  eval_every_steps: int = 0
  keep_every_steps: int = 0
  shuffle_block: int = 0
  pad: int = 0  # black pixels around an image, before views are cut of it
  mixup: float = 0.0  # see views.mix; 0: none
  has_labels: bool = False  # whether they travel with the batches
  num_devices: int = 1
  learning_rate: float = 0.0
  lr_final: float = 0.0
  compute_dtype: str = "float32"

  @property
  def shuffles_over_processes(self) -> bool:
    """Whether keys of this process's slots come from images in slots of others."""
    return bool(self.shuffle_block and self.slots[1] % self.shuffle_block)

  def epoch(self, step: int) -> float:
    """Epochs completed after `step` updates; an initialisation that is not counted is none of them."""
    return max(0, step - self.fill_steps) / self.steps_per_epoch

  def batch(self, step: int) -> int:
    """Number of the batch that update `step` uses; step i of what comes before training shares batch i (authors)."""
    return step if step < self.fill_steps else step - self.fill_steps

  def phase(self, step: int) -> Phase:
    """The `Phase` of update `step`."""
    return next((phase for phase in self.phases if step < phase.stop), self.phases[-1])

  def pairing(self, step: int) -> Pairing:
    """Which views meet in update `step`."""
    return self.phase(step).pairing

  @property
  def filled_at(self) -> int:
    """Updates before the last phase, after which a bank is filled."""
    return self.phases[-1].start

  @property
  def train_pairing(self) -> Pairing:
    """Which views meet in the last phase."""
    return self.phases[-1].pairing

  def evaluates(self, step: int) -> bool:
    """Whether the frozen encoder is scored before update `step`: at 0, every n epochs, at the end."""
    every = self.eval_every_steps
    return bool(every) and step in (0, self.total_steps) or self._every(every, step)

  def keeps(self, step: int) -> bool:
    """Whether the checkpoint of `step` stays for good: every n epochs."""
    return self._every(self.keep_every_steps, step)

  def _every(self, steps, step):
    return bool(steps) and step > self.fill_steps and (step - self.fill_steps) % steps == 0


class Phased(Protocol):
  """What a plan asks of an objective (objectives.base)."""

  needs_labels: bool

  def check(self, sizes: Sizes) -> None:
    """Raises ConfigError for sizes that it cannot work with."""

  def phases(self, sizes: Sizes) -> tuple[Phase, ...]:
    """What is done in turn."""


def sizes_of(config: ConfigDict, num_examples: int, num_classes: int, devices: int) -> Sizes:
  """The `Sizes` of a config and its data."""
  return Sizes(
    config.data.batch_size, config.model.dim, num_examples, num_classes, devices,
    config.views.mode, len(config.views.crops), config.views.reduction, config.bn.group_size,
  )  # fmt: skip


def make_plan(
  config: ConfigDict,
  objective: Phased,
  num_examples: int,
  num_classes: int,
  machine: Machine,
  normalises: bool = True,
) -> Plan:
  """The `Plan` of a config in its ranges and of its objective; `normalises`: with BatchNorm somewhere. Raises ConfigError."""
  backend, devices, processes, process = machine
  batches.check(config, num_examples, devices, normalises)
  sizes = sizes_of(config, num_examples, num_classes, devices)
  labelled = num_classes > 0 or not objective.needs_labels
  require(labelled, "objective", config.objective, NO_LABELS)
  objective.check(sizes)
  batch = config.data.batch_size
  steps_per_epoch = num_examples // batch
  *first, last = objective.phases(sizes)
  before = sum(phase.steps for phase in first)
  fill_steps = sum(phase.steps for phase in first if not phase.counted)
  total_steps = fill_steps + round(config.epochs * steps_per_epoch)
  longer = "method.bank.init_epochs leaves none for training; use more, or fewer of those"
  require(total_steps > before or before == fill_steps, "epochs", config.epochs, longer)
  phases = in_place((*first, dataclasses.replace(last, steps=total_steps - before)))
  scale = batch / config.optim.scale_from_batch if config.optim.scale_from_batch else 1.0
  local = batch // processes
  return Plan(
    num_examples=num_examples,
    num_classes=num_classes,
    batch_size=batch,
    slots=(process * local, local),
    num_devices=devices,
    steps_per_epoch=steps_per_epoch,
    phases=phases,
    fill_steps=fill_steps,
    total_steps=total_steps,
    eval_every_steps=round(config.eval.every_epochs * steps_per_epoch),
    keep_every_steps=math.ceil(config.save.keep_every_epochs * steps_per_epoch),
    view_sizes=tuple(c[0] for c in config.views.crops),
    view_scales=tuple((low, high) for _, low, high in config.views.crops),
    shuffle_block=batches.shuffle_block(config, batch),
    pad=config.views.pad,
    mixup=batches.mixup(config, devices, getattr(objective, "mixes_pairs", 0.0)),
    has_labels=objective.needs_labels,
    learning_rate=config.optim.learning_rate * scale,
    lr_final=config.optim.lr_final * scale,
    compute_dtype=resolve_dtype(config.compute_dtype, backend),
  )


def in_place(phases: Sequence[Phase]) -> tuple[Phase, ...]:
  """The same phases, each starting where the one before it stops."""
  placed, start = [], 0
  for phase in phases:
    placed.append(dataclasses.replace(phase, start=start))
    start = placed[-1].stop
  return tuple(placed)


def make_probe_plan(
  num_examples: int,
  num_classes: int,
  *,
  batch_size: int,
  crops: Sequence[Crop],
  epochs: int,
  devices: int,
  processes: int,
  process: int,
  mode: str = "",
  pad: int = 0,
) -> Plan:
  """The `Plan` of batches alone: no bank, no key encoder; batches are cut at the data's size.

  `mode`: of the views; empty: all as queries, as a probe of a frozen encoder takes them; `pad`: see Plan. Raises ConfigError.
  """
  batch = min(batch_size, num_examples) // devices * devices
  require(batch, "batch_size", batch_size, f"use {devices} or more, one image per device")
  local = batch // processes
  steps = num_examples // batch
  pairing = make_pairing(mode, len(crops)) if mode else Pairing(tuple(range(len(crops))), (), ())
  return Plan(
    num_examples=num_examples,
    num_classes=num_classes,
    batch_size=batch,
    slots=(process * local, local),
    steps_per_epoch=steps,
    total_steps=epochs * steps,
    view_sizes=tuple(c[0] for c in crops),
    view_scales=tuple((low, high) for _, low, high in crops),
    pad=pad,
    phases=(Phase("training", pairing, epochs * steps),),
  )


def is_fixed(name: str, objective: str) -> bool:
  """Whether a dotted key stays as it is for the whole of a run that has this objective."""
  if name.startswith("method."):
    return method.is_fixed(name.removeprefix("method."), objective)
  return any(f"{name}.".startswith(f"{fixed}.") for fixed in FIXED)


def get(config: ConfigDict | dict[str, Json], name: str) -> Json:
  """The value of a dotted key."""
  for part in name.split("."):
    config = config[part]
  return config
