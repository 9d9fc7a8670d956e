"""What goes wrong without an error: embeddings that are all alike, a bank that takes no part, prototypes that none is held to.

Flow: log hands over every line of metrics and prints what comes back; report goes through the file again.
Holds: each is said once, and again only after it had passed; a run that resumes says nothing twice, since
  what its file says is looked at first.
Not here: the numbers (evaluation/signals, objectives).
"""

import math
from collections.abc import Callable, Iterable

from adco_jax.runtime.files import Json

Line = dict[str, Json]  # of metrics: {'step', 'epoch', name: number}

COLLAPSED, SPREAD = 0.95, 0.8  # mean cosine from which it is told, and below which it has passed
DEAD, ALIVE = 0.99, 0.97  # the same of the softmax's share on the batch's keys, as the bank sees it
STUCK, LEARNING = 0.998, 0.99  # the same of SwAV's loss over log of the prototypes
MOVING_EPOCHS = (
  2  # before them prototypes stand still (method.frozen_epochs), or have only begun to move
)
# So many in a row before a bank is called dead; in the first LONG_STEPS every encoder's embeddings are alike.
LONG_STEPS, LONG_LINES = 100, 5
PAGE = "docs/small_data.md"


class Alarms:
  """Looks at lines of metrics in the order of their steps. `trained_from`: first step after the bank's initialisation."""

  def __init__(self, trained_from: int, lines: Iterable[Line] = ()) -> None:
    self._trained_from, self._collapsed = trained_from, False
    self._alone, self._stuck = _Long(DEAD, ALIVE), _Long(STUCK, LEARNING)
    for line in lines:
      self.look(line)

  def look(self, line: Line) -> list[str]:
    """What is to be said of this line, if anything: a list of texts."""
    if line["step"] <= self._trained_from:
      return []
    looks: tuple[Callable[[Line], str], ...] = (
      self._look_at_embeddings,
      self._look_at_bank,
      self._look_at_prototypes,
    )
    return [text for text in (look(line) for look in looks) if text]

  def _look_at_embeddings(self, line):
    cosine = line.get("signal/mean_cosine")
    if cosine is None or line["step"] - self._trained_from < LONG_STEPS:
      return ""
    before, self._collapsed = self._collapsed, cosine > (SPREAD if self._collapsed else COLLAPSED)
    if before or not self._collapsed:
      return ""
    return (
      f"training looks collapsed: embeddings of different images have a mean cosine of {cosine:.3f}, "
      f"their rank is {line['signal/rank_embeddings']:.1f}; try a smaller optim.learning_rate; against negatives a temperature of "
      f"0.1 to 0.4 or a smaller method.bank.learning_rate ({PAGE}); without them BatchNorm in the head (model.head.norm) or "
      "a larger ema.decay; and see in views.png whether the images differ"
    )

  def _look_at_bank(self, line):
    mass = line.get("bank/in_batch_mass")
    if mass is None or not self._alone.begins(line["step"], mass):
      return ""
    return (
      f"the bank takes no part: since step {self._alone.since} the batch's own keys have {mass:.3f} of its softmax "
      f"(bank/in_batch_mass), so its rows get no gradient; try method.bank.init=keys, a higher method.bank.temperature or "
      f"method.bank.learning_rate ({PAGE})"
    )

  def _look_at_prototypes(self, line):
    moving = "prototypes/used" in line and line["epoch"] >= MOVING_EPOCHS
    if not moving or not self._stuck.begins(
      line["step"], line["train/loss"] / line["train/chance"]
    ):
      return ""
    return (
      f"no prototype is preferred: since step {self._stuck.since} the loss stands at chance, log of their number; try a lower "
      "method.epsilon (.03), longer method.frozen_epochs, fewer method.prototypes, or a smaller optim.learning_rate"
    )


class _Long:
  """Whether a number has been `high` for long: said once, again only after it was below `low`."""

  def __init__(self, high, low):
    self._high, self._low = high, low
    self._told, self._steps = False, []  # steps in a row at which it was high

  @property
  def since(self):
    """The first of them."""
    return self._steps[0]

  def begins(self, step, number):
    """Whether that is to be said now."""
    if not math.isfinite(number):  # such a step says nothing
      return False
    if number < (self._low if self._told else self._high):
      self._told, self._steps = False, []
      return False
    self._steps.append(step)
    long = self._steps[-1] - self._steps[0] >= LONG_STEPS and len(self._steps) >= LONG_LINES
    before, self._told = self._told, self._told or long
    return self._told and not before
