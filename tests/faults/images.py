"""Real files of every kind that a folder of images may hold, sound and broken."""

import struct
import zlib

import numpy as np
from PIL import Image


def photograph(height, width, seed=0):
  """Something with edges, gradients and texture, uint8 [height, width, 3]."""
  y, x = np.mgrid[0:height, 0:width]
  waves = np.stack([np.sin(x / 3 + c) * np.cos(y / (4 + c)) for c in range(3)], -1)
  noise = np.random.RandomState(seed).uniform(-0.3, 0.3, waves.shape)
  return np.uint8(np.clip(127 + 90 * waves + 90 * noise + 60 * (x > width / 2)[..., None], 0, 255))


def write_images(folder, count, sizes=((40, 50),)):
  """`count` sound JPEGs 00.jpg, 01.jpg, ..."""
  folder.mkdir(parents=True, exist_ok=True)
  for i in range(count):
    image = Image.fromarray(photograph(*sizes[i % len(sizes)], seed=i))
    image.save(folder / f"{i:02d}.jpg", quality=95)


def write_unusual(folder):
  """{name: mean that its pixels must have, about} of sound files that careless readers get wrong."""
  folder.mkdir(parents=True, exist_ok=True)
  image = Image.fromarray(photograph(40, 50))
  gray, mean = image.convert("L"), float(np.mean(image))
  image.convert("CMYK").save(folder / "cmyk.jpg")
  gray.save(folder / "gray.jpg")
  image.convert("P").save(folder / "palette.png")
  image.convert("P").save(folder / "transparent.png", transparency=b"\x80\xff")
  image.convert("RGBA").save(folder / "alpha.png")
  image.save(folder / "png_inside.jpg", format="PNG")
  image.save(folder / "webp.webp")
  image.save(folder / "animated.gif", save_all=True, append_images=[image.rotate(90)] * 2)
  Image.fromarray(np.asarray(gray).astype(np.uint16) * 257).save(folder / "16_bit.png")
  Image.new("1", (1, 1), 1).save(folder / "one_pixel.png")
  means = {path.name: mean for path in folder.iterdir()}
  return means | {"one_pixel.png": 255.0}


def write_broken(folder, copies=1):
  """{name: what the reason must mention} of files that hold no usable image."""
  folder.mkdir(parents=True, exist_ok=True)
  image = Image.fromarray(photograph(40, 50))
  image.save(folder / "sound.jpg", quality=95)
  image.save(folder / "sound.png")
  image.save(folder / "sound.gif")
  jpg, png, gif = ((folder / f"sound.{kind}").read_bytes() for kind in ("jpg", "png", "gif"))
  kinds = {
    "empty.jpg": (b"", "cannot identify"),
    "garbage.jpg": (b"not a photograph" * 40, "cannot identify"),
    "truncated.jpg": (jpg[: len(jpg) // 2], "truncated"),
    "header_only.jpg": (jpg[:200], ""),
    "truncated.png": (png[: len(png) // 2], "truncated"),
    "checksum.png": (png[:60] + bytes([png[60] ^ 255]) + png[61:], ""),
    "huge_header.jpg": (_with_jpeg_size(jpg, 60000, 60000), "60000 x 60000 pixels"),
    "huge_header.png": (_png(60000, 60000), "60000 x 60000 pixels"),
    "huge_header.gif": (gif[:6] + struct.pack("<HH", 60000, 60000) + gif[10:], "60000 x 60000"),
    "text.png": (b"<html><body>404 not found</body></html>", "cannot identify"),
  }
  for kind in ("jpg", "png", "gif"):
    (folder / f"sound.{kind}").unlink()
  reasons = {}
  for i in range(copies):
    for name, (content, reason) in kinds.items():
      (folder / f"{i}_{name}").write_bytes(content)
      reasons[f"{i}_{name}"] = reason
  return reasons


def _with_jpeg_size(content, height, width):
  """The same JPEG with another size in its frame header."""
  at = content.index(b"\xff\xc0") + 5
  return content[:at] + struct.pack(">HH", height, width) + content[at + 4 :]


def _png(height, width):
  """A well-formed PNG of a few bytes that states this size."""

  def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  parts = (
    chunk(b"IHDR", header),
    chunk(b"IDAT", zlib.compress(b"\0" * 1000)),
    chunk(b"IEND", b""),
  )
  return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
