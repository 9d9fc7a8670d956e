"""Files of scores: where they go, what is in them, and the one way in which they are shown.

Flow: evaluate writes eval/<task>-<data>-<split>-<step>.json through `begin` and `write`; console, report and
  card show `sections` of `read_all`, each result by its `title`, `caption` and `cells`.
Holds: a result has its file, with nothing in it yet, from its beginning on, so that tasks at the same time have one each;
  a result is found again only by all that it was computed from; one never hides another, nor looks like
  it: captions tell view, seed, place and what of the protocol is unusual. A file that is no result is named.
Not here: scores, data.
"""

import contextlib
import glob
import json
import os
from collections.abc import Iterable

from adco_jax.errors import RunError
from adco_jax.runtime.console import tell
from adco_jax.runtime.files import Json, read_json, write_json
from adco_jax.workdir.files import canonical

Facts = dict[str, Json]  # of a result, see tasks.evaluate

NAMES = {"knn": "kNN", "linear": "Linear probe", "finetune": "Classifier", "svm": "SVMs"}
METRICS = {"svm": "mean average precision"}  # of other tasks it is top-1
NAMED = {
  "all": "all labels",
  "top5": "top-5",
  "mean": "mean of classes",
}  # columns; labels per class are numbers
SECTIONS = {
  "own": "On its own data",
  "other": "On other data",
  "unknown": "By an earlier version, which did not record the data",
}


def begin(workdir: str, data: str, facts: Facts) -> tuple[str, Facts]:
  """(path, facts so far) of the result that begins as `facts`, with the results that its file has already.

  eval/<task>-<data>-<step>.json; where that holds another result, a number is added.
  """
  while True:
    path, stored = find(workdir, facts["task"], data, facts["step"], facts["identity"])
    if stored:
      return path, stored
    with contextlib.suppress(FileExistsError):  # another task was quicker
      write_json(path, facts, new=True)
      return path, facts


def find(
  workdir: str, task: str, data: str, step: int, identity: dict[str, Json]
) -> tuple[str, Facts | None]:
  """(path, facts so far or None) of the result with this identity (a plain dictionary)."""
  folder = os.path.join(workdir, "eval")
  os.makedirs(folder, exist_ok=True)
  number = 1
  while True:
    suffix = f"-{number}" if number > 1 else ""
    path = os.path.join(folder, f"{task}-{data}-{step}{suffix}.json")
    if not os.path.exists(path):
      return path, None
    facts = _read(path)
    if facts and facts.get("identity") == canonical(identity):
      return path, facts
    number += 1


def picture_of(path: str, kind: str = "neighbours") -> str:
  """Where a picture of a kNN result lies: its neighbours, the map, or the attention."""
  folder, name = os.path.split(path)
  return os.path.join(folder, name.replace("knn", kind, 1).replace(".json", ".png"))


def write(path: str, facts: Facts) -> None:
  """Writes a result, whole or not at all; what cannot be written is shown. Raises RunError.

  `facts`: see `evaluate.begin`; 'results' are {representation: {'all': top-1, labels per class: {'mean',
  'spread', 'draws'}}}.
  """
  try:
    write_json(path, facts)
  except OSError as error:
    show(path, facts)
    raise RunError(f"{path}: {error.strerror}; the scores above are not kept") from error


def read_all(workdir: str) -> list[Facts]:
  """Facts of every stored result that has a score, each with its 'path'; newest step first, then own data first."""
  paths = glob.glob(os.path.join(glob.escape(workdir), "eval", "*.json"))
  found = ((path, _read(path)) for path in sorted(paths))
  results = [facts | {"path": path} for path, facts in found if facts and facts["results"]]
  return sorted(
    results, key=lambda f: (-f["step"], f.get("own") is not True, f["task"], title(f), f["path"])
  )


def _read(path):
  """Facts of a result, of this version or an earlier one, with no score in it where it has only begun; None, and a line, of
  another file."""
  try:
    facts = read_json(path)
    begun = facts["results"] == {}
    if title(facts) and caption(facts) and (begun or cells(facts["results"])):
      return facts | {"step": int(facts["step"]), "task": str(facts["task"])}
  except (OSError, ValueError, LookupError, TypeError, AttributeError):
    pass
  tell(f"{path}: holds no result that can be shown; left as it is")
  return None


