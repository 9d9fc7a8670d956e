"""AdCo on scikit-learn's 1,797 handwritten digits, a small ResNet, some minutes on two CPU cores.

Command: python -m adco_jax.main --config=configs/adco_digits.py
Hardware: 2 CPU cores, 306 to 326 s where they are busy (benchmarks/results/digits.json); 81 to 97 s on another machine, without
evaluations, for 897 of the 1,297 train images (digits-held-out*.json). Expected: see docs/measured.md.
How this recipe was found, and why ImageNet's does not work here: docs/small_data.md.
"""

from configs import adco_cifar10_r18


def get_config():
  config = adco_cifar10_r18.get_config()
  config.epochs = 100
  config.model.arch = "resnet8"
  config.model.width = 0.25
  config.views.crops = ((16, 0.6, 1.0), (16, 0.6, 1.0))
  config.method.temperature = 0.4
  config.method.bank.size = 512
  config.method.bank.temperature = 0.2
  config.method.bank.learning_rate = 0.3
  config.method.bank.weight_decay = 1e-4
  config.method.bank.init = "keys"
  config.method.bank.init_epochs = 0.0
  config.data.source = "digits"
  config.data.num_examples = 1297
  config.data.batch_size = 64
  config.data.mean = (0.3, 0.3, 0.3)
  config.data.std = (0.35, 0.35, 0.35)
  config.augment.policy = "digits"
  config.eval.every_epochs = 10
  config.eval.size = 16
  config.log.every_steps = 50
  config.save.every_steps = 500
  return config
