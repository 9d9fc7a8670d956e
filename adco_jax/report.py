"""A workdir as one self-contained page: curves, scores, pictures and the config, no other file needed.

Flow: main calls `write_report(workdir)` after every task; it reads metrics.jsonl, eval/*.json and the
  pictures, and nothing else.
Holds: a figure appears only if its numbers are on file; writing never changes anything but report.html.
Not here: any measurement.
"""

import html
import io
import os

from adco_jax import pages, remote
from adco_jax.console import tell
from adco_jax.evaluation import results
from adco_jax.metrics import read_metrics
from adco_jax.workdir import flatten, read_config, read_json


def write_report(workdir):
  """Writes `workdir`/report.html from what is there and prints where it is."""
  path = os.path.join(workdir, "report.html")
  lines = read_metrics(workdir)
  parts = [
    facts(workdir, lines),
    scores(workdir),
    curves(lines),
    pages.picture(
      os.path.join(workdir, "views.png"),
      "What the encoder is shown",
      "Left: an image. Right of it: its views, cropped, coloured and normalised as in training. Views of "
      "one image must stay recognisable as the same thing; if they do not, weaken the augmentation.",
    ),
    neighbours(workdir),
    settings(workdir),
  ]
  pages.write_page(path, os.path.basename(os.path.abspath(workdir)), parts)
  tell(f"report: {path}")


def show_scores(workdir):
  """Prints every stored score of a workdir. Raises ConfigError if there is no run."""
  read_config(workdir)
  for heading, found in results.sections(results.read_all(remote.local(workdir))):
    tell(f"{heading}:")
    for result in found:
      results.show(result["path"], result)


def facts(workdir, lines):
  """One paragraph: what ran, how far it is, how fast."""
  config, plan = read_json(os.path.join(workdir, "config.json"))["config"], None
  plan = read_json(os.path.join(workdir, "plan.json"))
  step = max((line["step"] for line in lines), default=0)
  speeds = sorted(
    line["time/images_per_second"] for line in lines if "time/images_per_second" in line
  )
  speed = f", median {speeds[len(speeds) // 2]:.0f} images/s" if speeds else ""
  text = (
    f"{config['objective']} with {config['model']['arch']} (width {config['model']['width']:g}) on "
    f"{config['data']['source']}: {plan['num_examples']} images, {config['epochs']:g} epochs, batch "
    f"{plan['batch_size']}, bank of {config['bank']['size']}, temperatures {config['temperature']:g} and "
    f"{config['bank']['temperature']:g}. Step {step} of {plan['total_steps']}{speed}."
  )
  return f"<p>{html.escape(text)}</p>"


def scores(workdir):
  """Every stored result as a table: those on the own data first, each part with its newest step first."""
  parts = []
  for heading, found in results.sections(results.read_all(workdir)):
    parts.append(f"<h2>{heading}: top-1</h2>")
    for result in found:
      title, caption = (html.escape(f(result)) for f in (results.title, results.caption))
      parts.append(f"<h3>{title}</h3>{_table(result['results'])}<p class=small>{caption}</p>")
  if parts:
    parts.append(
      "<p>The untrained encoder has the same network and start; raw pixels are the images themselves. "
      "Few labels: mean and spread over the same draws for every row.</p>"
    )
  return "\n".join(parts)


def curves(lines):
  """Loss against chance, contrast accuracy, kNN, bank norms and in-batch mass over steps."""
  figures = [
    _curve(lines, ["train/query_loss", "train/chance", "bank/loss"], "Loss",
           "The encoder's loss against chance, log(K + B) times the weight of all pairs: what an encoder that "
           "tells nothing apart would have. An adversarial bank may hold the loss near or above chance while the encoder "
           "improves; the bank's own loss is at its own temperature."),
    _curve(lines, ["train/accuracy"], "Contrast accuracy",
           "Share of queries whose key beats every bank row and other key. It says how hard the bank is, "
           "not how good the encoder is."),
    _curve(lines, ["knn/top1", "probe/top1"], "Held-out accuracy",
           "kNN and linear probe on train images left out of the search. This is the curve to watch; its first "
           "point is the untrained encoder.", marker="o"),
    _curve(lines, ["bank/min_norm", "bank/median_norm", "bank/max_norm"], "Norms of the bank's rows",
           "A row turns by about learning rate / norm^2 per step: small norms make a fast adversary."),
    _curve(lines, ["train/in_batch_mass", "bank/in_batch_mass"], "In-batch mass",
           "Share of the softmax on the batch's keys, at the encoder's and at the bank's temperature; the "
           "rest lies on the bank. Near 1 the bank hardly takes part."),
  ]  # fmt: skip
  figures = [f for f in figures if f]
  return f"<h2>Training</h2><div class=pair>{''.join(figures)}</div>" if figures else ""


def neighbours(workdir):
  """The newest sheet of nearest neighbours of every data set."""
  newest = {}
  for result in results.read_all(workdir):
    path = results.picture_of(result["path"])
    if result["task"] == "knn" and os.path.exists(path):
      newest.setdefault(results.title(result), (path, result["step"]))
  text = (
    "First column: a test image. Then its five nearest train images by the trained encoder and, after the "
    "gap, by the untrained one."
  )
  return "\n".join(
    pages.picture(path, html.escape(f"Neighbours: {title}"), f"Step {step}. {text}")
    for title, (path, step) in newest.items()
  )


def settings(workdir):
  """The whole config, folded away."""
  config = flatten(read_json(os.path.join(workdir, "config.json"))["config"])
  rows = "".join(f"<tr><td>{k}<td>{html.escape(str(v))}" for k, v in sorted(config.items()))
  return f"<details><summary>Config</summary><table><code>{rows}</code></table></details>"


def _table(found):
  titles, rows = results.cells(found)
  body = "".join(
    f"<tr><td>{html.escape(name)}" + "".join(f"<td>{t}" for t in texts) for name, texts in rows
  )
  return f"<table><tr><th>{''.join(f'<th>{t}' for t in titles)}{body}</table>"


def _curve(lines, names, title, caption, marker=None):
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(5.2, 3.2), layout="constrained")
  drawn = 0
  for name in names:
    points = [(line["step"], line[name]) for line in lines if name in line]
    if points:
      style = "--" if name.endswith("chance") else "-"
      seen = marker or ("o" if len(points) == 1 else None)
      axes.plot(
        *zip(*points, strict=True), style, label=name, marker=seen, markersize=3, linewidth=1.2
      )
      drawn += 1
  axes.set_xlabel("step")
  axes.grid(alpha=0.3)
  if drawn:
    figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=8)
  buffer = io.BytesIO()
  figure.savefig(buffer, format="svg")
  pyplot.close(figure)
  return (
    pages.figure(buffer.getvalue(), "image/svg+xml", title, f"<b>{title}.</b> {caption}")
    if drawn
    else ""
  )
