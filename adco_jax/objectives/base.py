"""What an encoder is trained against: the interface that every objective has, and what passes through it.

Flow: build makes one objective from the config; plan asks it for its phases, train_step for its loss, log and --plan for
  what it has to tell; docs/extending.md builds one from outside of this package.
Shapes: Q query views, V key views, b slots of this device, B of all, D components of an embedding.
Holds: plan, step, state, checkpoints and log know none of an objective's arrays by name.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import flax
import jax
import optax
from jax.sharding import PartitionSpec as P

from adco_jax.config.pairing import PAIRED, Pair, make_online_pairing, make_pairing
from adco_jax.config.plan import Phase, Sizes
from adco_jax.runtime.dtypes import Tree

# Who embeds keys: the key encoder, the query encoder, nobody.
KeysFrom = Literal["momentum", "online", "none"]
# When the key encoder moves: before it embeds, towards the query's of before the update (MoCo, AdCo); after the update,
# towards the new one (BYOL).
MomentumUpdate = Literal["before_keys", "after_step"]
# How the key encoder begins: as a copy of the query's, or drawn on its own (BYOL).
MomentumInit = Literal["copy", "independent"]
# What of an encoder it sees: what the head makes of the features, or those.
Sees = Literal["projections", "features"]


Classifier = dict[str, jax.Array]  # {'kernel' [F, C], 'bias' [C]}


class Variables(NamedTuple):
  """The arrays of an objective by what becomes of them; each a tree, empty where there are none."""

  params: Tree = {}  # descend with the encoder, whole on every device
  adversary: Tree = {}  # ascend by an optimiser of their own: AdCo's bank
  memory: Tree = {}  # replaced by what `loss` gives back: MoCo's queue


class Rows(flax.struct.PyTreeNode):
  """The negatives that an objective keeps, and its rule of who shares whose weight: softmaxes of cosines / temperature.

  A query's softmax is over all rows and, beside them, the `keys` of its batch, its own, or none. What a query weighs for a row is
  the row's share in that, or, with over='queries', the query's share in the row's softmax over queries.
  """

  vectors: jax.Array  # [K, D], of any length
  temperature: float = flax.struct.field(pytree_node=False)
  keys: Literal["batch", "own", "none"] = flax.struct.field(pytree_node=False)
  over: Literal["rows", "queries"] = flax.struct.field(pytree_node=False, default="rows")


class Embeddings(NamedTuple):
  """What the encoders made of a batch: projections (or features, see `sees`) as they come, not normalised."""

  queries: jax.Array  # [Q, b, D] of this device, differentiable
  # momentum: [V, B, D] of the whole batch in slot order, constant; online: `queries` again; none: None
  keys: jax.Array | None
  labels: jax.Array | None = None  # int32 [b] of this device's slots, where it needs them


class Context(NamedTuple):
  """Where a loss is taken."""

  pairs: tuple[Pair, ...]  # those of queries and keys that meet
  step: jax.Array  # completed updates
  epoch: jax.Array  # of training, completed: a fraction too; 0 in the phases before it
  # Of this step, equal on all devices: draw for the whole batch, then take your part.
  rng: jax.Array
  sizes: Sizes
  # (adversary, gradient) -> the adversary as its optimiser would move it now
  ascend: Callable[[Tree, Tree], Tree]


class Written(NamedTuple):
  """What a loss leaves behind besides its gradient."""

  metrics: dict[str, jax.Array]  # this device's parts of sums over all devices
  memory: Tree = {}  # what stands in the memory's place
  adversary: Tree | None = None  # not None: overwrites the adversary, which then does not ascend


class Objective(Protocol):
  """A frozen dataclass whose fields are its settings."""

  keys_from: KeysFrom
  momentum_update: MomentumUpdate
  momentum_init: MomentumInit
  sees: Sees
  needs_labels: bool
  modes: Sequence[str]  # of the views, that it can take

  def check(self, sizes: Sizes) -> None:
    """Raises ConfigError for sizes that it cannot work with."""

  def phases(self, sizes: Sizes) -> tuple[Phase, ...]:
    """What is done in turn; the last phase lasts until the run ends."""

  def init(self, rng: jax.Array, sizes: Sizes, dtype: jax.typing.DTypeLike) -> Variables:
    """Its arrays before the first update."""

  def specs(self) -> Variables:
    """A PartitionSpec for each of the three trees."""

  def ascent(self, sizes: Sizes) -> optax.GradientTransformation:
    """How the adversary moves along the gradient that it is given; `optax.identity()` where there is none."""

  def trains(self, c: Context) -> jax.Array | bool:
    """Whether its parameters and their momenta move in this update."""

  def project(self, params: Tree) -> Tree:
    """Its parameters after an update, brought back to where they may be."""

  def loss(
    self, v: Variables, e: Embeddings, c: Context, phase: Phase
  ) -> tuple[jax.Array, Written]:
    """This device's part of a sum over devices, varying over them, and what it writes."""

  def summary(self, v: Variables) -> dict[str, jax.Array]:
    """{name of a metric: scalar} of its arrays, at logged steps."""

  def rows(self, v: Variables) -> Rows | None:
    """The negatives that it keeps, at evaluations; None where it keeps none."""

  def chance(self, sizes: Sizes, phase: Phase) -> float | None:
    """The loss of an encoder that tells nothing apart, if that is known."""

  def warnings(self, sizes: Sizes) -> tuple[str, ...]:
    """Lines that a careful colleague would say."""


