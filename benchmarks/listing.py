"""How long it takes to know what a large data set holds: the first time, again, and after a change.

Command: python -m benchmarks.listing        (--files=1000000 for more)
Makes a tree of that many empty files in a thousand folders, tar and TFRecord shards of as many small members, in a
temporary folder; each look is a process of its own; the page cache is warm, as after any copy.
"""

import argparse
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import tempfile
import time

from benchmarks import record

LOOK = """
import json, sys, time, os, resource
from adco_jax.data.sources import loading
start = time.perf_counter()
source = loading.load_source(sys.argv[1], sys.argv[2], "train", name="")
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"seconds": seconds, "images": source.num_examples, "peak_mebibytes": peak, **source.identity()}))
"""


def make_tree(folder, count):
  """Empty files 1,000 folders wide; their time stamps lie in the past, as those of data do."""
  for number in range(1000):
    place = os.path.join(folder, "train", f"class{number:03d}")
    os.makedirs(place)
    for i in range(number, count, 1000):
      os.close(os.open(os.path.join(place, f"image_{i:08d}.jpeg"), os.O_CREAT))
    os.utime(place, (1, 1))
  os.utime(os.path.join(folder, "train"), (1, 1))


def make_tars(folder, count, shards=20):
  """Members of 100 bytes, each with its label."""
  os.makedirs(os.path.join(folder, "train"))
  for shard in range(shards):
    with tarfile.open(os.path.join(folder, "train", f"{shard:05d}.tar"), "w") as archive:
      for i in range(shard, count, shards):
        for name, content in ((f"{i:08d}.jpg", b"x" * 100), (f"{i:08d}.cls", b"%d" % (i % 1000))):
          member = tarfile.TarInfo(name)
          member.size = len(content)
          archive.addfile(member, io.BytesIO(content))
  age(os.path.join(folder, "train"))


def make_tfrecords(folder, count, shards=20):
  """Examples of an image of 100 bytes and a label."""
  os.makedirs(folder)
  entry = lambda name, kind, value: b"\x0a" + bytes([len(name) + len(value) + 6]) + b"\x0a" + bytes([len(name)]) + name + b"\x12" + bytes([len(value) + 2]) + bytes([kind << 3 | 2, len(value)]) + value  # fmt: skip
  for shard in range(shards):
    with open(os.path.join(folder, f"train-{shard:05d}-of-{shards:05d}"), "wb") as file:
      for i in range(shard, count, shards):
        features = entry(b"image", 1, b"\x0a\x50" + b"x" * 80) + entry(b"label", 3, b"\x08" + bytes([i % 100]))  # fmt: skip
        size = len(features)
        content = b"\x0a" + (bytes([size & 127 | 128, size >> 7]) if size > 127 else bytes([size])) + features  # fmt: skip
        file.write(struct.pack("<QI", len(content), 0) + content + b"\0\0\0\0")
  age(folder)


def age(folder):
  """Time stamps of the past."""
  for name in os.listdir(folder):
    os.utime(os.path.join(folder, name), (1, 1))


def look(kind, folder, cache):
  """One process that opens the source."""
  command = [sys.executable, "-c", LOOK, kind, folder]
  environment = os.environ | {"ADCO_JAX_CACHE": cache, "JAX_PLATFORMS": "cpu"}
  found = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
  return json.loads(found.stdout.splitlines()[-1])


def run(argv):
  """Measures, prints, writes."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
  parser.add_argument("--files", type=int, default=100_000)
  parser.add_argument("--out", type=os.path.expanduser, default=record.RESULTS)
  options = parser.parse_args(argv)
  table = {}
  with tempfile.TemporaryDirectory() as folder:
    cache = os.path.join(folder, "cache")
    for kind, make in (("folder", make_tree), ("webdataset", make_tars), ("tfrecord", make_tfrecords)):  # fmt: skip
      place = os.path.join(folder, kind)
      make(place, options.files)
      time.sleep(3)  # what has just changed is not trusted
      looks = {name: look(kind, place, cache) for name in ("first", "second")}
      if kind == "folder":
        with open(os.path.join(place, "train", "class500", "new.png"), "wb"):
          time.sleep(0.01)
        looks["after a file came"] = look(kind, place, cache)
      table[kind] = looks
      for name, found in looks.items():
        print(f"{kind:10} {name:17} {found['seconds']:6.2f} s for {found['images']} images ({found['checksum']}), process peak {found['peak_mebibytes']:.0f} MiB", flush=True)  # fmt: skip
  print(
    record.write(options.out, "listing", "python -m benchmarks.listing " + " ".join(argv), table)
  )
  return 0


if __name__ == "__main__":
  sys.exit(run(sys.argv[1:]))
