"""Files of weights, read without ever executing what they hold: .pth, .pth.tar, .safetensors, .npz.

Flow: import and replay call `read`; export calls `write_state` and `read` again to check it.
Holds: a pickle with code in it is refused by torch's weights-only reader before anything of it runs;
  PyTorch is imported for .pth only, safetensors never needs it; nothing is overwritten.
Not here: what the names mean (torch_weights, authors).
"""

import argparse
import contextlib
import importlib
import os
import re
from types import ModuleType

import numpy as np

from adco_jax.errors import ConfigError, require
from adco_jax.runtime.dtypes import Tree
from adco_jax.runtime.files import whole, write_npz

TORCH = (".pth", ".pt", ".tar", ".ckpt", ".bin")
READABLE = (*TORCH, ".safetensors", ".npz")


def read(path: str, option: str = "file") -> dict[str, Tree]:
  """The content of a file as nested dictionaries of NumPy arrays and plain values. Raises ConfigError."""
  require(
    path and os.path.isfile(path), option, path, f"no such file; name a {', '.join(READABLE)}"
  )
  suffix = os.path.splitext(path)[1]
  require(
    suffix in READABLE, option, path, f"unknown kind of file; use one of {', '.join(READABLE)}"
  )
  readers = {".safetensors": _read_safetensors, ".npz": _read_npz}
  if suffix in TORCH:
    need("torch", f"config.{option}={path!r}: {suffix}")
  try:
    content = to_numpy(readers.get(suffix, _read_torch)(path))
  except ConfigError:
    raise
  except Exception as error:  # each reader has its own types for a damaged file
    raise ConfigError(f"config.{option}={path!r}: {_reason(error)}") from error
  require(isinstance(content, dict) and content, option, path, "holds no state dict")
  return content


def write_state(path: str, state: dict[str, np.ndarray]) -> None:
  """Writes {name: array} as .safetensors, .pth or .npz, whole or not at all. Raises ConfigError."""
  suffix = os.path.splitext(path)[1]
  if suffix == ".npz":
    write_npz(path, state)
    return
  with whole(path) as part:
    if suffix == ".safetensors":
      with open(part, "wb") as file:
        mode = os.fstat(file.fileno()).st_mode  # the user's; the library's is for the owner alone
      need("safetensors").numpy.save_file(state, part)
      os.chmod(part, mode)
    else:
      torch = need("torch")
      torch.save({name: torch.from_numpy(np.array(value)) for name, value in state.items()}, part)


def need(package: str, what: str = "this") -> ModuleType:
  """The optional package, imported; `what` needs it. Raises ConfigError that says what to install."""
  try:
    if package == "safetensors":
      importlib.import_module("safetensors.numpy")
    return importlib.import_module(package)
  except ImportError as error:
    name = {"pyarrow.parquet": "pyarrow"}.get(package, package)
    raise ConfigError(f"{what} needs the package {name}; pip install {name}") from error


def to_numpy(content: Tree) -> Tree:
  """torch tensors anywhere in nested dictionaries and lists -> NumPy copies (torch may reuse its memory)."""
  if isinstance(content, dict):
    return {key: to_numpy(value) for key, value in content.items()}
  if isinstance(content, (list, tuple)):
    return [to_numpy(value) for value in content]
  if hasattr(content, "detach"):
    content = content.detach().cpu()
    wide = (
      content if content.dtype.itemsize > 2 or not content.is_floating_point() else content.float()
    )
    return np.array(wide.numpy())
  return content


def check_finite(state: dict[str, np.ndarray], option: str, path: str) -> None:
  """Refuses weights that are not finite numbers, by name. Raises ConfigError."""
  for name, value in state.items():
    if np.issubdtype(np.asarray(value).dtype, np.floating) and not np.isfinite(value).all():
      count = int((~np.isfinite(value)).sum())
      raise ConfigError(
        f"config.{option}={path!r}: {name} holds {count} values that are not finite"
      )


def _read_torch(path):
  with open(path, "rb") as file:
    if file.read(2) not in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05"):
      raise ValueError("neither a zip archive nor a pickle")
  torch = need("torch")
  allow = getattr(torch.serialization, "safe_globals", contextlib.nullcontext)
  with allow([argparse.Namespace]):  # a bag of names, in which many programs keep their options
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_safetensors(path):
  return need("safetensors").numpy.load_file(path)


def _read_npz(path):
  with np.load(path, allow_pickle=False) as archive:
    return {name: archive[name] for name in archive.files}


def _reason(error):
  text = " ".join(str(error).split())
  if "weights_only" in text or "Weights only" in text:
    match = re.search(r"GLOBAL (\S+)", text)
    what = f" ({match[1]})" if match else ""
    return (
      f"refused, nothing of it was executed: a pickle with more than weights in it{what}; if you trust it, keep its "
      "weights alone: torch.save(torch.load(FILE, weights_only=False)['state_dict'], 'weights.pth')"
    )
  return f"truncated or no checkpoint ({text.partition('. ')[0][:100] or type(error).__name__})"
