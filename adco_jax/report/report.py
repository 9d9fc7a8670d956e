"""A workdir as one self-contained page: curves, scores, pictures and the config, no other file needed.

Flow: main calls `write_report(workdir)` after every task; it reads metrics.jsonl, eval/*.json and the
  pictures, and nothing else.
Holds: a figure appears only if its numbers are on file; writing never changes anything but report.html.
Not here: any measurement.
"""

import html
import os
import zipfile

import numpy as np

from adco_jax.data.sources.kinds import read_as
from adco_jax.evaluation import gallery, results
from adco_jax.report import charts, pages, sheets
from adco_jax.runtime import remote
from adco_jax.runtime.console import tell
from adco_jax.runtime.files import Json, read_json
from adco_jax.runtime.progress import rate
from adco_jax.training.alarms import Alarms
from adco_jax.workdir.files import filled_at, flatten, read_config, read_history
from adco_jax.workdir.metrics import read_metrics


def write_report(workdir: str) -> None:
  """Writes `workdir`/report.html from what is there and prints where it is."""
  path = os.path.join(workdir, "report.html")
  lines = read_metrics(workdir)
  sections = [
    facts(workdir, lines),
    scores(workdir),
    warnings(workdir, lines),
    changes(workdir),
    curves(workdir, lines),
    pages.picture(
      os.path.join(workdir, "views.png"),
      "What the encoder is shown",
      "Left: an image. Right of it: its views, cropped, coloured and normalised as in training. Views of "
      "one image must stay recognisable as the same thing; if they do not, weaken the augmentation.",
    ),
    sheets.maps(workdir),
    sheets.attention(workdir),
    sheets.neighbours(workdir),
    negatives(workdir, lines),
    settings(workdir),
  ]
  pages.write_page(path, os.path.basename(os.path.abspath(workdir)), sections)
  tell(f"report: {path}")


def show_scores(workdir: str) -> None:
  """Prints every stored score of a workdir. Raises ConfigError if there is no run."""
  read_config(workdir)
  for heading, group in results.sections(results.read_all(remote.local(workdir))):
    tell(f"{heading}:")
    for result in group:
      results.show(result["path"], result)


def facts(workdir: str, lines: list[dict[str, Json]]) -> str:
  """One paragraph: what ran, how far it is, how fast."""
  config = read_config(workdir)
  source = read_as(*(config["data"][name] for name in ("source", "dir", "split")))
  plan = read_json(os.path.join(workdir, "plan.json"))
  step = max((line["step"] for line in lines), default=0)
  speeds = sorted(
    line["time/images_per_second"] for line in lines if "time/images_per_second" in line
  )
  speed = f", median {rate(speeds[len(speeds) // 2])} images/s" if speeds else ""
  text = (
    f"{config['model']['arch']} (width {config['model']['width']:g}) on "
    f"{source}: {plan['num_examples']} images, {config['epochs']:g} epochs, batch "
    f"{plan['batch_size']}; {of_objective(config)}. Step {step} of {plan['total_steps']}{speed}."
  )
  return f"<p>{html.escape(text)}</p>"


def of_objective(config: dict[str, Json]) -> str:
  """A run's objective and its settings, in words."""
  settings = [f"{name} {value}" for name, value in flatten(config["method"]).items()]
  return f"{config['objective']} ({', '.join(settings)})"


def scores(workdir: str) -> str:
  """Every stored result as a table: those on the own data first, each part with its newest step first."""
  sections = []
  for heading, group in results.sections(results.read_all(workdir)):
    sections.append(f"<h2>{heading}</h2>")
    for result in group:
      title, caption = (html.escape(f(result)) for f in (results.title, results.caption))
      head, table = f"<h3>{title}: {results.metric(result)}</h3>", _table(result["results"])
      sections.append(f"{head}{table}<p class=small>{caption}</p>")
      sections += [_confusion(result, title), _by_class(result)]
  if sections:
    sections.append(
      "<p>The untrained encoder has the same network and start; raw pixels are the images themselves. "
      "Few labels: mean and spread over the same draws for every row.</p>"
    )
  return "\n".join(sections)


