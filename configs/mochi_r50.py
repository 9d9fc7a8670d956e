"""MoCHi, ResNet-50, ImageNet-1k: MoCo v2 with further negatives mixed of the hardest ones.

Command: python -m adco_jax.main --config=configs/mochi_r50.py --config.data.dir=/datasets/imagenet
Paper: arXiv 2010.01028, (N, s, s') = (1024, 512, 256) from epoch 15 on as they are remembered: only its abstract could be
read, and no official code exists.
Expected: 68.7 linear top-1 after 800 epochs (derived from AdCo's introduction); here: not yet measured.
"""

from ml_collections import ConfigDict

from configs import moco_r50


def get_config():
  config = moco_r50.get_config()
  config.objective = "mochi"
  config.method = ConfigDict()
  config.method.temperature = 0.2  # of the loss
  config.method.queue_size = 65536  # K keys that wait in the queue
  config.method.hardest = 1024  # N nearest rows that are mixed
  config.method.mixed = 512  # s rows of two of them
  config.method.mixed_with_query = 256  # s' rows of one of them and the query
  config.method.start_epochs = 15.0  # epochs of MoCo before anything is mixed
  return config
