"""A linear SVM per class on the frozen query encoder of a workdir, scored by mean average precision.

Command: python -m adco_jax.main --config=configs/svm.py --config.pretrained=runs/r50 --config.data.source=csv --config.data.dir=/my/images
VOC07: --config=configs/svm.py:voc07 --config.data.dir=/datasets/VOCdevkit (trainval and test; every image squeezed to 224 x 224).
Writes: eval/svm-<data>-<split>-<step>.json in that workdir. Labels: any number per image, or one.
Defaults: VISSL's svm for VOC07: costs by three-fold cross-validation for each class, area under the precision of all
thresholds, difficult images negatives in training and left out in testing; of few positives five draws. Its features
are of 2 x 2 places (8192 numbers), these are pooled over all (2048). None means: as in the pre-training.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import knn


def get_config(preset=""):
  if preset not in ("", "voc07"):
    raise ValueError(f"no preset {preset!r}; use svm or svm:voc07")
  config = ConfigDict()
  config.task = "svm"
  config.pretrained = ""  # workdir of a pre-training
  config.step = 0  # of the checkpoint; 0: the newest
  config.seed = 0  # of the draws of few positives

  config.data = knn.get_data()

  config.size = placeholder(int)  # side of the image that the encoder sees
  config.crop_fraction = placeholder(
    float
  )  # centre square that it is cut from; 0: the whole image, squeezed
  config.batch_size = 256  # images that the encoder sees at once

  # C of the SVMs, chosen for each class by cross-validation on train
  config.costs = (0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0)
  config.folds = 3  # of the cross-validation
  config.positive_weight = 2.0  # of an image that has the class; of one without: 1
  config.ignored_are_negatives = (
    True  # images that do not count for a class (difficult): learnt as without it; False: left out
  )
  # also with so few images that have the class, and classes - 1 times as many without; () for none
  config.labels_per_class = (1, 2, 4, 8, 16, 32, 64, 96)
  config.draws = 5  # of the few; mean and spread are over them
  config.baselines = True  # score the untrained encoder and raw pixels as well
  config.projected = False  # score what the head makes of the features as well
  config.features = knn.get_features()
  if preset == "voc07":
    config.data.source, config.data.split, config.data.test_split = "voc", "trainval", "test"
    config.size, config.crop_fraction = 224, 0.0
  return config
