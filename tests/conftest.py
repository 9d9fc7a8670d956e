"""Eight CPU devices, no silent broadcasting; every test file starts from here."""

import contextlib
import fcntl
import functools
import gc
import io
import os
import pathlib
import shutil

from adco_jax.runtime import compiled

# Unoptimised code by the plain emitters, in one piece, compiles five times as fast; some tests start processes without.
FAST = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
FLAGS = f"--xla_force_host_platform_device_count=8 {FAST}"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
os.environ["JAX_PLATFORMS"] = "cpu"
# No program is compiled twice, by whichever worker, in this session and in those after it (`pytest --cache-clear`).
CACHE = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "d" / "compiled" / compiled.machine()
if "PYTEST_XDIST_WORKER" not in os.environ:
  CACHE.mkdir(parents=True, exist_ok=True)
  compiled.tidy(CACHE)
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import jax
import pytest

from adco_jax import main
from tests.settings import OPTIMISED

main.settle()
jax.config.update("jax_numpy_rank_promotion", "raise")
# Tracing makes many objects that live on; looking through all of them again and again is a quarter of its time.
gc.freeze()
gc.set_threshold(20_000, 10, 10)


def pytest_collection_modifyitems(config, items):
  """Refuses a slow test of no group or of several: launch/nightly.sh would leave it out, or run it twice."""
  marks = [line.split(": ") for line in config.getini("markers")]
  groups = {name for name, kind, *_ in marks if kind == "group"}
  for item in items:
    names = {mark.name for mark in item.iter_markers()}
    if "slow" in names and len(names & groups) != 1:
      raise pytest.UsageError(f"{item.nodeid}: is slow, so of one of the groups {sorted(groups)}")


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
  """(workdir, fingerprint) of the run of tests.test_end_to_end's flags, trained once for all workers; for `finished`."""
  from tests import test_end_to_end as run

  folder = tmp_path_factory.getbasetemp()
  folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
  workdir, said = folder / "trained", folder / "trained.txt"
  with open(folder / "trained.lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not said.exists():
      with contextlib.redirect_stdout(io.StringIO()) as printed:
        run.run(workdir)
      said.write_text(printed.getvalue())
  return workdir, run.fingerprint(said.read_text())


@pytest.fixture
def finished(trained, tmp_path_factory):
  """(workdir, fingerprint) of a run that was trained in one go; the test's own to change."""
  workdir, number = trained
  return shutil.copytree(workdir, tmp_path_factory.mktemp("finished") / "run"), number


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
  monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=OPTIMISED))
