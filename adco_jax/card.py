"""The model card of an exported encoder: what it is, from which data, how good, how to feed it.

Flow: export calls `write` once the file has been checked.
Holds: every figure is read from the workdir; what was not measured is not there.
"""

import os

from adco_jax import remote
from adco_jax.evaluation import results
from adco_jax.workdir import flatten, read_json

USE = {
  "torchvision": "model.load_state_dict(weights, strict=True)  # fc = torch.nn.Identity(), or num_classes=C with a probe",
  "timm": "model.load_state_dict(weights, strict=True)  # timm.create_model(NAME, num_classes=0)",
  "detectron2": "MODEL.WEIGHTS in a config whose PIXEL_MEAN, PIXEL_STD and STRIDE_IN_1X1=False fit",
  "npz": "numpy.load(FILE): torchvision's names and layouts, the projection as fc.0 and fc.2",
  "stablehlo": "jax.export.deserialize(bytearray(FILE)).call(images)  # uint8 [b, H, W, 3] -> features [b, F]",
}


def write(path, file, config, run):
  """Writes the card of `file` as Markdown with a YAML head."""
  trained = run.config
  plan = read_json(os.path.join(remote.local(config.pretrained), "plan.json"))
  epochs = max(0, run.step - plan["fill_steps"]) / plan["steps_per_epoch"]
  data, view = trained.data, trained.eval
  mean, std = (", ".join(f"{x:g}" for x in values) for values in (data.mean, data.std))
  resized = round(view.size / view.crop_fraction)
  lines = [
    "---",
    f"license: {config.license}",
    "library_name: adco_jax",
    "tags: [self-supervised, image-feature-extraction]",
    "---",
    f"# {os.path.basename(file)}",
    "",
    f"The {config.player} encoder of a run of {trained.objective} with {trained.model.arch} (width "
    f"{trained.model.width:g}, {trained.model.stem} stem), step {run.step}, {epochs:.1f} epochs.",
    "",
    f"- **Data**: {data.source}, {plan['num_examples']} images, no labels used.",
    f"- **Preprocessing**: RGB, centre crop {view.size} of {resized} pixels, scaled to 0..1, "
    f"mean ({mean}), std ({std})"
    + ("; inside the program." if config.format == "stablehlo" else "."),
    f"- **Use**: `{USE[config.format]}`",
    "",
    "## Scores on held-out images",
    "",
    *(scores(config.pretrained, run.step, config.player) or ["None was measured at this step."]),
    "",
    "## Config",
    "",
    *(f"- `{name}`: {value}" for name, value in sorted(flatten(trained.to_dict()).items())),
  ]
  with open(path, "w") as out:
    out.write("\n".join(lines) + "\n")


def scores(workdir, step, player):
  """Tables of all stored results at `step`, which are the query encoder's, as lines."""
  found = [f for f in results.read_all(remote.local(workdir)) if f["step"] == step]
  lines = []
  if found and player != "query":
    lines = ["These are of the query encoder of the same step; this one was not scored.", ""]
  for heading, part in results.sections(found):
    lines += [f"### {heading}", ""]
    for facts in part:
      lines += [f"{results.title(facts)}: top-1; {results.caption(facts)}.", "", "```"]
      lines += [results.format_table(facts["results"]), "```", ""]
  return lines
