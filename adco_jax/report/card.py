"""The model card of an exported encoder: what it is, from which data, how good, how to feed it.

Flow: export calls `write` once the file has been checked.
Holds: every figure is read from the workdir; what was not measured is not there.
"""

import os
from collections.abc import Sequence
from typing import Protocol

from ml_collections import ConfigDict

from adco_jax.data.sources.kinds import read_as
from adco_jax.evaluation import results
from adco_jax.interop import builders
from adco_jax.models import vit as transformers
from adco_jax.runtime import remote
from adco_jax.runtime.files import read_json, write_text
from adco_jax.workdir.files import describe_changes, flatten, read_config, read_history


class Run(Protocol):
  """What a card needs of an opened run (encoders.LoadedEncoder)."""

  @property
  def config(self) -> ConfigDict:
    """Of the pre-training."""

  @property
  def step(self) -> int:
    """Of the checkpoint."""


SHOWN = 20  # class names in a card; all are in the file beside it


def write(
  path: str, file: str, config: ConfigDict, run: Run, classes: Sequence[str] = (), outputs: int = 0
) -> None:
  """Writes the card of `file` as Markdown with a YAML head.

  `classes`: names of the classifier's outputs where they are known; `outputs`: their number, 0 without one.
  """
  trained, workdir = run.config, config.pretrained
  lines = [
    *head(file, config, run),
    *origin(workdir, trained, run.step),
    *changes(workdir, run.step),
    preprocessing(config.format, trained),
    *class_lines(file, classes, outputs),
    "- **Use**:",
    "",
    *use(file, config.format, trained, outputs),
    "",
    "## Scores on held-out images",
    "",
    *(scores(workdir, run.step, config.encoder) or ["None was measured at this step."]),
    "",
    "## Config",
    "",
    *(f"- `{name}`: {value}" for name, value in sorted(flatten(trained.to_dict()).items())),
  ]
  write_text(path, "\n".join(lines) + "\n")


def head(file: str, config: ConfigDict, run: Run) -> list[str]:
  """The YAML head, the title and what the file is, as lines."""
  model = run.config.model
  transformer = model.arch in transformers.ARCHITECTURES
  kind = f"patches of {model.vit.patch}" if transformer else f"{model.stem} stem"
  return [
    "---",
    f"license: {config.license}",
    "library_name: adco_jax",
    "tags: [self-supervised, image-feature-extraction]",
    "---",
    f"# {os.path.basename(file)}",
    "",
    f"The {config.encoder} encoder of a run of {run.config.objective} with {model.arch} (width "
    f"{model.width:g}, {kind}), step {run.step}.",
    "",
  ]


def preprocessing(form: str, trained: ConfigDict) -> str:
  """How an image is made ready for the encoder, in a line."""
  data, view = trained.data, trained.eval
  mean, std = (", ".join(f"{x:g}" for x in values) for values in (data.mean, data.std))
  scaled = f"scaled to 0..1, mean ({mean}), std ({std})"
  if form == "stablehlo":
    scaled = f"uint8; inside the program it is {scaled}"
  resized = round(view.size / view.crop_fraction)
  return f"- **Preprocessing**: RGB, centre crop {view.size} of {resized} pixels, {scaled}."


def use(file: str, form: str, trained: ConfigDict, outputs: int) -> list[str]:
  """The program that loads the file, as lines."""
  data, model = trained.data, trained.model
  return builders.lines(
    form, file, arch=model.arch, width=model.width, stem=model.stem, classes=outputs,
    size=trained.eval.size, mean=data.mean, std=data.std, vit=transformers.form_of(model.vit, trained.views.crops),
  )  # fmt: skip


def origin(workdir: str, trained: ConfigDict, step: int) -> list[str]:
  """Where the weights come from and what they were trained on here, as lines."""
  plan = read_json(os.path.join(remote.local(workdir), "plan.json"))
  epochs = max(0, step - plan["fill_steps"]) / plan["steps_per_epoch"]
  lines = []
  if imported := plan.get("imported"):
    before = f" after {imported['epoch']} epochs" if imported["epoch"] else ""
    lines.append(f"- **Begun from**: `{imported['file']}`, another program's file{before}.")
  elif trained.init_from:
    lines.append(f"- **Begun from**: the encoders of `{trained.init_from}`.")
  if imported and not plan.get("data"):
    return [*lines, "- **Data**: not known here; it was not trained further."]
  data = trained.data
  kind = read_as(data.source, data.dir, data.split)
  labels = "labels used" if plan.get("has_labels") else "no labels used"
  images = f"{kind}, {plan['num_examples']} images, {labels}"
  return [*lines, f"- **Data**: {images}, {epochs:.1f} epochs."]


def class_lines(file: str, classes: Sequence[str], outputs: int) -> list[str]:
  """What the classifier's outputs are, as lines."""
  if not outputs:
    return []
  if not len(classes):
    return [f"- **Classes**: {outputs} outputs; the probe's file has no names of them."]
  some = ", ".join(classes[:SHOWN]) + (", ..." if len(classes) > SHOWN else "")
  return [
    f"- **Classes**: {outputs}, in the order of `{os.path.basename(class_file(file))}`: {some}."
  ]


def class_file(file: str) -> str:
  """Where the class names of an exported classifier lie, a JSON list."""
  return f"{file}.classes.json"


def changes(workdir: str, step: int) -> list[str]:
  """What was changed before `step` by --extend, one line each time."""
  return [
    f"- **Changed at step {change['step']}**: {describe_changes(change['changes'])}"
    for change in read_history(workdir)
    if change["step"] < step
  ]


def scores(workdir: str, step: int, encoder: str) -> list[str]:
  """Tables of all stored results at `step`, as lines; whose they are is said of those that are not `encoder`'s."""
  stored = [f for f in results.read_all(remote.local(workdir)) if f["step"] == step]
  averaged = read_config(workdir)["method"].get("average", False)
  usual = {"finetune": "key"} if averaged else {}  # of results that do not say it
  of = lambda facts: facts.get("encoder") or usual.get(facts["task"], "query")
  others = {of(facts) for facts in stored} - {encoder}
  lines = []
  if stored and encoder not in map(of, stored):
    which = " and ".join(sorted(others))
    lines = [f"These are of the {which} encoder of the same step; this one was not scored.", ""]
  for heading, part in results.sections(stored):
    lines += [f"### {heading}", ""]
    for facts in part:
      if of(facts) != encoder and not lines[0].startswith("These"):
        lines += [f"This is of the {of(facts)} encoder of the same step, not of this one:", ""]
      lines += [
        f"{results.title(facts)}: {results.metric(facts)}; {results.caption(facts)}.",
        "",
        "```",
      ]
      lines += [results.format_table(facts["results"]), "```", ""]
  return lines
