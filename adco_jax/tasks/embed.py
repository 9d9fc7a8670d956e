"""The task `embed`: features of every image of a source, with its name.

Flow: main -> `run`: workdir's encoder, any source -> features -> .npz or .parquet.
Holds: each image once, in the source's order; nothing is overwritten; what cannot be written where it was to
  go is written elsewhere.
Not here: reading images (data), which ones (scored_data), the encoder (frozen).
"""

import contextlib
import errno
import functools
import os
import tempfile
from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from adco_jax import build
from adco_jax.data.sources.base import Source
from adco_jax.encoders import open_run, results_folder, run_config
from adco_jax.errors import RunError, require
from adco_jax.evaluation import features
from adco_jax.interop.files import need
from adco_jax.models import tokens
from adco_jax.runtime import remote
from adco_jax.runtime.console import tell
from adco_jax.runtime.files import whole, write_npz
from adco_jax.tasks import scored_data
from adco_jax.workdir.files import check_writable

SUFFIXES = (".npz", ".parquet")


def run(config: ConfigDict) -> None:
  """Writes the features. Raises ConfigError, RunError."""
  check(config)
  stored = run_config(config.pretrained, config.data, config.step)
  data, model, form = stored.data, stored.model, config.features.tokens
  tokens.check("features.tokens", form, model.arch, model.vit.depth)
  source = build.open_source(data)
  columns = describe(config, source)
  view = scored_data.view(config, stored)
  scored_data.announce(data, source, view["size"])
  run = open_run(config.pretrained, stored, config.encoder, config.step)
  loader = build.create_loader(run.config, source, run.mesh)
  batches = loader.evaluation(np.arange(source.num_examples), **view)
  forward = functools.partial(run.forward_of(form), run.variables)
  columns |= {"features": features.extract(forward, batches)}
  loader.reader.check()
  if loader.reader.broken:
    columns["broken"] = np.isin(np.arange(source.num_examples), list(loader.reader.broken))
  path = save(lambda: config.out or free_path(config, source, run.step), columns)
  which = "" if form == tokens.POOLED else f", tokens {form}"
  tell(f"{source.num_examples} x {columns['features'].shape[1]} features{which}: {path}")


def check(config: ConfigDict) -> None:
  """Refuses what no workdir could make right. Raises ConfigError."""
  out = config.out
  remote.refuse(out, "out")
  suffix = os.path.splitext(out)[1] if out else ".npz"
  require(suffix in SUFFIXES, "out", out, f"use a name that ends in {' or '.join(SUFFIXES)}")
  if suffix == ".parquet":
    need("pyarrow.parquet")
  require(not out or not os.path.lexists(out), "out", out, "exists; name another file")
  folder = os.path.dirname(os.path.abspath(out)) if out else results_folder(config.pretrained)
  require(
    not out or os.path.isdir(folder),
    "out",
    out,
    f"no folder {folder}; make it, or name another file",
  )
  check_writable(folder, "config.out")


def describe(config: ConfigDict, source: Source) -> dict[str, np.ndarray]:
  """The columns that are known before any work. Raises ConfigError for names that parquet cannot hold."""
  columns = {"names": np.array(source.names())}
  if source.labels is not None:
    columns |= {"labels": source.labels, "classes": np.array(source.classes)}
  if config.out.endswith(".parquet"):
    for text in (*columns["names"], *source.classes):
      remedy = (
        f"parquet holds UTF-8 alone, which the name {text!a} is not; rename it, or write .npz"
      )
      require(_is_utf8(text), "out", config.out, remedy)
  return columns


def free_path(config: ConfigDict, source: Source, step: int) -> str:
  """WORKDIR/embeddings-<data>-<split>-<step>.npz, with a number where that is taken; key encoder and form of tokens in the name."""
  usual = (config.encoder, "query"), (config.features.tokens, tokens.POOLED)
  which = "".join(f"{value}-" for value, default in usual if value != default)
  name = f"embeddings-{which}{scored_data.file_name(source.name, source.split)}-{step}"
  folder = results_folder(config.pretrained)
  os.makedirs(folder, exist_ok=True)
  path = stem = os.path.join(folder, name)
  number = 1
  while remote.home(f"{path}.npz").exists():
    number += 1
    path = f"{stem}-{number}"
  return f"{path}.npz"


def save(name: Callable[[], str], columns: dict[str, np.ndarray]) -> str:
  """Writes the path that `name()` gives and returns it; or writes the same as .npz in the temporary folder and raises RunError."""
  path = ""
  try:
    while (free := name()) != path:  # by now another task may have taken the last one
      path = free
      with contextlib.suppress(FileExistsError):
        write(path, columns)
        return path
    raise FileExistsError(errno.EEXIST, "exists by now")
  except (
    Exception
  ) as error:  # disks and libraries fail in many ways; hours of work must not go with it
    spare = os.path.join(tempfile.mkdtemp(prefix="adco_jax-"), "features.npz")
    write(spare, columns)
    reason = getattr(error, "strerror", None) or error
    raise RunError(f"{path}: not written ({reason}); the features are in {spare}") from error


def write(path: str, columns: dict[str, np.ndarray]) -> None:
  """All columns in one file, whole or not at all."""
  if path.endswith(".npz"):
    write_npz(path, columns, new=True)
  else:
    import pyarrow as pa

    flat, width = columns["features"].ravel(), columns["features"].shape[1]
    apart = ("features", "classes") + ("labels",) * (columns.get("labels", flat).ndim == 2)
    table = {name: pa.array(value) for name, value in columns.items() if name not in apart}
    if "classes" in columns:
      labels, classes = columns["labels"], columns["classes"]
      if labels.ndim == 2:
        table["labels"] = pa.array([classes[row == 1] for row in labels])
      else:
        table["class"] = pa.DictionaryArray.from_arrays(labels, classes)
    table["features"] = pa.FixedSizeListArray.from_arrays(pa.array(flat), width)
    with whole(path, new=True) as part:
      need("pyarrow.parquet").write_table(pa.table(table), part)


def _is_utf8(text):
  try:
    str(text).encode()
  except UnicodeEncodeError:
    return False
  return True