CHARTS = [
  (
    "Loss", ["train/loss", "train/query_loss", "train/chance", "bank/loss"],
    "The encoder's loss against chance: what an encoder that tells nothing apart would have (against negatives the log of the "
    "number of candidates, times the weight of all pairs). An adversarial bank may hold the loss near or above chance while the "
    "encoder improves; the bank's own loss is at its own temperature. Without negatives or prototypes (BYOL) a loss near 0 "
    "may mean that all embeddings are alike: see Rank and Likeness.",
  ),
  (
    "Training accuracy", ["train/accuracy"],
    "Share of queries to which their own key is nearer than every other candidate: it says how hard the negatives are, "
    "not how good the encoder is. Of caco: to which the row of their key is the nearest; of supervised: whose label is found.",
  ),
  (
    "Held-out accuracy", ["knn/top1", "probe/top1", "classifier/top1", "classifier/top5", "knn/chance"],
    "kNN and linear probe on train images left out of the search, or a trained classifier on train images that it never trains "
    "on. This is the curve to watch; its first point is the untrained encoder, or the encoder that the run began from. "
    "Chance: the most that guessing gives (the largest class and two standard errors).",
  ),
  (
    "Held-out loss", ["classifier/loss"],
    "Cross-entropy of the trained classifier on the images that are held out; where it rises while accuracy stands, the "
    "classifier grows too sure of itself (method.label_smoothing).",
  ),
  (
    "Rank", ["signal/rank_features", "signal/rank_embeddings"],
    "RankMe of features and embeddings, which needs no labels: 1 if all images look alike to the encoder. Among runs on "
    "the same data a higher rank of the features often means better ones.",
  ),
  (
    "Effective rank", ["signal/effective_rank_features", "signal/effective_rank_embeddings"],
    "The same without the mean: directions in which images differ, by however little. It is small where they differ along few.",
  ),
  (
    "Dead dimensions", ["signal/dead_features", "signal/dead_embeddings"],
    "Share of dimensions that hardly differ between images: by less than a hundredth of what they would if all were used alike.",
  ),
  (
    "Lengths", ["signal/norm_features", "signal/norm_embeddings"],
    "Mean length of features and embeddings. Losses see directions alone, and the longer a vector is, the less a step turns it.",
  ),
  (
    "Likeness", ["signal/mean_cosine"],
    "Mean cosine between embeddings of different images: near 1 all are alike, near 0 they are spread.",
  ),
  (
    "Alignment", ["train/alignment"],
    "Mean squared distance between a query and its own key, two views of one image: low is good as long as embeddings "
    "of different images stay apart.",
  ),
  (
    "Uniformity", ["signal/uniformity"],
    "Log of the mean of exp(-2 d^2) over pairs of embeddings: 0 if all are alike, about -4 if they are spread evenly.",
  ),
  (
    "Length of the gradient", ["optim/gradient_norm", "optim/clipped"],
    "Before it is cut to optim.clip_norm, and the share of steps in which it was.",
  ),
  (
    "Norms of the bank's rows", ["bank/min_norm", "bank/median_norm", "bank/max_norm"],
    "A row turns by about learning rate / norm^2 per step: small norms make a fast adversary.",
  ),
  (
    "Prototypes in play", ["prototypes/used"],
    "exp of the entropy of how often each is the nearest to an embedding of a batch: 1 if one is to all, at most their number and that of the embeddings.",
  ),
  (
    "In-batch mass", ["train/in_batch_mass", "bank/in_batch_mass"],
    "Share of the softmax on the batch's keys, at the encoder's and at the bank's temperature; the "
    "rest lies on the bank. Near 1 the bank hardly takes part.",
  ),
  (
    "Rows in play", ["adversary/rows_in_play"],
    "exp of the entropy of what each row of negatives has of the pulls of 1,000 train images: 1 if one row has all, K if all have "
    "the same. It says nothing of how much that is: see the in-batch mass.",
  ),
  (
    "Pull and density", ["adversary/density_correlation"],
    "Rank correlation of a query's pull on the rows, by the run's own rule, with the density around it: below 0 queries that few "
    "images are like pull more.",
  ),
  (
    "Pull of low density", ["adversary/low_density_over_rows", "adversary/low_density_over_queries"],
    "Mean pull of the tenth of the queries with the lowest density, 1 for the average query, by AdCo's rule and by the "
    "alternative, for the same rows; see the figure of pull against density.",
  ),
]  # fmt: skip
MARKED = ("knn/top1", "classifier/", "signal/", "adversary/")  # few points: each is shown


def curves(workdir: str, lines: list[dict[str, Json]]) -> str:
  """Every chart whose numbers are on file; the bank's initialisation shaded, changes of the config marked."""
  fill_steps = filled_at(read_json(os.path.join(workdir, "plan.json")))
  changed = [change["step"] for change in read_history(workdir)]
  figures = []
  for title, names, caption in CHARTS:
    marker = "o" if names[0].startswith(MARKED) else None
    data = charts.draw(lines, names, fill_steps=fill_steps, changed=changed, marker=marker)
    if data:
      figures.append(pages.figure(data, "image/svg+xml", title, f"<b>{title}.</b> {caption}"))
  return f"<h2>Training</h2><div class=pair>{''.join(figures)}</div>" if figures else ""


def changes(workdir: str) -> str:
  """What was changed on the way, by --extend."""
  rows = "".join(
    f"<tr><td>{change['step']}<td>{html.escape(key)}<td>{html.escape(str(before))}<td>{html.escape(str(now))}"
    for change in read_history(workdir)
    for key, before, now in change["changes"]
  )
  heads = "<tr><th>from step<th>key<th>before<th>now"
  return f"<h2>Changed on the way</h2><table>{heads}{rows}</table>" if rows else ""


