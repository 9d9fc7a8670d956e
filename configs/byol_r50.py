"""BYOL, ResNet-50, ImageNet-1k, 1000 epochs: no negatives.

Command: python -m adco_jax.main --config=configs/byol_r50.py --config.data.dir=/datasets/imagenet
Paper: arXiv 2006.07733; values are those of deepmind-research byol/configs/byol.py for 1000 epochs (for 300: rate .3, average
.99, decay 1e-6; for 100: .45, .99, 1e-6).
Expected: 74.3 linear top-1 (paper); here: not yet measured.
Differs: no classifier is trained beside it; crops are cut bilinear; colours are torchvision's, theirs add to the brightness
and take the contrast about each channel's mean.
"""

from ml_collections import ConfigDict

from configs import adco_r50


def get_config():
  config = adco_r50.get_config()
  config.epochs = 1000
  config.objective = "byol"
  config.method = ConfigDict()
  config.method.predictor_width = 4096  # of its hidden layer
  config.method.momentum_init = "independent"  # of the key encoder; copy: the query encoder's
  config.model.dim = 256
  config.model.head.width = 4096
  config.model.head.norm = "hidden"
  config.views.mode = "symmetric"
  config.views.reduction = "sum"
  config.views.crops = ((224, 0.08, 1.0), (224, 0.08, 1.0))
  config.bn.group_size = 0
  config.ema.decay = 0.996  # base_target_ema
  config.ema.schedule = "cosine"
  config.optim.name = "lars"
  config.optim.no_decay = "vectors"
  config.optim.learning_rate = 0.2  # per 256 images
  config.optim.scale_from_batch = 256
  config.optim.lr_final = 0.0
  config.optim.schedule = "cosine_step"
  config.optim.warmup_epochs = 10.0
  config.optim.weight_decay = 1.5e-6
  config.data.batch_size = 4096
  config.augment.policy = "byol"
  return config
