"""MoCo v2, ResNet-50, ImageNet-1k, in AdCo's trainer: a queue in place of the bank, all else equal.

Command: python -m adco_jax.main --config=configs/moco_r50.py --config.data.dir=/datasets/imagenet
Expected: 67.5 +- 0.1 linear top-1 after 200 epochs (5 runs, MoCo's README); here: not yet measured.
"""

from ml_collections import ConfigDict

from configs import adco_r50


def get_config():
  config = adco_r50.get_config()
  config.objective = "moco"
  config.method = ConfigDict()
  config.method.temperature = 0.2  # of the loss [--moco-t]
  config.method.in_batch = False  # True: all keys of the batch are further negatives
  config.method.queue_size = 65536  # K keys that wait in the queue [--moco-k]
  config.optim.lr_final = 0.0  # MoCo's cosine ends at zero
  return config
