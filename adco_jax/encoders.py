"""Trained encoders, taken from a workdir or an exported file, and features of images by them.

Flow: `load_encoder` for programs that import us; the tasks that use a run and train it no further call `run_config`, open
  what data they need, then `open_run`.
Holds: model and normalisation are the pre-training's, as they were up to the checkpoint that is opened; data may be
  another (None: the same), and then nothing that described the pre-training's own data set is applied to it.
Not here: sources and loaders (each task opens what it needs), scores.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from adco_jax import build
from adco_jax.config import plan as planning
from adco_jax.data.cuts import cut_centre
from adco_jax.data.images import decode
from adco_jax.data.sources.files import BadImage
from adco_jax.data.sources.kinds import read_as
from adco_jax.errors import ConfigError, require
from adco_jax.evaluation.features import extract, make_features
from adco_jax.interop import exported, torch_weights
from adco_jax.models import tokens
from adco_jax.models.heads import Encoder
from adco_jax.objectives.base import Classifying
from adco_jax.runtime import remote, rng, sharding
from adco_jax.runtime.dtypes import Tree, at_least_float32
from adco_jax.runtime.files import Json, read_json
from adco_jax.workdir.checkpoint import restore_parts, saved_steps, stored_fields
from adco_jax.workdir.files import holds_run, read_config, undone, with_later_keys

# What describes one data set and says nothing about another.
NOT_SAID = {
  "dir": "", "name": "", "split": "train", "test_split": "val", "image_key": "", "label_key": "", "subset": "",
  "labels": True, "num_classes": 0, "resident_size": 0,
}  # fmt: skip


Image = np.ndarray | str | os.PathLike[str]  # uint8 [H, W, 3], or the path of a file


@dataclasses.dataclass(frozen=True)
class LoadedEncoder:
  """One encoder at one step, replicated over all devices.

  module: Linen, `module.apply(variables, x, method="features")` -> pooled features [B, F] of normalised x [B, H, W, 3];
  variables: {'params', 'batch_stats'}, without 'head' of an exported file that has no projection (all but .npz); config: of
  its pre-training.
  """

  module: Encoder
  variables: dict[str, Tree]
  config: ConfigDict
  step: int
  mesh: jax.sharding.Mesh
  create_untrained: Callable[[], dict[str, Tree]]  # () -> the variables before the first step

  @functools.cached_property
  def forward(self) -> Callable[[Tree, jax.Array], jax.Array]:
    """(variables, uint8 [B, H, W, 3] on the devices) -> pooled features float32 [B, F]."""
    return self.forward_of(tokens.POOLED)

  def forward_of(self, form: str) -> Callable[[Tree, jax.Array], jax.Array]:
    """As `forward`, of another form of a ViT's tokens than the pooled one, see models.tokens. Raises ConfigError."""
    model, data = self.config.model, self.config.data
    tokens.check("features.tokens", form, model.arch, model.vit.depth)
    return _make_forward(self.module, tuple(data.mean), tuple(data.std), self.mesh, form)

  def embed(
    self, images: np.ndarray | Iterable[Image], batch_size: int = 256, form: str = tokens.POOLED
  ) -> np.ndarray:
    """Pooled features, float32 [N, F], of images seen as configs/embed.py sees them.

    images: uint8 [N, H, W, 3] in 0..255, or any number of arrays uint8 [H, W, 3] of any sizes and of paths of image files.
    At most `batch_size` are on the devices at once. form: of a ViT's tokens, 'pooled' 'class' 'mean' 'class_mean' 'class_4'.
    Raises ValueError for what is no such image, ConfigError for a form that the encoder does not have.
    """
    view = self.config.eval
    see = lambda image: cut_centre(_pixels(image), view.size, view.crop_fraction)
    _check_array(images)
    forward = functools.partial(self.forward_of(form), self.variables)
    return extract(forward, self._batches(images, see, batch_size))

  def _batches(self, images, see, batch_size):
    """(images on the devices, how many count): the last batch is filled up to a power of two, so that few shapes compile."""
    images = iter(images)
    first = next(images, None)
    if first is None:
      raise ValueError("embed: no images")
    images = itertools.chain([first], images)
    with concurrent.futures.ThreadPoolExecutor() as pool:
      while part := list(itertools.islice(images, batch_size)):
        seen = np.stack(list(pool.map(see, part)))
        rows = sharding.round_up(min(batch_size, 1 << (len(part) - 1).bit_length()))
        padded = np.pad(seen, ((0, max(0, rows - len(part))), (0, 0), (0, 0), (0, 0)))
        yield sharding.put(padded, sharding.batch_sharding(self.mesh)), len(part)


