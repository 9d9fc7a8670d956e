"""AdCo, ViT-S/16, ImageNet-1k.

Command: python -m adco_jax.main --config=configs/adco_vits16.py --config.data.dir=/datasets/imagenet
Not in the paper: encoder and optimiser are MoCo v3's (configs/mocov3_vits16.py, its sources), the bank is that of
configs/adco_r50_sym.py, both views play both parts, and the head has no BatchNorm, as AdCo's has none: our choice.
Expected: not yet measured.
"""

from configs import adco_r50_sym


def get_config():
  config = adco_r50_sym.get_config()
  config.epochs = 300
  config.model.arch = "vit_small"
  config.model.vit.positions = "sincos"
  config.model.vit.start = "mocov3"
  config.bn.group_size = 0  # there is no BatchNorm
  config.ema.decay = 0.99
  config.ema.schedule = "cosine"
  config.optim.name = "adamw"
  config.optim.no_decay = "vectors"
  config.optim.learning_rate = 1.5e-4
  config.optim.scale_from_batch = 256
  config.optim.lr_final = 0.0
  config.optim.schedule = "cosine_step"
  config.optim.warmup_epochs = 40.0
  config.optim.weight_decay = 0.1
  config.optim.freeze = "patch_embed"
  config.data.batch_size = 1024
  return config
