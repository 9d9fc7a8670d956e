"""Writes report.html of a workdir again, for instance while its pre-training is still running.

Command: python -m adco_jax.main --config=configs/report.py --config.pretrained=runs/r50
"""

from ml_collections import ConfigDict


def get_config():
  config = ConfigDict()
  config.task = "report"
  config.pretrained = ""  # the workdir
  return config
