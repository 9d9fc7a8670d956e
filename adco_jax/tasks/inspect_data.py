"""The task `inspect_data`: what a source holds, what is broken in it, how its views look, how fast it is read.

Flow: main -> `run`: source -> every image looked at once -> numbers, sheet of views, loader's speed -> page.
Holds: nothing is trained and nothing of the data is changed; numbers are of the images that were read;
  it says `ready to train` where pretrain would begin and not stop for what was found.
Not here: reading (data), drawing (view_sheet, pages).
"""

import collections
import html
import os
import threading
import time
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from ml_collections import ConfigDict

from adco_jax import build
from adco_jax.config import plan as planning
from adco_jax.config.plan import Plan
from adco_jax.data import glance
from adco_jax.data.images import Reader, refusal
from adco_jax.data.loaders import Loader
from adco_jax.data.sources.base import Source
from adco_jax.data.sources.files import Paths
from adco_jax.errors import ConfigError
from adco_jax.report import pages
from adco_jax.runtime import host, sharding
from adco_jax.runtime.files import Json, write_json
from adco_jax.runtime.processes import say
from adco_jax.runtime.progress import Progress, rate
from adco_jax.tasks import beginning
from adco_jax.tasks.view_sheet import save_view_sheet
from adco_jax.workdir.files import check_writable

SPEED_SECONDS = 10.0
LEVELS = np.arange(256) / 255
NAMED = 50  # broken files that the page lists


def run(config: ConfigDict, workdir: str) -> None:
  """Prints and writes what there is to know. Raises ConfigError."""
  check_writable(workdir)
  source = build.open_training(config).trained
  os.makedirs(workdir, exist_ok=True)
  say(f"{source.name}: {source.num_examples} images, {len(source.classes) or 'no'} classes")
  reader = Reader(source, 1.0, config.data.max_megapixels)
  facts = {"source": source.kind, "dir": config.data.dir, "split": source.split}
  facts |= describe(source) | look(reader, config)
  if facts["readable"] and source.num_examples >= jax.device_count():
    plan = make_view_plan(config, source)
    loader = build.create_loader(config, source, sharding.create_mesh(), reader)
    save_view_sheet(os.path.join(workdir, "inspect.png"), config, plan, loader)
    facts["loader"] = type(loader).__name__
    facts["loader_images_per_second"] = measure(loader, config, plan)
  facts["training"], facts["warnings"] = trainable(config, source, workdir, facts)
  write_json(os.path.join(workdir, "inspect.json"), facts)
  rows = summary(facts, config)
  for name, text in rows:
    say(f"{name:24} {text}")
  pages.write_page(os.path.join(workdir, "inspect.html"), f"data of {source.name}", [table(rows), *sections(workdir, facts)])  # fmt: skip
  say(f"page: {os.path.join(workdir, 'inspect.html')}")


def describe(source: Source) -> dict[str, Json]:
  """What is known without reading an image."""
  facts: dict[str, Json] = {
    "images": source.num_examples,
    "identity": source.identity()["checksum"],
  }
  facts |= {"not_read": source.unread, "folders_without_images": list(source.empty)}
  if isinstance(source.files, Paths):
    kinds = (os.path.splitext(source.files.name(i))[1].lower() for i in range(source.num_examples))
    facts["extensions"] = dict(collections.Counter(kinds).most_common(8))
  if source.labels is not None:
    counts = (
      np.bincount(source.targets, minlength=len(source.classes))
      if not source.has_several
      else (source.labels == 1).sum(0)
    )
    facts |= {"classes": len(source.classes), "class_images": _spread(counts)}
    facts["several_per_image"] = source.has_several
  return facts


def look(reader: Reader, config: ConfigDict) -> dict[str, Json]:
  """Sizes, mean and standard deviation, broken and equal files, of up to data.inspect_images spread evenly."""
  total, limit = reader.source.num_examples, config.data.inspect_images
  index = np.unique(np.linspace(0, total - 1, min(limit or total, total)).astype(int))
  lock, sums, sizes, checks, empty = threading.Lock(), np.zeros((2, 3)), [], [], {}

  def one(i):
    image = reader.read(int(i))
    if image is None:
      return
    levels = glance.levels_of(image)
    shares = levels / (image.shape[0] * image.shape[1])
    moments = np.stack([LEVELS @ shares, LEVELS**2 @ shares])
    with lock:
      sums[...] += moments
      sizes.append(image.shape[:2])
      checks.append(zlib.crc32(np.ascontiguousarray(image).data))
      if kind := glance.emptiness(levels):
        empty[int(i)] = kind

  with ThreadPoolExecutor(config.data.threads or host.cores()) as pool:
    for _ in Progress("looked at", len(index)).over(pool.map(one, index)):
      pass
  broken = {reader.source.where(i): reason for i, reason in sorted(reader.broken.items())}
  facts = {"looked_at": len(index), "readable": len(sizes), "broken": broken}
  if sizes:
    mean = sums[0] / len(sizes)
    spread = np.sqrt(np.maximum(sums[1] / len(sizes) - mean**2, 0))
    sides: np.ndarray = np.sort(np.array(sizes), 1)
    facts |= {
      "mean": mean.round(4).tolist(), "std": spread.round(4).tolist(),
      "short_side": _spread(sides[:, 0]), "long_side": _spread(sides[:, 1]),
      "smaller_than_crop": int((sides[:, 0] < max(c[0] for c in config.views.crops)).sum()),
      "same_pixels": len(checks) - len(set(checks)),
      "almost_no_information": {reader.source.where(i): kind for i, kind in sorted(empty.items())},
    }  # fmt: skip
  return facts


