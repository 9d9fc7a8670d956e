"""AdCo, ResNet-50, ImageNet-1k, with SwAV's multi-crop and colours: two crops of 224 and six of 96 pixels.

Command: python -m adco_jax.main --config=configs/adco_r50_swav_crops.py --config.data.dir=/datasets/imagenet
Expected: nothing published of AdCo itself; CaCo, of the same authors, reports 75.7 after 800 epochs with these
crops and another recipe; SwAV 72.7 after 200 at batch 256. This implementation: not yet measured.
Both 224 crops are keys in turn, and the other seven views are queries (SwAV's own assignment of views).
"""

from configs import adco_r50


def get_config():
  config = adco_r50.get_config()
  config.views.mode = "symmetric_multicrop"
  config.views.crops = ((224, 0.14, 1.0),) * 2 + ((96, 0.05, 0.14),) * 6
  config.augment.policy = "swav"
  return config
