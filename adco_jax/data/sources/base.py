"""What a source is: who is in a data set, and where their pixels lie.

Flow: loading and its helpers make a `Source`; the plan takes its size, a reader its images or files.
Holds: the order of examples is fixed; nothing is decoded.
"""

import dataclasses
import zlib
from typing import Protocol

import numpy as np

from adco_jax.data.sources.listing import HIDDEN
from adco_jax.errors import require


class Files(Protocol):
  """Images on disk by number, see data.sources.files."""

  def __len__(self) -> int: ...

  def name(self, i: int) -> str:
    """What it is called below the split's folder, or in its shard."""

  def where(self, i: int) -> str:
    """What a person needs to find it."""

  def read(self, i: int) -> bytes:
    """The file's content. Raises files.BadImage, RunError."""

  def checksum(self) -> str:
    """Of all names and places."""


def hold_to_form(
  source: "Source", option: str, value: str, images_name: str = "images"
) -> "Source":
  """A source whose arrays somebody else made, in the form that all readers expect. Raises ConfigError that names `option`."""
  images, labels, count = source.images, source.labels, source.num_examples
  if images is not None:
    ok = images.dtype == np.uint8 and images.ndim == 4 and images.shape[-1] == 3
    form = f"{images_name} is {images.dtype}{list(images.shape)}"
    require(ok, option, value, f"{form}; store uint8 [N, H, W, 3]")
    require(images.size, option, value, f"{form}: no pixels")
    images = np.ascontiguousarray(images)
  if labels is not None:
    labels = np.asarray(labels)
    form = f"labels are {labels.dtype}{list(labels.shape)}"
    remedy = (
      f"{form}; store integers [{count}], one per image, or [{count}, classes] of 1, 0 and -1"
    )
    ok = labels.shape == (count,) or (labels.ndim == 2 and len(labels) == count and labels.size)
    require(ok and np.issubdtype(labels.dtype, np.integer), option, value, remedy)
    labels = labels.astype(np.int64).reshape(count if labels.size == count else labels.shape)
  return dataclasses.replace(source, images=images, labels=labels, classes=tuple(source.classes))


@dataclasses.dataclass(frozen=True)
class Source:
  """N examples: `images` in memory or `files` on disk.

  `labels`: None where there are none; integers [N], one per image; or int8 [N, C], any number per image: 1 the class is
  there, 0 it is not, -1 it does not count (VOC's difficult objects).
  `classes`: names (str) by label. `kind`, `split`: what was read, which may stand in for what was asked.
  `unread`: {ending: how many files there are no images}; `empty`: first folders without an image.
  `whole`: the identity of all images, where data.subset left some out.
  """

  name: str
  images: np.ndarray | None
  files: Files | None
  labels: np.ndarray | None
  classes: tuple[str, ...]
  split: str = ""
  kind: str = ""
  unread: dict[str, int] = dataclasses.field(default_factory=dict)
  empty: tuple[str, ...] = ()
  notes: tuple[str, ...] = ()  # lines that a user must be told once, besides those of `left_out`
  whole: dict[str, int | str] = dataclasses.field(default_factory=dict)

  @property
  def on_disk(self) -> Files:
    """The files of a source that has no `images`."""
    assert self.files is not None
    return self.files

  @property
  def has_several(self) -> bool:
    """Whether an image may have any number of labels."""
    return self.labels is not None and self.labels.ndim == 2

  @property
  def targets(self) -> np.ndarray:
    """The labels [N] of a source that has one per image."""
    assert self.labels is not None and not self.has_several
    return self.labels

  @property
  def presence(self) -> np.ndarray:
    """The labels of a source that has some, as int8 [N, C]: 1 there, 0 not, -1 does not count."""
    assert self.labels is not None
    if self.has_several:
      return self.labels
    return (self.labels[:, None] == np.arange(len(self.classes))[None, :]).astype(np.int8)

  @property
  def num_examples(self) -> int:
    """N."""
    return len(self.on_disk) if self.images is None else len(self.images)

  def identity(self, labels: bool = False) -> dict[str, int | str]:
    """{'number', 'checksum'} of pixels, or of names and places, and 'labels' if they matter: what a resumed run must find again."""
    pixels = self.images
    checksum = self.on_disk.checksum() if pixels is None else f"{zlib.crc32(pixels.data):08x}"
    facts: dict[str, int | str] = {"number": self.num_examples, "checksum": checksum}
    if labels and self.labels is not None:
      facts["labels"] = f"{zlib.crc32(self.labels.astype(np.int64).tobytes()):08x}"
    return facts

  def left_out(self) -> str:
    """What lies there and is not read, in a line; '' where that is nothing but hidden files."""
    seen = {kind: count for kind, count in self.unread.items() if kind != HIDDEN}
    parts = [", ".join(f"{count} {kind}" for kind, count in self.unread.items())] if seen else []
    if self.empty:
      more = f" and {len(self.empty) - 5} more" if len(self.empty) > 5 else ""
      parts.append(f"no image that can be read in the folders {', '.join(self.empty[:5])}{more}")
    return f"not read in {self.name} {self.split}: {'; '.join(parts)}" if parts else ""

  def where(self, i: int) -> str:
    """What a person needs to find image i, in one line."""
    place = self.name_of(i) if self.files is None else self.files.where(i)
    return place.replace("\n", "\\n")

  def names(self) -> list[str]:
    """Of all images: paths below the split's folder, members of shards, or numbers."""
    return [self.name_of(i) for i in range(self.num_examples)]

  def name_of(self, i: int) -> str:
    """One of them."""
    return f"{self.name}/{i}" if self.files is None else self.files.name(i)
