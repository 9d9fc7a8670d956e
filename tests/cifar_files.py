"""CIFAR-10's folders as its authors publish them, written small: what Python 2 pickled, and the binary batches."""

import io
import pickle
import struct

import numpy as np

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


class Python2(pickle._Pickler):
  """Protocol 2 as Python 2 wrote it: its texts are bytes, of opcodes that Python 3 only reads."""

  dispatch = dict(pickle._Pickler.dispatch)

  def save_bytes(self, value):
    short = len(value) < 256
    self.write(b"U" + bytes([len(value)]) if short else b"T" + struct.pack("<i", len(value)))
    self.write(value)
    self.memoize(value)

  dispatch[bytes] = save_bytes


def pickled(tree):
  """NumPy's own modules as they were called then."""
  file = io.BytesIO()
  Python2(file, 2).dump(tree)
  return file.getvalue().replace(b"numpy._core", b"numpy.core")


def draw(count=8):
  """{batch: (uint8 [count, 32, 32, 3], labels [count])}."""
  rng = np.random.RandomState(0)
  of = lambda: (rng.randint(0, 256, (count, 32, 32, 3), np.uint8), rng.randint(0, 10, count))
  return {name: of() for name in BATCHES}


def rows(images):
  """Reds, greens, blues: uint8 [n, 3072]."""
  return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def write_python(folder, batches):
  folder.mkdir(parents=True)
  for name, (images, labels) in batches.items():
    names = [b"%d.png" % i for i in range(len(labels))]
    batch = {b"batch_label": name.encode(), b"labels": labels.tolist(), b"data": rows(images), b"filenames": names}  # fmt: skip
    (folder / name).write_bytes(pickled(batch))
  meta = {b"num_cases_per_batch": len(labels), b"label_names": [c.encode() for c in CLASSES], b"num_vis": 3072}  # fmt: skip
  (folder / "batches.meta").write_bytes(pickled(meta))


def write_binary(folder, batches):
  folder.mkdir(parents=True)
  for name, (images, labels) in batches.items():
    whole = np.concatenate([labels[:, None].astype(np.uint8), rows(images)], 1)
    (folder / f"{name}.bin").write_bytes(whole.tobytes())
  (folder / "batches.meta.txt").write_text("\n".join(CLASSES) + "\n\n")


WRITERS = {"cifar-10-batches-py": write_python, "cifar-10-batches-bin": write_binary}
