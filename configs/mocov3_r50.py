"""MoCo v3, ResNet-50, ImageNet-1k, 100 epochs.

Command: python -m adco_jax.main --config=configs/mocov3_r50.py --config.data.dir=/datasets/imagenet
Paper: arXiv 2104.02057; values are those of facebookresearch/moco-v3 CONFIG.md for 100 epochs (for 300: rate .3; for 1000:
rate .3, decay 1.5e-6, average .996).
Expected: 68.9 linear top-1 (their README); here: not yet measured.
Differs: the last BatchNorm of a residual block starts at 1, theirs at 0.
"""

from ml_collections import ConfigDict

from configs import adco_r50


def get_config():
  config = adco_r50.get_config()
  config.epochs = 100
  config.objective = "mocov3"
  config.method = ConfigDict()
  config.method.temperature = 1.0  # [--moco-t]
  config.method.predictor_width = 4096  # [--moco-mlp-dim]
  config.method.predictor_norm = "hidden"  # BatchNorm of it; all_plain: of the last layer too (ViT)
  config.model.dim = 256  # [--moco-dim]
  config.model.head.width = 4096
  config.model.head.norm = "all_plain"
  config.views.mode = "symmetric"
  config.views.reduction = "sum"
  config.bn.group_size = 0
  config.ema.decay = 0.99  # [--moco-m]
  config.ema.schedule = "cosine"  # [--moco-m-cos]
  config.optim.name = "lars"
  config.optim.no_decay = "vectors"
  config.optim.learning_rate = 0.6  # per 256 images [--lr]
  config.optim.scale_from_batch = 256
  config.optim.lr_final = 0.0
  config.optim.schedule = "cosine_step"
  config.optim.warmup_epochs = 10.0  # [--warmup-epochs]
  config.optim.weight_decay = 1e-6  # [--wd]
  config.data.batch_size = 4096
  config.augment.policy = "byol"
  config.augment.blur_kernel = "pillow"  # as their loader
  return config
