"""Programs that are compiled ahead, and the folder in which they are found again."""

import gc
import os

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from adco_jax import build
from adco_jax.data.batch import Constants
from adco_jax.data.images import Reader
from adco_jax.data.resident import ResidentLoader
from adco_jax.data.sources.loading import load_source
from adco_jax.runtime import compiled, sharding
from adco_jax.training import programs
from tests import settings


@pytest.fixture(scope="module")
def parts():
  """(plan, loader, `Trainer`) of a tiny config whose bank is trained for two steps."""
  config, mesh = (
    settings.tiny_config(augment__policy="none"),
    sharding.create_mesh(jax.devices()[:1]),
  )
  source = load_source("digits", "", "train")
  plan = settings.tiny_plan(config, 1, source.num_examples)
  loader = ResidentLoader(Reader(source), mesh)
  return plan, loader, build.build(config, plan, mesh)


@pytest.fixture
def cache(tmp_path):
  """An empty folder that is JAX's persistent cache, for the smallest program too."""
  options = {
    "jax_compilation_cache_dir": str(tmp_path / "cache"),
    "jax_persistent_cache_min_compile_time_secs": 0,
  }
  before = {name: getattr(jax.config, name) for name in options}
  for values in (options, before):
    for name, value in values.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()
    if values is options:
      yield tmp_path / "cache"


def constants_of(run, loader):
  return Constants.put(run.mesh, 0, loader.images)


def train(plan, loader, run, state, made):
  """(numbers of the state, whether `state` was given away) after a step of either program."""
  mesh, start = run.mesh, plan.fill_steps - 1
  state = first = jax.device_put(state, run.shardings)
  batches = loader.train(start, start + 2, seed=0, plan=plan, ratio=(0.75, 4 / 3))
  constants = constants_of(run, loader)
  for step, loaded in enumerate(batches, start):
    state, _ = made.of(step)(state, loaded.batch.put(mesh), constants)
  numbers = [x.tobytes() for x in jax.tree.leaves(jax.device_get(state))]
  return numbers, all(x.is_deleted() for x in jax.tree.leaves(first.query_params))


@pytest.mark.slow
@pytest.mark.storage
def test_a_program_from_the_cache_is_the_same_program(parts, cache, capsys):
  """Compiled ahead, then found in the folder: the same bits, and the state is given away each time."""
  plan, loader, run = parts
  state = jax.device_get(run.create_state()).replace(step=np.int32(plan.fill_steps - 1))
  found, entries = [], []
  for _ in range(2):
    jax.clear_caches()
    made = programs.Programs(
      run, plan, loader.item, constants_of(run, loader), 0, plan.fill_steps + 1
    )
    made.begin_later()
    found.append(train(plan, loader, run, state, made))
    made.close()
    entries.append({x.name for x in cache.glob("jit_fill*")} | {x.name for x in cache.glob("jit_update*")})  # fmt: skip
  assert found[0] == found[1] and found[0][1]
  assert entries[0] == entries[1] and len(entries[0]) == 2
  assert capsys.readouterr().out.count("of the bank's initialisation and of training") == 2


def test_a_damaged_entry_is_told_and_compiled_again(cache):
  double = jax.jit(lambda x: 2 * x + 1)
  assert double(np.float32(3)) == 7
  for entry in cache.glob("*-cache"):
    entry.write_bytes(entry.read_bytes()[:100])
  jax.clear_caches()
  with pytest.warns(UserWarning, match="persistent compilation cache"):
    assert double(np.float32(3)) == 7
  compiled.tidy(cache)
  assert not list(cache.glob("*-cache"))


def test_what_the_compiler_refuses_is_raised_where_it_is_needed(parts):
  plan, loader, run = parts
  broken = run._replace(updates=(run.updates[0], jax.jit(lambda *_: 1 + "1")))
  made = programs.Programs(
    broken, plan, loader.item, constants_of(run, loader), plan.fill_steps, plan.total_steps
  )
  program = made.of(plan.fill_steps)
  with pytest.raises(TypeError):
    program.wait()
  made.close()


def test_tracing_leaves_the_collector_as_it_was(parts):
  plan, loader, run = parts
  made = programs.Programs(
    run, plan, loader.item, constants_of(run, loader), 0, plan.fill_steps + 1
  )
  made.traced()
  assert gc.isenabled()
  made.close()


def test_the_folder_is_apart_by_machine_and_the_users_to_name(monkeypatch, tmp_path, capsys):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
  folder = compiled.keep()
  assert os.path.isdir(folder) and folder.startswith(f"{tmp_path}/adco_jax/compiled/")
  assert os.environ["JAX_COMPILATION_CACHE_DIR"] == folder
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4096))
  assert compiled.default_folder() != folder
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
  (tmp_path / "file").touch()
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
  assert compiled.keep() == "" and "JAX_COMPILATION_CACHE_DIR" not in os.environ
  assert "compiled programs are not kept" in capsys.readouterr().out
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", f"{tmp_path}/own")
  assert compiled.keep() == f"{tmp_path}/own" and not os.path.exists(f"{tmp_path}/own")


def test_tidying_keeps_what_is_whole_and_newest(monkeypatch, tmp_path):
  """An entry that was cut short goes, so do the oldest above the bound, and nothing that is no entry."""
  whole = compiled.zlib.compress(os.urandom(1000))
  for name in ("a", "b", "c"):
    (tmp_path / f"{name}-cache").write_bytes(whole)
  (tmp_path / "cut-cache").write_bytes(whole[:500])
  (tmp_path / "by-zstandard-cache").write_bytes(b"\x28\xb5\x2f\xfd....")
  (tmp_path / "notes").write_bytes(b"x")
  compiled.tidy(tmp_path)
  left = {"a-cache", "b-cache", "c-cache", "by-zstandard-cache", "notes", "tidied"}
  assert set(os.listdir(tmp_path)) == left
  for age, name in enumerate(["by-zstandard", "a", "b", "c"]):  # they were read meanwhile
    os.utime(tmp_path / f"{name}-cache", (10**9 - age, 10**9 - age))
  monkeypatch.setattr(compiled, "MOST_BYTES", 2500)
  compiled.tidy(tmp_path)
  assert set(os.listdir(tmp_path)) == left - {"c-cache"}