def warnings(workdir: str, lines: list[dict[str, Json]]) -> str:
  """What the run's alarms said, and what its last evaluation says where nothing looks collapsed then."""
  alarms = Alarms(filled_at(read_json(os.path.join(workdir, "plan.json"))))
  said = [(line["step"], text) for line in lines for text in alarms.look(line)]
  told = [f"<p class=warning>Step {step}: {html.escape(text)}.</p>" for step, text in said]
  last = [(line["step"], text) for line in lines if (text := alarms.healthy(line))][-1:]
  return "\n".join([*told, *(f"<p>Step {step}: {html.escape(text)}.</p>" for step, text in last)])


def negatives(workdir: str, lines: list[dict[str, Json]]) -> str:
  """The gallery of the rows of negatives, and how the queries' pull on them goes with density; nothing where there are none."""
  try:
    with np.load(os.path.join(workdir, gallery.FILE)) as file:
      kept = dict(file)
  except (OSError, ValueError, zipfile.BadZipFile):
    return ""
  last = [line for line in lines if "adversary/rows_in_play" in line][-1:]
  masses = [line["bank/in_batch_mass"] for line in lines if "bank/in_batch_mass" in line][-1:]
  in_play = "".join(
    f" At step {x['step']} {x['adversary/rows_in_play']:.0f} of {kept['rows']} rows are in play"
    + "".join(f", while the batch's keys have {m:.3f} of the softmax" for m in masses)
    + "."
    for x in last
  )
  sheet = pages.picture(
    os.path.join(workdir, gallery.PICTURE),
    "What the negatives do",
    "Rows are the negatives that the objective keeps: a bank, a queue. Beside each stands the train image that was nearest to it "
    "at evaluations on the way and, after the gap, those nearest now. Its use is its share in the softmaxes of the images over the "
    f"rows; where the cosine is low, even the nearest image is far.{in_play}",
  )
  pulls = {f"over {rule}": kept[f"over_{rule}"] for rule in ("rows", "queries")}
  caption = (
    "<b>Pull against density.</b> Rows move towards queries, here train images, each by its pull (where nothing moves them it is "
    "their weight alone). Over rows: each query shares its weight out among rows and keys, as in AdCo; over queries: each row among "
    "queries. A dot is a query, a line the means of tenths of them, both for the rows as they are. The paper says that AdCo turns to "
    "queries of low density: at the left its line should lie above the other one."
  )
  chart = charts.draw_pulls(kept["density"], pulls, f"over {kept['over']}")
  return sheet + pages.figure(chart, "image/svg+xml", "Pull against density", caption)


def settings(workdir: str) -> str:
  """The whole config, folded away."""
  config = flatten(read_config(workdir))
  rows = "".join(f"<tr><td>{k}<td>{html.escape(str(v))}" for k, v in sorted(config.items()))
  return f"<details><summary>Config</summary><table><code>{rows}</code></table></details>"


def _confusion(result, title):
  """Of the trained encoder's probe, where it was stored."""
  counts, classes = result.get("confusion", {}).get("trained"), result.get("class_names", [])
  if not counts or len(classes) != len(counts):
    return ""
  caption = "<b>Confusion.</b> Rows: true classes; per cent of a row's images that are taken for each class."
  chart = charts.draw_confusion(counts, classes)
  return f"<details><summary>Confusion of classes</summary>{pages.figure(chart, 'image/svg+xml', f'Confusion, {title}', caption)}</details>"


def _by_class(result):
  """Average precision of every class by representation, where it was stored, and the cost of the trained encoder's SVM."""
  if not (by_class := result.get("by_class", {})):
    return ""
  kinds, first = list(by_class), next(iter(by_class.values()))
  heads = "".join(
    f"<th>{html.escape(kind)}" for kind in [*kinds, "cost", "train images", "test images"]
  )
  areas = lambda name: "".join(f"<td>{by_class[kind][name]['area']:.3f}" for kind in kinds)
  rows = (
    f"<tr><td>{html.escape(name)}{areas(name)}"
    f"<td>{row['cost']:g}<td>{row['train_images']}<td>{row['test_images']}"
    for name, row in first.items()
  )
  return f"<details><summary>Average precision of classes</summary><table><tr><th>{heads}{''.join(rows)}</table></details>"


def _table(group):
  titles, rows = results.cells(group)
  body = "".join(
    f"<tr><td>{html.escape(name)}" + "".join(f"<td>{t.replace('+- ', '±&nbsp;')}" for t in texts)
    for name, texts in rows
  )
  return f"<table><tr><th>{''.join(f'<th>{t}' for t in titles)}{body}</table>"
