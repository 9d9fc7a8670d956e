"""Several encoders scored by one task, and their scores in one table.

Flow: main hands a list in `pretrained` here -> the task for each -> table on the console, .md and .json beside the first.
Holds: each encoder's own result is stored as if it had been scored alone; runs that are equal but for their seed are told once more
  as mean and standard deviation; a table never overwrites another one.
Not here: the scores (evaluate), how a table looks (evaluation.comparison).
"""

import json
import os
from collections.abc import Callable

from ml_collections import ConfigDict

from adco_jax.encoders import results_folder, run_config
from adco_jax.errors import require
from adco_jax.evaluation import comparison
from adco_jax.evaluation.comparison import Entry
from adco_jax.interop import exported
from adco_jax.runtime import remote
from adco_jax.runtime.console import tell
from adco_jax.runtime.files import read_json, write_json, write_text
from adco_jax.workdir.files import canonical


def places(pretrained: str) -> list[str]:
  """The workdirs and exported files of a list with commas; a path with a comma that is there is one of them."""
  return [pretrained] if os.path.exists(pretrained) else [p for p in pretrained.split(",") if p]


def run(config: ConfigDict, task: Callable[[ConfigDict], str]) -> None:
  """Scores each and writes comparison-<task>-<data>.md and .json. `task` returns the path of its result. Raises ConfigError."""
  given = places(config.pretrained)
  doubled = [place for place in given if given.count(place) > 1]
  require(
    not doubled, "pretrained", config.pretrained, f"names {doubled[:1]} twice; once is enough"
  )
  for place in given:
    run_config(place, config.data, config.step)  # what cannot be opened is said before any work
  entries = []
  for number, place in enumerate(given, 1):
    tell(f"{number} of {len(given)}: {place}")
    path = task(_of(config, place))
    entries.append(Entry(place, *alike(place, config), read_json(path)))
  tell(comparison.as_markdown(entries))
  keep(config, entries, os.path.basename(path))


def _of(config, place):
  config = config.copy_and_resolve_references()
  config.pretrained = place
  return config


def alike(place: str, config: ConfigDict) -> tuple[str, int]:
  """(which encoder and the pre-training's config without its seed: runs that have them in common can be averaged, the seed)."""
  stored = canonical(run_config(place, step=config.step).to_dict())
  encoder = exported.read_facts(place)["encoder"] if os.path.isfile(place) else "query"
  return json.dumps([encoder, stored | {"seed": 0}], sort_keys=True), stored["seed"]


def keep(config: ConfigDict, entries: list[Entry], name: str) -> None:
  """Writes the table beside the first encoder, or within it where that lies in gs://, under a name that is free."""
  place = entries[0].place
  folder = os.path.abspath(results_folder(place))
  folder = folder if "://" in place else os.path.dirname(folder)
  data = os.path.splitext(name)[0].rpartition("-")[0]
  stem, number = os.path.join(folder, f"comparison-{data}"), 1
  path = stem
  while any(remote.home(f"{path}{ending}").exists() for ending in (".json", ".md")):
    number += 1
    path = f"{stem}-{number}"
  write_text(f"{path}.md", comparison.as_markdown(entries))
  write_json(f"{path}.json", {"task": config.task, "rows": comparison.rows(entries)})
  tell(f"table: {path}.md, .json")
