"""Small sets held on the device as uint8; views are cut there, inside the jitted step.

Flow: source + plan -> `ResidentLoader.train(...)` ships example numbers and boxes, a few kB per step;
  the step asks these for their `crops`. Evaluation asks `.evaluation(...)`.
Shapes: images uint8 [N, H, W, 3], replicated; a view travels as `Boxes`: index int32 [b], boxes [b, 4].
Holds: `crop_and_resize` is Pillow's antialiased bilinear resize of a box, as two matrix products (no gathers of
  pixels: they are slow on TPU).
Not here: which examples and boxes (order, crops); colour (augment).
"""

import functools
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adco_jax.config.plan import Plan
from adco_jax.data import order
from adco_jax.data.batch import LoadedBatch, assemble_batch, views_per_read
from adco_jax.data.cuts import cut_centre
from adco_jax.data.images import GRAY, Reader
from adco_jax.errors import require
from adco_jax.runtime import host, sharding
from adco_jax.runtime.dtypes import Tree
from adco_jax.runtime.progress import Progress
from adco_jax.views import crops

BLOCK = 8  # steps whose boxes are drawn at once
LOOKS = 16  # images that are looked at before a set of files is held to be of one size


def resize_matrix(
  start_B: jax.Array, length_B: jax.Array, size_in: int, size_out: int
) -> jax.Array:
  """Weights [B, size_out, size_in] that resize pixels [start, start + length) to `size_out`.

  Triangle filter, widened where the box shrinks (Pillow's BILINEAR); rows sum to 1.
  """
  start, scale = start_B[:, None, None], (length_B / size_out)[:, None, None]
  centre = start + (jnp.arange(size_out, dtype=start_B.dtype)[None, :, None] + 0.5) * scale - 0.5
  pixel = jnp.arange(size_in, dtype=start_B.dtype)[None, None]
  inside = (pixel >= start) & (pixel < start + length_B[:, None, None])
  weight = jnp.maximum(1 - jnp.abs(pixel - centre) / jnp.maximum(scale, 1), 0) * inside
  return weight / jnp.sum(weight, -1, keepdims=True)


def crop_and_resize(images: jax.Array, boxes: jax.Array, size: int) -> jax.Array:
  """uint8 [b, H, W, 3] and boxes [b, 4] (top, left, height, width) -> uint8 [b, size, size, 3]."""
  boxes = boxes.astype(jnp.float32)
  rows = resize_matrix(boxes[:, 0], boxes[:, 2], images.shape[1], size)
  columns = resize_matrix(boxes[:, 1], boxes[:, 3], images.shape[2], size)
  product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
  tall = product("bsh,bhwc->bswc", rows, images.astype(jnp.float32))
  exact = product("btw,bswc->bstc", columns, tall)
  return jnp.clip(jnp.floor(exact + 0.5), 0, 255).astype(jnp.uint8)


