"""Workdirs that are recognised, states that come back bit for bit, damage that is seen."""

import errno
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adco_jax.errors import ConfigError, RunError
from adco_jax.runtime import files, sharding
from adco_jax.workdir import checkpoint, fingerprints
from adco_jax.workdir.checkpoint import Checkpoints
from adco_jax.workdir.files import check_writable, read_config
from adco_jax.workdir.opening import open_workdir


def make_state(value, mesh):
  """Leaves of every kind that a state has: split and whole, float, integer, bfloat16."""
  split, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  rng = np.random.RandomState(value)
  return {
    "bank": jax.device_put(rng.standard_normal((256, 64)).astype(np.float32), split),
    "params": {
      "kernel": jax.device_put(jnp.asarray(rng.standard_normal((3, 3)), jnp.bfloat16), whole)
    },
    "step": jax.device_put(jnp.int32(value), whole),
  }


def abstract(state, mesh=None):
  place = lambda x: x.sharding if mesh is None else sharding.replicated(mesh)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)), state)


@pytest.fixture
def saved(tmp_path):
  """A workdir with checkpoints 10 and 20, and what they hold."""
  mesh = sharding.create_mesh()
  states = {step: make_state(step, mesh) for step in (10, 20)}
  manager = Checkpoints(tmp_path, keep=3)
  for step, state in states.items():
    manager.save(step, state)
  manager.close()
  return tmp_path, states


