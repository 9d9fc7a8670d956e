"""Eight CPU devices, no silent broadcasting; every test file starts from here."""

import functools
import os
import tempfile

# Unoptimised code by the plain emitters compiles four times as fast; some end-to-end tests start processes without.
FAST = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
FLAGS = f"--xla_force_host_platform_device_count=8 {FAST}"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
os.environ["JAX_PLATFORMS"] = "cpu"
# A run that is started again, as many are here, compiles nothing twice; the folder goes with the session.
CACHE = tempfile.TemporaryDirectory(prefix="adco_jax_tests_")
os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

import jax
import pytest

from adco_jax import main

main.settle()
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def float64():
  """The test runs with 64-bit types."""
  with jax.enable_x64(True):
    yield


@pytest.fixture
def strict():
  """The test refuses implicit dtype promotion."""
  with jax.numpy_dtype_promotion("strict"):
    yield


@pytest.fixture
def optimised(monkeypatch):
  """What the test jits is compiled with all optimisations, as in training, in spite of FAST above."""
  options = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
  monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=options))
