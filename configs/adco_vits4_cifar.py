"""AdCo, a ViT of patches of four pixels, CIFAR-10, held on the device.

Command: python -m adco_jax.main --config=configs/adco_vits4_cifar.py --config.data.dir=/datasets/cifar10.npz
Data, bank and views: configs/adco_cifar10_r18.py. Encoder: ViT-Ti's width with nine blocks and twelve heads of 16 numbers,
AdamW with the usual decay of ViTs, warm-up of ten epochs: our choice; no recipe of the authors exists.
Expected: not yet measured at 200 epochs.
"""

from configs import adco_cifar10_r18


def get_config():
  config = adco_cifar10_r18.get_config()
  config.model.arch = "vit_tiny"
  config.model.vit.patch = 4
  config.model.vit.depth = 9
  config.model.vit.heads = 12
  config.model.vit.pool = "mean"
  config.bn.group_size = 0  # there is no BatchNorm
  config.optim.name = "adamw"
  config.optim.no_decay = "vectors"
  config.optim.learning_rate = 5e-4
  config.optim.scale_from_batch = 256
  config.optim.lr_final = 0.0
  config.optim.schedule = "cosine_step"
  config.optim.warmup_epochs = 10.0
  config.optim.weight_decay = 0.05
  return config
