"""The task `embed`: features of every image of a source, with its name.

Flow: main -> `run`: workdir's encoder, any source -> features -> .npz or .parquet.
Holds: each image once, in the source's order; nothing is overwritten.
Not here: reading images (data), the encoder (frozen).
"""

import os

import numpy as np

from adco_jax import build, remote, sharding
from adco_jax.console import tell
from adco_jax.evaluation import features
from adco_jax.frozen import open_run, run_config
from adco_jax.interop.files import need
from adco_jax.plan import require

SUFFIXES = (".npz", ".parquet")


def run(config):
  """Writes the features. Raises ConfigError."""
  remote.refuse(config.out, "out")
  suffix = os.path.splitext(config.out)[1] if config.out else ".npz"
  require(suffix in SUFFIXES, "out", config.out, f"use a name that ends in {' or '.join(SUFFIXES)}")
  if suffix == ".parquet":
    need("pyarrow.parquet")
  stored = run_config(config.pretrained, config.data)
  data = stored.data
  source = build.open_source(data)
  run = open_run(config.pretrained, stored, config.player)
  name = f"embeddings-{data.split}-{run.step}.npz"
  path = config.out or os.path.join(remote.local(config.pretrained), name)
  require(not remote.home(path).exists(), "out", path, "exists; name another file")
  loader = build.create_loader(run.config, source, run.mesh)
  forward = features.make_features(run.encoder, data.mean, data.std, run.mesh)
  batches = loader.evaluation(
    np.arange(source.num_examples),
    size=config.size or run.config.eval.size,
    fraction=config.crop_fraction or run.config.eval.crop_fraction,
    batch_size=sharding.round_up(config.batch_size),
  )
  columns = {
    "features": features.extract(lambda images: forward(run.variables, images), batches),
    "names": np.array(source.names()),
  }
  loader.reader.check()
  if loader.reader.broken:
    columns["broken"] = np.isin(np.arange(source.num_examples), list(loader.reader.broken))
  if source.labels is not None:
    columns["labels"] = source.labels
  write(path, columns)
  tell(f"{source.num_examples} x {columns['features'].shape[1]} features: {path}")


def write(path, columns):
  """All columns in one file, whole or not at all."""
  part = f"{path}.part"
  if path.endswith(".npz"):
    with open(part, "wb") as file:
      np.savez(file, **columns)
  else:
    import pyarrow as pa

    flat, width = columns["features"].ravel(), columns["features"].shape[1]
    table = {name: pa.array(value) for name, value in columns.items() if name != "features"}
    table["features"] = pa.FixedSizeListArray.from_arrays(pa.array(flat), width)
    need("pyarrow.parquet").write_table(pa.table(table), part)
  os.replace(part, path)
