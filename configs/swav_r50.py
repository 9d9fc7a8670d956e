"""SwAV, ResNet-50, ImageNet-1k, 200 epochs, 2 x 224 and 6 x 96 pixels.

Command: python -m adco_jax.main --config=configs/swav_r50.py --config.data.dir=/datasets/imagenet
Paper: arXiv 2006.09882; values are those of facebookresearch/swav scripts/swav_200ep_pretrain.sh.
Expected: 73.9 linear top-1 (their README); here: not yet measured.
Differs: LARS stands for LARC; warm-up begins at 0, theirs at .3; the head's BatchNorm sees one view at a time.
"""

from ml_collections import ConfigDict

from configs import adco_r50


def get_config():
  config = adco_r50.get_config()
  config.epochs = 200
  config.objective = "swav"
  config.method = ConfigDict()
  config.method.temperature = 0.1  # [--temperature]
  config.method.prototypes = 3000  # [--nmb_prototypes]
  config.method.epsilon = 0.05  # [--epsilon]
  config.method.iterations = 3  # [--sinkhorn_iterations]
  config.method.frozen_epochs = 1.0  # [--freeze_prototypes_niters=313]
  config.method.queue_size = 0  # [--queue_length]; 3840 at batch 256
  config.method.queue_epochs = 15.0  # [--epoch_queue_starts]
  config.model.head.norm = "hidden"
  config.views.mode = "symmetric_multicrop"
  config.views.reduction = "mean"
  config.views.crops = ((224, 0.14, 1.0),) * 2 + ((96, 0.05, 0.14),) * 6
  config.bn.group_size = 0  # [--sync_bn]
  config.optim.name = "lars"
  config.optim.learning_rate = 4.8  # at batch 4096 [--base_lr]
  config.optim.lr_final = 0.0048  # [--final_lr]
  config.optim.schedule = "cosine_step"
  config.optim.warmup_epochs = 10.0
  config.optim.weight_decay = 1e-6
  config.data.batch_size = 4096
  config.data.std = (0.228, 0.224, 0.225)  # theirs
  config.augment.policy = "swav"
  return config
