"""Fine-tuning: an encoder and a classifier trained on labels, from a pre-training, an exported file or random weights.

Command: python -m adco_jax.main --config=configs/finetune.py --config.pretrained=runs/r50
Few labels: --config.label_share=0.01 or --config.labels_per_class=10 (with --config.data.batch_size=50 or the like).
Another data set: --config.data.dir=/datasets/flowers. The same network from scratch: --config.init=random with a rate for
that, such as --config.optim.learning_rate=.1 --config.optim.head_rate=1. Small pictures: --config=configs/finetune.py:small
(crops of the padded picture in place of random resized ones).
Writes: a workdir as every pre-training does, and eval/finetune-<data>-<split>-<step>.json of the last step and of the best
one on held-out images.
Defaults: SwAV's for 10 % of ImageNet (20 epochs, batch 256, rate .01 and .2 for the classifier, no decay), with a cosine
per step. Expected: not yet measured on ImageNet.

It is a pre-training config with the objective `supervised`; None means: as in the pre-training, or, where there is none,
as configs/adco_r50.py.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import adco_r50

# Of the pre-training, unless given.
INHERITED = {
  "model": ("arch", "width", "stem", "dim"),
  "model.head": ("layers", "width", "norm"),
  "model.vit": (
    "patch", "grid", "pool", "positions", "registers", "layer_scale", "depth", "heads", "start", "attention",
  ),
  "bn": ("group_size",),
  "data": (
    "source", "dir", "subset", "name", "image_key", "label_key", "split", "test_split", "num_examples", "num_classes", "loader",
    "resident_share", "resident_size", "cut", "threads", "max_bad_fraction", "max_megapixels", "mean", "std",
  ),
  "eval": ("size", "crop_fraction"),
}  # fmt: skip


def get_config(preset="photos"):
  if preset not in ("photos", "small"):
    raise ValueError(f"no preset {preset!r}; use finetune:photos or finetune:small")
  config = adco_r50.get_config()
  config.task = "finetune"
  config.pretrained = ""  # workdir of a pre-training, or a file that configs/export.py wrote
  # pretrained: from its encoder; random: the same network and data from random weights, the supervised baseline
  config.init = "pretrained"
  del config.init_from
  config.init_head = (
    "new"  # of the classifier: new, or kept of a pretrained that has one of as many classes
  )
  config.hold_out = 0.1
  config.objective = "supervised"
  config.method = ConfigDict()
  config.method.label_smoothing = 0.0  # mass that is spread over all classes
  config.method.mixup = 0.0  # Beta(a, a) mixes pairs of images and their labels; 0: none
  config.method.average = False  # a moving average (ema.decay) of all weights, which is scored then
  config.epochs = 20
  config.bn.running_from = "mean"
  config.optim.learning_rate = 0.01
  config.optim.head_rate = 20.0
  config.optim.lr_final = 0.0
  config.optim.schedule = "cosine_step"
  config.optim.weight_decay = 0.0
  config.augment.policy = placeholder(str)  # None: flip where the pre-training's mirrors, else none
  config.views.mode = "one"
  # One row; None: as large as the images of eval.size, with shares of .08 to 1, or whole pictures less views.pad
  config.views.crops = placeholder(tuple)
  config.views.ratio = {"photos": (3 / 4, 4 / 3), "small": (1.0, 1.0)}[preset]
  config.views.pad = {"photos": 0, "small": 4}[preset]
  config.log.every_steps = 20
  config.eval.every_epochs = 1  # scores of the classifier on the images of hold_out; 0: never
  for group, names in INHERITED.items():
    branch = config
    for part in group.split("."):
      branch = branch[part]
    for name in names:
      kind = branch.get_type(name)
      del branch[name]
      branch[name] = placeholder(kind)
  return config
