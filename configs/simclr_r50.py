"""SimCLR, ResNet-50, ImageNet-1k: the batch's other embeddings are the negatives.

Command: python -m adco_jax.main --config=configs/simclr_r50.py --config.data.dir=/datasets/imagenet
Paper: arXiv 2002.05709 (v1's two-layer head); values are the flags of google-research/simclr run.py and its README.
Expected: 69.1 linear top-1 after 1000 epochs (their checkpoint); here: not yet measured.
Differs: colour's strength is the policy's, its contrast and saturation are torchvision's; the last BatchNorm of the head has a
bias; the last BatchNorm of a residual block starts at 1, theirs at 0, and the head as torch's; views are forward passes of
their own.
"""

from ml_collections import ConfigDict

from configs import adco_r50


def get_config():
  config = adco_r50.get_config()
  config.epochs = 1000
  config.objective = "simclr"
  config.method = ConfigDict()
  config.method.temperature = 0.1  # [--temperature]
  config.model.head.norm = "all"  # Linear, BatchNorm, ReLU, Linear, BatchNorm
  config.views.mode = "symmetric"
  config.views.reduction = "sum"  # objective.py: loss_a + loss_b
  config.views.crops = ((224, 0.08, 1.0), (224, 0.08, 1.0))
  config.bn.group_size = 0  # [--global_bn]
  config.optim.name = "lars"  # [--optimizer]
  config.optim.no_decay = "vectors"
  config.optim.learning_rate = 0.3  # per 256 images [--learning_rate]
  config.optim.scale_from_batch = 256
  config.optim.lr_final = 0.0
  config.optim.schedule = "cosine_step"
  config.optim.warmup_epochs = 10.0  # [--warmup_epochs]
  config.optim.weight_decay = 1e-6  # v1; 1e-4 in v2 [--weight_decay]
  config.data.batch_size = 4096  # [--train_batch_size]
  config.data.mean = (0.0, 0.0, 0.0)  # images stay in 0..1
  config.data.std = (1.0, 1.0, 1.0)
  config.augment.policy = "simclr"
  return config
