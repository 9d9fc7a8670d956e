"""Curves of metrics over steps, and pull against density, drawn by Matplotlib without a display.

Flow: report asks for one chart after the other and puts the bytes into its page.
Holds: nothing is cut off, whatever the labels are; steps of the bank's initialisation are shaded, steps from
  which on a run was changed are marked.
Not here: which metrics, and what they mean (report).
"""

import io
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from adco_jax.runtime.files import Json

# Of a rule in all reports, told apart by colour-blind readers too.
COLOURS = {"over rows": ("#0072b2", "o"), "over queries": ("#d55e00", "s")}
LETTERS, TICKS, WRITTEN = (
  16,
  50,
  20,
)  # of a class's name, most names at an axis, most classes with numbers
PARTS = 10  # of the queries, by density
LONG = 30  # letters of a name beside which no second one has room


def draw(
  lines: Iterable[dict[str, Json]],
  names: Sequence[str],
  *,
  fill_steps: int = 0,
  changed: Iterable[int] = (),
  marker: str | None = None,
  kind: str = "svg",
) -> bytes | None:
  """A picture of metrics `names` as bytes of `kind`, or None if no line has any.

  `lines`: of metrics.jsonl; `fill_steps`: those that are shaded; `changed`: steps that are marked.
  """
  curves = {name: [(x["step"], x[name]) for x in lines if name in x] for name in names}
  curves = {name: points for name, points in curves.items() if points}
  if not curves:
    return None
  figure, axes = _create()
  if fill_steps and min(step for points in curves.values() for step, _ in points) <= fill_steps:
    axes.axvspan(0, fill_steps, color="0.9", label="bank's initialisation")
  for name, points in curves.items():
    style, single = "--" if name.endswith("chance") else "-", "o" if len(points) == 1 else None
    columns = zip(*points, strict=True)
    axes.plot(*columns, style, label=name, marker=marker or single, markersize=3, linewidth=1.2)
  for number, step in enumerate(changed):
    axes.axvline(step, color="0.4", linestyle=":", label=None if number else "config changed")
  axes.set_xlabel("step")
  return _finish(figure, axes, kind)


def draw_pulls(
  density_N: np.ndarray, pulls: Mapping[str, np.ndarray], own: str, kind: str = "svg"
) -> bytes:
  """Pull of N queries against their density, as bytes of `kind`: a dot each, and the means of tenths of them.

  `pulls`: {rule: [N]}, 1 for the average query; `own`: the rule of the run.
  """
  from matplotlib import ticker

  figure, axes = _create()
  axes.axhline(1, color="0.6", linewidth=0.8)
  tenths = np.array_split(np.argsort(density_N, kind="stable"), min(PARTS, len(density_N)))
  for name, pull in pulls.items():
    colour, marker = COLOURS[name]
    dots = dict(markersize=3, markeredgewidth=0, alpha=0.25, rasterized=True)
    axes.plot(density_N, pull, ".", color=colour, **dots)
    means = [[x[part].mean() for part in tenths] for x in (density_N, pull)]
    line, words = ("-", f"{name} (this run's rule)") if name == own else ("--", name)
    style = dict(marker=marker, markersize=4.5, markeredgecolor="white", linewidth=1.6)
    axes.plot(*means, line, color=colour, label=words, **style)
  axes.set_yscale("log")
  axes.yaxis.set_major_locator(ticker.LogLocator(2, (1, 1.5)))
  axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
  axes.yaxis.set_minor_locator(ticker.NullLocator())
  axes.set_xlabel("density around a query (log; left: few images are like it)")
  axes.set_ylabel("pull of a query (1: average)")
  return _finish(figure, axes, kind)


def draw_confusion(counts_CxC: np.ndarray, classes: Sequence[str], kind: str = "svg") -> bytes:
  """A matrix of confusion, rows are true classes, as bytes of `kind`; shares are written where there is room for them."""
  counts = np.asarray(counts_CxC)
  shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
  figure, axes = _create()
  figure.set_size_inches(*2 * [min(9, 2.2 + 0.34 * len(counts))])
  axes.imshow(shares, cmap="cividis", vmin=0, vmax=1)
  names = [plain(name, LETTERS) for name in classes]
  every = range(0, len(names), -(-len(names) // TICKS))
  axes.set_xticks(every, [names[i] for i in every], rotation=90, fontsize=8)
  axes.set_yticks(every, [names[i] for i in every], fontsize=8)
  axes.set_xlabel("taken for")
  for row, column in np.argwhere(shares >= 0.005) if len(counts) <= WRITTEN else ():
    colour = "black" if shares[row, column] > 0.5 else "white"
    text = f"{100 * shares[row, column]:.0f}"
    axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
  return _bytes(figure, kind)


def plain(name: str, letters: int) -> str:
  """A class's name as Matplotlib prints it: short, no formula, no leading underscore, which legends leave out, no byte that is no
  letter, as names of files can have."""
  short = name if len(name) <= letters else f"{name[: letters - 1]}…"
  short = short.encode(errors="backslashreplace").decode().replace("$", r"\$")
  return " " * short.startswith("_") + short


def _create():
  """(figure, axes)."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  return pyplot.subplots(figsize=(5.2, 3.2))


def _finish(figure, axes, kind):
  """The figure with grid and legend as bytes of `kind`."""

  axes.grid(alpha=0.3)
  columns = 2 if max(map(len, axes.get_legend_handles_labels()[1])) < LONG else 1
  axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, fontsize=8)
  return _bytes(figure, kind)


def _bytes(figure, kind):
  from matplotlib import pyplot

  buffer = io.BytesIO()
  figure.savefig(buffer, format=kind, bbox_inches="tight", dpi=110)
  pyplot.close(figure)
  return buffer.getvalue()
