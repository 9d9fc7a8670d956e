"""The same score of several encoders as one table.

Flow: compare hands over stored results -> `rows` -> Markdown or JSON.
Holds: the spread that is told is named: of all labels the standard error of a share of so many test images, of few labels the
  standard deviation over draws, of a group the sample's standard deviation over its runs.
Not here: how a result came about (evaluate).
"""

import math
import os
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from adco_jax.evaluation import results
from adco_jax.evaluation.results import Facts
from adco_jax.runtime.files import Json

NOTE = (
  "±: with all labels, the standard error of one set of test images (of average precision none is told); with few, the standard deviation over draws of labels; "
  "in a mean of runs, over the runs."
)


class Entry(NamedTuple):
  """One encoder's result; `alike`: equal for runs that differ by the seed alone."""

  place: str
  alike: str  # equal of those that can be averaged
  seed: int
  facts: Facts


def rows(entries: Sequence[Entry]) -> list[dict[str, Json]]:
  """[{'encoder', 'step', 'representation', 'scores': {column: [value, spread]}}]: encoders, best first, means of groups, then what is
  no encoder's own: pixels."""
  names = _names([entry.place for entry in entries])
  found = [
    {"encoder": name, "step": entry.facts["step"], "representation": kind, "scores": _spreads(scores, entry.facts)}
    for name, entry in zip(names, entries, strict=True)
    for kind, scores in entry.facts["results"].items() if kind != "pixels"
  ]  # fmt: skip
  found += _groups(entries, names)
  found.sort(key=lambda row: -row["scores"]["all"][0])
  pixels = [e.facts for e in entries if "pixels" in e.facts["results"]]
  seen = {str(f["results"]["pixels"]): f for f in pixels}
  for facts in seen.values():
    scores = _spreads(facts["results"]["pixels"], facts)
    several = len(seen) > 1 and "identity" in facts
    size = f"{facts['identity']['view']['size']} px" if several else ""
    found.append({"encoder": "pixels", "step": "", "representation": size, "scores": scores})
  return found


def as_markdown(entries: Sequence[Entry]) -> str:
  """Heading, table, and what the spreads are."""
  table = rows(entries)
  columns = list(dict.fromkeys(column for row in table for column in row["scores"]))
  lines = [f"{results.title(entries[0].facts)}: {results.metric(entries[0].facts)}", ""]
  heads = ["encoder", "step", "", *map(results.named, columns)]
  lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
  for row in table:
    cells = [_text(row["scores"].get(column)) for column in columns]
    lines.append(
      f"| {row['encoder']} | {row['step']} | {row['representation']} | {' | '.join(cells)} |"
    )
  others = sorted({results.caption(e.facts | {"step": ""}).partition(", ")[2] for e in entries})
  return "\n".join([*lines, "", NOTE, *others]) + "\n"


def _names(places):
  """Their last parts, or the whole where two have the same."""
  short = [os.path.basename(os.path.normpath(place)) for place in places]
  return [
    name if Counter(short)[name] == 1 else place for name, place in zip(short, places, strict=True)
  ]


def _groups(entries, names):
  """A row for every two or more runs that are equal but for the seed; of one seed, or of equal weights, the first is one of them."""
  members: dict[tuple[str, int], dict[int, tuple[str, dict[str, Json]]]] = {}
  seen: dict[tuple[str, int], set[str]] = {}
  for entry, name in zip(entries, names, strict=True):
    facts = entry.facts
    group = members.setdefault((entry.alike, facts["step"]), {})
    weights = facts["identity"]["checkpoint"]["fingerprint"] if "identity" in facts else name
    if weights not in seen.setdefault((entry.alike, facts["step"]), set()):
      group.setdefault(entry.seed, (name, facts["results"]))
    seen[entry.alike, facts["step"]].add(weights)
  for (_, step), group in members.items():
    told, found = zip(*group.values(), strict=True)
    for kind in found[0] if len(found) > 1 else ():
      if kind != "pixels" and all(kind in scores for scores in found):
        scores = {c: _over_runs([each[kind][c] for each in found]) for c in found[0][kind]}
        name = f"mean of {', '.join(told)}"
        yield {"encoder": name, "step": step, "representation": kind, "scores": scores}


def _over_runs(values):
  values = [value if isinstance(value, float) else value["mean"] for value in values]
  return [float(np.mean(values)), float(np.std(values, ddof=1))]


def _spreads(scores, facts):
  """{column: [value, spread]} of one representation; None where the score is no share of the test images."""
  share, images = results.metric(facts) == "top-1", facts["test_images"]
  return {
    column: [x, math.sqrt(max(0.0, x * (1 - x)) / images) if share else None]
    if isinstance(x, float)
    else [x["mean"], x["spread"]]
    for column, x in scores.items()
  }


def _text(value):
  if value is None:
    return ""
  return f"{value[0]:.3f}" + ("" if value[1] is None else f" ± {value[1]:.3f}")
