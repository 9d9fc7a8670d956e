"""Weighted kNN on the frozen query encoder of a workdir; every test image is scored once.

Command: python -m adco_jax.main --config=configs/knn.py --config.pretrained=runs/r50
Writes: eval/knn-<step>.json and eval/neighbours-<step>.png in that workdir.
Paper: Wu et al. 2018; k and temperature are chosen on train images left out of the search.
An empty or zero value means: as in the pre-training.
"""

from ml_collections import ConfigDict


def get_config():
  config = ConfigDict()
  config.task = "knn"
  config.pretrained = ""  # workdir of a pre-training
  config.seed = 0  # of the held-out images and the few-label draws

  config.data = ConfigDict()
  config.data.dir = ""
  config.data.split = ""
  config.data.test_split = ""
  config.data.loader = ""

  config.size = 0  # side of the image that the encoder sees
  config.crop_fraction = 0.0  # centre square that it is cut from
  config.batch_size = 256

  config.knn = ConfigDict()
  config.knn.k = (1, 5, 10, 20, 50, 100, 200)
  config.knn.temperature = (0.02, 0.07, 0.2)
  config.hold_out = 0.1  # share of train on which k and temperature are chosen

  config.labels_per_class = (1, 5, 10)  # also with so few labels; () for none
  config.draws = 10  # of the few labels; mean and spread are over them
  config.baselines = True  # score the untrained encoder and raw pixels as well
  config.neighbours = 10  # test images whose nearest neighbours are drawn
  return config
