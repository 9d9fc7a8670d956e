"""What goes wrong without an error: embeddings that are all alike or lie on a line, features that know nothing of the labels any
more, a loss that stays where it began, a bank that takes no part, prototypes that none is held to.

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
FLAT, FULL = 2.0, 3.0  # the same of the rank of embeddings or features, from below
RANKS = ("signal/rank_embeddings", "signal/rank_features")
DEAD, ALIVE = 0.99, 0.97  # the same of the softmax's share on the batch's keys, as the bank sees it
STUCK, LEARNING = 0.998, 0.99  # the same of SwAV's loss over log of the prototypes
CHANCE, BELOW = (
  0.99,
  0.97,
)  # the same of every other loss over that of an encoder that tells nothing apart
FIRST_EPOCHS = 1  # in which every loss may stand there
LEARNT = (
  0.05  # of kNN over the first one: against a bank an encoder may learn at the loss of chance
)
MOVING_EPOCHS = (
  2  # before them prototypes stand still (method.frozen_epochs), or have only begun to move
)
# So many in a row before a bank is called dead; in the first LONG_STEPS every encoder's embeddings are alike.
LONG_STEPS, LONG_LINES = 100, 5
PAGE = "docs/small_data.md"
TRY = (
  f"try a smaller optim.learning_rate; against negatives a temperature of 0.1 to 0.4 or a smaller method.bank.learning_rate "
  f"({PAGE}); without them BatchNorm in the head (model.head.norm) or a larger ema.decay; and see in views.png whether the "
  "images differ"
)


class Alarms:
  """Looks at lines of metrics in the order of their steps. `trained_from`: first step after the bank's initialisation."""

  def __init__(self, trained_from: int, lines: Iterable[Line] = ()) -> None:
    self._trained_from, self._collapsed, self._guesses = trained_from, False, False
    self._first: Line | None = None  # with a held-out accuracy
    self._gain: float | None = None  # of the newest held-out accuracy over that one
    self._alone, self._stuck, self._idle = (
      _Long(DEAD, ALIVE),
      _Long(STUCK, LEARNING),
      _Long(CHANCE, BELOW),
    )
    for line in lines:
      self.look(line)

  def look(self, line: Line) -> list[str]:
    """What is to be said of this line, if anything: a list of texts."""
    if self._first is None and "knn/chance" in line:
      self._first = line
    if self._first and "knn/top1" in line:
      self._gain = line["knn/top1"] - self._first["knn/top1"]
    if line["step"] <= self._trained_from:
      return []
    looks: tuple[Callable[[Line], str], ...] = (
      self._look_at_embeddings,
      self._look_at_accuracy,
      self._look_at_loss,
      self._look_at_bank,
      self._look_at_prototypes,
    )
    return [text for text in (look(line) for look in looks) if text]

  def healthy(self, line: Line) -> str:
    """What an evaluation late enough to be judged says of a run that shows no sign of a collapse now; '' of another line."""
    if not self._judged(line) or self._collapsed or self._guesses or self._idle.told:
      return ""
    known = f", kNN {line['knn/top1']:.3f}" if "knn/top1" in line else ""
    if (first := self._first) and line.get("knn/top1", 1.0) < first["knn/top1"]:
      known += f", which is less than the {first['knn/top1']:.3f} of step {first['step']}"
    return f"no sign of a collapse: {_likeness(line)}{known}"

  def _judged(self, line):
    """Whether it is an evaluation after so many steps that embeddings should differ."""
    evaluated = any(name in line for name in RANKS)
    return evaluated and line["step"] - self._trained_from >= LONG_STEPS

  def _look_at_embeddings(self, line):
    if not self._judged(line):
      return ""
    most, least = (SPREAD, FULL) if self._collapsed else (COLLAPSED, FLAT)
    rank = min(line[name] for name in RANKS if name in line)
    alike = line.get("signal/mean_cosine", 0) > most or rank < least
    before, self._collapsed = self._collapsed, alike
    return f"training looks collapsed: {_likeness(line)}; {TRY}" if alike and not before else ""

  def _look_at_accuracy(self, line):
    """Where labels tell nothing from the start, as where they are drawn by lot, nothing was lost."""
    first = self._first
    if first is None or not self._judged(line) or "knn/chance" not in line:
      return ""
    if first["knn/top1"] <= first["knn/chance"]:
      return ""
    before, self._guesses = self._guesses, line["knn/top1"] <= line["knn/chance"]
    if before or not self._guesses:
      return ""
    return (
      f"held-out accuracy is at chance: kNN {line['knn/top1']:.3f}, where guessing may give {line['knn/chance']:.3f} and step "
      f"{first['step']} had {first['knn/top1']:.3f}: what the untrained encoder knew is lost"
      + ("" if self._collapsed else f"; {TRY}")
    )

  def _look_at_loss(self, line):
    """A bank may be so hard that the loss alone tells nothing; where kNN is not known either, nothing is said of such a run."""
    loss, chance = line.get("train/query_loss", line.get("train/loss")), line.get("train/chance")
    if loss is None or not chance or "prototypes/used" in line or line["epoch"] < FIRST_EPOCHS:
      return ""
    learns = self._gain > LEARNT if self._gain is not None else "bank/mean_norm" in line
    if learns or not self._idle.begins(line["step"], loss / chance):
      return ""
    return (
      f"nothing is learnt: since step {self._idle.since} the loss is {loss:.3f}, where an encoder that tells nothing apart has "
      f"{chance:.3f}; try a lower method.temperature, another optim.learning_rate, a smaller method.bank.learning_rate "
      f"({PAGE}), and see in views.png whether the views of an image have something in common"
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


def _likeness(line):
  """How alike images are, in words; of embeddings where they are looked at."""
  texts = []
  if "signal/mean_cosine" in line:
    texts.append(
      f"embeddings of different images have a mean cosine of {line['signal/mean_cosine']:.3f}"
    )
  for name in (name for name in RANKS if name in line):
    of = name.removeprefix("signal/rank_")
    dead = line.get(f"signal/dead_{of}")
    texts.append(
      f"the rank of {of} is {line[name]:.1f}"
      + (f" ({dead:.0%} of dimensions dead)" if dead else "")
    )
  return ", ".join(texts)


class _Long:
  """Whether a number has been `high` for long: said once, again only after it was below `low`."""

  def __init__(self, high, low):
    self._high, self._low = high, low
    self.told, self._steps = False, []  # steps in a row at which it was high

  @property
  def since(self):
    """The first of them."""
    return self._steps[0]

  def begins(self, step, number):
    """Whether that is to be said now."""
    if not math.isfinite(number):  # such a step says nothing
      return False
    if number < (self._low if self.told else self._high):
      self.told, self._steps = False, []
      return False
    self._steps.append(step)
    long = self._steps[-1] - self._steps[0] >= LONG_STEPS and len(self._steps) >= LONG_LINES
    before, self.told = self.told, self.told or long
    return self.told and not before
