"""AdCo, ResNet-50, ImageNet-1k, multi-crop: the authors' `--multi_crop=1`, one key and five queries.

Command: python -m adco_jax.main --config=configs/adco_r50_multicrop.py --config.data.dir=/datasets/imagenet
Expected: 73.2 linear top-1 after 200 epochs (paper's abstract); this implementation: not yet measured.
View 0 is the key; losses and bank gradients of the five queries are summed at unchanged rates, as theirs.
"""

from configs import adco_r50


def get_config():
  config = adco_r50.get_config()
  config.views.mode = "multicrop"
  config.views.crops = (
    (224, 0.2, 1.0),
    (224, 0.2, 1.0),
    (192, 0.172, 0.86),
    (160, 0.143, 0.715),
    (128, 0.114, 0.571),
    (96, 0.086, 0.429),
  )
  return config
