"""The tables and plots of a comparison.

Rows: methods; values: mean and standard deviation over seeds (of a sample, n - 1; none for one seed).
"""

import os

import matplotlib
import numpy as np

from benchmarks import one_run

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

COLUMNS = {
  "kNN, k 20": ("knn", "k20"), "kNN, k 200": ("knn", "k200"), "kNN projected": ("knn_projected", "k20"),
  "linear": ("linear", "all"), "1 per class": ("linear", "1"), "5 per class": ("linear", "5"),
  "10 per class": ("linear", "10"),
}  # fmt: skip
NOTES = (
  "N per class: logistic regression on so many labels, at a temperature that was chosen by all labels of the train images. "
  "Minutes, where they are told, are of all training steps at the median pace of a run's lines, peaks of the process or device: both are the "
  "machine's as well, and `benchmarks.methods` compares costs. Curves: kNN of the held-out images of a run, others for each seed."
)
LABELS_SEEN = (
  "supervised",
  "supervised_cifar10",
)  # held-out images have been trained on, here with their labels
PENALTY_EDGES = one_run.PENALTIES[0], one_run.PENALTIES[-1]
STYLES = ("-", "--", ":", "-.")  # with eight colours that are told apart by everybody


def summarise(table):
  """{kind: {method: {column: [mean, deviation or None, seeds], ...}}}."""
  return {
    kind: {method: _of(runs) for method, runs in rows.items()} for kind, rows in table.items()
  }


def _of(runs):
  values = {}
  for name, (group, key) in COLUMNS.items():
    values[name] = spread([run["scores"][group].get(key) for run in runs])
  shares = sorted(
    {int(k) for run in runs for k in run["scores"]["linear"] if k.isdigit()} - {1, 5, 10}
  )
  for n in shares:
    values[f"{n} per class"] = spread([run["scores"]["linear"].get(str(n)) for run in runs])
  values["minutes"] = spread([minutes(run) for run in runs])
  peaks = [(run["device_peak_bytes"] or run["process_peak_bytes"]) / 2**30 for run in runs]
  values["peak GiB"] = [max(peaks), None, len(peaks)]
  return values


def minutes(run):
  """Of all its steps of training at the median pace of its lines, None where none was told: benchmarks/methods.py compares."""
  return run["steps"] * run["seconds_per_step"] / 60 if run["seconds_per_step"] else None


def origins(runs):
  """{'commits': those that trained or scored, 'images': facts of all, 'dates': first and last, 'penalties_at_edge': how many} of
  results, those that only chose a temperature too."""
  made = [one for run in runs for one in run["made"]]
  penalties = [run["scores"]["linear"]["penalty"] for run in runs]
  return {
    "commits": sorted({one["commit"] for one in made}),
    "devices": sorted({f"{one['device']}, {one['processor']}, jax {one['jax']}" for one in made}),
    "dates": [min(one["date"] for one in made), max(one["date"] for one in made)],
    "images": runs[0]["images"],
    "penalties_at_edge": f"{sum(p in PENALTY_EDGES for p in penalties)} of {len(penalties)}",
  }


def spread(values):
  """[mean, deviation or None, how many] of what is there."""
  there = [x for x in values if x is not None]
  if not there:
    return None
  return [
    float(np.mean(there)),
    float(np.std(there, ddof=1)) if len(there) > 1 else None,
    len(there),
  ]


def as_markdown(summary, seen, made=None, like=""):
  """The tables, of each kind of recipe, best kNN first; what the temperatures were chosen from (`like`: of which comparison), and
  what made it all."""
  blocks = []
  for kind, rows in summary.items():
    if not rows:
      continue
    seeds = sorted({values["kNN, k 20"][2] for values in rows.values()})
    told = [name for values in rows.values() for name, value in values.items() if value]
    names = list(dict.fromkeys(told))
    lines = [
      f"{kind} recipe, mean ± deviation of {' or '.join(map(str, seeds))} seeds, best kNN first",
      "",
      f"| method | {' | '.join(names)} |",
      "|---" * (len(names) + 1) + "|",
    ]
    for method in sorted(rows, key=lambda m: -rows[m]["kNN, k 20"][0]):
      cells = [_cell(name, rows[method].get(name)) for name in names]
      lines.append(f"| {method} | {' | '.join(cells)} |")
    blocks.append("\n".join(lines))
  if chosen := [
    f"{m} {t:g}: {'-' if x is None else f'{x:.3f}'}" for m, t, x in seen if t is not None
  ]:
    where = f" in {os.path.basename(like)}" if like else ""
    blocks.append(
      f"kNN of train images{where}, each among the others, first seed, by temperature: {', '.join(chosen)}."
    )
  if edge := at_edge(seen):
    blocks.append(
      f"Best at the edge of the grid, so that a better one may lie beyond: {', '.join(edge)}."
    )
  if made:
    blocks.append(NOTES)
    words = f"commits {', '.join(x[:10] for x in made['commits'])}; {' / '.join(made['devices'])}"
    of = lambda part: f"{part['images']:,} of {part['split']} ({part['checksum']})"
    images = ", ".join(of(made["images"][k]) for k in ("train", "test"))
    name = made["data"] or made["images"]["train"]["name"]
    edges = f"penalties at an end of their grid: {made['penalties_at_edge']}"
    blocks.append(f"{' to '.join(sorted(set(made['dates'])))}, {words}; {name}: {images}; {edges}.")
  return "\n\n".join(blocks) + "\n"