def equal(a, b):
  return all(
    np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


def test_newest_comes_back_bit_for_bit_on_other_devices(saved):
  workdir, states = saved
  few = sharding.create_mesh(jax.devices()[:2])
  for mesh in (None, few):
    manager = Checkpoints(workdir)
    state, step = manager.restore(abstract(states[20], mesh))
    manager.close()
    assert step == 20 and equal(state, states[20]) and not equal(state, states[10])
    assert state["bank"].sharding.mesh.size == (8 if mesh is None else 2)


def test_a_flipped_bit_is_seen_and_set_aside(saved, capsys):
  """Orbax alone restores it without a word."""
  workdir, states = saved
  flip_one_bit(os.path.join(workdir, "checkpoints", "20", "state"))
  manager = Checkpoints(workdir)
  state, step = manager.restore(abstract(states[20]))
  assert step == 10 and equal(state, states[10])
  assert os.path.isdir(os.path.join(workdir, "checkpoints", "20.damaged"))
  assert "checkpoint 20 is damaged" in capsys.readouterr().out
  manager.save(20, states[20])  # and its number can be used again
  manager.close()
  manager = Checkpoints(workdir)
  assert manager.restore(abstract(states[20]))[1] == 20
  manager.close()


def test_all_damaged_is_refused_however_often_and_nothing_is_touched(saved):
  """A second start must not take the empty list that the first one left for a new run."""
  workdir, states = saved
  for step in ("10", "20"):
    for file in data_files(os.path.join(workdir, "checkpoints", step, "state")):
      os.truncate(file, os.path.getsize(file) // 2)
  folder = os.path.join(workdir, "checkpoints")
  for _ in range(2):
    manager = Checkpoints(workdir)
    with pytest.raises(ConfigError, match=r"no checkpoint .* is intact: 20 \(.*10 \(.*nothing was"):
      manager.restore(abstract(states[20]))
    manager.close()
    assert {"10", "20"} <= set(os.listdir(folder))
  for step in ("10", "20"):
    os.rename(os.path.join(folder, step), os.path.join(folder, f"{step}.damaged"))
  manager = Checkpoints(workdir)
  with pytest.raises(ConfigError, match="10.damaged, 20.damaged; nothing was touched"):
    manager.restore(abstract(states[20]))
  manager.close()


def test_a_failing_machine_is_no_damage(saved, monkeypatch):
  """Too little memory, or a disk that does not answer: the files are left alone and the run ends."""
  workdir, states = saved
  manager = Checkpoints(workdir)

  def fail(*_, **__):
    raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8589934592 bytes")

  monkeypatch.setattr(checkpoint.ocp.Checkpointer, "restore", fail)
  with pytest.raises(RunError, match="cannot be read .*RESOURCE_EXHAUSTED.*nothing was touched"):
    manager.restore(abstract(states[20]))
  manager.close()
  assert {"10", "20"} <= set(os.listdir(os.path.join(workdir, "checkpoints")))


def test_parts_by_name(saved, capsys):
  workdir, states = saved
  parts, step = checkpoint.restore_parts(workdir, abstract({"params": states[20]["params"]}))
  assert step == 20 and set(parts) == {"params"} and equal(parts["params"], states[20]["params"])
  both = {"params": states[20]["params"], "bank": states[20]["bank"]}
  flip_one_bit(os.path.join(workdir, "checkpoints", "20", "state"))
  parts, step = checkpoint.restore_parts(workdir, abstract(both))
  assert step == 10 and equal(parts["bank"], states[10]["bank"])
  assert "checkpoint 20" in capsys.readouterr().out
  flip_one_bit(os.path.join(workdir, "checkpoints", "10", "state"))
  with pytest.raises(ConfigError, match="no checkpoint is intact"):
    checkpoint.restore_parts(workdir, abstract(both))


def test_fingerprint_sees_every_bit_and_no_sharding():
  x = np.random.RandomState(0).standard_normal((8, 4)).astype(np.float32)
  whole = fingerprints.fingerprint({"x": jnp.asarray(x)})
  split = jax.device_put(x, sharding.batch_sharding(sharding.create_mesh()))
  assert fingerprints.fingerprint({"x": split}) == whole
  for place in range(x.size):
    for bit in range(32):
      flipped = x.copy()
      flipped.view(np.uint32).ravel()[place] ^= np.uint32(1 << bit)
      assert fingerprints.fingerprint({"x": flipped}) != whole, (place, bit)
  assert fingerprints.fingerprint({"y": jnp.asarray(x)}) != whole


def test_workdir_knows_its_run(tmp_path):
  config = {"seed": 0, "bank": {"size": 8}, "crops": ((8, 0.2),), "log": {"every_steps": 5}}
  path = str(tmp_path / "run")
  open_workdir(path, config, {}, ["log.every_steps"])
  os.makedirs(f"{path}/checkpoints/5")  # it took steps
  assert open_workdir(path, config | {"log": {"every_steps": 9}}, {}, ["log.every_steps"]) == []
  assert read_config(path)["crops"] == [[8, 0.2]]
  with pytest.raises(ConfigError) as refusal:
    open_workdir(path, config | {"seed": 1, "bank": {"size": 9}}, {}, [])
  first, *table = str(refusal.value).split("\n")
  assert "holds a run with another config (2 keys differ" in first and "--workdir" in first
  assert [row.split() for row in table] == [
    ["bank.size", "there:", "8", "here:", "9"], ["seed", "there:", "0", "here:", "1"]
  ]  # fmt: skip
  assert json.load(open(f"{path}/config.json"))["config"]["seed"] == 0


def test_some_checkpoints_stay_for_good(tmp_path):
  """Besides the newest ones; the newest intact one still wins, and one kept for good is read by its number."""
  mesh = sharding.create_mesh()
  manager = Checkpoints(tmp_path, keep=1, keeps=lambda step: step in (3, 6))
  for step in range(1, 9):
    manager.save(step, make_state(step, mesh))
  manager.finish()
  assert {int(name) for name in os.listdir(tmp_path / "checkpoints")} == {3, 6, 8}
  wanted = abstract(make_state(0, mesh))
  assert manager.restore(wanted)[1] == 8
  flip_one_bit(os.path.join(tmp_path, "checkpoints", "8", "state"))
  assert manager.restore(wanted)[1] == 6
  manager.close()


def test_a_workdir_from_before_a_key_was_there_is_still_the_same_run(tmp_path):
  """Written without save.keep_every_epochs: opened, read and resumed as if it said what was done then."""
  config = {"seed": 0, "save": {"keep": 2}}
  open_workdir(str(tmp_path), config, {}, [])
  os.makedirs(tmp_path / "checkpoints" / "5")
  assert read_config(str(tmp_path))["save"] == {"keep": 2, "keep_every_epochs": 0}
  open_workdir(str(tmp_path), {"seed": 0, "save": {"keep": 2, "keep_every_epochs": 0}}, {}, [])
  with pytest.raises(ConfigError, match="1 keys differ"):
    open_workdir(str(tmp_path), {"seed": 0, "save": {"keep": 2, "keep_every_epochs": 5}}, {}, [])


def test_unwritable_workdir(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(ConfigError, match="is not writable; name another"):
    check_writable(str(tmp_path / "file" / "run"))
  check_writable(str(tmp_path / "new" / "run"))
  (tmp_path / "gone").symlink_to(tmp_path / "unmounted")
  with pytest.raises(ConfigError, match="gone is a link that leads nowhere; name another"):
    check_writable(str(tmp_path / "gone" / "run"))


def flip_one_bit(folder):
  """In the middle of the largest data file."""
  data = max(data_files(folder), key=os.path.getsize)
  content = bytearray(open(data, "rb").read())
  content[len(content) // 2] ^= 4
  open(data, "wb").write(content)


def data_files(folder):
  files = [os.path.join(root, f) for root, _, names in os.walk(folder) for f in names]
  return [f for f in files if "/d/" in f]


def test_writers_of_one_path_do_not_mix(tmp_path, monkeypatch):
  """In containers every process may be number 1. A name that is to be new is never taken from another."""
  monkeypatch.setattr(os, "getpid", lambda: 1)
  path = str(tmp_path / "x")
  with files.whole(path) as one, files.whole(path) as other:
    assert one != other
    for part in (one, other):
      pathlib.Path(part).write_text(part)
  assert pathlib.Path(path).read_text() == one
  with pytest.raises(FileExistsError):
    files.write_text(path, "new", new=True)
  monkeypatch.setattr(os, "link", refuse_links)
  with pytest.raises(FileExistsError):
    files.write_text(path, "new", new=True)
  files.write_text(f"{path}2", "new", new=True)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["x", "x2"]


def refuse_links(one, other):
  raise PermissionError(errno.EPERM, "Operation not permitted")
