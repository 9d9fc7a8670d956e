"""Memory of a step is kept for the next one where the host computes, and nowhere else."""

import os
import subprocess
import sys

import pytest

from adco_jax.runtime import host

STEPS = """
import resource, statistics, sys
from adco_jax.runtime import host
print(host.keep_memory())
import jax, jax.numpy as jnp
side = int(sys.argv[1])
step = jax.jit(lambda x: x + jnp.sin(jnp.outer(x, x)) @ x)
x, pages = jnp.ones(side), []
for _ in range(24):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  x = step(x).block_until_ready()
  pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(int(statistics.median(pages[12:])))
"""


def run(side, **environment):
  """(whether memory is kept, pages that the system cleared for a step of `side` x `side` numbers, once it has run a while)."""
  own = ("GLIBC_TUNABLES", "JAX_PLATFORMS", "XLA_FLAGS")
  given = {k: v for k, v in os.environ.items() if k not in own and not k.startswith("MALLOC_")}
  command = [sys.executable, "-c", STEPS, str(side)]
  told = subprocess.run(
    command, env={**given, **environment}, capture_output=True, text=True, check=True
  )
  kept, pages = told.stdout.split()
  return kept == "True", int(pages)


@pytest.mark.parametrize("side", [2_900, 4_100])
def test_a_step_finds_the_memory_of_the_one_before(side):
  """32 MiB, which malloc would never keep of itself, and 64."""
  kept, pages = run(side, JAX_PLATFORMS="cpu")
  assert kept and pages < 100
  assert run(side, JAX_PLATFORMS="cpu", MALLOC_TOP_PAD_="0")[1] > side * side * 4 / 4096


@pytest.mark.parametrize(
  "environment",
  [
    {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
    {"JAX_PLATFORMS": "cpu", "MALLOC_ARENA_MAX": "4"},
  ],
)
def test_what_a_user_says_of_malloc_stands(environment):
  assert not run(100, **environment)[0]


def test_accelerators_leave_malloc_alone(tmp_path):
  """A package that could bring one is enough, unless the CPU is asked for."""
  (tmp_path / "jax_plugins").mkdir()
  path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", ""), os.getcwd()])
  assert not run(100, PYTHONPATH=path)[0]
  assert run(100, PYTHONPATH=path, JAX_PLATFORMS="cpu")[0]


GIVEN_BACK = """
from adco_jax.runtime import host
import numpy as np
host.keep_memory()
large = [np.ones(2**22) for _ in range(4)]
behind = np.ones(2**22)  # the heap cannot be cut before it
del large
resident = lambda: 4096 * int(open("/proc/self/statm").read().split()[1])
before = resident()
host.give_back()
print(before - resident())
"""


def test_what_nobody_uses_is_given_back():
  """128 MiB lie in the middle of the heap."""
  given = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES" and "MALLOC_" not in k}
  command = [sys.executable, "-c", GIVEN_BACK]
  environment = {**given, "JAX_PLATFORMS": "cpu"}
  told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
  assert int(told.stdout) > 120 * 2**20


def test_cores_are_this_process_s_share_or_all(monkeypatch):
  """macOS has no word for a share."""
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
  assert host.cores() == 2
  monkeypatch.delattr(os, "sched_getaffinity")
  assert host.cores() == os.cpu_count()
