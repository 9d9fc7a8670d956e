"""The gallery of an objective's rows of negatives: the train images nearest to them, now and at every evaluation before.

Flow: online calls one `Gallery` at every evaluation; it draws adversary.png and keeps adversary.npz, of which report draws how
  pull and density go together.
Shapes: adversary.npz: steps [E] and nearest [E, R] (numbers of train images) of R rows, the same at all evaluations; density,
  over_rows and over_queries [N] of the last one, see adversary; `over`, the objective's own rule, and `rows`, K.
Holds: what a run resumed at step n does from there on replaces what was there; nothing is drawn at random.
Not here: what is measured (adversary), whose the rows are (objectives).
"""

import functools
import os
import zipfile
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from adco_jax.evaluation import adversary, signals
from adco_jax.objectives.base import Objective, Variables
from adco_jax.runtime import processes, sharding
from adco_jax.runtime.files import write_npz
from adco_jax.workdir import pictures

PICTURE, FILE = "adversary.png", "adversary.npz"
QUERIES = 1000  # images whose density and pull are measured
SEARCHED = 10_000  # images of which the nearest is looked for
FOLLOWED = 2048  # rows, spread over all, among which the most and the least used are found
SHOWN = 5  # most used rows, and as many of the least used
LOOKS, NEAREST = 6, 4  # images beside a row: at evaluations from the first to this one, and now
HEADINGS = (
  "Most used rows (1 x: the average row; cosine: with the nearest image)",
  "Least used rows",
)


class Gallery:
  """Called with what an evaluation has seen. `picture`: where it draws; `thumbnail`: number of an example -> uint8 [H, W, 3]."""

  def __init__(
    self,
    objective: Objective,
    batch_size: int,
    mesh: Mesh,
    workdir: str,
    thumbnail: Callable[[int], np.ndarray],
  ) -> None:
    self.picture, self._file = (os.path.join(workdir, name) for name in (PICTURE, FILE))
    self._rows = jax.jit(objective.rows, out_shardings=sharding.replicated(mesh))
    self._batch_size, self._thumbnail = batch_size, thumbnail

  def __call__(
    self, step: int, variables: Variables, examples_N: np.ndarray, embeddings_NxD: np.ndarray
  ) -> dict[str, float]:
    """Numbers of `adversary.numbers`, none where there are no rows; `examples`: numbers of the images in their source."""
    rows = jax.device_get(self._rows(variables))
    measured = embeddings_NxD[signals.evenly(len(embeddings_NxD), QUERIES)]
    found = None if rows is None else adversary.play(measured, rows, self._batch_size)
    if found is None:
      return {}
    some = signals.evenly(len(embeddings_NxD), SEARCHED)
    seen = examples_N[some], embeddings_NxD[some]
    processes.on_first(lambda: self._show(step, rows, found, *seen))
    return adversary.numbers(found, rows.over)

  def _show(self, step, rows, found, examples, embeddings):
    """Writes both files."""
    followed = signals.evenly(len(rows.vectors), FOLLOWED)
    cosines = adversary.cosines(rows.vectors[followed], embeddings)
    nearest = examples[cosines.argmax(1)]
    steps, before = self._earlier(step, len(followed))
    steps, history = np.append(steps, step), np.concatenate([before, nearest[None]])
    kept = found._asdict() | {"over": np.array(rows.over), "rows": np.array(found.mass.size)}
    del kept["mass"]
    write_npz(self._file, kept | {"steps": steps, "nearest": history})
    use, looks = found.mass[followed] * found.mass.size, signals.evenly(len(steps), LOOKS)
    sheet: list[list[np.ndarray | None]] = []
    labels: list[str] = []
    read = functools.cache(self._thumbnail)
    for words, chosen in zip(HEADINGS, most_and_least(use, nearest), strict=True):
      sheet.append([])
      labels.append(words)
      for r in chosen:
        now = examples[np.argsort(-cosines[r], kind="stable")[:NEAREST]]
        sheet.append([*map(read, history[looks, r]), None, *map(read, now)])
        labels.append(f"row {followed[r]}\nused {use[r]:.2f} x\ncosine {cosines[r].max():.2f}")
    pictures.save_sheet(self.picture, sheet, 64, labels, _titles(steps[looks]))

  def _earlier(self, step, count):
    """(steps, nearest) of the evaluations before this one; none where other rows were followed."""
    nothing = np.empty(0, int), np.empty((0, count), int)
    try:
      with np.load(self._file) as file:
        steps, nearest = file["steps"], file["nearest"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
      return nothing
    before = steps < step
    return (steps[before], nearest[before]) if nearest.shape[1] == count else nothing


def most_and_least(use_R: np.ndarray, nearest_R: np.ndarray) -> tuple[list[int], list[int]]:
  """Up to SHOWN of the rows with the most use, most first, and of those with the least, least first.

  Of rows with the same nearest image only the first of each: rows that crowd would show nothing else.
  """
  order = np.argsort(-use_R, kind="stable")
  most, least = (
    [ends[i] for i in sorted(np.unique(nearest_R[ends], return_index=True)[1])][:SHOWN]
    for ends in (order, order[::-1])
  )
  return most, [row for row in least if row not in most]


def _titles(steps):
  """Above the columns of a row's images."""
  first, *others = steps.tolist()
  then = [f"\n{step}" for step in others]
  return [f"nearest image at step\n{first}", *then, "", "nearest images now"]
