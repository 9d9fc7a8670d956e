"""AdCo, ResNet-50, ImageNet-1k, symmetric loss: the authors' `--sym=1 --cluster=65536`.

Command: python -m adco_jax.main --config=configs/adco_r50_sym.py --config.data.dir=/datasets/imagenet
Expected: 70.6 linear top-1 after 200 epochs (authors' README); this implementation: not yet measured.
"""

from configs import adco_r50


def get_config():
  config = adco_r50.get_config()
  config.views.mode = "symmetric"
  return config
