"""AdCo on scikit-learn's handwritten digits."""

from configs import adco_cifar10_r18


def get_config():
  config = adco_cifar10_r18.get_config()
  config.epochs = 100
  config.model.arch = "resnet10"
  config.model.width = 0.25
  config.views.crops = ((16, 0.4, 1.0), (16, 0.4, 1.0))
  config.bank.size = 512
  config.bn.group_size = 32
  config.data.batch_size = 128
  config.data.source = "digits"
  config.data.num_examples = 1297
  config.data.mean = (0.3, 0.3, 0.3)
  config.data.std = (0.35, 0.35, 0.35)
  config.augment.policy = "digits"
  config.eval.every_epochs = 10
  config.eval.size = 16
  config.log.every_steps = 20
  config.save.every_steps = 200
  config.data.test_split = "test"
  return config
