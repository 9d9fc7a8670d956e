"""From an image file to pixels, whatever the file turns out to be.

Flow: pipeline (per example, in threads) and resident (all at once) ask a `Reader`, then cut views (cuts).
Shapes: pixels uint8 [H, W, 3], or of a `Picture` decoded smaller.
Holds: pixels are upright, as EXIF says; the size in a header is checked before a pixel is allocated; a JPEG is decoded
  smaller only for who asks (`scale_for`), by the transform of its blocks, so that pixel (y, x) of scale s is that of the
  s x s pixels from (s y, s x) on; a broken file is named once, counted and never ends a run alone; a disk that fails does (its images would be there
  again after a restart).
Not here: bytes (files), what a mode's values mean (modes), which example takes the place of a broken one
  (order), where to cut (crops).
"""

import io
import math
import re
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from adco_jax.data.modes import jpeg_orientation, to_rgb, upright
from adco_jax.data.sources.base import Source
from adco_jax.data.sources.files import BadImage
from adco_jax.errors import RunError
from adco_jax.runtime.console import tell

GRAY = np.full((1, 1, 3), 127, np.uint8)  # stands for an image that nothing can replace
SCRATCH_BYTES = 2**26  # a larger image gets memory of its own


ScaleFor = Callable[
  [int, int], int
]  # (height, width) of an image -> the scale at which it is decoded


class Picture(NamedTuple):
  """An image as it was decoded: `scale` pixels of its height and width to one of `pixels`."""

  pixels: np.ndarray  # uint8 [ceil(height / scale), ceil(width / scale), 3]
  height: int
  width: int
  scale: int = 1

  @classmethod
  def whole(cls, pixels: np.ndarray) -> Self:
    """Pixels [H, W, 3] as they are."""
    return cls(pixels, *pixels.shape[:2])

  def padded(self, pad: int) -> Self:
    """With so many black pixels on every side; of an image that was not decoded smaller."""
    if not pad:
      return self
    assert self.scale == 1
    return self.whole(cv2.copyMakeBorder(self.pixels, *4 * (pad,), cv2.BORDER_CONSTANT))


class Reader:
  """Pixels of a source's examples by number; knows which ones are broken.

  `max_bad_fraction`: share of all examples that may be, see `check`; `max_megapixels` of one image.
  """

  def __init__(
    self, source: Source, max_bad_fraction: float = 0.0, max_megapixels: float = 64.0
  ) -> None:
    self.source, self._max_pixels = source, max_megapixels * 1e6
    self._max_bad_fraction = max_bad_fraction
    self.broken: dict[int, str] = {}  # number -> why
    self._lock = threading.Lock()

  def read(self, index: int) -> np.ndarray | None:
    """uint8 [H, W, 3], or None if the file is broken."""
    picture = self.picture(index)
    return None if picture is None else picture.pixels

  def picture(
    self, index: int, scratch: "Scratch | None" = None, scale_for: ScaleFor | None = None
  ) -> Picture | None:
    """The `Picture`, or None if the file is broken; `scratch`, `scale_for`: see `decode_for`."""
    if self.source.images is not None:
      return Picture.whole(self.source.images[index])
    if index in self.broken:
      return None
    try:
      return decode_for(scale_for, self.source.on_disk.read(index), self._max_pixels, scratch)
    except BadImage as reason:
      self.refuse(index, reason)
      return None

  def refuse(self, index: int, reason: object) -> None:
    """Counts an example as broken and names it, once."""
    with self._lock:
      if index not in self.broken:
        self.broken[index] = str(reason)
        tell(f"broken image {self.source.where(index)}: {reason}")

  def read_first(
    self,
    candidates: Sequence[int] | np.ndarray,
    scratch: "Scratch | None" = None,
    scale_for: ScaleFor | None = None,
  ) -> tuple[Picture, int, bool]:
    """(Picture, number, whether it took another's place) of the first that can be read; GRAY if none."""
    for index in candidates:
      picture = self.picture(int(index), scratch, scale_for)
      if picture is not None:
        return picture, int(index), index != candidates[0]
    return Picture.whole(GRAY), int(candidates[0]), True

  def check(self) -> None:
    """Raises RunError if more examples are broken than may be."""
    first = self.source.where(next(iter(self.broken))) if self.broken else ""
    reason = refusal(len(self.broken), self.source.num_examples, self._max_bad_fraction, first)
    if reason:
      raise RunError(reason)


