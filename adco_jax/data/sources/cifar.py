"""CIFAR-10 as its authors publish it: the batches for Python (pickles) and the binary ones, side by side in their folders.

Flow: loading asks `load_cifar10`; kinds asks `find_batches` what lies in a folder.
Shapes: a batch is uint8 [n, 3072], of each image all reds, then greens, then blues, and n labels 0..9; images leave as
  uint8 [N, 32, 32, 3].
Holds: a pickle may hold numbers, texts, lists, dictionaries and arrays of bytes; anything else is refused and nothing
  that it names is called, not even NumPy's own functions.
Not here: CIFAR-100, whose batches have two labels (tfds reads it).
"""

import io
import os
import pickle
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from adco_jax.data.sources import splits
from adco_jax.data.sources.base import Source
from adco_jax.errors import ConfigError, NoSplit
from adco_jax.runtime.dtypes import Tree

NAME = "cifar10"
FILES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
SIDE = 32
PIXELS = 3 * SIDE * SIDE


class Form(NamedTuple):
  """One of the two ways in which the batches are published."""

  folder: str  # as the archive unpacks
  ending: str  # of a batch's file
  names: str  # file of the classes' names
  read_batch: Callable[[bytes], tuple[np.ndarray, np.ndarray]]  # -> uint8 [n, 3072], labels [n]
  read_names: Callable[[bytes], list[str]]


def load_cifar10(directory: str, split: str) -> Source:
  """The folder of the batches, or the one above it; splits train (five batches) and test. Raises ConfigError, NoSplit."""
  folder, form = find_batches(directory) or _refuse(directory)
  taken = splits.choose(FILES, split, NAME)
  if not taken:
    key = splits.key_of(split)
    raise NoSplit(f"config.{key}={split!r}: {NAME} has the splits train and test")
  names = _read(directory, os.path.join(folder, form.names), form.read_names)
  paths = [os.path.join(folder, name + form.ending) for name in FILES[taken]]
  pixels, labels = zip(*(_read(directory, path, form.read_batch) for path in paths), strict=True)
  planes = np.concatenate(pixels).reshape(-1, 3, SIDE, SIDE)
  images = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
  return Source(NAME, images, None, np.concatenate(labels), tuple(names), taken)


def find_batches(directory: str) -> tuple[str, Form] | None:
  """(folder, Form) of the batches that lie in `directory`, or in a folder of it that is called as in the archive."""
  batches = FILES["train"] + FILES["test"]
  for form in FORMS:
    for folder in (directory, os.path.join(directory, form.folder)):
      if any(os.path.isfile(os.path.join(folder, name + form.ending)) for name in batches):
        return folder, form
  return None


def _refuse(directory):
  python, binary = FORMS
  raise ConfigError(
    f"config.data.dir={directory!r}: no batches of CIFAR-10; name the folder {python.folder} (of cifar-10-python.tar.gz, "
    f"unpacked) or {binary.folder} (of cifar-10-binary.tar.gz), or the one above it"
  )


def _read(directory, path, read):
  """read(content of a file). Raises ConfigError."""
  told, remedy = f"config.data.dir={directory!r}: {path}", "unpack the archive again"
  try:
    with open(path, "rb") as file:
      content = file.read()
  except OSError as error:
    raise ConfigError(f"{told} cannot be read ({error.strerror}); {remedy}") from error
  try:
    return read(content)
  except Exception as error:  # a damaged pickle may raise anything
    what = " ".join(str(error).split())[:120] or type(error).__name__
    raise ConfigError(f"{told} is damaged ({what}); {remedy}") from error


def _read_binary(content):
  """Rows of a label and its pixels."""
  if not content or len(content) % (1 + PIXELS):
    raise ValueError(f"{len(content)} bytes, not a multiple of {1 + PIXELS}")
  rows = np.frombuffer(content, np.uint8).reshape(-1, 1 + PIXELS)
  return rows[:, 1:], rows[:, 0].astype(np.int64)


def _read_python(content):
  """A dictionary of 'data' and 'labels'."""
  batch = _unpickle(content)
  pixels, labels = batch["data"].unpack(), np.array(batch["labels"])
  if pixels.shape != (len(labels), PIXELS) or not np.issubdtype(labels.dtype, np.integer):
    raise ValueError(f"{len(labels)} labels and pixels {[*pixels.shape]}, not [n, {PIXELS}]")
  return pixels, labels.astype(np.int64)


def _unpickle(content):
  """A pickled dictionary, its names as text, its arrays as `_Array`."""
  tree = _Unpickler(io.BytesIO(content), encoding="bytes").load()
  return {_text(name): value for name, value in tree.items()}


class _Unpickler(pickle.Unpickler):
  """Of what an array's pickle calls, our own stand-ins; nothing else can be called."""

  def find_class(self, module, name):
    if (module, name) == ("_codecs", "encode"):  # bytes, as Python 3 writes them for Python 2
      return lambda text, encoding: text.encode({"latin1": "latin1"}[encoding])
    known = {"_reconstruct": lambda *_: _Array(), "ndarray": None, "dtype": _Dtype}
    if module.partition(".")[0] != "numpy" or name not in known:
      raise pickle.UnpicklingError(f"names {module}.{name}, which no batch does")
    return known[name]


class _Array:
  """An array as its pickle tells it."""

  def __setstate__(self, state):
    _, self.shape, self.dtype, self.fortran, self.content = state

  def unpack(self) -> np.ndarray:
    """uint8, of the shape that it says."""
    if self.dtype.code not in ("u1", "B"):
      raise ValueError(f"an array of {self.dtype.code}, not of bytes")
    values = np.frombuffer(self.content, np.uint8)
    return values.reshape(self.shape, order="F" if self.fortran else "C")


class _Dtype:
  """An array's type as its pickle tells it."""

  def __init__(self, code, *_):
    self.code = _text(code)

  def __setstate__(self, state):
    """Byte order and fields, which bytes do not have."""


def _text(name: Tree) -> str:
  return name.decode() if isinstance(name, bytes) else str(name)


FORMS = (
  Form(
    "cifar-10-batches-py", "", "batches.meta", _read_python,
    lambda content: [_text(name) for name in _unpickle(content)["label_names"]],
  ),
  Form(
    "cifar-10-batches-bin", ".bin", "batches.meta.txt", _read_binary,
    lambda content: content.decode().split(),
  ),
)  # fmt: skip
