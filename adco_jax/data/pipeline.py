"""Host tf.data: read, decode once, cut every view, ship uint8; for folders, shards and anything large.

Flow: source + plan -> `PipelineLoader.train(...)` -> sharding -> the step. Evaluation asks
  `.evaluation(...)`.
Shapes: a view travels as `Pixels`, uint8 [b, size, size, 3]; sizes may differ. Threads work on chunks of c slots, a divisor of b.
Holds: order, spares and boxes come from NumPy (order, crops), so a start at step n costs no reading and
  gives the batches of a run that got there, whatever the number of threads; the memory of a batch is used again
  once nobody looks at it. TensorFlow is imported here alone, when the first batch is asked for (that takes seconds, in
  which programs are compiled); it runs threads on the host and never touches an accelerator.
Not here: colour, blur, flip, normalisation (augment, on the device); decoding (images), resizing (cuts).
"""

import atexit
import contextlib
import functools
import importlib.util
import itertools
import math
import os
import weakref
from collections.abc import Generator, Iterator
from types import ModuleType
from typing import NamedTuple, Self

import jax
import numpy as np
from jax.sharding import Mesh

from adco_jax.config.plan import Plan
from adco_jax.data import images, order
from adco_jax.data.batch import LoadedBatch, assemble_batch, views_per_read
from adco_jax.data.cuts import CUTS, cut_exactly
from adco_jax.errors import ConfigError, RunError
from adco_jax.runtime import host, sharding
from adco_jax.runtime.dtypes import Tree
from adco_jax.views import crops

PREFETCH = 2  # batches ready ahead of the step
CHUNK = 8  # slots of one call: fewer cost more per slot, more leave threads idle at a batch's end


class Pixels(NamedTuple):
  """A view that the host has cut: uint8 [b, size, size, 3]."""

  pixels: Tree

  def crops(self, size: int, images: jax.Array | None, pad: int = 0) -> jax.Array:
    """Themselves."""
    del size, images, pad
    return self.pixels

  @classmethod
  def shapes(cls, slots: int, size: int) -> Self:
    """Shape and dtype."""
    return cls(jax.ShapeDtypeStruct((slots, size, size, 3), np.uint8))


