"""What every method of a comparison is trained with: everything equal but the negatives, or each at its own best.

equal: one recipe for all (that of a config, configs/adco_cifar10_r18.py or another; symmetric views, mean over directions, the same head, rate, decay, average,
  batches and seeds); config.objective alone is switched, with the further differences of `FURTHER`. The temperature of each is
  one of a shared grid, chosen by train images, each searched among the others; AdCo's and its relatives' bank has the encoder's,
  and the rate at which its rows turn per step as they did where its recipe was found (docs/small_data.md), whatever the
  number of rows, the batch and the temperature. MoCo v3's loss is twice the temperature times the others': its rate is
  divided and its decay multiplied by that, so that a step is what the others' is. The recipe is the one in which AdCo and MoCo
  are at home: a head without BatchNorm, BatchNorm in groups with a shuffle of keys, an average of .99, SGD without warm-up.
own: what is published for each on CIFAR-10, or stands nearest to it (sources in `own`); AdCo's and its relatives' was found by
  this project on held-out CIFAR-10 images, at full width, 24 epochs, batch 256, one view as query: nobody searched like that
  for the others here.
Epochs that fill a bank are the first of a run's, 390 steps where the recipe was found, FILL_SHARE of a short run at most:
  until then all that have one train as MoCo does, on the same batches, CaCo at a temperature of its own.
"""

import importlib
from typing import NamedTuple

from benchmarks.one_run import UNTRAINED
from configs.adco_photos import bank_rate

BANKS = ("adco", "still", "query_softmax", "caco")  # filled before training
NO_TEMPERATURE = ("byol", "supervised")
MOVED = ("adco", "query_softmax", "caco")  # by a rate of its own
FILL_EPOCHS, FILL_SHARE = 2, 0.4  # of a run's at most: keys of the first hundred steps all agree
# What the sharpest comparison cannot keep equal.
FURTHER = {
  "byol": "predictor, no negatives, key encoder drawn on its own, 2 - 2 cos for a cross-entropy; no temperature, the "
  "grid of which changes the others' steps as well",
  "mocov3": "predictor",
  "mochi": "queue; mixtures of its hardest eighth behind a fifth of the run",
  "swav": "prototypes that are held for the first epoch and move at the encoder's rate, no rows besides the batch's, no key "
  "encoder, shuffle or momentum average",
  "simclr": "no key encoder, so no shuffle: both views of an image are normalised beside the same others; its "
  "gradient reaches both ends of a pair",
  "supervised": "labels; one view per image",
  "caco": "positives of the bank too; its bank filled at temperature .2",
  "random": "not filled, so trained for all epochs",
}


class Sizes(NamedTuple):
  """What a comparison holds equal besides the recipe."""

  epochs: int
  batch: int
  rows: int  # of a bank or queue
  images: int
  width: float  # of the network
  base: str = "adco_cifar10_r18"


def methods():
  """Names of all rows of the table."""
  return [*_negatives(Sizes(1, 1, 1, 1, 1))]