@functools.lru_cache(maxsize=8)
def _make_forward(module, mean, std, mesh, form):
  """One function of all encoders that are alike but for their variables: it is compiled once, however often a hook embeds."""
  return make_features(module, mean, std, mesh, tokens=form)


def load_encoder(
  place: str | os.PathLike[str], encoder: str = "query", step: int | None = None
) -> LoadedEncoder:
  """The encoder of a workdir, or of a file that configs/export.py wrote.

  encoder: 'query' or 'key' and step: which of a workdir's, None for the newest intact checkpoint; a file holds one, which
  they may name but not choose.
  Raises ConfigError.
  """
  place = os.path.expanduser(place)
  require(encoder in ("query", "key"), "encoder", encoder, "use 'query' or 'key'")
  if os.path.isfile(place):
    return _open_export(place, encoder=encoder, step=step or 0)
  if not holds_run(remote.local(place)):
    raise ConfigError(
      f"load_encoder: {place!r} is neither the workdir of a run nor an exported file"
    )
  return open_run(place, run_config(place, step=step or 0), encoder, step or 0)


def run_config(
  workdir: str, data: Mapping[str, Json] | ConfigDict | None = None, step: int = 0
) -> ConfigDict:
  """The config of the pre-training of a workdir or of an exported file; `data`: values for config.data that replace its own where not None;
  `step`: of the checkpoint that is meant, 0 for the newest: what --extend changed later is not in force then.

  Another kind of source than the pre-training's keeps nothing of `NOT_SAID`; another dir or name of the same
  kind keeps all but the number of classes. Raises ConfigError.
  """
  if os.path.isfile(workdir):
    config = ConfigDict(with_later_keys(exported.read(workdir)[0]["config"]))
  else:
    config = ConfigDict(read_config(workdir))
    config.update_from_flattened_dict(_undone(workdir, step))
  return with_data(config, data)


def with_data(
  config: ConfigDict, data: Mapping[str, Json] | ConfigDict | None = None
) -> ConfigDict:
  """The config of a pre-training, changed for other data, see `run_config`."""
  given = {name: value for name, value in (data or {}).items() if value is not None}
  stored = config.data
  if _is_of_another_kind(stored, given):
    stored.update(NOT_SAID)
  else:
    others = {
      name for name in ("dir", "name", "split") if given.get(name, stored[name]) != stored[name]
    }
    if others & {"dir", "name"}:
      stored.num_classes = 0
    if others & {"name", "split"}:
      stored.subset = ""  # a folder may have moved, and one that a list does not fit is refused
  stored.update(given)
  return config


def results_folder(place: str) -> str:
  """Where what is computed of an encoder is written: its workdir, or FILE.scores beside an exported file."""
  return f"{place}.scores" if os.path.isfile(place) else remote.local(place)


def _undone(workdir, step):
  """What `undone` says of a checkpoint, 0 for the newest."""
  return undone(workdir, step or max(saved_steps(workdir), default=0))


def _is_of_another_kind(stored, given):
  """Whether values given for config.data name another kind of source than the pre-training read."""
  own = read_as(stored.source, stored.dir, stored.split)
  source = given.get("source", stored.source)
  if "dir" not in given and source not in (own, stored.source):
    return True  # the pre-training's folder is not meant, though it could be read
  place, split = (given.get(name, stored[name]) for name in ("dir", "split"))
  return read_as(source, place, split) != own


def open_run(
  workdir: str, config: ConfigDict, encoder: str = "query", step: int = 0
) -> LoadedEncoder:
  """The encoder of `encoder` ('query' or 'key') with its `run_config`; an exported file holds one encoder of one step.

  `step`: of the checkpoint, 0 for the newest intact one. Raises ConfigError.
  """
  if os.path.isfile(workdir):
    return _open_export(workdir, config, encoder, step)
  facts = read_json(os.path.join(remote.local(workdir), "plan.json"))
  module, mesh, create = begin(config, facts["compute_dtype"])
  whole = sharding.replicated(mesh)
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), jax.eval_shape(create)
  )
  stats = {name: tree for name, tree in abstract.items() if name != "params"}
  wanted = {f"{encoder}_params": abstract["params"], f"{encoder}_stats": stats}
  known = f"{encoder}_params" in stored_fields(workdir) or encoder == "query"
  require(known, "encoder", encoder, "this run's objective has no key encoder; use query")
  parts, restored_step = restore_parts(workdir, wanted, step=step)
  same = _undone(workdir, restored_step) == _undone(workdir, step)
  remedy = f"the newest intact checkpoint, {restored_step}, is of before the config changed; use --config.step={restored_step}"
  require(same, "step", step, remedy)
  variables = {"params": parts[f"{encoder}_params"], **parts[f"{encoder}_stats"]}
  return LoadedEncoder(module, variables, config, restored_step, mesh, create)


