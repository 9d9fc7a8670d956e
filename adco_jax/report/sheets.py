"""Pictures that tasks drew beside their results, in the report: nearest neighbours, the map of features, a ViT's attention.

Flow: report puts these sections between its curves and its settings.
Holds: of results that differ by the checkpoint alone only the newest is shown.
Not here: drawing (workdir.pictures, report.feature_map).
"""

import html
import os
from collections.abc import Hashable

from adco_jax.evaluation import results
from adco_jax.report import pages


def neighbours(workdir: str) -> str:
  """The newest sheet of nearest neighbours of every data set, view and protocol, else that of the online evaluation."""
  shown = newest(
    workdir,
    "neighbours",
    "Neighbours",
    "First column: a test image. Then its five nearest train images by the trained encoder and, after the "
    "gap, by the untrained one.",
  )
  return shown or pages.picture(
    os.path.join(workdir, "neighbours.png"),
    "Nearest neighbours",
    "First column: a train image that was left out of the search. Then its five nearest among the others, by the encoder as "
    "it was last evaluated. They should show the same kind of thing, not merely the same colour.",
  )


def maps(workdir: str) -> str:
  """The newest map of every data set, view and protocol."""
  return newest(
    workdir,
    "map",
    "Map",
    "Each point is a test image; points that lie together have features that are alike, by the trained encoder and, beside it, by "
    "the untrained one (t-SNE of cosines). Neighbourhoods mean something, distances between groups and sizes of groups do not. "
    "Labels only choose colour and marker.",
  )


def attention(workdir: str) -> str:
  """The newest picture of attention of every data set, view and protocol."""
  return newest(
    workdir,
    "attention",
    "Attention",
    "First column: a test image. Then how much the class token of the last block takes from each patch: the mean of all heads, and "
    "single heads. Dark is nothing, bright the largest share of that map. Left: the largest share of the mean, in even "
    "shares (1.0 x: it looks everywhere alike), and what all patches get; the rest goes to the class token itself and to registers.",
  )


def newest(workdir: str, kind: str, title: str, text: str) -> str:
  """The pictures of a kind, those of the newest checkpoint alone, each with its result's caption and `text`."""
  found: dict[Hashable, tuple[str, results.Facts]] = {}
  for result in results.read_all(workdir):
    path = results.picture_of(result["path"], kind)
    if result["task"] == "knn" and os.path.exists(path):
      found.setdefault(results.same_but_step(result), (path, result))
  return "\n".join(
    pages.picture(
      path,
      html.escape(f"{title}: {results.title(result)}"),
      f"{html.escape(results.caption(result))}.<br>{text}",
    )
    for path, result in found.values()
  )
