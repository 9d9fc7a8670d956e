"""MoCo v3, ViT-S/16, ImageNet-1k, 300 epochs.

Command: python -m adco_jax.main --config=configs/mocov3_vits16.py --config.data.dir=/datasets/imagenet
Paper: arXiv 2104.02057; values are those of facebookresearch/moco-v3 CONFIG.md for ViT-Small.
Expected: 73.2 linear top-1 (their README; the linear probe's rate is 3 per 256 images, the pre-training's 1.5e-4); here:
not yet measured.
ViT-Base: --config.model.arch=vit_base --config.model.vit.heads=12. One machine: theirs has batch 1,024 on eight GPUs.
"""

from configs import mocov3_r50


def get_config():
  config = mocov3_r50.get_config()
  config.epochs = 300
  config.model.arch = "vit_small"
  config.model.vit.heads = 12  # timm's vit_small has 6
  config.model.vit.positions = "sincos"
  config.model.vit.start = "mocov3"
  config.model.head.layers = 3
  config.method.temperature = 0.2  # [--moco-t]
  config.method.predictor_norm = (
    "all_plain"  # BatchNorm of the last layer too, without scale and bias
  )
  config.views.crops = ((224, 0.08, 1.0), (224, 0.08, 1.0))  # [--crop-min]
  config.optim.name = "adamw"
  config.optim.no_decay = ""  # on all parameters
  config.optim.learning_rate = 1.5e-4  # per 256 images
  config.optim.warmup_epochs = 40.0
  config.optim.weight_decay = 0.1
  config.optim.freeze = "patch_embed"  # [--stop-grad-conv1]
  return config
