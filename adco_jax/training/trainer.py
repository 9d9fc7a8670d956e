"""What build gives to whoever trains: an encoder, what its updates need and compiled functions of a state.

Flow: build makes one `Trainer`; pretrain, replay_step and estimate take their functions from it, programs and restore its shapes.
Shapes: a packed state has vectors in place of an encoder's trees where a GPU trains (flat), else it is the state.
Not here: how it is put together (build).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from adco_jax.models.heads import Encoder
from adco_jax.training.state import TrainState
from adco_jax.training.train_step import StepSpec


class Trainer(NamedTuple):
  """What a task needs to train: pure functions, compiled at first use."""

  encoder: Encoder
  spec: StepSpec
  mesh: Mesh
  shardings: TrainState  # of the state
  abstract_state: TrainState  # shapes, dtypes and shardings of the state, for restoring
  create_state: Callable[[], TrainState]
  pack: Callable[[TrainState], TrainState]  # state (given away) -> state as the updates take it
  unpack: Callable[[TrainState], TrainState]  # that form -> state
  abstract_packed: TrainState  # as abstract_state, of that form
  updates: tuple[jax.stages.Wrapped, ...]  # of each phase a `train_step.Update`, state donated
