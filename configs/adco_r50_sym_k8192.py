"""AdCo, ResNet-50, ImageNet-1k, symmetric, 8,192 negatives: `--sym=1 --cluster 8192`.

Command: python -m adco_jax.main --config=configs/adco_r50_sym_k8192.py --config.data.dir=/datasets/imagenet
Expected: 70.2 linear top-1 after 200 epochs (authors' README); this implementation: not yet measured.
"""

from configs import adco_r50_sym


def get_config():
  config = adco_r50_sym.get_config()
  config.method.temperature = 0.14  # --moco_t
  config.optim.learning_rate = 0.04  # --lr
  config.method.bank.size = 8192
  config.method.bank.temperature = 0.03  # --mem_t
  return config