def refusal(broken: int, looked_at: int, max_bad_fraction: float, first: str) -> str:
  """'' or the line with which a run stops: a larger share is broken than may be; `first` of them is named.

  A run that has read some of its images holds them against all that there are; who has looked at a sample,
  spread evenly, against the sample.
  """
  if broken <= max_bad_fraction * looked_at:
    return ""
  return (
    f"config.data.max_bad_fraction={max_bad_fraction:g}: {broken} of {looked_at} images ({broken / looked_at:.1%}) "
    f"cannot be read, among them {first}; repair or remove them, or raise it"
  )


class Scratch(threading.local):
  """Memory of a thread for one image at a time; giving it back to the system costs more than a copy."""

  def __init__(self) -> None:
    self._memory = np.empty(0, np.uint8)

  def array(self, shape: tuple[int, ...]) -> np.ndarray:
    """uint8 of this shape and any content, valid until the thread asks again."""
    size = math.prod(shape)
    if size > SCRATCH_BYTES:
      return np.empty(shape, np.uint8)
    if size > len(self._memory):
      self._memory = np.empty(size, np.uint8)
    return self._memory[:size].reshape(shape)


def decode(content: bytes, max_pixels: float) -> np.ndarray:
  """File content -> uint8 [H, W, 3], upright; animations give their first picture. Raises BadImage."""
  return decode_for(None, content, max_pixels).pixels


def decode_for(
  scale_for: ScaleFor | None, content: bytes, max_pixels: float, scratch: Scratch | None = None
) -> Picture:
  """File content -> `Picture`, upright. Raises BadImage.

  JPEGs take libjpeg-turbo without Pillow around it, to the same pixels; whatever it objects to, and
  every other format, is Pillow's to read or to refuse. `scale_for`: None, or (height, width) -> the scale, 1, 2,
  4 or 8, at which a JPEG of this size is decoded. With a `Scratch` the pixels may lie there.
  """
  try:
    return _decode_jpeg(content, max_pixels, scratch, scale_for)
  except ValueError:
    return Picture.whole(_decode_any(content, max_pixels))
  except MemoryError as error:
    raise RunError("no memory left to decode an image; use fewer data.threads") from error


def _decode_jpeg(content, max_pixels, scratch, scale_for):
  height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
  if colours not in ("YCbCr", "Gray") or width * height > max_pixels:
    raise ValueError("not for this decoder")
  turned = jpeg_orientation(content)
  shown = (width, height) if turned in range(5, 9) else (height, width)
  scale = scale_for(*shown) if scale_for else 1
  while turned in range(2, 9) and (height % scale or width % scale):
    scale //= 2  # of a mirrored picture the part of a pixel that is left over would come first
  least = -(-height // scale), -(-width // scale)
  memory = scratch.array((*least, 3)) if scratch else None
  pixels = simplejpeg.decode_jpeg(content, min_height=least[0], min_width=least[1], buffer=memory)
  return Picture(upright(pixels, turned), *shown, scale)


def _decode_any(content, max_pixels):
  try:
    with Image.open(io.BytesIO(content)) as image:
      width, height = image.size
      if width * height > max_pixels:
        raise BadImage(
          f"{width} x {height} pixels, config.data.max_megapixels={max_pixels / 1e6:g}"
        )
      return to_rgb(image, content)
  except (BadImage, MemoryError):
    raise
  except Exception as error:  # decoders raise many types on damaged files
    what = re.sub(r"<_io\S* object at \w+>", "", " ".join(str(error).split()))
    raise BadImage(what.strip()[:120] or type(error).__name__) from error
