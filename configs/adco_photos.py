"""AdCo on your own ordinary photographs: a few thousand to a few hundred thousand of them, one device.

Command: python -m adco_jax.main --config=adco_photos:5000 --config.data.dir=FOLDER --workdir=runs/photos
5000: about how many photographs there are; the bank's size follows from it. FOLDER: any tree of images;
train/<class>/... and val/<class>/... (or test/) where there are labels, which only scores use.
Larger network or pictures: --config.model.arch=resnet50 --config.views.crops="((224,.2,1.),(224,.2,1.))"
--config.eval.size=224. Temperatures and rates: docs/small_data.md; they are our choice, made on small sets.
Expected: 200 epochs are not yet measured; 30 epochs on 5,000 small pictures at a quarter of the width gave kNN
.376, untrained .248 (2026-11-27, docs/small_data.md, "Photographs").
"""

import math

from configs import adco_r50


def get_config(images="5000"):
  if not images.isdecimal() or not int(images):
    raise ValueError(f"{images!r} is no number of photographs; use one such as adco_photos:5000")
  config = adco_r50.get_config()
  config.epochs = 200
  config.model.arch = "resnet18"
  config.views.crops = ((128, 0.2, 1.0), (128, 0.2, 1.0))
  config.method.temperature = 0.2
  config.method.bank.size = bank_size(int(images))
  config.method.bank.temperature = 0.2
  config.data.batch_size = 128
  config.method.bank.learning_rate = bank_rate(
    config.method.bank.size, config.data.batch_size, config.method.bank.temperature
  )
  config.method.bank.init = (
    "keys"  # rows that begin where the queries are; else a small bank takes no part
  )
  config.ema.decay = 0.99
  config.optim.learning_rate = 0.06
  config.optim.weight_decay = 5e-4
  config.optim.warmup_epochs = 2.0
  config.data.num_examples = int(images)
  config.save.every_steps = 1000
  config.eval.every_epochs = 5
  config.eval.size = 128
  return config


def bank_size(images):
  """A power of two: about a quarter of the images, 256 at least, the authors' 65,536 at most."""
  return max(256, min(65536, 2 ** round(math.log2(images / 4))))


def bank_rate(bank, batch, temperature, turn=0.023):
  """The rate at which a row turns by `turn` per step, as in the published setting: docs/small_data.md."""
  return float(f"{turn * (bank + batch) * temperature / 10:.2g}")
