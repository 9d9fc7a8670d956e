"""The task `export`: an encoder as a file that other programs load, and a card that says what it is.

Flow: main -> `run`: workdir's encoder -> state dict or program -> file -> reloaded and compared -> card.
Holds: success is printed only after the file was read again and gave the outputs of the original;
  nothing is overwritten.
Not here: names and layouts (interop), who is exported (frozen).
"""

import dataclasses
import os
import pickle
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from adco_jax.encoders import LoadedEncoder, open_classifier, open_run, run_config
from adco_jax.errors import ConfigError, require
from adco_jax.interop import builders, detectron2, exported, files, torch_weights, vit_weights
from adco_jax.models import tokens, vit
from adco_jax.report import card
from adco_jax.runtime import remote, sharding
from adco_jax.runtime.console import tell
from adco_jax.runtime.files import whole, write_json
from adco_jax.tasks.scoring import has_trained_head
from adco_jax.workdir.files import canonical, check_writable
from adco_jax.workdir.fingerprints import fingerprint

STATE = (".safetensors", ".pth")
SUFFIXES = {
  "torchvision": STATE,
  "timm": STATE,
  "detectron2": (".pkl",),
  "npz": (".npz",),
  "stablehlo": (".stablehlo",),
}
WITH_FC = ("torchvision", "timm", "npz")
PLATFORMS = ("cpu", "cuda", "tpu")  # on which a StableHLO program runs
TOLERANCE = 1e-4  # of the largest feature; compilers may add in another order


Probe = dict[str, np.ndarray]  # see `read_probe`


def run(config: ConfigDict) -> None:
  """Writes file and card. Raises ConfigError, also if the reloaded file gives other outputs."""
  check(config)
  whole = not os.path.isfile(config.pretrained)
  require(
    whole, "pretrained", config.pretrained, "is an exported file; name the workdir of its run"
  )
  stored = run_config(config.pretrained, step=config.step)
  check_format(config, stored.model, stored.views.crops)
  probe = read_probe(config)
  run = open_run(config.pretrained, stored, config.encoder, config.step)
  check_probe(probe, config, run)
  if probe is None and config.classifier and config.format in WITH_FC:
    probe = open_classifier(config.pretrained, run, config.encoder)
  path = target(config, run.step)
  os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
  if config.format == "stablehlo":
    write_program(path, run)
    difference = compare_program(path, run)
  else:
    write_weights(path, config, run, probe)
    difference = compare_weights(path, config, run, probe)
  if not difference <= TOLERANCE:
    os.replace(path, f"{path}.wrong")
    raise ConfigError(
      f"{path}.wrong: reloaded, its outputs differ by {difference:.1e}; do not use it"
    )
  classes = [str(name) for name in (probe or {}).get("classes", ())]
  if classes:
    write_json(card.class_file(path), classes)
  facts = canonical(run.config.to_dict()), run.step, config.encoder, str(run.module.dtype)
  exported.write(path, *facts, has_trained_head(config.pretrained, run))
  card.write(f"{path}.md", path, config, run, classes, len(probe["bias"]) if probe else 0)
  tell(f"exported {config.encoder} encoder, step {run.step}: {path}, card {path}.md")
  tell(f"reloaded: largest difference of an output, relative, {difference:.1e}")


def check(config: ConfigDict) -> None:
  """Refuses what no workdir could make right. Raises ConfigError."""
  require(config.format in SUFFIXES, "format", config.format, f"use one of {', '.join(SUFFIXES)}")
  remote.refuse(config.out, "out")
  suffixes = SUFFIXES[config.format]
  ok = not config.out or os.path.splitext(config.out)[1] in suffixes
  require(ok, "out", config.out, f"{config.format} is written as {' or '.join(suffixes)}")
  refuse_existing(config.out)
  if config.out:
    check_writable(os.path.dirname(os.path.abspath(config.out)), "config.out")
  ok = not config.linear or config.format in WITH_FC
  require(ok, "linear", config.linear, f"only {', '.join(WITH_FC)} carry a classifier")
  if config.format in ("torchvision", "timm"):
    files.need("torch" if config.out.endswith(".pth") else "safetensors")


def check_format(config: ConfigDict, model: ConfigDict, crops: Sequence[Sequence[float]]) -> None:
  """Refuses a format that has no network like this one. Raises ConfigError."""
  form = vit.form_of(model.vit, crops)
  reason = builders.refusal(config.format, model.arch, model.width, model.stem, form)
  others = [form for form in ("torchvision", "timm", "npz") if form != config.format]
  require(not reason, "format", config.format, f"{reason}; use {', '.join(others)} or stablehlo")


def target(config: ConfigDict, step: int) -> str:
  """The path that config.out names or means. Raises ConfigError if it exists."""
  name = f"{config.encoder}-{config.format}-{step}{SUFFIXES[config.format][0]}"
  path = config.out or os.path.join(remote.local(config.pretrained), "export", name)
  refuse_existing(path)
  return path


def refuse_existing(path: str) -> None:
  """Raises ConfigError if the file, its card or its class names are there, or one that was wrong."""
  others = (f"{path}.md", card.class_file(path), exported.facts_file(path), f"{path}.wrong")
  for name in (path, *others) if path else ():
    require(not remote.home(name).exists(), "out", name, "exists; name another file")


