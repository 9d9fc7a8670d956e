"""Is a killed run the same run? A short job straight through and the same job killed on its way, compared.

Command: python -m adco_jax.main --config=configs/verify_resume.py --config.of=configs/adco_digits.py
Prints the largest difference of all numbers of both final states (0.0) and both fingerprints.
Hardware: whatever the job itself needs, twice. Nothing outside --workdir is touched but this program's own cache (docs/reliability.md).
"""

from ml_collections import ConfigDict


def get_config():
  config = ConfigDict()
  config.task = "verify_resume"
  config.of = ""  # the pre-training config to verify
  config.flags = (
    ""  # its overrides, written as in a shell: --config.data.dir='/my images' --config.seed=1
  )
  config.extend_at = 0  # step at which the job is stopped and extended; 0: it is not
  config.extend_flags = ""  # the overrides that it goes on with, beside --extend: --config.epochs=3
  config.steps = 40  # of the job
  config.save_steps = 7  # between its checkpoints
  config.kills = 3  # SIGKILLs, at steps drawn from `seed`
  config.seed = 0  # of the kills
  return config
