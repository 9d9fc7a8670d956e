"""Linear probe on the frozen query encoder of a workdir; every test image is scored once.

Command: python -m adco_jax.main --config=configs/linear.py --config.pretrained=runs/r50
Small sets: --config=configs/linear.py:small (logistic regression on features of unaugmented images).
Unknown scale: --config=configs/linear.py:sweep (rates x crops x forms of the features in one pass, the best on held-out train images).
MoCo's and MoCo v2's: --config=configs/linear.py:moco (main_lincls.py: rate 30, a tenth from epochs 60 and 80 on).
Writes: eval/linear-<data>-<split>-<step>.json and beside it the probe itself, .npz (kernel, bias, classes, step, fingerprint), in that workdir.
Defaults: the authors' lincls.py: SGD 10 with a cosine per epoch to 0.01, batch 256, 100 epochs, no decay,
random resized crops of .08 to 1 and flips. They report their best epoch on the validation set; this
reports the last. None means: as in the pre-training.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import knn

RECIPES = {"authors": "sgd", "moco": "sgd", "small": "lbfgs", "sweep": "sweep"}


def get_config(preset="authors"):
  if preset not in RECIPES:
    raise ValueError(f"no preset {preset!r}; use linear:{', linear:'.join(RECIPES)}")
  moco = preset == "moco"
  config = ConfigDict()
  config.task = "linear"
  config.pretrained = ""  # workdir of a pre-training
  config.step = 0  # of the checkpoint; 0: the newest
  config.seed = 0  # of the order, the crops, the held-out images and the few-label draws

  config.data = knn.get_data()
  config.data.cut = placeholder(str)  # resizing of the crops of sgd: fast or pillow

  config.size = placeholder(int)  # side of the image that the encoder sees
  config.crop_fraction = placeholder(
    float
  )  # centre square that a test image is cut from; 0: the whole image, squeezed
  config.batch_size = 256  # of sgd, and images that the encoder sees at once

  # sgd: new crops in every epoch; lbfgs: logistic regression on features of whole images; sweep: many sgd at once.
  config.recipe = RECIPES[preset]
  config.sgd = ConfigDict()
  config.sgd.epochs = 10 if preset == "sweep" else 100  # passes over the train images
  config.sgd.learning_rate = 30.0 if moco else 10.0  # where the schedule begins, as given
  config.sgd.schedule = "steps" if moco else "cosine_epoch"  # as optim.schedule of a pre-training
  config.sgd.step_epochs = (
    (60, 80) if moco else ()
  )  # of schedule steps: where the rate falls to a tenth
  config.sgd.lr_final = 0.01  # where a cosine ends
  config.sgd.momentum = 0.9  # as torch computes it
  config.sgd.weight_decay = 0.0  # on kernel and bias
  config.sgd.scale = (0.08, 1.0)  # of the random resized crops

  # sweep: every rate with every kind of crops, on features as they are and scaled; its cosine ends at 0.
  config.sweep = ConfigDict()
  config.sweep.learning_rates = (
    0.001,
    0.003,
    0.01,
    0.03,
    0.1,
    0.3,
    1.0,
    3.0,
    10.0,
    30.0,
  )  # as given
  config.sweep.crops = (0.08, 0.5)  # least share of the image that is cut out

  config.penalties = (0.001, 0.01, 0.1, 1.0)  # of lbfgs, chosen on held-out train images
  config.hold_out = 0.1  # share of train on which the penalty is chosen
  config.labels_per_class = (1, 5, 10)  # also with so few labels (always lbfgs); () for none
  config.label_shares = ()  # also with such shares of each class's labels: (0.01, 0.1)
  config.draws = 10  # of the few labels; mean and spread are over them
  config.baselines = True  # score the untrained encoder and raw pixels as well (lbfgs)
  config.features = knn.get_features()
  return config