def read_probe(config: ConfigDict) -> Probe | None:
  """{'kernel' [F, C], 'bias' [C], perhaps 'classes' [C] and the checkpoint's 'step' and 'fingerprint'} of
  config.linear, or None. Raises ConfigError."""
  if not config.linear:
    return None
  probe = files.read(config.linear, "linear")
  require({"kernel", "bias"} <= set(probe), "linear", config.linear, "no probe of the linear task")
  outputs = {len(probe[name]) for name in ("bias", "classes") if name in probe}
  ok = len(outputs) == 1 and probe["kernel"].shape[1:] == probe["bias"].shape
  require(
    ok, "linear", config.linear, "holds other numbers of outputs than of class names or biases"
  )
  return probe


def check_probe(probe: Probe | None, config: ConfigDict, run: LoadedEncoder) -> None:
  """Refuses a probe of another encoder, or of other features where it says no encoder. Raises ConfigError."""
  if probe is None:
    return
  form = str(probe.get("tokens", tokens.POOLED))
  remedy = f"was learnt on the form {form} of the tokens, and files carry a classifier of the pooled one; learn it with --config.features.tokens=pooled"
  require(form == tokens.POOLED, "linear", config.linear, remedy)
  width = jax.eval_shape(run.forward, run.variables, _images(run)).shape[1]
  given = len(probe["kernel"])
  require(given == width, "linear", config.linear, f"is for {given} features, not {width}")
  if "fingerprint" not in probe:
    tell(f"{config.linear} does not say on which encoder it was learnt: taken for this one's")
    return
  remedy = (
    f"was learnt on another encoder, a query encoder of step {probe['step']}; this is the {config.encoder} "
    f"encoder of step {run.step}: name its own run, step and encoder, or run the linear task on this one"
  )
  require(str(probe["fingerprint"]) == fingerprint(run.variables), "linear", config.linear, remedy)


def write_weights(path: str, config: ConfigDict, run: LoadedEncoder, probe: Probe | None) -> None:
  """The backbone under the format's names; npz also holds the projection."""
  variables = jax.device_get(run.variables)
  state = torch_weights.export_encoder(variables, head=config.format == "npz", steps=run.step)
  if probe is not None:
    state = torch_weights.set_aside(state)
    fc = builders.classifier(config.format, run.config.model.arch)
    state |= {f"{fc}.weight": torch_weights.to_there(probe["kernel"]), f"{fc}.bias": probe["bias"]}
  if vit_weights.is_vit(state):
    if "pos_embed" not in state:
      state |= vit_weights.fixed_positions(state, run.module.vit.grid)
    state = vit_weights.to_torchvision(state) if config.format == "torchvision" else state
  if config.format != "detectron2":
    files.write_state(path, state)
    return
  model = {"model": detectron2.rename(state), "__author__": "adco_jax", "matching_heuristics": True}
  with whole(path) as part, open(part, "wb") as file:
    pickle.dump(model, file)


def compare_weights(
  path: str, config: ConfigDict, run: LoadedEncoder, probe: Probe | None
) -> float:
  """Largest relative difference of outputs between the run and the file read again."""
  if config.format == "detectron2":
    with open(path, "rb") as file:
      state = detectron2.restore_names(pickle.load(file)["model"])
  else:
    state = files.read(path, "out")
  blank = jax.tree.map(jnp.zeros_like, run.variables)
  variables, report = torch_weights.import_encoder(state, blank)
  images, forward = _images(run), run.forward
  ours, theirs = (np.asarray(forward(v, images)) for v in (run.variables, variables))
  difference = _difference(ours, theirs)
  if not report["missing"]:
    embed = lambda v: run.module.apply(v, images.astype(np.float32) / 255, train=False)
    difference = max(difference, _difference(embed(run.variables), embed(variables)))
  if probe is None:
    return difference
  name = builders.classifier(config.format, run.config.model.arch)
  fc = torch_weights.to_here(state[f"{name}.weight"]), state[f"{name}.bias"]
  logits = ours @ probe["kernel"] + probe["bias"], theirs @ fc[0] + fc[1]
  return max(difference, _difference(*logits))


def write_program(path: str, run: LoadedEncoder) -> None:
  """uint8 images [b, H, W, 3] -> features [b, F], weights inside, for any batch size b."""
  size = run.config.eval.size
  (batch,) = jax.export.symbolic_shape("b")
  images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8)
  variables = jax.device_get(run.variables)
  forward = dataclasses.replace(run, mesh=sharding.create_mesh(jax.devices()[:1])).forward
  program = jax.jit(lambda images: forward(variables, images))
  serialised = jax.export.export(program, platforms=PLATFORMS)(images)
  with whole(path) as part, open(part, "wb") as file:
    file.write(serialised.serialize())


def compare_program(path: str, run: LoadedEncoder) -> float:
  """As `compare_weights`, for a program."""
  with open(path, "rb") as file:
    program = jax.export.deserialize(bytearray(file.read()))
  images = _images(run)
  return _difference(run.forward(run.variables, images), program.call(images))


def _images(run, count=4):
  size = run.config.eval.size
  return np.random.RandomState(0).randint(0, 256, (count, size, size, 3), np.uint8)


def _difference(ours, theirs):
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  apart, scale = np.abs(ours - theirs).max(), np.abs(ours).max()
  return float(apart / scale) if scale else float(apart)  # features may all be 0