def make_view_plan(config: ConfigDict, source: Source) -> Plan:
  """A `Plan` of the config's views with a batch that any number of images fills."""
  return planning.make_probe_plan(
    source.num_examples, 0, batch_size=config.data.batch_size, crops=config.views.crops, mode=config.views.mode,
    pad=config.views.pad, epochs=10**6, devices=jax.device_count(), processes=1, process=0,
  )  # fmt: skip


def measure(loader: Loader, config: ConfigDict, plan: Plan) -> float:
  """Images/s of the loader alone, its views cut, from its second batch on."""
  mesh, batches = sharding.create_mesh(), loader.train(0, 10**6, seed=config.seed, plan=plan, ratio=config.views.ratio)  # fmt: skip
  sizes = [plan.view_sizes[v] for v in plan.train_pairing.query_views]
  crops = jax.jit(lambda items, images: [item.crops(size, images, plan.pad).sum() for item, size in zip(items, sizes, strict=True)])  # fmt: skip
  start, steps = 0.0, -1
  for loaded in batches:
    jax.block_until_ready(crops(loaded.batch.put(mesh).queries, loader.images))
    steps += 1
    if steps == 0:
      start = time.monotonic()
    elif time.monotonic() - start > SPEED_SECONDS:
      break
  batches.close()
  return steps * plan.batch_size / (time.monotonic() - start)


def trainable(
  config: ConfigDict, source: Source, workdir: str, facts: dict[str, Json]
) -> tuple[str, list[str]]:
  """(what stands in the way of training, '' if nothing does; warnings): the checks of pretrain, and what it would meet."""
  try:
    beginning.check(config, workdir)
    plan = build.make_plan(config, source)
    beginning.check_head(config, plan, workdir)
  except ConfigError as error:
    return str(error), []
  first = next(iter(facts["broken"]), "")
  stop = refusal(len(facts["broken"]), facts["looked_at"], config.data.max_bad_fraction, first)
  if stop or not facts["readable"]:
    return stop or f"none of {facts['looked_at']} images can be read, such as {first}", []
  return "", build.warnings(config, plan, facts["short_side"]["median"])


def summary(facts: dict[str, Json], config: ConfigDict) -> list[tuple[str, str]]:
  """[(name, text)] for people."""
  spread = lambda s: f"{s['min']} to {s['max']}, median {s['median']}"
  rows = [("images", f"{facts['images']}, listing {facts['identity']}")]
  if "extensions" in facts:
    rows.append(("files", ", ".join(f"{n} {k or 'without ending'}" for k, n in facts["extensions"].items())))  # fmt: skip
  if facts["not_read"] or facts["folders_without_images"]:
    others = ", ".join(f"{n} {k}" for k, n in facts["not_read"].items()) or "nothing else"
    folders = ", ".join(facts["folders_without_images"])
    rows.append(("not read", others + (f"; no image in {folders}" if folders else "")))
  labels = "none: kNN and probes will be off"
  if "classes" in facts:
    several = ", several per image" if facts["several_per_image"] else ""
    labels = f"{facts['classes']}{several}, images in each: {spread(facts['class_images'])}"
  rows.append(("classes", labels))
  rows.append(("looked at", f"{facts['looked_at']}, of which {len(facts['broken'])} are broken"))
  if facts["readable"]:
    pixels = f"{facts['smaller_than_crop']} images are smaller than the largest crop"
    rows += [
      ("short side", f"{spread(facts['short_side'])}; {pixels}"),
      ("long side", spread(facts["long_side"])),
      ("mean, std", f"{facts['mean']}, {facts['std']} (config.data.mean, .std: {tuple(config.data.mean)}, {tuple(config.data.std)})"),
      ("same pixels twice", f"{facts['same_pixels']}"),
      ("loader", "not measured: fewer images than devices" if "loader" not in facts else f"{facts['loader']}: {rate(facts['loader_images_per_second'])} images/s with {len(config.views.crops)} views each"),
    ]  # fmt: skip
  if facts.get("almost_no_information"):
    rows.append(("almost no information", glance.empty_line(facts["almost_no_information"], facts["readable"])))  # fmt: skip
  answer = f"no: {facts['training']}" if facts["training"] else "yes, with this config"
  rows.append(("ready to train", f"{answer}, but" if facts["warnings"] else answer))
  rows += [("", text) for text in facts["warnings"]]
  return rows


def table(rows: Iterable[tuple[str, str]]) -> str:
  """The summary as HTML."""
  body = "".join(
    f"<tr><td>{html.escape(name)}<td style='text-align:left'>{html.escape(text)}"
    for name, text in rows
  )
  return f"<table>{body}</table>"


def sections(workdir: str, facts: dict[str, Json]) -> tuple[str, str]:
  """The sheet of views, if these images gave one, and the names of broken files."""
  sheet = "" if "loader" not in facts else pages.picture(
    os.path.join(workdir, "inspect.png"), "What an encoder would be shown",
    "Left: an image. Right of it: its views, cropped, coloured and normalised as in training. They must "
    "stay recognisable as the same thing; if they do not, weaken the augmentation.",
  )  # fmt: skip
  broken = list(facts["broken"].items())
  rows = "".join(f"<tr><td>{html.escape(k)}<td>{html.escape(v)}" for k, v in broken[:NAMED])
  more = f" (the first {NAMED}; all are in inspect.json)" if len(broken) > NAMED else ""
  names = f"<h2>{len(broken)} broken files{more}</h2><table>{rows}</table>" if broken else ""
  return sheet, names


def _spread(numbers):
  return {
    "min": int(np.min(numbers)),
    "median": int(np.median(numbers)),
    "max": int(np.max(numbers)),
  }