class PipelineLoader:
  """Train and evaluation batches of what `reader` reads, decoded by `threads` host threads (0: one per core).

  `cut`: 'fast' or 'pillow', how training views are resized (cuts); evaluation always asks Pillow. The scale at which an
  image is decoded follows from the boxes of all its views of the step, so that every process finds the same.
  """

  item = Pixels
  ahead = 1  # batch that is ready besides those of tf.data

  def __init__(
    self, reader: images.Reader, mesh: Mesh, threads: int = 0, cut: str = "fast"
  ) -> None:
    self.reader, self._mesh, self._way = reader, mesh, CUTS[cut]
    self.images = None
    check_tensorflow()
    self._scratch = images.Scratch()
    self._threads = threads or host.cores()

  def train(
    self, start: int, stop: int, *, seed: int, plan: Plan, ratio: tuple[float, float]
  ) -> Generator[LoadedBatch, None, None]:
    """Yields the `LoadedBatch` of the updates start..stop-1."""
    boxes = lambda draws, h, w: (crops.box(d, h, w, ratio) for d in draws.tolist())
    cut, least = self._way
    for phase in plan.phases:
      first, last, pairing = max(start, phase.start), min(stop, phase.stop), phase.pairing
      if first >= last:
        continue
      groups = views_per_read(plan, pairing)
      sizes = [[plan.view_sizes[v] for v in views] for views in groups]
      wanted = (order.request(seed, step, plan, ratio) for step in range(first, last))
      every = [plan.view_sizes[v] for v in pairing.views]
      scale = lambda draws, h, w, to=every: 1 if plan.pad else least(boxes(draws, h, w), to)
      batches = self._batches(wanted, boxes, sizes, plan.slots[1], cut, scale, plan.pad)
      for indices, replaced, key_orders, *views in batches:
        batch = assemble_batch([Pixels(x) for x in views], key_orders, plan, pairing)
        labels = self.reader.source.labels
        yield LoadedBatch.of(batch, indices, int(replaced.sum()), plan, labels)

  def evaluation(
    self, indices: np.ndarray, *, size: int, fraction: float, batch_size: int
  ) -> Iterator[tuple[jax.Array, int]]:
    """Yields (uint8 [batch_size, size, size, 3] on the devices, how many of them count)."""
    rows = batch_size // jax.process_count()
    mine = slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)
    starts = range(0, len(indices), batch_size)
    parts = [indices[s : s + batch_size] for s in starts]
    padded = (np.pad(p, (0, batch_size - len(p)), mode="edge")[mine] for p in parts)
    no_draws = np.zeros((rows, 1, 1, 1)), np.zeros((rows, 1, 1, 1, 1))
    wanted = (order.Request(p[:, None, None], *no_draws) for p in padded)
    boxes = lambda _, h, w: [crops.centre_boxes(np.float64(h), np.float64(w), fraction)]
    batches = self._batches(wanted, boxes, [[size]], rows, cut_exactly, lambda *_: 1)
    for part, (*_, views) in zip(parts, batches, strict=True):
      yield sharding.put(views, sharding.batch_sharding(self._mesh)), len(part)

  def _batches(self, *args):
    """`_generate`, closed before the interpreter ends: TensorFlow's threads would wait for it for ever."""
    batches = self._generate(*args)
    _OPEN.add(batches)
    return batches

  def _generate(self, wanted, boxes, sizes, rows, crop_and_resize, scale, pad=0):
    """The `order.Request` of each batch -> (indices [b], replaced [b], key_orders, views...).

    Pixels go straight from the threads into the arrays that are yielded; through TensorFlow's queues
    travel only numbers. `scale`: (all draws of an image, its height, its width) -> how much smaller it is decoded; `pad`: see Plan.
    """
    tf, failures, chunk, filling = import_tensorflow(), [], math.gcd(rows, CHUNK), {}
    pools = [_Pool((rows, size, size, 3)) for size in itertools.chain(*sizes)]

    def chunks():
      for number, (*arrays, key_orders) in enumerate(wanted):
        filling[number] = [key_orders, *(pool.take() for pool in pools)]
        for first in range(0, rows, chunk):
          part = slice(first, first + chunk)
          yield (number, first), *(array[part] for array in arrays)

    def read(candidates, draws):
      try:
        found = self.reader.read_first(candidates, self._scratch, functools.partial(scale, draws))
        return found[0].padded(pad), *found[1:]
      except RunError as error:
        failures.append(error)
        raise

    def load(where, candidates, draws, all_draws):
      """A chunk: of each reading the first candidate that can be read is decoded once, then cut."""
      (number, first), read_from = where, []
      for slot in range(chunk):
        views, at = iter(zip(filling[number][1:], draws[slot], strict=True)), first + slot
        for names, several, every in zip(candidates[slot], sizes, all_draws[slot], strict=True):
          picture, *which = read(names, every)
          read_from.append(which)
          arrays, mine = zip(*itertools.islice(views, len(several)), strict=True)
          found_boxes = boxes(np.array(mine), picture.height, picture.width)
          for array, box in zip(arrays, found_boxes, strict=True):
            box = [x / picture.scale for x in box]
            crop_and_resize(picture.pixels, box, array.shape[1], array[at])
      indices, replaced = zip(*read_from[:: len(sizes)], strict=True)  # of the slots' own
      return np.array(indices, np.int64), np.array(replaced, bool)

    def call(*chunk):
      return tf.numpy_function(load, chunk, (tf.int64, tf.bool))

    integers = tf.TensorSpec((2,), tf.int64), tf.TensorSpec((chunk, None, None), tf.int64)
    signature = *integers, *(tf.TensorSpec((chunk, *[None] * n), tf.float64) for n in (3, 4))
    data = tf.data.Dataset.from_generator(chunks, output_signature=signature)
    data = data.map(call, num_parallel_calls=self._threads, deterministic=True)
    data = data.batch(rows // chunk, drop_remainder=True).prefetch(PREFETCH)
    options = tf.data.Options()
    options.threading.private_threadpool_size = self._threads
    options.deterministic = True
    try:
      for number, slots in enumerate(data.with_options(options).as_numpy_iterator()):
        yield *(x.reshape(rows) for x in slots), *filling.pop(number)
    except tf.errors.OpError as error:
      raise (failures[0] if failures else error) from None


_OPEN: weakref.WeakSet[Generator] = weakref.WeakSet()


@atexit.register
def _close():
  for batches in list(_OPEN):
    with contextlib.suppress(ValueError):  # it is running in another thread
      batches.close()


class _Pool:
  """Arrays of one shape, whose memory is used again: fresh memory costs time on every page."""

  def __init__(self, shape):
    self._shape, self._free = shape, []

  def take(self):
    """An array whose content may be anything. Its memory comes back when no array, NumPy's or JAX's, looks at it."""
    memory = self._free.pop() if self._free else np.empty(self._shape, np.uint8)
    loan = _Loan(memory)
    weakref.finalize(loan, self._free.append, memory)
    return np.asarray(loan)


class _Loan:
  """What an array from a pool, and every view of it, is based on: as long as one of them lives, so does this."""

  def __init__(self, memory):
    self.__array_interface__ = memory.__array_interface__


def check_tensorflow() -> None:
  """Raises ConfigError where TensorFlow is not installed."""
  if not importlib.util.find_spec("tensorflow"):
    raise ConfigError(
      "config.data.loader='pipeline': TensorFlow is not installed; pip install tensorflow, "
      "or use --config.data.loader=resident"
    )


def import_tensorflow() -> ModuleType:
  """TensorFlow with its accelerators hidden, so that it leaves their memory to JAX."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  os.environ.setdefault(
    "TF_ENABLE_ONEDNN_OPTS", "0"
  )  # it says so on stderr, and nothing here uses it
  os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")  # else all of Keras is imported, for seconds
  import tensorflow as tf

  for kind in ("GPU", "TPU"):
    tf.config.set_visible_devices([], kind)
  return tf