@runtime_checkable
class Classifying(Protocol):
  """An objective that trains a linear classifier of the features, which can be scored and exported."""

  def classifier(self, v: Variables, average: bool = False) -> Classifier:
    """{'kernel' [F, C], 'bias' [C]} of its arrays, or of their average."""


def averages(objective: Objective) -> bool:
  """Whether a moving average of encoder, statistics and the objective's parameters is kept, in the key encoder's place and in its
  memory: all move towards the values of before an update, by ema.decay."""
  return bool(getattr(objective, "keeps_average", False))


class Base:
  """What an objective does that says nothing else: one phase, nothing kept, nothing ascends."""

  keys_from: KeysFrom = "momentum"
  momentum_update: MomentumUpdate = "before_keys"
  momentum_init: MomentumInit = "copy"
  sees: Sees = "projections"
  needs_labels: bool = False
  normalises: bool = False  # with a BatchNorm of its own; one that does not say so may have one
  modes: Sequence[str] = PAIRED

  def check(self, sizes: Sizes) -> None:
    """All sizes are fine."""

  def phases(self, sizes: Sizes) -> tuple[Phase, ...]:
    """Training alone."""
    make = make_pairing if self.keys_from == "momentum" else make_online_pairing
    return (Phase("training", make(sizes.mode, sizes.num_views, sizes.reduction)),)

  def init(self, rng: jax.Array, sizes: Sizes, dtype: jax.typing.DTypeLike) -> Variables:
    """No arrays."""
    return Variables()

  def specs(self) -> Variables:
    """Whatever there is lies whole on every device."""
    return Variables(P(), P(), P())

  def ascent(self, sizes: Sizes) -> optax.GradientTransformation:
    """Nothing ascends."""
    return optax.identity()

  def trains(self, c: Context) -> jax.Array | bool:
    """Always."""
    return True

  def project(self, params: Tree) -> Tree:
    """Anywhere."""
    return params

  def summary(self, v: Variables) -> dict[str, jax.Array]:
    """Nothing to tell."""
    return {}

  def rows(self, v: Variables) -> Rows | None:
    """None."""

  def chance(self, sizes: Sizes, phase: Phase) -> float | None:
    """Not known."""

  def warnings(self, sizes: Sizes) -> tuple[str, ...]:
    """None."""
    return ()


def holds(objective: Objective) -> bool:
  """Whether there may be updates in which its parameters do not move (`trains`)."""
  return type(objective).trains is not Base.trains