def _negatives(sizes):
  """{method: (objective, its settings)} in the equal recipe."""
  fill = max(1, min(FILL_EPOCHS, round(FILL_SHARE * sizes.epochs)))
  rows, some = sizes.rows, max(8, sizes.rows // 8)
  queue = {"queue_size": rows}
  bank = {"bank.size": rows}
  filled = bank | {"bank.init": "trained", "bank.init_epochs": fill}
  moves = {"bank.weight_decay": 0.0}
  return {
    "adco": ("adco", filled | moves | {"in_batch": True}),
    "still": ("still", filled | {"in_batch": True}),
    "random": ("random", bank | {"in_batch": True}),
    "query_softmax": ("query_softmax", filled | moves | {"in_batch": True}),
    "moco": ("moco", queue | {"in_batch": False}),
    "moco_in_batch": ("moco", queue | {"in_batch": True}),
    "mochi": ("mochi", queue | {
      "hardest": some, "mixed": some // 2, "mixed_with_query": some // 4, "start_epochs": 0.2 * sizes.epochs,
    }),
    "simclr": ("simclr", {}),
    "mocov3": ("mocov3", {"predictor_width": 1024}),
    "byol": ("byol", {"predictor_width": 1024}),
    "swav": ("swav", {"prototypes": min(512, sizes.images // 20), "frozen_epochs": min(1.0, 0.2 * sizes.epochs)}),
    "caco": ("caco", bank | {"bank.init_epochs": fill, "bank.warmup_epochs": 0.05 * sizes.epochs}),
    "supervised": ("supervised", {}),
  }  # fmt: skip


def equal(method, sizes, temperature=None):
  """Flags of a run in the equal recipe."""
  settings, optim = _settings(method, sizes, temperature), base_config(sizes.base).optim
  if method == "mocov3" and temperature is not None and optim.name == "sgd":
    factor = 2 * temperature  # of its loss; rates and decay with which SGD takes the same steps
    scaled = optim.learning_rate / factor, optim.lr_final / factor, optim.weight_decay * factor
    names = "learning_rate", "lr_final", "weight_decay"
    settings |= {f"optim.{k}": float(f"{x:.6g}") for k, x in zip(names, scaled, strict=True)}
  return _flags(sizes, settings)


def untrained(sizes):
  """(name, flags) of a row that says where all begin."""
  return "untrained", [*equal("random", sizes), UNTRAINED]


def _settings(method, sizes, temperature):
  """{key: value} of all that a method has beside the config, its temperature among it."""
  objective, own = _negatives(sizes)[method]
  if temperature is not None and method not in NO_TEMPERATURE:
    own = own | {"temperature": temperature}
    if objective in MOVED:
      own |= {
        "bank.temperature": temperature,
        "bank.learning_rate": _rate(objective, sizes, temperature),
      }
  one = {"views.crops": base_config(sizes.base).views.crops[:1]} if method == "supervised" else {}
  return {
    "objective": objective, "epochs": sizes.epochs, "data.batch_size": sizes.batch,
    "model.width": sizes.width, "log.every_steps": 20, "save.every_steps": 10**6, "save.keep": 1,
    "views.mode": "one" if one else "symmetric", **one, **{f"method.{key}": value for key, value in own.items()},
  }  # fmt: skip


def _rate(objective, sizes, temperature):
  """Of a bank, at which its rows turn as where AdCo's recipe was found (and as CaCo's published ones: 3, 65,536 rows, t .08)."""
  if objective != "caco":
    return bank_rate(sizes.rows, sizes.batch, temperature)
  # A query's weights are shared by rows alone and are 1 - p of the positive and p of all others: nearly 2.
  return float(f"{bank_rate(sizes.rows, 0, temperature) / 2:.2g}")


def base_config(base):
  """The config NAME or NAME:ARGUMENT that the equal recipe is made of."""
  name, _, argument = base.partition(":")
  return importlib.import_module(f"configs.{name}").get_config(*filter(None, [argument]))


def own(method, sizes):
  """Flags of a run in a method's own recipe."""
  ((size, *_), *_) = base_config(sizes.base).views.crops
  sgd = {"optim.learning_rate": 0.06, "optim.scale_from_batch": 128, "optim.lr_final": 0.0,
         "optim.schedule": "cosine_step", "views.crops": ((size, 0.08, 1.0), (size, 0.08, 1.0))}  # fmt: skip
  head = lambda layers, width, norm: {
    "model.head.layers": layers, "model.head.width": width, "model.head.norm": norm
  }  # fmt: skip
  wide = head(2, 1024, "hidden") | {
    "model.dim": 256,
    "bn.group_size": 0,
    "augment.policy": "cifar_byol",
  }
  further = {
    # docs/small_data.md: temperatures, the turn of a row, decay and the longer filling.
    "adco": {"temperature": 0.1},
    "still": {"temperature": 0.1},
    "random": {"temperature": 0.1},
    "query_softmax": {"temperature": 0.1},
    # lightly's CIFAR-10 benchmark: SGD .06 per 128 images, decay 5e-4, crops from .08.
    "moco": sgd | {"temperature": 0.1},
    # Nothing is published for these two there: MoCo's row, MoCHi's mixtures from 5 % of the run on (10 of 200 epochs).
    "moco_in_batch": sgd | {"temperature": 0.1},
    "mochi": sgd | {"temperature": 0.1, "method.start_epochs": 0.05 * sizes.epochs},
    "simclr": sgd | head(2, 0, "all") | {"temperature": 0.5, "bn.group_size": 0},
    # Half the rate and twice the decay: the loss is BYOL's, 2 - 2 cos, lightly's -cos. Its key encoder is a copy there.
    "byol": sgd | wide | {
      "optim.learning_rate": 0.03, "optim.weight_decay": 1e-3, "method.momentum_init": "copy",
    },
    # lightly holds no prototypes; theirs have a bias in some of its versions.
    "swav": sgd | head(2, 0, "hidden") | {
      "method.frozen_epochs": 0.0, "temperature": 0.1, "views.reduction": "mean", "bn.group_size": 0, "optim.name": "adamw",
      "optim.learning_rate": 1e-3, "optim.weight_decay": 1e-6, "views.crops": ((size, 0.14, 1.0), (size, 0.14, 1.0)),
    },
    # solo-learn's temperature, average and colours, its heads of 4,096 cut to 1,024 for so narrow a network; its LARS has a
    # limit that ours has not, so the SGD of all of the above.
    "mocov3": sgd | {"ema.schedule": "cosine", "views.reduction": "sum"} | wide | head(2, 1024, "all_plain") | {"temperature": 0.2},
    # CaCo publishes nothing on small data: AdCo's row with the temperatures raised, CaCo's average, head and BatchNorm. Its
    # loss is the sum of both directions, which with AdCo's rate for the mean would be twice that rate: the mean.
    "caco": head(3, 0, "hidden") | {
      "temperature": 0.2, "model.dim": 256, "bn.group_size": 0, "ema.schedule": "cosine",
    },
    # configs/supervised_cifar10.py, which is the usual recipe of small ResNets.
    "supervised": {
      "optim.learning_rate": 0.1, "optim.scale_from_batch": 128, "optim.lr_final": 0.0, "optim.schedule": "cosine_step",
      "bn.group_size": 0, "augment.policy": "flip", "views.crops": ((size, 0.64, 0.64),), "views.ratio": (1.0, 1.0),
      "views.pad": size // 8,
    },
  }[method]  # fmt: skip
  temperature = further.pop("temperature", None)
  return _flags(sizes, _settings(method, sizes, temperature) | further)


def _flags(sizes, settings):
  return [f"--config={sizes.base}", *(f"--config.{key}={value}" for key, value in settings.items())]
