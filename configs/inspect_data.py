"""What is in a data set, and how fast this machine reads it, before anyone trains.

Command: python -m adco_jax.main --config=configs/inspect_data.py --config.data.dir=/my/images
Writes inspect.html, inspect.json and inspect.png to --workdir (default runs/inspect_data) and changes nothing else.
Any pre-training config inspects its own data, crops and colours with --config.task=inspect_data.
"""

from configs import adco_r50


def get_config():
  config = adco_r50.get_config()
  config.task = "inspect_data"
  return config
