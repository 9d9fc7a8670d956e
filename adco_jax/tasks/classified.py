"""A run on labels scores its own classifier: on held-out train images while it trains, on test images at its end.

Flow: pretrain opens the test images before anything compiles (`open_test`), and asks a `Classified` for its online evaluation and,
  behind the last step, for eval/finetune-<data>-<split>-<step>.json, which report and card show.
Holds: no image that is scored was trained on; the last step is scored, and the best one on held-out images, each under its
  own step; what is stored is not computed again.
Not here: the arithmetic (evaluation.classifier), which images are held out (labelled).
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from adco_jax import build
from adco_jax.config.plan import Plan
from adco_jax.data.labelled import Parts
from adco_jax.data.sources import loading
from adco_jax.data.sources.base import Source
from adco_jax.errors import NoSplit, require
from adco_jax.evaluation import classifier, results
from adco_jax.evaluation.classifier import Best, OnlineClassifier
from adco_jax.objectives.base import Classifying, averages
from adco_jax.runtime import processes, sharding
from adco_jax.runtime.guard import Guard
from adco_jax.runtime.processes import say
from adco_jax.tasks import scored_data
from adco_jax.training.restore import ENCODERS
from adco_jax.training.state import TrainState
from adco_jax.training.trainer import Trainer
from adco_jax.workdir.checkpoint import restore_parts, saved_steps
from adco_jax.workdir.fingerprints import fingerprint

VERSION = 1  # of the arithmetic of a score


class Prepared(NamedTuple):
  """What is known before anything compiles."""

  source: Source  # that is trained on
  plan: Plan
  parts: Parts  # all of it
  test: Source | None = None


def open_test(config: ConfigDict, train: Source) -> Source | None:
  """The test images of a run whose objective classifies, with the classes of `train`; None where there are none.

  Raises ConfigError for images of `train`, or of classes that it lacks.
  """
  data = config.data
  if not isinstance(build.create_objective(config), Classifying) or not data.test_split:
    return None
  resolved = data.copy_and_resolve_references()
  resolved.source = train.kind  # what was taken for what is said once
  try:
    test = build.open_source(resolved, data.test_split)
  except NoSplit:
    say(f"no split {data.test_split} there: the classifier is not scored on test images")
    return None
  if test.labels is None or test.has_several:
    say(f"split {test.split} has not one label per image: the classifier is not scored on it")
    return None
  remedy = (
    "reads images that are trained on; name another split, or none with --config.data.test_split="
  )
  shared = scored_data.share_images(train, test)
  require(not shared, "data.test_split", data.test_split, remedy)
  return loading.align_classes(test, train.classes)


class Classified:
  """Scores of one run's classifier; `best` is told of those on held-out images."""

  def __init__(
    self,
    config: ConfigDict,
    prepared: Prepared,
    trainer: Trainer,
    objective: Classifying,
    guard: Guard,
    best: Best,
  ) -> None:
    self._config, self._prepared, self._trainer = config, prepared, trainer
    self._objective, self._guard, self._best = objective, guard, best
    data = config.data
    given = trainer.encoder, tuple(data.mean), tuple(data.std), trainer.mesh
    self._classify = classifier.make_classify(*given)
    self._view = {
      "size": config.eval.size,
      "fraction": config.eval.crop_fraction,
      "batch_size": sharding.round_up(config.eval.batch_size),
    }

  def online(self, held_out: Source) -> OnlineClassifier:
    """What scores a state on the images that are held out."""
    config, mesh = self._config, self._trainer.mesh
    loader = processes.on_all(lambda: build.create_loader(config, held_out, mesh))
    given = self._classify, self._objective, loader, self._view, self._guard, self._best
    return OnlineClassifier(*given)

  def score_test(self, workdir: str, state: TrainState) -> None:
    """Writes the scores of the last state, and of the best step's where that is another. Raises guard.Leaving."""
    test, last, best = self._prepared.test, int(state.step), self._best.step
    if test is None:
      return
    scorer = self.online(test)
    self._keep(workdir, scorer, test, last, state)
    if best in (None, last):
      return
    if best not in saved_steps(workdir):
      say(f"step {best}, the best on held-out images, has no checkpoint: not scored on test images")
      return
    abstract = self._trainer.abstract_state
    names = [name for name in (*ENCODERS, "objective") if getattr(abstract, name)]
    wanted = {name: getattr(abstract, name) for name in names}
    parts, _ = restore_parts(workdir, wanted, "workdir", best)
    self._keep(workdir, scorer, test, best, state.replace(**parts))

  def _keep(self, workdir, scorer, test, step, state):
    """One result, unless it is stored."""
    variables, own = classifier.scored(self._objective, state)
    identity = self._identify(test, step, (variables, own))
    name = self._name(test)
    find = lambda: results.find(workdir, "finetune", name, step, identity)
    path, stored = processes.first_gives(find)
    facts = stored or self._facts(test, step, identity, scorer.score(variables, own))
    if not stored:
      facts["broken"] = {"test": len(scorer.broken)}
      processes.on_first(lambda: results.write(path, facts))
    processes.on_first(lambda: results.show(path, facts))

  def _identify(self, test, step, arrays):
    pixels = {key: self._config.data[key] for key in scored_data.PIXELS}
    train = self._prepared.source
    return {
      "protocol": {"version": VERSION},
      "checkpoint": {"step": step, "fingerprint": fingerprint(arrays)},
      "data": {"train": scored_data.describe(train), "test": scored_data.describe(test)},
      "view": {key: self._view[key] for key in ("size", "fraction")} | pixels,
    }

  def _name(self, test):
    train = self._prepared.source
    learnt = [] if train.split == "train" else [train.split]
    return scored_data.file_name(test.name.removesuffix(".npz"), *learnt, test.split)

  def _facts(self, test, step, identity, scores):
    config, best = self._config, self._best
    asked = {"epochs": f"{config.epochs:g}", "begun from": config.init_from or "random weights"}
    usual = {"labels_per_class": 0, "label_share": 1.0, "hold_out": 0.0}
    asked |= {key: config[key] for key, value in usual.items() if config[key] != value}
    chosen = {"the best step on held-out images: top-1": best.top1} if step == best.step else {}
    columns = {"all": scores["top1"]} | {k: x for k, x in scores.items() if k == "top5"}
    return {
      "task": "finetune", "step": step, "own": True, "identity": identity, "place": scored_data.place(config.data, test),
      "unusual": asked, "config": {"seed": config.seed}, "loss": scores["loss"],
      "encoder": "key" if averages(self._objective) else "query",  # type: ignore[arg-type]
      "train_images": self._prepared.source.num_examples, "test_images": test.num_examples,
      "results": {"trained": columns}, "chosen": {"trained": chosen}, "neighbours": {},
    }  # fmt: skip
