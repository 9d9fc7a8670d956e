"""The only import of TensorFlow: it runs the pipeline's threads on the host and never touches an accelerator.

Flow: pipeline calls `check_tensorflow()` at once and `import_tensorflow()` when the first batch is asked for: the
  import takes seconds, in which programs are compiled.
Not here: anything else.
"""

import importlib.util
import os
from types import ModuleType

from adco_jax.errors import ConfigError


def check_tensorflow() -> None:
  """Raises ConfigError where TensorFlow is not installed."""
  if not importlib.util.find_spec("tensorflow"):
    raise ConfigError(
      "config.data.loader='pipeline': TensorFlow is not installed; pip install tensorflow, "
      "or use --config.data.loader=resident"
    )


def import_tensorflow() -> ModuleType:
  """TensorFlow with its accelerators hidden, so that it leaves their memory to JAX."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  os.environ.setdefault(
    "TF_ENABLE_ONEDNN_OPTS", "0"
  )  # it says so on stderr, and nothing here uses it
  os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")  # else all of Keras is imported, for seconds
  import tensorflow as tf

  for kind in ("GPU", "TPU"):
    tf.config.set_visible_devices([], kind)
  return tf
