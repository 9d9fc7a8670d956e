"""From an image file to pixels, whatever the file turns out to be.

Flow: pipeline (per example, in threads) and resident (all at once) ask a `Reader`, then `cut` views.
Shapes: pixels uint8 [H, W, 3]; a box is (top, left, height, width).
Holds: the size in a header is checked before a pixel is allocated; a broken file is named once, counted
  and never ends a run alone; a disk that fails does (its images would be there again after a restart).
Not here: which example takes the place of a broken one (order), where to cut (crops).
"""

import errno
import io
import os
import threading
import time

import numpy as np
from PIL import Image

from adco_jax.console import tell
from adco_jax.plan import RunError

Image.MAX_IMAGE_PIXELS = None  # the reader's own limit stands instead, and names its option
GRAY = np.full((1, 1, 3), 127, np.uint8)  # stands for an image that nothing can replace
UNREADABLE = (errno.EACCES, errno.EISDIR, errno.ELOOP)
DISK_TRIES, DISK_PAUSE_SECONDS = 5, 2.0


class BadImage(Exception):
  """This file holds no image that can be used; the message says why."""


class Reader:
  """Pixels of a source's examples by number; knows which ones are broken.

  `max_bad_fraction`: share of all examples that may be, see `check`; `max_megapixels` of one image.
  """

  def __init__(self, source, max_bad_fraction=0.0, max_megapixels=64.0):
    self.source, self._max_pixels = source, max_megapixels * 1e6
    self._max_bad_fraction = max_bad_fraction
    self.broken, self._lock = {}, threading.Lock()  # number -> why

  def read(self, index):
    """uint8 [H, W, 3], or None if the file is broken."""
    if self.source.images is not None:
      return self.source.images[index]
    if index in self.broken:
      return None
    path = self.source.paths[index]
    try:
      return decode(read_bytes(path), self._max_pixels)
    except BadImage as reason:
      with self._lock:
        if index not in self.broken:
          self.broken[index] = str(reason)
          tell(f"broken image {path}: {reason}")
      return None

  def read_first(self, candidates):
    """(pixels, number, whether it took another's place) of the first that can be read; GRAY if none."""
    for index in candidates:
      image = self.read(int(index))
      if image is not None:
        return image, int(index), index != candidates[0]
    return GRAY, int(candidates[0]), True

  def check(self):
    """Raises RunError if more examples are broken than may be."""
    count, examples = len(self.broken), self.source.num_examples
    if count > self._max_bad_fraction * examples:
      raise RunError(
        f"config.data.max_bad_fraction={self._max_bad_fraction:g}: {count} of {examples} images cannot be "
        f"read so far, among them {self.source.paths[next(iter(self.broken))]}; mend them, or raise it"
      )


def read_bytes(path):
  """The file's content. Raises BadImage if it never had any, RunError if the disk keeps failing.

  A file that was there when the folder was listed and is gone now is the disk's fault, not the image's.
  """
  for _ in range(DISK_TRIES):
    try:
      with open(path, "rb") as file:
        return file.read()
    except OSError as error:
      failure = error.strerror
      dangling = error.errno == errno.ENOENT and os.path.islink(path)
      if error.errno in UNREADABLE or dangling:
        raise BadImage(failure) from error
      time.sleep(DISK_PAUSE_SECONDS)
  raise RunError(f"{path} cannot be read ({failure}, tried {DISK_TRIES} times); mend the disk")


def decode(content, max_pixels):
  """File content -> uint8 [H, W, 3]; animations give their first picture. Raises BadImage."""
  try:
    with Image.open(io.BytesIO(content)) as image:
      width, height = image.size
      if width * height > max_pixels:
        raise BadImage(
          f"{width} x {height} pixels, config.data.max_megapixels={max_pixels / 1e6:g}"
        )
      return np.asarray(_to_rgb(image))
  except BadImage:
    raise
  except MemoryError as error:
    raise RunError("no memory left to decode an image; use fewer data.threads") from error
  except Exception as error:  # decoders raise many types on damaged files
    raise BadImage(" ".join(str(error).split())[:120] or type(error).__name__) from error


def cut(image, box, size):
  """The pixels of `box` resized to uint8 [size, size, 3], antialiased where it shrinks."""
  top, left, height, width = (int(x) for x in box)
  part = Image.fromarray(image[top : top + height, left : left + width])
  return np.asarray(part.resize((size, size), Image.Resampling.BILINEAR))


def _to_rgb(image):
  if image.mode.startswith("I"):  # 16 bits per pixel, which Pillow would clip
    return Image.fromarray(np.uint8(np.clip(np.asarray(image), 0, 65535) >> 8)).convert("RGB")
  if image.mode == "P" and "transparency" in image.info:
    image = image.convert("RGBA")
  return image.convert("RGB")
