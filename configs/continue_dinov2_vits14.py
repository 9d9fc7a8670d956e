"""Pre-training goes on from DINOv2's ViT-S/14, on your own images.

First: python -m adco_jax.main --config=configs/import.py:continue_dinov2_vits14 --config.file=dinov2.safetensors --workdir=runs/dinov2
Command: python -m adco_jax.main --config=configs/continue_dinov2_vits14.py --config.init_from=runs/dinov2 --config.data.dir=/my/images
dinov2.safetensors: timm's model.safetensors of vit_small_patch14_dinov2.lvd142m. Its positions are of 37 x 37 patches and are resampled
for views of 224 pixels. The objective is SimCLR's, which needs no bank and no key encoder: our choice, as are a hundredth
of the usual rate and a clipped gradient; the encoder has learnt already.
Expected: not yet measured.
"""

from ml_collections import ConfigDict

from configs import adco_r50


def get_config():
  config = adco_r50.get_config()
  config.epochs = 20
  config.objective = "simclr"
  config.method = ConfigDict()
  config.method.temperature = 0.2
  config.model.arch = "vit_small"
  config.model.vit.patch = 14
  config.model.vit.grid = 37
  config.model.vit.layer_scale = 1e-5  # where DINOv2 began; the file's values stand there
  config.views.mode = "symmetric"
  config.bn.group_size = 0  # there is no BatchNorm
  config.optim.name = "adamw"
  config.optim.no_decay = "vectors"
  config.optim.learning_rate = 1e-5
  config.optim.lr_final = 0.0
  config.optim.schedule = "cosine_step"
  config.optim.warmup_epochs = 1.0
  config.optim.weight_decay = 0.05
  config.optim.clip_norm = 3.0  # DINOv2's
  return config