def sections(results: Iterable[Facts]) -> list[tuple[str, list[Facts]]]:
  """[(heading, results)] of results: own data, other data, not recorded; only what there is."""
  parts = [(part, [f for f in results if _section(f) == part]) for part in SECTIONS]
  return [(SECTIONS[part], group) for part, group in parts if group]


def title(facts: Facts) -> str:
  """Which score of which data, in a few words."""
  name = NAMES.get(facts["task"]) or str(facts["task"])
  if "identity" not in facts:
    return name
  train, test = (facts["identity"]["data"][part] for part in ("train", "test"))
  learnt = f" (from {train['split']})" if train["split"] != "train" else ""
  return f"{name} on {test['name']}, split {test['split']}{learnt}"


def metric(facts: Facts) -> str:
  """What the numbers of a result are."""
  return METRICS.get(facts["task"], "top-1")


def same_but_step(facts: Facts) -> str:
  """What results of different checkpoints have in common if they can be compared; can be a key."""
  if "identity" not in facts:
    return title(facts)
  return json.dumps(facts["identity"] | {"checkpoint": None}, sort_keys=True)


def caption(facts: Facts) -> str:
  """Step, sizes, view, protocol and place, in one line."""
  sizes = f"{facts['test_images']} test and {facts['train_images']} train images"
  parts = [f"step {facts['step']}", sizes, *_view(facts), *_protocol(facts)]
  parts += [facts["place"]] if "place" in facts else []
  if any(facts.get("broken", {}).values()):
    parts.append(" and ".join(f"{n} broken in {part}" for part, n in facts["broken"].items() if n))
  return ", ".join(parts)


def cells(results: dict[str, Json]) -> tuple[list[str], list[tuple[str, list[str]]]]:
  """(column titles, [(representation, texts)]) of a table of scores."""
  columns = list(next(iter(results.values())))
  return [named(c) for c in columns], [
    (name, [_text(scores[c]) for c in columns]) for name, scores in results.items()
  ]


def named(column: str) -> str:
  """A column's title."""
  if column.endswith(" %"):
    return f"{column} of labels"
  return f"{column} per class" if column.isdigit() else NAMED.get(column, column)


def format_table(results: dict[str, Json]) -> str:
  """The table as aligned text."""
  titles, rows = cells(results)
  lines = [("", titles), *rows]
  return "\n".join(f"{name:10}" + "".join(f"{text:>17}" for text in texts) for name, texts in lines)


def show(path: str, facts: Facts) -> None:
  """Prints a result."""
  tell(f"{title(facts)}: {metric(facts)}; {caption(facts)} ({path})")
  tell(format_table(facts["results"]))


def _section(facts):
  return {True: "own", False: "other", None: "unknown"}[facts.get("own")]


def _view(facts):
  if "identity" not in facts:
    return []
  view = facts["identity"]["view"]
  part = f"{view['fraction']:g} of the short side" if view["fraction"] else "all, squeezed"
  return [f"seen at {view['size']} px ({part})"]


def _protocol(facts):
  asked, chosen = facts["config"], facts["chosen"].get("trained", {})
  how = [
    f"{key} {value if isinstance(value, str) else format(value, '.4g')}"
    for key, value in chosen.items() if not isinstance(value, list)
  ]  # fmt: skip
  if facts["task"] == "linear":
    recipe, epochs = asked.get("recipe"), asked.get("sgd", {}).get("epochs")
    words = {"sgd": f"SGD over {epochs} epochs of crops"}
    words["sweep"] = (
      f"the best on held-out train images of {len(chosen.get('tried', []))} SGDs over {epochs} epochs of crops"
    )
    how.insert(0, words.get(str(recipe), "L-BFGS"))
  if asked.get("labels_per_class") or asked.get("label_shares"):
    how.append(f"{asked['draws']} draws of few labels")
  if "seed" in asked:
    how.append(f"seed {asked['seed']}")
  return how + [f"{key} {value}" for key, value in facts.get("unusual", {}).items()]


def _text(score):
  if isinstance(score, float):
    return f"{score:.3f}"
  return f"{score['mean']:.3f} +- {score['spread']:.3f}"
