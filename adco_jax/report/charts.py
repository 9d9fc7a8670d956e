"""Curves of metrics over steps, drawn by Matplotlib without a display.

Flow: report asks for one chart after the other and puts the bytes into its page.
Holds: nothing is cut off, whatever the labels are; steps of the bank's initialisation are shaded, steps from
  which on a run was changed are marked.
Not here: which metrics, and what they mean (report).
"""

import io
from collections.abc import Iterable, Sequence

from adco_jax.runtime.files import Json


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
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  curves = {name: [(x["step"], x[name]) for x in lines if name in x] for name in names}
  curves = {name: points for name, points in curves.items() if points}
  if not curves:
    return None
  figure, axes = pyplot.subplots(figsize=(5.2, 3.2))
  if fill_steps and min(step for points in curves.values() for step, _ in points) <= fill_steps:
    axes.axvspan(0, fill_steps, color="0.9", label="bank's initialisation")
  for name, points in curves.items():
    style, single = "--" if name.endswith("chance") else "-", "o" if len(points) == 1 else None
    columns = zip(*points, strict=True)
    axes.plot(*columns, style, label=name, marker=marker or single, markersize=3, linewidth=1.2)
  for number, step in enumerate(changed):
    axes.axvline(step, color="0.4", linestyle=":", label=None if number else "config changed")
  axes.set_xlabel("step")
  axes.grid(alpha=0.3)
  axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=8)
  buffer = io.BytesIO()
  figure.savefig(buffer, format=kind, bbox_inches="tight", dpi=110)
  pyplot.close(figure)
  return buffer.getvalue()
