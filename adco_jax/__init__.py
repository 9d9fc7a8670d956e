"""adco_jax: pre-training of image encoders with AdCo (arXiv 2011.08435) in JAX and Flax.

What other programs use: `load_encoder`, `LoadedEncoder`, `train` and the errors they raise. Importing it starts nothing.
"""

import importlib

__version__ = "0.2.0"

_PUBLIC = {
  "load_encoder": "encoders", "LoadedEncoder": "encoders", "train": "main",
  "ConfigError": "errors", "RunError": "errors", "Preempted": "errors",
}  # fmt: skip


def __getattr__(name: str) -> object:
  if name in _PUBLIC:
    return getattr(importlib.import_module(f"adco_jax.{_PUBLIC[name]}"), name)
  raise AttributeError(f"module 'adco_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted([*globals(), *_PUBLIC])