class Boxes(NamedTuple):
  """A view that the step cuts: of which image, int32 [b], and where, its padding included, float32 [b, 4] (top, left, height, width)."""

  index: Tree
  boxes: Tree

  def crops(self, size: int, images: jax.Array | None, pad: int = 0) -> jax.Array:
    """Inside the step: uint8 [b, size, size, 3] of the loader's `images`, black pixels around them."""
    assert images is not None
    chosen = images[self.index]
    if pad:
      chosen = jnp.pad(chosen, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    return crop_and_resize(chosen, self.boxes, size)

  @classmethod
  def shapes(cls, slots: int, size: int) -> Self:
    """Shapes and dtypes."""
    del size
    array = jax.ShapeDtypeStruct
    return cls(array((slots,), np.int32), array((slots, 4), np.float32))


def expected_bytes(reader: Reader, size: int) -> int | None:
  """What a source takes on a device; None if a few looks into it find images of several sizes."""
  source = reader.source
  if size:
    return source.num_examples * size * size * 3
  if source.images is not None:
    return source.images.nbytes
  looks = np.linspace(0, source.num_examples - 1, LOOKS).astype(int)
  pictures = [reader.read(int(i)) for i in dict.fromkeys(looks)]
  sizes = {x.size for x in pictures if x is not None}
  shapes = {x.shape for x in pictures if x is not None}
  return source.num_examples * sizes.pop() if len(shapes) == 1 else None


def kept_bytes(
  reader: Reader, kind: str, size: int, share: float, platform: str, memory: float
) -> int:
  """What data.loader=`kind` keeps on a device of so much `memory`; 0: nothing. 'auto' keeps what takes a small share of it, and
  on a CPU only what is in memory anyway (files gain nothing there)."""
  of_files = reader.source.images is None
  if kind == "pipeline" or (kind == "auto" and platform == "cpu" and of_files):
    return 0
  needed = expected_bytes(reader, size)
  if kind == "resident":
    return needed or 1  # of several sizes: refused when they are read
  return needed if needed is not None and needed <= share * memory else 0


def to_array(reader: Reader, size: int, threads: int = 0) -> np.ndarray:
  """The images of a reader's source as one array, cut to squares of `size` if > 0; broken ones are gray."""
  source = reader.source
  if source.images is not None:
    whole = not size or source.images.shape[1:3] == (size, size)
    return source.images if whole else np.stack([cut_centre(x, size) for x in source.images])

  def square(i):
    image = reader.read(i)
    return image if image is None or not size else cut_centre(image, size)

  progress = Progress(f"reading {source.name}", source.num_examples)
  with ThreadPoolExecutor(threads or host.cores()) as pool:
    images = list(progress.over(pool.map(square, range(source.num_examples))))
  reader.check()
  shapes = {x.shape for x in images if x is not None}
  remedy = f"the images have {len(shapes)} sizes; set the side they are cut to, such as 256"
  require(len(shapes) == 1, "data.resident_size", size, remedy)
  gray = np.broadcast_to(GRAY, shapes.pop())
  return np.stack([gray if x is None else x for x in images])


class ResidentLoader:
  """Train and evaluation batches of a source that fits on every device."""

  item = Boxes
  ahead = 32  # batches that are drawn before they are needed: a few kilobytes each

  def __init__(self, reader: Reader, mesh: Mesh, resident_size: int = 0, threads: int = 0) -> None:
    images = to_array(reader, resident_size, threads)
    self.reader, self._mesh, self._size = reader, mesh, np.array(images.shape[1:3], float)
    self.images = sharding.put(images, sharding.replicated(mesh))
    self._crops = jax.jit(Boxes.crops, static_argnums=1)

  def train(
    self, start: int, stop: int, *, seed: int, plan: Plan, ratio: tuple[float, float]
  ) -> Generator[LoadedBatch, None, None]:
    """Yields the `LoadedBatch` of the updates start..stop-1."""
    broken = np.array(sorted(self.reader.broken), np.int64)
    for step, drawn in self._boxes(range(start, stop), seed, plan, ratio):
      wanted, pairing = order.request(seed, step, plan, ratio, drawn), plan.pairing(step)
      boxes = wanted.draws.astype(np.float32)
      fine = ~np.isin(wanted.candidates, broken)
      chosen = np.take_along_axis(wanted.candidates, fine.argmax(-1)[..., None], -1)[..., 0]
      index, views = chosen.astype(np.int32), map(len, views_per_read(plan, pairing))
      reading = [r for r, count in enumerate(views) for _ in range(count)]
      items = [Boxes(index[:, r], boxes[:, v]) for v, r in enumerate(reading)]
      batch = assemble_batch(items, wanted.key_orders, plan, pairing)
      replaced, labels = int((~fine[:, 0, 0]).sum()), self.reader.source.labels
      yield LoadedBatch.of(batch, chosen[:, 0], replaced, plan, labels)

  def _boxes(self, steps, seed, plan, ratio):
    """(step, boxes [B, V, 4] of all its views) of every step, a block of them drawn at once."""
    for block in (steps[i : i + BLOCK] for i in range(0, len(steps), BLOCK)):
      setting = plan.batch_size, plan.view_scales, ratio, *(self._size + 2 * plan.pad)
      yield from zip(block, crops.random_boxes(seed, block, *setting), strict=True)

  def evaluation(
    self, indices: np.ndarray, *, size: int, fraction: float, batch_size: int
  ) -> Iterator[tuple[jax.Array, int]]:
    """Yields (uint8 [batch_size, size, size, 3] on the devices, how many of them count)."""
    box = crops.centre_boxes(self._size[0], self._size[1], fraction)
    for start in range(0, len(indices), batch_size):
      part = indices[start : start + batch_size]
      padded = np.pad(part, (0, batch_size - len(part))).astype(np.int32)
      local = _process_rows(padded)
      boxes = np.tile(box.astype(np.float32), (len(local), 1))
      item = sharding.put(Boxes(local, boxes), sharding.batch_sharding(self._mesh))
      yield self._crops(item, size, self.images), len(part)


def _process_rows(rows):
  count = len(rows) // jax.process_count()
  return rows[jax.process_index() * count :][:count]
