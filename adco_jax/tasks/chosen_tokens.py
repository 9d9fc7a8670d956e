"""Which form of a ViT's tokens is scored, where `features.tokens` is `chosen`: the best on held-out train images.

Flow: a scoring task calls `choose` with the features of every form and its own judge, then scores what it gives.
Holds: no test image and no test label has a say; each representation (trained, untrained) chooses for itself, as it does k or a
  penalty; the value of every form that was tried is told and stored.
Not here: the forms (models.tokens), scores (evaluate, svm).
"""

from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from adco_jax.data import order
from adco_jax.evaluation import knn, linear, signals
from adco_jax.runtime.console import tell
from adco_jax.runtime.files import Json
from adco_jax.tasks.scoring import OF_TOKENS, Frozen, Scored

Judge = Callable[
  [np.ndarray], float
]  # features [N, F] of all train images -> score of those held out
FITTED = 20_000  # train images at most on which a probe is fitted to judge a form


def choose(
  name: str, scored: Scored, frozen: Frozen, judge: Judge
) -> tuple[Scored, Frozen, dict[str, Json]]:
  """(features of the best form, the encoder that gives them, what is to be told); the first form wins a tie.

  All as it was where there is nothing to choose: another `features.tokens`, pixels, the head's outputs.
  """
  if not frozen.forms or name not in OF_TOKENS:
    return scored, frozen, {}
  tried = {form: judge(scored.train[:, there]) for form, there in frozen.forms.items()}
  best = max(tried, key=lambda form: tried[form])
  values = ", ".join(f"{form} {value:.3f}" for form, value in tried.items())
  tell(f"tokens of {name}, on held-out train images: {values}; scored: {best}")
  there, forward = frozen.forms[best], frozen.forward
  cut = frozen._replace(forward=lambda variables, images: forward(variables, images)[:, there])
  told = [{"tokens": form, "held-out": value} for form, value in tried.items()]
  return (
    Scored(*(np.asarray(part[:, there]) for part in scored)),
    cut,
    {"tokens": best, "tokens tried": told},
  )


def choose_knn(train: np.ndarray, frozen: Frozen, config: ConfigDict) -> tuple[int, float]:
  """(k, temperature) of the kNN that is best on held-out train images."""
  labels, classes = frozen.train.targets, len(frozen.train.classes)
  return knn.choose(
    train, labels, *held_out(frozen, config), ks=config.knn.k, temperatures=config.knn.temperature, num_classes=classes
  )  # fmt: skip


def judge_knn(train: np.ndarray, frozen: Frozen, config: ConfigDict) -> float:
  """Accuracy of the best kNN on held-out train images."""
  labels, classes = frozen.train.targets, len(frozen.train.classes)
  searched, left = held_out(frozen, config)
  k, temperature = choose_knn(train, frozen, config)
  found = knn.predict(
    train, labels, train[left], k=k, temperature=temperature, num_classes=classes, rows=searched
  )
  return knn.accuracy(found, labels[left])


def judge_linear(train: np.ndarray, frozen: Frozen, config: ConfigDict) -> float:
  """Accuracy on held-out train images of logistic regression at the best of the penalties, fitted on FITTED others at most."""
  labels, classes = frozen.train.targets, len(frozen.train.classes)
  searched, left = held_out(frozen, config)
  searched = searched[signals.evenly(len(searched), FITTED)]
  scale = linear.scale_of(train[searched])
  fitted, seen = scale(train[searched]), scale(train[left])
  accuracies = [
    knn.accuracy(linear.predict(linear.fit(fitted, labels[searched], classes, p), seen), labels[left])
    for p in config.penalties
  ]  # fmt: skip
  return max(accuracies)


def held_out(frozen: Frozen, config: ConfigDict) -> tuple[np.ndarray, np.ndarray]:
  """Numbers of the train images (that are learnt from, that are held out)."""
  return order.hold_out(config.seed, len(frozen.train.targets), config.hold_out)
