"""AdCo, ResNet-50, ImageNet-1k, symmetric multi-crop: both 224 pixel views are keys, all views queries.

Command: python -m adco_jax.main --config=configs/adco_r50_sym_multicrop.py --config.data.dir=/datasets/imagenet
Expected: not published (the authors' program cannot do both at once) and not yet measured.
The loss is the mean over both keys of the multi-crop sum, so rates keep their meaning.
"""

from configs import adco_r50_multicrop


def get_config():
  config = adco_r50_multicrop.get_config()
  config.views.mode = "symmetric_multicrop"
  return config
