"""Host tf.data: read, decode once, cut every view, ship uint8; for folders and anything large.

Flow: source + plan -> `PipelineLoader.train(...)` -> sharding -> the step. Evaluation asks
  `.evaluation(...)`.
Shapes: an item of a view is (uint8 [b, size, size, 3],); one tensor per view, sizes may differ.
Holds: order, spares and boxes come from NumPy (order, crops), so a start at step n costs no reading and
  gives the batches of a run that got there, whatever the number of threads.
Not here: colour, blur, flip, normalisation (augment, on the device); decoding (images).
"""

import os

import jax
import numpy as np

from adco_jax import sharding
from adco_jax.data import crops, images, order
from adco_jax.data.tf import import_tensorflow
from adco_jax.plan import RunError

PREFETCH = 2  # batches ready ahead of the step


class PipelineLoader:
  """Train and evaluation batches of what `reader` reads, decoded by `threads` host threads (0: one per core)."""

  shared: dict = {}

  def __init__(self, reader, mesh, threads=0):
    self.reader, self._mesh = reader, mesh
    self._tf = import_tensorflow()
    self._threads = threads or len(os.sched_getaffinity(0))

  @staticmethod
  def cut(item, size, shared):
    """Inside the step: the views arrive cut."""
    del size, shared
    return item[0]

  def train(self, start, stop, *, seed, plan, ratio):
    """Yields the `order.Batch` of the updates start..stop-1."""
    middle = min(max(start, plan.fill_steps), stop)
    for first, last in ((start, middle), (middle, stop)):
      if first == last:
        continue
      pairing = plan.pairing(first)
      views, sizes = pairing.views, [plan.view_sizes[v] for v in pairing.views]
      requests = (order.request(seed, step, plan, ratio) for step in range(first, last))
      wanted = ((r.candidates, r.draws[:, list(views)]) for r in requests)
      boxes = lambda draws, h, w: crops.boxes(draws, h, w, ratio)
      batches = self._batches(wanted, boxes, sizes, plan.slots[1])
      for step, (indices, replaced, *found) in zip(range(first, last), batches, strict=True):
        orders = order.key_orders(seed, step, pairing, plan.batch_size, plan.shuffle_block)
        items = {v: (x,) for v, x in zip(views, found, strict=True)}
        split = order.ship(items, orders, pairing, plan)
        yield order.Batch(split, orders, indices, int(replaced.sum()))

  def evaluation(self, indices, *, size, fraction, batch_size):
    """Yields (uint8 [batch_size, size, size, 3] on the devices, how many of them count)."""
    rows = batch_size // jax.process_count()
    mine = slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)
    starts = range(0, len(indices), batch_size)
    parts = [indices[s : s + batch_size] for s in starts]
    padded = (np.pad(p, (0, batch_size - len(p)), mode="edge")[mine] for p in parts)
    wanted = ((p[:, None], np.zeros((rows, 1, 1, 1))) for p in padded)
    boxes = lambda _, h, w: crops.centre_boxes(h, w, fraction)[None]
    batches = self._batches(wanted, boxes, [size], rows)
    for part, (_, _, found) in zip(parts, batches, strict=True):
      yield sharding.put_split(self._mesh, found), len(part)

  def _batches(self, wanted, boxes, sizes, rows):
    """(candidates [b, C], draws [b, ...]) of each batch -> (indices [b], replaced [b], views...)."""
    tf, failures = self._tf, []

    def load(candidates, draws):
      """One example: the first candidate that can be read is decoded once, then cut."""
      try:
        image, *which = self.reader.read_first(candidates)
      except RunError as error:
        failures.append(error)
        raise
      cuts = boxes(draws, *np.float64(image.shape[:2]))
      views = [images.cut(image, box, size) for box, size in zip(cuts, sizes, strict=True)]
      return *which, *views

    def call(candidates, draws):
      found = tf.numpy_function(
        load, [candidates, draws], [tf.int64, tf.bool] + [tf.uint8] * len(sizes)
      )
      shapes = ((), (), *((size, size, 3) for size in sizes))
      return tuple(tf.ensure_shape(x, shape) for x, shape in zip(found, shapes, strict=True))

    draws = tf.TensorSpec((rows, None, None, None), tf.float64)
    signature = tf.TensorSpec((rows, None), tf.int64), draws
    data = tf.data.Dataset.from_generator(lambda: wanted, output_signature=signature)
    data = data.unbatch().map(call, num_parallel_calls=self._threads, deterministic=True)
    data = data.batch(rows, drop_remainder=True).prefetch(PREFETCH)
    options = tf.data.Options()
    options.threading.private_threadpool_size = self._threads
    options.deterministic = True
    try:
      yield from data.with_options(options).as_numpy_iterator()
    except tf.errors.OpError as error:
      raise (failures[0] if failures else error) from None
