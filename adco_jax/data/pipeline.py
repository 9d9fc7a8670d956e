"""Host tf.data: read, decode once, cut every view, ship uint8; for folders and anything large.

Flow: source + plan -> `PipelineLoader.train(...)` -> sharding -> the step. Evaluation asks
  `.evaluation(...)`.
Shapes: an item of a view is (uint8 [b, size, size, 3],); one tensor per view, sizes may differ.
Holds: order and boxes come from NumPy (order, crops), so a start at step n costs no reading and gives
  the batches of a run that got there, whatever the number of threads.
Not here: colour, blur, flip, normalisation (augment, on the device).
"""

import os

import jax
import numpy as np

from adco_jax import sharding
from adco_jax.data import crops, order
from adco_jax.data.tf import import_tensorflow
from adco_jax.plan import ConfigError

PREFETCH = 2  # batches ready ahead of the step


class PipelineLoader:
  """Train and evaluation batches of any source, decoded by `threads` host threads (0: one per core)."""

  shared: dict = {}

  def __init__(self, source, mesh, threads=0):
    self._source, self._mesh = source, mesh
    self._tf = import_tensorflow()
    self._threads = threads or len(os.sched_getaffinity(0))

  @staticmethod
  def cut(item, size, shared):
    """Inside the step: the views arrive cut."""
    del size, shared
    return item[0]

  def train(self, start, stop, *, seed, plan, ratio):
    """Yields (split, orders) of the updates start..stop-1; see `order.ship`."""
    middle = min(max(start, plan.fill_steps), stop)
    for first, last in ((start, middle), (middle, stop)):
      if first == last:
        continue
      pairing = plan.pairing(first)
      views, sizes = pairing.views, [plan.view_sizes[v] for v in pairing.views]
      requests = (order.request(seed, step, plan, ratio) for step in range(first, last))
      wanted = ((r.indices, r.draws[:, list(views)]) for r in requests)
      boxes = lambda draws, h, w: crops.boxes(draws, h, w, ratio, self._tf)
      batches = self._batches(wanted, boxes, sizes, plan.slots[1], (len(views), crops.TRIES, 4))
      for step, images in zip(range(first, last), batches, strict=True):
        orders = order.key_orders(seed, step, pairing, plan.batch_size, plan.shuffle_block)
        items = {v: (x,) for v, x in zip(views, images, strict=True)}
        yield order.ship(items, orders, pairing, plan), orders

  def evaluation(self, indices, *, size, fraction, batch_size):
    """Yields (uint8 [batch_size, size, size, 3] on the devices, how many of them count)."""
    rows = batch_size // jax.process_count()
    mine = slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)
    starts = range(0, len(indices), batch_size)
    parts = [indices[s : s + batch_size] for s in starts]
    padded = (np.pad(p, (0, batch_size - len(p)), mode="edge")[mine] for p in parts)
    wanted = ((p, np.zeros((rows, 1))) for p in padded)
    boxes = lambda _, h, w: crops.centre_boxes(h, w, fraction, self._tf)[None]
    for part, (images,) in zip(
      parts, self._batches(wanted, boxes, [size], rows, (1,)), strict=True
    ):
      yield sharding.put_split(self._mesh, images), len(part)

  def _batches(self, wanted, boxes, sizes, rows, draws_shape):
    """(indices [b], draws [b, ...]) of each batch -> tuples of uint8 arrays, one per size."""
    tf, source = self._tf, self._source
    content = tf.string if source.images is None else tf.uint8
    shape = () if source.images is None else source.images.shape[1:]
    signature = (
      tf.TensorSpec((rows, *shape), content),
      tf.TensorSpec((rows, *draws_shape), tf.float64),
    )
    examples = source.paths if source.images is None else source.images
    data = tf.data.Dataset.from_generator(
      lambda: ((examples[i], d) for i, d in wanted), output_signature=signature
    )
    decode = _make_decode(tf) if source.images is None else lambda image: image
    load = _make_load(tf, decode, boxes, sizes)
    data = data.unbatch().map(load, num_parallel_calls=self._threads, deterministic=True)
    data = data.batch(rows, drop_remainder=True).prefetch(PREFETCH)
    options = tf.data.Options()
    options.threading.private_threadpool_size = self._threads
    options.deterministic = True
    try:
      yield from data.with_options(options).as_numpy_iterator()
    except tf.errors.InvalidArgumentError as error:
      raise ConfigError(f"config.data.dir: {_first_broken(source)}") from error


def _make_decode(tf):
  def decode(path):
    """Path -> uint8 [H, W, 3]; `decode_jpeg` also knows PNG, GIF (first frame), BMP and CMYK."""
    return tf.io.decode_jpeg(tf.io.read_file(path), channels=3, dct_method="INTEGER_ACCURATE")

  return decode


def _make_load(tf, decode, boxes, sizes):
  def load(content, draws):
    """One example -> one uint8 view per size: decoded once, cut, resized with antialiasing."""
    image = decode(content)
    shape = tf.cast(tf.shape(image), tf.float64)
    cuts = tf.cast(boxes(draws, shape[0], shape[1]), tf.int32)
    views = []
    for i, size in enumerate(sizes):
      top, left, height, width = tf.unstack(cuts[i])
      part = image[top : top + height, left : left + width]
      view = tf.image.resize(part, (size, size), method="bilinear", antialias=True)
      view = tf.saturate_cast(tf.floor(view + 0.5), tf.uint8)
      views.append(tf.ensure_shape(view, (size, size, 3)))
    return tuple(views)

  return load


def _first_broken(source):
  """Names the first file that does not decode; slow, and called only when one does not."""
  from PIL import Image

  for path in source.paths:
    try:
      with Image.open(path) as image:
        image.load()
    except (OSError, SyntaxError) as error:
      return f"{path} cannot be decoded ({error}); remove it"
  return "an image cannot be decoded by TensorFlow; convert it to JPEG or PNG"
