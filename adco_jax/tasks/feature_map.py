"""The map of test features that the task `knn` draws beside its result: trained encoder and untrained one, with some of the images.

Flow: evaluate makes a `FeatureMap` of its result, lets `representations` compute what it `lacks`, adds features, saves.
Holds: images, places and file depend on data, encoder, seed and config.map alone; one file a result, drawn again only for
  another number of images or after it was taken away.
Not here: places and points (report.feature_map), where files lie (results).
"""

import json
import time

import numpy as np
from ml_collections import ConfigDict

from adco_jax.evaluation import results, signals
from adco_jax.report import feature_map
from adco_jax.report.feature_map import Panel
from adco_jax.runtime import sharding
from adco_jax.runtime.console import tell
from adco_jax.runtime.files import whole
from adco_jax.tasks.scoring import Frozen


class FeatureMap:
  """Of the result at `path`. `lacks`: representations whose features it needs; none where the map is there, or not wanted."""

  def __init__(self, frozen: Frozen, config: ConfigDict, path: str) -> None:
    self._frozen, self._seed = frozen, config.seed
    self._picture = results.picture_of(path, "map")
    self._rows = signals.evenly(frozen.test.num_examples, config.map)
    self._places: dict[str, np.ndarray] = {}
    names = ("trained", "untrained") if config.baselines else ("trained",)
    self._note = json.dumps({"images": len(self._rows), "of": names})
    there = feature_map.note_of(self._picture) == self._note
    self.lacks: set[str] = set() if there or not config.map else set(names)
    if self.lacks and len(self._rows) < feature_map.FEWEST:
      few = f"{len(self._rows)} test images are too few"
      tell(f"no map: {few}; it takes {feature_map.FEWEST} or more, and config.map as many")
      self.lacks = set()

  def add(self, name: str, features: np.ndarray) -> None:
    """Finds the places of a representation's test features [N, F], if it lacks them."""
    if name not in self.lacks:
      return
    if not np.isfinite(features[self._rows]).all():
      tell(f"no map of {name}: features are not finite")
      return
    start = time.monotonic()
    self._places[name] = feature_map.layout(features[self._rows], self._seed)
    tell(f"map of {len(self._rows)} test images, {name}: {time.monotonic() - start:.0f}s")

  def save(self) -> None:
    """Draws what was added, if anything was, and says where."""
    if not self._places:
      return
    panels = [
      Panel(name, places, self._images(feature_map.pick(places)))
      for name, places in self._places.items()
    ]
    test = self._frozen.test
    png = feature_map.draw(panels, test.targets[self._rows], test.classes, self._note)
    with whole(self._picture) as part, open(part, "wb") as file:
      file.write(png)
    tell(f"map: {self._picture}")

  def _images(self, points):
    """{point: uint8 [H, W, 3] as the encoder sees it}."""
    loader = self._frozen.loaders.of("test")
    view = self._frozen.view | {"batch_size": sharding.round_up(len(points))}
    batches = loader.evaluation(self._rows[points], **view)
    images = np.concatenate([np.asarray(x)[:count] for x, count in batches])
    return dict(zip(points, images, strict=True))
