"""Files of scores: where they go, what is in them, how they look as a table.

Flow: evaluate writes eval/<task>-<step>.json through `path_for`; it prints `format_table`, report draws
  the same cells.
Holds: a file is never overwritten; the same task with the same settings finds its own file again.
Not here: scores.
"""

import os

from adco_jax.console import tell
from adco_jax.workdir import canonical, read_json, write_json


def path_for(workdir, task, step, config):
  """eval/<task>-<step>.json; where other settings made that file, a number is added.

  If the returned file exists, it holds what `config` (a plain dictionary) asks for.
  """
  folder = os.path.join(workdir, "eval")
  os.makedirs(folder, exist_ok=True)
  number = 1
  while True:
    suffix = f"-{number}" if number > 1 else ""
    path = os.path.join(folder, f"{task}-{step}{suffix}.json")
    if not os.path.exists(path) or read_json(path)["config"] == canonical(config):
      return path
    number += 1


def write(path, *, task, step, config, train_images, test_images, results, chosen):
  """Writes the scores, whole or not at all.

  `results`: {representation: {'all': top-1, labels per class: {'mean', 'spread', 'draws'}}}.
  """
  counts = {"train_images": train_images, "test_images": test_images}
  facts = {"task": task, "step": step, "config": canonical(config), **counts}
  write_json(path, {**facts, "results": results, "chosen": chosen})


def show(path):
  """Prints the table of a result file."""
  facts = read_json(path)
  tell(
    f"{facts['task']} top-1 at step {facts['step']}, {facts['test_images']} test images ({path})"
  )
  print(format_table(facts["results"]), flush=True)


def cells(results):
  """(column titles, [(representation, texts)]) of a table of scores."""
  columns = list(next(iter(results.values())))
  titles = ["all labels" if c == "all" else f"{c} per class" for c in columns]
  return titles, [(name, [_text(scores[c]) for c in columns]) for name, scores in results.items()]


def format_table(results):
  """The table as aligned text."""
  titles, rows = cells(results)
  lines = [("", titles), *rows]
  return "\n".join(f"{name:10}" + "".join(f"{text:>17}" for text in texts) for name, texts in lines)


def _text(score):
  if isinstance(score, float):
    return f"{score:.3f}"
  return f"{score['mean']:.3f} +- {score['spread']:.3f}"
