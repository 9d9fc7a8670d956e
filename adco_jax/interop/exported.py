"""What an exported file of weights does not say itself: network, normalisation and view, in a JSON file beside it.

Flow: export calls `write`, encoders `read`.
Holds: file and facts together are all that is needed to embed images as the run they came from does.
Not here: names of weights (torch_weights), the card for people (report.card).
"""

import os

import numpy as np

from adco_jax.errors import ConfigError, require
from adco_jax.interop import files
from adco_jax.runtime.files import Json, read_json, write_json

FORMAT = 1  # raise it when a field means something else


def facts_file(path: str) -> str:
  """Where the facts of an exported file lie."""
  return f"{path}.json"


def write(
  path: str, config: dict[str, Json], step: int, encoder: str, compute_dtype: str, head: bool
) -> None:
  """Facts of the encoder 'query' or 'key' at a step of a run of `config`, a plain dictionary; `head`: whether its projection was trained."""
  facts = {
    "format": FORMAT,
    "encoder": encoder,
    "step": step,
    "compute_dtype": compute_dtype,
    "head": head,
  }
  write_json(facts_file(path), facts | {"config": config})


def read(path: str) -> tuple[dict[str, Json], dict[str, np.ndarray]]:
  """(facts, {name: array} in torchvision's names) of an exported file. Raises ConfigError."""
  facts, kind = read_facts(path), os.path.splitext(path)[1]
  if kind not in files.READABLE:
    raise ConfigError(f"{path}: {kind} is not read back; export as torchvision, timm or npz")
  return facts, files.read(path)


def read_facts(path: str) -> dict[str, Json]:
  """What `write` wrote. Raises ConfigError."""
  try:
    facts = read_json(facts_file(path))
  except FileNotFoundError as error:
    remedy = "files that configs/export.py writes have one; take others in by configs/import.py"
    raise ConfigError(
      f"{path}: no {os.path.basename(facts_file(path))} beside it; {remedy}"
    ) from error
  except (OSError, ValueError) as error:
    raise ConfigError(f"{facts_file(path)}: damaged ({error}); export the run again") from error
  known = isinstance(facts, dict) and facts.get("format") == FORMAT
  require(known, "file", facts_file(path), "is not of this version; export the run again")
  return facts
