"""AdCo, ResNet-18 with the small stem, CIFAR-10, held on the device.

Command: python -m adco_jax.main --config=configs/adco_cifar10_r18.py --config.data.dir=/datasets/cifar10.npz
Data: one .npz with train_images, test_images uint8 [N, 32, 32, 3], train_labels, test_labels; or cifar-10-batches-py as published.
Expected: .634 +- .004 held-out kNN after two epochs of filling and 24 more (3 seeds, one H200, CIFAR-10 as JPEGs of quality 75); with the bank's former
settings (.2 / .1, 8,192 rows filled once) .541: docs/small_data.md, "A bank that plays". 200 epochs: not yet measured.
A single-GPU port of the authors' code (Erfan3738/AdCo) reports kNN 88.1 asymmetric and 90.3 symmetric after 800 epochs
with K 8192, rate .04, temperatures .14/.03.
"""

from configs import adco_r50


def get_config():
  config = adco_r50.get_config()
  config.epochs = 200
  config.model.arch = "resnet18"
  config.model.stem = "small"
  config.views.crops = ((32, 0.2, 1.0), (32, 0.2, 1.0))
  config.method.temperature = 0.1
  config.method.bank.size = 4096
  config.method.bank.temperature = 0.1
  config.method.bank.learning_rate = 1.0
  config.method.bank.weight_decay = 0.0
  config.method.bank.init_epochs = 2.0  # keys of the first hundred steps all agree
  config.ema.decay = 0.99
  config.optim.learning_rate = 0.06
  config.optim.weight_decay = 5e-4
  config.data.source = "npz"
  config.data.test_split = "test"
  config.data.num_examples = 50000
  config.data.mean = (0.4914, 0.4822, 0.4465)
  config.data.std = (0.2470, 0.2435, 0.2616)
  config.augment.policy = "cifar"
  config.eval.every_epochs = 5
  config.eval.size = 32
  config.eval.crop_fraction = 1.0
  return config
