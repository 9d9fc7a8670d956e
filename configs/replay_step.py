"""A step that was not finite, taken again: names the first tensor that is not.

Command: python -m adco_jax.main --config=configs/replay_step.py --config.capsule=runs/r50/capsules/1200
The data and the number of devices are those of the run.
"""

from ml_collections import ConfigDict


def get_config():
  config = ConfigDict()
  config.task = "replay_step"
  config.capsule = ""  # WORKDIR/capsules/STEP, written when a run stops for max_bad_steps
  return config
