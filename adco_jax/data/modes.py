"""From what a file holds to upright RGB of eight bits: Pillow's modes by a stated rule, orientation by EXIF or XMP.

Flow: images decodes a file and asks `to_rgb`, or, behind its fast JPEG decoder, `jpeg_orientation` and `upright`.
Shapes: pixels uint8 [H, W, 3].
Holds: what has no rule is no image (BadImage with the reason), never black or white pixels. Modes of 8 bits are
  taken as they are, transparency is dropped. Whole numbers of more bits, per file: the smallest of 8, 12
  and 16 bits that holds its largest value (and what a TIFF states as its largest) is its range, whose
  upper 8 bits are taken. Floating numbers: 0..1 or 0..255. One scale serves all pixels of a file.
Not here: bytes, limits of size (images).
"""

import contextlib
import re
import struct

import cv2
import numpy as np
from PIL import Image

from adco_jax.data.sources.files import BadImage

ORIENTATION, LARGEST_SAMPLE = 274, 281  # tags of EXIF and of TIFF
XMP, XMP_ORIENTATION = b"http://ns.adobe.com/xap/1.0/\0", rb'tiff:Orientation(?:="|>)([0-9])'
BITS = (8, 12, 16)
SLACK = 0.5 / 255  # of a range: what resizing in floating numbers leaves outside of it


def to_rgb(image: Image.Image, content: bytes) -> np.ndarray:
  """uint8 [H, W, 3] of a Pillow image of a file's `content`, upright. Raises BadImage."""
  tags = dict(getattr(image, "tag_v2", {}))
  stated, sixteen = np.max(tags.get(LARGEST_SAMPLE, 0)), ";16" in str(getattr(image, "tile", ""))
  image.load()
  turned = _orientation(image)  # of a TIFF none is left: Pillow has turned it upright in `load`
  if image.mode == "F":
    pixels = _from_floats(np.asarray(image))
  elif image.mode.startswith("I"):
    pixels = _from_integers(np.asarray(image)[..., None], stated)
  else:
    if image.mode == "P" and "transparency" in image.info:
      image = image.convert("RGBA")
    pixels = np.asarray(image.convert("RGB"))
    if (
      sixteen and pixels.max() < 16
    ):  # of colours Pillow keeps the upper 8 of 16 bits, whatever they hold
      whole = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
      if whole is not None and whole.dtype == np.uint16 and whole.ndim == 3:
        pixels = _from_integers(whole[..., 2::-1], stated)
        turned = tags.get(ORIENTATION, turned)
  return upright(pixels, turned)


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
  """uint8 [H, W, 3] as EXIF's orientation 1..8 wants it shown; the same array where it is so already."""
  if orientation not in range(2, 9):
    return pixels
  if orientation in (2, 3, 7, 8):
    pixels = pixels[:, ::-1]
  if orientation in (3, 4, 6, 7):
    pixels = pixels[::-1]
  return np.ascontiguousarray(pixels.swapaxes(0, 1) if orientation > 4 else pixels)


def jpeg_orientation(content: bytes) -> int:
  """EXIF's orientation of a JPEG file's content, else XMP's, else 1, as Pillow has it; only headers are looked at."""
  stated, at = 1, 2
  while content[at : at + 1] == b"\xff" and at + 4 <= len(content):
    if content[at + 1] == 0xFF:  # a marker may be filled up
      at += 1
      continue
    marker, (size,) = content[at + 1], struct.unpack_from(">H", content, at + 2)
    if marker == 0xDA:  # pixels begin
      break
    part = content[at + 4 : at + 2 + size] if marker == 0xE1 else b""
    if part.startswith(b"Exif\0\0"):
      exif = Image.Exif()
      try:
        exif.load(part)
        if ORIENTATION in exif:
          return exif[ORIENTATION]
      except Exception:  # damaged EXIF is no reason to lose an image
        return 1
    elif part.startswith(XMP) and (match := re.search(XMP_ORIENTATION, part)):
      stated = int(match[1])
    at += 2 + size
  return stated


def _orientation(image):
  with contextlib.suppress(Exception):
    return image.getexif().get(ORIENTATION, 1)
  return 1


def _from_integers(values, stated):
  low, high = int(values.min()), int(values.max())
  top = max(high, stated if stated < 2**16 else 0)
  bits = next((b for b in BITS if top < 2**b), None)
  if low < 0 or bits is None:
    raise BadImage(
      f"whole numbers from {low} to {high}, of neither 8, 12 nor 16 bits; store 0..255"
    )
  return _rgb(np.uint8(values >> (bits - 8)))


def _from_floats(values):
  low, high = float(values.min()), float(values.max())
  largest = 1 if high <= 1 + SLACK else 255
  if not (
    -SLACK * largest <= low and high <= (1 + SLACK) * largest
  ):  # nor anything that is no number
    raise BadImage(
      f"floating numbers from {low:g} to {high:g}, neither 0..1 nor 0..255; store 0..255"
    )
  return _rgb(np.uint8(np.clip(np.rint(values[..., None] * (255 / largest)), 0, 255)))


def _rgb(values):
  return np.ascontiguousarray(np.broadcast_to(values, (*values.shape[:2], 3)))