def best_of(methods, seen):
  """{method: temperature} of what was seen as [[method, temperature, accuracy], ...], where none is missing."""
  best = {}
  for method in methods:
    of = {t: accuracy for m, t, accuracy in seen if m == method}
    if of and None not in of.values():
      best[method] = max(of, key=of.get)
  return best


def at_edge(seen):
  """['method temperature'] of those whose best accuracy is at an end of a grid of several, of what `best_of` takes."""
  grids = {}
  for method, temperature, _ in seen:
    grids.setdefault(method, []).append(temperature)
  ends = {method: (min(of), max(of)) for method, of in grids.items() if len(of) > 1}
  return [f"{m} {t:g}" for m, t in best_of(ends, seen).items() if t in ends[m]]


def _cell(name, value):
  if value is None:
    return ""
  mean, deviation, _ = value
  digits = 2 if name in ("minutes", "peak GiB") else 3
  short = lambda x: f"{x:.{digits}f}".removeprefix("0") if digits == 3 else f"{x:,.{digits}f}"
  return short(mean) + (f" ± {short(deviation)}" if deviation is not None and digits == 3 else "")


def write_beside(path, text, table):
  """Tables (`text`) and plots with the name of a result file."""
  stem = os.path.splitext(path)[0]
  with open(f"{stem}.md", "w") as file:
    file.write(text)
  for kind, rows in table.items():
    looked = lambda runs: all(run["held_out"] for run in runs)  # some are not while they train
    curves = {m: runs for m, runs in rows.items() if looked(runs) and m not in LABELS_SEEN}
    if curves:
      draw(curves, f"{stem}-{kind}.png")


def draw(rows, path):
  """Held-out kNN over epochs (bars: deviation over seeds) and, where it was told, over the time of training steps."""
  timed = any(minutes(run) for runs in rows.values() for run in runs)
  size = dict(figsize=(12 if timed else 7.5, 5), sharey=True, squeeze=False)
  figure, (panels,) = pyplot.subplots(1, 1 + timed, **size)
  left, right = panels[0], panels[-1]
  colours = pyplot.get_cmap("tab10").colors
  last = {m: np.mean([run["held_out"][-1][2] for run in runs]) for m, runs in rows.items()}
  for number, method in enumerate(sorted(rows, key=lambda m: -last[m])):
    runs = rows[method]
    count = min(len(run["held_out"]) for run in runs)
    curves = np.array([run["held_out"][:count] for run in runs])
    steps = curves[0, :, 1]
    mean, deviation = (
      curves[..., 2].mean(0),
      curves[..., 2].std(0, ddof=1) if len(runs) > 1 else None,
    )
    style = dict(color=colours[number % 8], linestyle=STYLES[number // 8 % 4], linewidth=1.3)
    epochs = steps / max(1, steps[-1]) * runs[0]["epochs"]
    apart = (number - (len(rows) - 1) / 2) / 200 * epochs[-1]  # bars would hide each other
    left.errorbar(epochs + apart, mean, deviation, label=method, capsize=2, elinewidth=0.8, **style)
    if whole := spread([minutes(run) for run in runs]):
      right.plot(steps / max(1, steps[-1]) * whole[0], mean, **style)
  right.set(xlabel="minutes of training steps, at their median pace")
  left.set(
    xlabel="epochs, a bank's filling among them", ylabel="kNN of held-out train images, top-1"
  )
  for axes in panels:
    axes.grid(alpha=0.3)
  figure.legend(loc="outside right upper", frameon=False, fontsize=9)
  figure.set_layout_engine("constrained")
  figure.savefig(path, dpi=110)
  pyplot.close(figure)
