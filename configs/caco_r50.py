"""CaCo (AdCo's successor), ResNet-50, ImageNet-1k, 200 epochs, two views.

Command: python -m adco_jax.main --config=configs/caco_r50.py --config.data.dir=/datasets/imagenet
Paper: arXiv 2203.14370; values are those of maple-research-lab/CaCo's README for batch 1024.
Expected: 71.3 linear top-1 (their README); here: not yet measured.
Differs: while the bank is filled the key encoder's average is the run's (.99), theirs .999.
"""

from ml_collections import ConfigDict

from configs import adco_r50


def get_config():
  config = adco_r50.get_config()
  config.objective = "caco"
  config.method = ConfigDict()
  config.method.temperature = 0.08  # [--moco_t]
  config.method.bank = ConfigDict()
  config.method.bank.size = 65536  # [--cluster]
  config.method.bank.temperature = 0.08  # [--mem_t]
  config.method.bank.learning_rate = 3.0  # not scaled with the batch [--memory_lr]
  config.method.bank.warmup_epochs = 10.0  # in which its rate grows from 0
  config.method.bank.momentum = 0.9  # of its steps
  config.method.bank.init_epochs = (
    0.0  # first epochs in which it is a queue; 0: K/B steps before them
  )
  config.model.dim = 256
  config.model.head.layers = 3
  config.model.head.norm = "hidden"
  config.views.mode = "symmetric"
  config.views.reduction = "sum"
  config.bn.group_size = 0
  config.ema.decay = 0.99
  config.ema.schedule = "cosine"
  config.optim.name = "lars"
  config.optim.no_decay = "vectors"
  config.optim.learning_rate = 0.3  # per 256 images [--lr]
  config.optim.scale_from_batch = 256
  config.optim.lr_final = 0.003  # scaled alike [--lr_final]
  config.optim.warmup_epochs = 10.0
  config.optim.weight_decay = 1.5e-6
  config.data.batch_size = 1024
  config.augment.policy = "byol"
  config.augment.blur_kernel = "pillow"  # as their loader
  return config
