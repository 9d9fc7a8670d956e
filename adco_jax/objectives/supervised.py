"""Cross-entropy of a linear classifier on the labels: the ceiling that an encoder without labels is held against.

Flow: as objectives/adco.py; one view per image (views.mode=one), of which it sees the backbone's features: the projection
  has no gradient and only decays.
Shapes: features [1, b, F], labels int32 [b], classifier [F, C].
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from adco_jax.config import ranges
from adco_jax.config.method import setting
from adco_jax.config.plan import Phase, Sizes
from adco_jax.objectives import infonce
from adco_jax.objectives.base import (
  Base,
  Classifier,
  Context,
  Embeddings,
  Variables,
  Written,
)
from adco_jax.runtime.sharding import AXIS
from adco_jax.views.mix import mix, shares


@dataclasses.dataclass(frozen=True)
class Supervised(Base):
  """Settings."""

  label_smoothing: float = setting(0.0, ranges.SHARE, "mass that is spread over all classes")
  mixup: float = setting(
    0.0, ranges.AMOUNT, "Beta(a, a) mixes pairs of images and their labels; 0: none"
  )
  average: bool = setting(
    False,
    words="keep a moving average (ema.decay), which is scored; exported as encoder=key",
    fixed=True,
  )

  keys_from = "none"
  sees = "features"
  needs_labels = True
  modes = ("one",)

  @property
  def keeps_average(self) -> bool:
    """See base.averages."""
    return self.average

  @property
  def mixes_pairs(self) -> float:
    """See Plan.mixup."""
    return self.mixup

  def init(self, rng: jax.Array, sizes: Sizes, dtype: jax.typing.DTypeLike) -> Variables:
    """A classifier that starts as torch's Linear: uniform within 1 / sqrt(F)."""
    bound = 1 / math.sqrt(sizes.dim)
    draw = lambda key, *shape: jax.random.uniform(key, shape, dtype, -bound, bound)
    kernel, bias = jax.random.split(rng)
    classifier = {
      "kernel": draw(kernel, sizes.dim, sizes.num_classes), "bias": draw(bias, sizes.num_classes)
    }  # fmt: skip
    memory = jax.tree.map(jnp.copy, {"classifier": classifier}) if self.average else {}
    return Variables(params={"classifier": classifier}, memory=memory)

  def classifier(self, v: Variables, average: bool = False) -> Classifier:
    """Its classifier, or the average of it."""
    return (v.memory if average else v.params)["classifier"]

  def loss(
    self, v: Variables, e: Embeddings, c: Context, phase: Phase
  ) -> tuple[jax.Array, Written]:
    """Mean over the batch of the cross-entropy."""
    assert e.labels is not None  # needs_labels
    kernel, bias = v.params["classifier"]["kernel"], v.params["classifier"]["bias"]
    features = e.queries[0].astype(kernel.dtype)
    logits = jnp.matmul(features, kernel, precision=infonce.HIGHEST) + bias[None]
    wanted = jax.nn.one_hot(e.labels, c.sizes.num_classes, dtype=logits.dtype)
    if self.mixup:
      own = jax.lax.axis_index(AXIS) * len(wanted) + jnp.arange(len(wanted))
      wanted = mix(wanted, shares(c.rng, c.sizes.batch_size, self.mixup)[own])
    likeliest = jnp.argmax(wanted, -1)
    wanted = (1 - self.label_smoothing) * wanted + self.label_smoothing / c.sizes.num_classes
    batch = c.sizes.batch_size
    loss = -jnp.sum(wanted * jax.nn.log_softmax(logits)) / batch
    right = jnp.argmax(logits, -1) == likeliest
    return loss, Written(
      {"train/loss": loss, "train/accuracy": jnp.sum(right.astype(loss.dtype)) / batch}, v.memory
    )

  def chance(self, sizes: Sizes, phase: Phase) -> float:
    """Log of the number of classes."""
    return math.log(sizes.num_classes)
