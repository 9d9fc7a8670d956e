"""Functions of a user's program that are called with the encoder as it stands, wherever training evaluates it.

Flow: pretrain puts them behind the online evaluation; the log writes their numbers with its own.
Holds: what a hook gives is numbers with names of the kind group/name, or nothing.
Not here: when it happens (Plan.evaluates).
"""

from collections.abc import Callable, Sequence

from ml_collections import ConfigDict

from adco_jax.encoders import LoadedEncoder
from adco_jax.errors import ConfigError
from adco_jax.training.log import Evaluation
from adco_jax.training.state import TrainState
from adco_jax.training.trainer import Trainer

# Called with the query encoder of the state that is evaluated, whose arrays training takes back afterwards.
Hook = Callable[[LoadedEncoder], dict[str, float] | None]


def check_hooks(config: ConfigDict, hooks: Sequence[Hook]) -> None:
  """Refuses hooks that would never be called. Raises ConfigError."""
  if hooks and not config.eval.every_epochs:
    raise ConfigError("config.eval.every_epochs=0: hooks are called at evaluations; use 1 or more")


class WithHooks:
  """An evaluation, then the hooks."""

  def __init__(
    self, evaluate: Evaluation, hooks: Sequence[Hook], config: ConfigDict, trainer: Trainer
  ) -> None:
    self.size, self.pictures = evaluate.size, evaluate.pictures
    self._evaluate, self._hooks, self._config, self._trainer = evaluate, hooks, config, trainer

  def __call__(self, state: TrainState) -> dict[str, float]:
    values = self._evaluate(state)
    encoder = LoadedEncoder(
      self._trainer.encoder,
      {"params": state.query_params, **state.query_stats},
      self._config,
      int(state.step),
      self._trainer.mesh,
      self._untrained,
    )
    for hook in self._hooks:
      values |= _checked(hook(encoder) or {})
    return values

  def _untrained(self):
    state = self._trainer.create_state()
    return {"params": state.query_params, **state.query_stats}


def _checked(values):
  """Numbers as they are logged. Raises ConfigError."""
  wrong = [name for name in values if not isinstance(name, str) or name.count("/") != 1]
  if wrong:
    raise ConfigError(f"hooks: one gave {wrong[0]!r}; name a number as group/name")
  return {name: float(value) for name, value in values.items()}
