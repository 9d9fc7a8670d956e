"""The only import of TensorFlow: it runs the pipeline's threads on the host and never touches an accelerator.

Flow: pipeline calls `import_tensorflow()` when a tf.data loader is really used (the import takes seconds).
Not here: anything else.
"""

import os


def import_tensorflow():
  """TensorFlow with its accelerators hidden, so that it leaves their memory to JAX. Raises ConfigError."""
  from adco_jax.plan import ConfigError

  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  os.environ.setdefault(
    "TF_ENABLE_ONEDNN_OPTS", "0"
  )  # it says so on stderr, and nothing here uses it
  os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")  # else all of Keras is imported, for seconds
  try:
    import tensorflow as tf
  except ImportError as error:
    raise ConfigError(
      "config.data.loader='pipeline': TensorFlow is not installed; pip install -r requirements.txt, "
      "or use --config.data.loader=resident"
    ) from error
  for kind in ("GPU", "TPU"):
    tf.config.set_visible_devices([], kind)
  return tf
