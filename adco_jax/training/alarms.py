"""Two things that go wrong without an error: embeddings that are all alike, and a bank that takes no part.

Flow: log hands over every line of metrics and prints what comes back; report goes through the file again.
Holds: each is said once, and again only after it had passed; a run that resumes says nothing twice, since
  what its file says is looked at first.
Not here: the numbers (evaluation/signals, objectives).
"""

import math
from collections.abc import Iterable

from adco_jax.runtime.files import Json

COLLAPSED, SPREAD = 0.95, 0.8  # mean cosine from which it is told, and below which it has passed
DEAD, ALIVE = 0.99, 0.97  # the same of the softmax's share on the batch's keys, as the bank sees it
# So many in a row before a bank is called dead; in the first LONG_STEPS every encoder's embeddings are alike.
LONG_STEPS, LONG_LINES = 100, 5
PAGE = "docs/small_data.md"


class Alarms:
  """Looks at lines of metrics in the order of their steps. `trained_from`: first step after the bank's initialisation."""

  def __init__(self, trained_from: int, lines: Iterable[dict[str, Json]] = ()) -> None:
    self._trained_from = trained_from
    self._collapsed, self._dead = False, False
    self._alone: list[int] = []  # steps in a row at which the bank had no part
    for line in lines:
      self.look(line)

  def look(self, line: dict[str, Json]) -> list[str]:
    """What is to be said of this line, if anything: a list of texts."""
    if line["step"] <= self._trained_from:
      return []
    return [text for text in (self._look_at_embeddings(line), self._look_at_bank(line)) if text]

  def _look_at_embeddings(self, line):
    cosine = line.get("signal/mean_cosine")
    if cosine is None or line["step"] - self._trained_from < LONG_STEPS:
      return None
    before, self._collapsed = self._collapsed, cosine > (SPREAD if self._collapsed else COLLAPSED)
    if before or not self._collapsed:
      return None
    return (
      f"training looks collapsed: embeddings of different images have a mean cosine of {cosine:.3f}, "
      f"their rank is {line['signal/rank_embeddings']:.1f}; try a smaller optim.learning_rate or "
      f"method.bank.learning_rate, or a temperature of 0.1 to 0.4 ({PAGE}), and see in views.png whether the images differ"
    )

  def _look_at_bank(self, line):
    mass = line.get("bank/in_batch_mass")
    if mass is None or not math.isfinite(mass):  # such a step says nothing of the bank
      return None
    if mass < (ALIVE if self._dead else DEAD):
      self._dead, self._alone = False, []
      return None
    self._alone.append(line["step"])
    long = self._alone[-1] - self._alone[0] >= LONG_STEPS and len(self._alone) >= LONG_LINES
    if self._dead or not long:
      return None
    self._dead = True
    return (
      f"the bank takes no part: since step {self._alone[0]} the batch's own keys have {mass:.3f} of its softmax "
      f"(bank/in_batch_mass), so its rows get no gradient; try method.bank.init=keys, a higher method.bank.temperature or "
      f"method.bank.learning_rate ({PAGE})"
    )
