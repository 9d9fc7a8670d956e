"""Features of images on a plane, a point an image: what lies together, the encoder takes to be alike.

Flow: tasks.feature_map asks for `layout` of each representation and `pick`s the images that `draw` shows as such.
Shapes: features [N, F]; places float64 [N, 2] in 0..1, both axes to one scale.
Paper: t-SNE (van der Maaten and Hinton 2008) in scikit-learn's Barnes-Hut form, from the two principal axes; the palette is
  Okabe and Ito's (2008) with two more.
Holds: the same features and seed give the same places; every class that is told has a colour and a marker that no other has
  together, so that colours are never all that tells two apart.
Not here: which images, their features, files (tasks.feature_map).
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from adco_jax.evaluation import signals
from adco_jax.report import charts

FEWEST = 8  # images; fewer make no map
PERPLEXITY = 30  # neighbours that count, less where there are few images
COLOURS = (
  "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#000000", "#882255", "#999999",
)  # fmt: skip
MARKERS = "os^DvPX*<>"
TOLD = 20  # classes with a colour, the most frequent ones; the others are gray
THUMBNAILS, SIDE, APART = 24, 32, 0.13  # at most, in pixels, and their least distance on the plane
BESIDE = 17  # points from a point to the middle of its thumbnail, both ways
LETTERS = 24  # of a class's name
DPI = 110


class Panel(NamedTuple):
  """One representation."""

  title: str
  places: np.ndarray  # [N, 2]
  images: Mapping[int, np.ndarray]  # {number of a point: uint8 [H, W, 3]} to be shown


def layout(features_NxF: np.ndarray, seed: int) -> np.ndarray:
  """Places [N, 2] of at least FEWEST images by the cosines of their features; all in the middle if these are equal."""
  from sklearn.manifold import TSNE
  from threadpoolctl import threadpool_limits  # which scikit-learn brings

  x = signals.unit(np.asarray(features_NxF, np.float64))
  if np.ptp(x, axis=0).max() < 1e-9:
    return np.full((len(x), 2), 0.5)
  perplexity = min(PERPLEXITY, (len(x) - 1) / 3)
  with threadpool_limits(1):  # several wait for each other more than they do, and are not needed
    found = TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(x)
  low, high = found.min(0), found.max(0)
  return 0.5 + (found - (low + high) / 2) / (high - low).max()


def pick(places_Nx2: np.ndarray) -> list[int]:
  """Up to THUMBNAILS points at least APART from each other, spread over all."""
  chosen: list[int] = []
  distance = np.linalg.norm(places_Nx2 - 0.5, axis=1)
  point = int(distance.argmin())
  distance = np.full(len(places_Nx2), np.inf)
  while len(chosen) < THUMBNAILS and distance[point] >= APART:
    chosen.append(point)
    distance = np.minimum(distance, np.linalg.norm(places_Nx2 - places_Nx2[point], axis=1))
    point = int(distance.argmax())
  return chosen


def style(number: int) -> tuple[str, str]:
  """(colour, marker) of the class with this place among those that are told."""
  colour, turn = number % len(COLOURS), number // len(COLOURS)
  return COLOURS[colour], MARKERS[(colour + turn) % len(MARKERS)]


def told(labels_N: np.ndarray) -> list[int]:
  """Classes with a colour, in their own order: all, or the TOLD most frequent (of equal ones the first)."""
  classes, counts = np.unique(labels_N, return_counts=True)
  most = np.argsort(-counts, kind="stable")[:TOLD]
  return sorted(classes[most].tolist())


def draw(panels: Sequence[Panel], labels_N: np.ndarray, classes: Sequence[str], note: str) -> bytes:
  """A PNG of all panels beside each other under one legend; `note` is kept in it, see `note_of`."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(5.4 * len(panels), 5.7))
  axes = figure.subplots(1, len(panels), squeeze=False)[0]
  numbers = told(labels_N)
  for axis, panel in zip(axes, panels, strict=True):
    _draw_panel(axis, panel, labels_N, numbers)
  figure.tight_layout()
  _draw_legend(figure, labels_N, numbers, classes, 5 * len(panels))
  buffer = io.BytesIO()
  metadata = {"Description": note, "Software": None}
  figure.savefig(buffer, format="png", bbox_inches="tight", dpi=DPI, metadata=metadata)
  return buffer.getvalue()


def note_of(path: str) -> str:
  """What `draw` was given as `note`; '' of a file that is none of ours, or not there."""
  try:
    with Image.open(path) as picture:
      return str(picture.info.get("Description", ""))
  except OSError:
    return ""


def _draw_panel(axis, panel, labels, numbers):
  size = 26 if len(labels) <= 600 else 13
  shape = {"s": size, "linewidths": 0.3, "edgecolors": "0.2"}
  others = ~np.isin(labels, numbers)
  axis.scatter(*panel.places[others].T, s=size / 2, color="0.75", linewidths=0)
  for place, number in enumerate(numbers):
    colour, marker = style(place)
    axis.scatter(*panel.places[labels == number].T, color=colour, marker=marker, **shape)
  for point, image in panel.images.items():
    colour = style(numbers.index(labels[point]))[0] if labels[point] in numbers else "0.6"
    _draw_thumbnail(axis, panel.places[point], image, colour)
  axis.set(xlim=(-0.04, 1.1), ylim=(-0.04, 1.1), xticks=[], yticks=[], aspect="equal")
  axis.set_title(panel.title)
  for line in axis.spines.values():
    line.set_color("0.8")


def _draw_thumbnail(axis, place, image, colour):
  """An image beside its point, which it would hide with all that lie there, framed in the colour of its class."""
  from matplotlib.offsetbox import AnnotationBbox, OffsetImage

  near = Image.Resampling.NEAREST if image.shape[0] < SIDE else Image.Resampling.BILINEAR
  shown = Image.fromarray(image).resize((SIDE, SIDE), near)
  frame = {"edgecolor": colour, "linewidth": 1.6}
  picture = OffsetImage(np.asarray(shown), zoom=72 / DPI, interpolation="nearest")
  line = {"arrowstyle": "-", "color": colour, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
  where: dict[str, Any] = {
    "xybox": (BESIDE, BESIDE),
    "boxcoords": "offset points",
    "arrowprops": line,
  }
  axis.add_artist(AnnotationBbox(picture, place, pad=0.05, bboxprops=frame, **where))


def _draw_legend(figure, labels, numbers, classes, columns):
  from matplotlib.lines import Line2D

  edge: dict[str, Any] = {"markeredgecolor": "0.2", "markeredgewidth": 0.4}
  handles = [
    Line2D([], [], linestyle="none", color=colour, marker=marker, markersize=7, **edge)
    for colour, marker in map(style, range(len(numbers)))
  ]
  texts = [charts.plain(classes[number], LETTERS) for number in numbers]
  more = len(np.unique(labels)) - len(numbers)
  if more:
    handles.append(Line2D([], [], color="0.75", marker="o", linestyle="none", markersize=5))
    texts.append(f"{more} other classes")
  columns = min(columns, _fitting(texts, columns))
  place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.02), "frameon": False}
  figure.legend(handles, texts, ncols=columns, **place)


def _fitting(texts, columns):
  """Columns for which the longest text leaves room."""
  longest = max(map(len, texts))
  return max(1, columns * 8 // max(8, longest))
