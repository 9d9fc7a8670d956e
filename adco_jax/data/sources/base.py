"""What a source is: who is in a data set, and where their pixels lie.

Flow: loading and its helpers make a `Source`; the plan takes its size, a reader its images or files.
Holds: the order of examples is fixed; nothing is decoded.
"""

import dataclasses
import zlib
from typing import Any

import numpy as np

from adco_jax.data.sources.listing import HIDDEN


@dataclasses.dataclass(frozen=True)
class Source:
  """N examples: `images` in memory or `files` on disk; `labels` None where there are none.

  `classes`: names (str) by label. `kind`, `split`: what was read, which may stand in for what was asked.
  `unread`: {ending: how many files there are no images}; `empty`: first folders without an image.
  """

  name: str
  images: np.ndarray | None
  files: Any
  labels: np.ndarray | None
  classes: tuple
  split: str = ""
  kind: str = ""
  unread: dict = dataclasses.field(default_factory=dict)
  empty: tuple = ()
  notes: tuple = ()  # lines that a user must be told once, besides those of `left_out`

  @property
  def num_examples(self):
    """N."""
    return len(self.images if self.images is not None else self.files)

  def identity(self):
    """{'number', 'checksum'} of pixels, or of names and places: what a resumed run must find again."""
    pixels = self.images is not None
    checksum = f"{zlib.crc32(self.images):08x}" if pixels else self.files.checksum()
    return {"number": self.num_examples, "checksum": checksum}

  def left_out(self):
    """What lies there and is not read, in a line; '' where that is nothing but hidden files."""
    seen = {kind: count for kind, count in self.unread.items() if kind != HIDDEN}
    parts = [", ".join(f"{count} {kind}" for kind, count in self.unread.items())] if seen else []
    if self.empty:
      more = f" and {len(self.empty) - 5} more" if len(self.empty) > 5 else ""
      parts.append(f"no image that can be read in the folders {', '.join(self.empty[:5])}{more}")
    return f"not read in {self.name} {self.split}: {'; '.join(parts)}" if parts else ""

  def where(self, i):
    """What a person needs to find image i, in one line."""
    place = self.name_of(i) if self.files is None else self.files.where(i)
    return place.replace("\n", "\\n")

  def names(self):
    """Of all images: paths below the split's folder, members of shards, or numbers."""
    return [self.name_of(i) for i in range(self.num_examples)]

  def name_of(self, i):
    """One of them."""
    return f"{self.name}/{i}" if self.files is None else self.files.name(i)
