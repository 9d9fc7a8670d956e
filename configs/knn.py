"""Weighted kNN on the frozen query encoder of a workdir; every test image is scored once.

Command: python -m adco_jax.main --config=configs/knn.py --config.pretrained=runs/r50
Published settings: --config=configs/knn.py:dino (k 20, .07), knn.py:wu (k 200, .07), knn.py:moco (k 200, .1, their CIFAR demo's).
Other data: --config.data.source=folder --config.data.dir=/my/images, with train/<class>/ and val/<class>/ in it.
Writes: eval/knn-<data>-<split>-<step>.json and eval/neighbours-...png, map-...png, of a ViT attention-...png, in that workdir.
Paper: Wu et al. 2018; k and temperature are chosen on train images left out of the search.
None means: as in the pre-training; of `data`, see `get_data`.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

PRESETS = {
  "chosen": ((1, 5, 10, 20, 50, 100, 200), (0.02, 0.07, 0.1, 0.2)),
  "dino": ((20,), (0.07,)),
  "wu": ((200,), (0.07,)),
  "moco": ((200,), (0.1,)),
}


def get_config(preset="chosen"):
  if preset not in PRESETS:
    raise ValueError(f"no preset {preset!r}; use knn:{', knn:'.join(PRESETS)}")
  config = ConfigDict()
  config.task = "knn"
  config.pretrained = ""  # workdir of a pre-training
  config.step = 0  # of the checkpoint; 0: the newest
  config.seed = 0  # of the held-out images and the few-label draws

  config.data = get_data()

  config.size = placeholder(int)  # side of the image that the encoder sees
  config.crop_fraction = placeholder(
    float
  )  # centre square that it is cut from; 0: the whole image, squeezed
  config.batch_size = 256  # images that the encoder sees at once

  config.knn = ConfigDict()
  config.knn.k = PRESETS[preset][0]  # neighbours that vote: the best of these
  config.knn.temperature = PRESETS[preset][1]  # of their weights: the best of these
  config.hold_out = 0.1  # share of train on which k and temperature are chosen

  config.labels_per_class = (1, 5, 10)  # also with so few labels; () for none
  config.label_shares = ()  # also with such shares of each class's labels: (0.01, 0.1)
  config.draws = 10  # of the few labels; mean and spread are over them
  config.baselines = True  # score the untrained encoder and raw pixels as well
  config.projected = False  # score what the head makes of the features as well
  config.recall = (
    1,
    5,
    10,
  )  # test images of which one of so many nearest others is of their class; () for none
  config.features = get_features()
  config.neighbours = 10  # test images whose nearest neighbours are drawn
  config.map = 1000  # test images, spread over all, on the map of features; 0: no map
  config.attention = (
    8  # test images, spread over all, with what a ViT's class token looks at; 0: none
  )
  return config


def get_features():
  """Which features are scored; where they lie while a task works on them, and after it."""
  features = ConfigDict()
  # Of a ViT: pooled (as the model pools), class (token), mean (of patches), class_mean (both: DINOv2), class_4 (class
  # tokens of the last four blocks: DINO's ViT-S), chosen (the best of these four on held-out train images).
  features.tokens = "pooled"
  features.keep_gigabytes = 0.5  # so many at most stay in the workdir for the next task; 0: none
  features.memory_gigabytes = 4.0  # more lie in a file of float32
  return features


def get_data():
  """The section `data` of all tasks that read images with the encoder of a finished run.

  With another source than the pre-training's, None holds for how images are read alone: what describes a
  data set (name, splits, keys, labels, number of classes) is then as in configs/adco_r50.py.
  """
  data = ConfigDict()
  data.source = placeholder(
    str
  )  # folder packed webdataset tfrecord tfds npz digits cifar10_binary csv list voc
  data.dir = placeholder(str)  # the folder (tfds: its data_dir), or the .npz file
  data.name = placeholder(str)  # of a TFDS set: NAME, NAME/CONFIG or NAME:VERSION
  data.split = placeholder(
    str
  )  # knn, linear: whose labels are learnt from; embed: what is embedded
  data.test_split = placeholder(str)  # what knn and linear score
  data.subset = placeholder(
    str
  )  # text file with the name of an image per line: of `split` these alone
  data.image_key = placeholder(
    str
  )  # feature of TFRecord examples that holds the image; column of files of a CSV
  data.label_key = placeholder(str)  # ... its label
  data.labels = placeholder(bool)  # False: forget them
  data.num_classes = placeholder(int)  # 0: as found in the data
  data.loader = placeholder(str)  # pipeline (tf.data), resident (on the device), auto
  data.resident_size = placeholder(int)  # side to which resident images are cut, arrays too; 0: not
  data.max_bad_fraction = placeholder(float)  # share of images that may be broken (gray instead)
  data.max_megapixels = placeholder(float)  # an image whose header states more counts as broken
  data.threads = placeholder(int)  # of tf.data; 0: one per core
  return data