def open_classifier(
  workdir: str, run: LoadedEncoder, encoder: str = "query"
) -> dict[str, np.ndarray] | None:
  """{'kernel' [F, C], 'bias' [C], 'classes' [C] where they have names} that a run trained with its query encoder, of the same
  checkpoint, or with 'key' their average; None where its objective trains none. Raises ConfigError."""
  objective, folder = build.create_objective(run.config), remote.local(workdir)
  if not isinstance(objective, Classifying):
    return None
  size, facts = run.config.views.crops[0][0], read_json(os.path.join(folder, "plan.json"))
  images = jax.ShapeDtypeStruct((1, size, size, 3), np.uint8)
  dim = jax.eval_shape(run.forward, run.variables, images).shape[1]
  sizes = planning.sizes_of(run.config, facts["num_examples"], facts["num_classes"], 1)
  dtype, whole = at_least_float32(run.module.dtype), sharding.replicated(run.mesh)
  shapes = jax.eval_shape(lambda: objective.init(jax.random.key(0), sizes._replace(dim=dim), dtype))
  place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)
  parts, _ = restore_parts(workdir, {"objective": jax.tree.map(place, shapes)}, step=run.step)
  classifier = jax.device_get(objective.classifier(parts["objective"], encoder == "key"))
  names = os.path.join(folder, "classes.json")
  named = {"classes": np.array(read_json(names))} if os.path.exists(names) else {}
  return {name: np.asarray(classifier[name]) for name in ("kernel", "bias")} | named


def _open_export(path, config=None, encoder="query", step=0):
  """The `LoadedEncoder` of an exported file of weights; `config`: its `run_config`. Raises ConfigError."""
  facts, state = exported.read(path)
  require(step in (0, facts["step"]), "step", step, f"{path} is of step {facts['step']}; use 0")
  other = "is of the query encoder; export the key encoder of its run"
  require(encoder == "query" or facts["encoder"] == "key", "encoder", encoder, f"{path} {other}")
  config = config or ConfigDict(with_later_keys(facts["config"]))
  module, mesh, create = begin(config, facts["compute_dtype"])
  blank = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(create))
  variables, report = torch_weights.import_encoder(state, blank)
  if report["missing"]:  # the projection, which only .npz files have: what asks for it fails
    variables = {
      name: {part: x for part, x in tree.items() if part != "head"}
      for name, tree in variables.items()
    }
  variables = jax.device_put(variables, sharding.replicated(mesh))
  return LoadedEncoder(module, variables, config, facts["step"], mesh, create)


def begin(
  config: ConfigDict, compute_dtype: str
) -> tuple[Encoder, jax.sharding.Mesh, Callable[[], dict[str, Tree]]]:
  """(module, mesh, () -> its variables before the first step) of a run's config."""
  module, mesh = build.create_encoder(config, compute_dtype), sharding.create_mesh()
  start, size = rng.rng_for(config.seed, rng.ENCODER), config.views.crops[0][0]
  create = lambda: module.init(start, jnp.zeros((1, size, size, 3)), train=False)
  return module, mesh, jax.jit(create, out_shardings=sharding.replicated(mesh))


def _check_array(images):
  """Refuses an array that is no batch of images. Raises ValueError."""
  if isinstance(images, (str, bytes, os.PathLike)):
    raise ValueError(f"embed: {images!r} is one path; give a list of them")
  if hasattr(images, "shape") and (len(images.shape) != 4 or images.shape[-1] != 3):
    raise ValueError(f"embed: an array of shape {tuple(images.shape)}; images are [N, H, W, 3]")


def _pixels(image):
  """uint8 [H, W, 3] of a path or an array. Raises ValueError."""
  if isinstance(image, (str, os.PathLike)):
    try:
      with open(image, "rb") as file:
        return decode(file.read(), float("inf"))
    except BadImage as error:
      raise ValueError(
        f"embed: {os.fspath(image)!r} is no image that can be read: {error}"
      ) from error
  array: Any = np.asarray(image)
  if array.ndim != 3 or array.shape[-1] != 3 or 0 in array.shape:
    raise ValueError(f"embed: an image of shape {array.shape}; each is [H, W, 3]")
  if array.dtype != np.uint8:
    remedy = "give uint8 in 0..255, for floats in 0..1: (255 * x).round().astype('uint8')"
    raise ValueError(f"embed: an image of {array.dtype}; {remedy}")
  return array
