"""What interrupts a run: signals, a second run, a stuck step, steps without finite numbers, a full disk."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from adco_jax import main
from adco_jax.errors import ConfigError, RunError
from adco_jax.models.heads import Encoder
from adco_jax.runtime import guard, sharding
from adco_jax.tasks.replay_step import layers
from adco_jax.training import capsule, train_step
from adco_jax.training.programs import Program
from adco_jax.training.saver import Saver
from adco_jax.workdir.checkpoint import Checkpoints
from adco_jax.workdir.metrics import read_metrics
from tests import settings
from tests.test_end_to_end import ONE_BLOCK, TINY, fingerprint, untimed

pytestmark = pytest.mark.kills  # the slow ones' group

FLAGS = [
  *TINY,
  ONE_BLOCK,
  "--config.epochs=1",
  "--config.eval.every_epochs=0",
  "--config.log.every_steps=1",
]


def when(condition, act):
  """Calls `act` from another thread as soon as `condition` holds."""

  def wait():
    while not condition():
      time.sleep(0.01)
    act()

  thread = threading.Thread(target=wait, daemon=True)
  thread.start()
  return thread


@pytest.mark.slow
def test_signals_save_and_leave_and_the_run_goes_on_to_the_same_bits(finished, tmp_path, capsys):
  """SIGTERM and SIGINT after some steps: status 42, saved there; the end is that of an undisturbed run."""
  undisturbed, straight = finished
  workdir = tmp_path / "disturbed"
  command = [*TINY, ONE_BLOCK, f"--workdir={workdir}"]
  for number, step in ((signal.SIGTERM, 5), (signal.SIGINT, 25)):
    reached = lambda s=step: [line for line in read_metrics(workdir) if line["step"] >= s]
    thread = when(reached, lambda n=number: os.kill(os.getpid(), n))
    assert main.main(command) == 42
    thread.join()
    said = capsys.readouterr()
    saved = int(said.err.split("saved at step ")[1].split(";")[0])
    assert saved >= step and Checkpoints(workdir).latest_step() == saved
  assert main.main(command) == 0
  assert fingerprint(capsys.readouterr().out) == straight
  assert untimed(workdir) == untimed(undisturbed)


def test_two_runs_cannot_share_a_workdir(tmp_path):
  held = guard.lock(tmp_path)
  with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"):
    guard.lock(tmp_path)
  os.close(held)
  os.close(guard.lock(tmp_path))


SCRIPT = """
import sys, time
from adco_jax.runtime.guard import Guard
with Guard(sys.argv[1], float(sys.argv[2])) as guard:
  guard.nothing_unsaved = sys.argv[3] == "idle"
  print("ready", flush=True)
  time.sleep(60)
"""


def start(workdir, minutes, state):
  command = [sys.executable, "-c", SCRIPT, str(workdir), str(minutes), state]
  process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  assert process.stdout.readline() == "ready\n"
  return process


def test_watchdog_prints_stacks_and_ends_the_process(tmp_path):
  process = start(tmp_path, 0.01, "busy")
  _, error = process.communicate(timeout=30)
  assert process.returncode == 43
  assert "time.sleep(60)" in error or 'File "<string>", line 7' in error
  assert "watchdog_minutes" in error


def test_with_nothing_unsaved_a_signal_ends_the_run_at_once(tmp_path):
  process = start(tmp_path, 0, "idle")
  process.send_signal(signal.SIGTERM)
  _, error = process.communicate(timeout=30)
  assert process.returncode == 42 and "nothing is unsaved" in error


def test_second_interrupt_leaves_at_once_and_frees_the_workdir(tmp_path):
  process = start(tmp_path, 0, "busy")
  process.send_signal(signal.SIGINT)
  assert "will save after this step" in process.stdout.readline()
  process.send_signal(signal.SIGINT)
  _, error = process.communicate(timeout=30)
  assert process.returncode == 130 and "leaving at once" in error
  os.close(guard.lock(tmp_path))


@pytest.mark.parametrize("objective, devices", [("adco", 4), ("moco", 1)])
def test_a_step_without_finite_numbers_moves_only_the_counter(objective, devices):
  """One NaN pixel: encoder, bank or queue, statistics, moving average and momenta stay, bit for bit."""
  own = {"adco": {"method__bank__init": "random"}, "moco": {}}[objective]
  config = settings.tiny_config(objective=objective, **own)
  players, plan, state = settings.create_players(config, devices)
  batch = settings.random_batch(plan, plan.train_pairing, 0)
  update = jax.jit(train_step.make_update(players, plan.phases[-1]))
  good, metrics = update(state, batch.put(players.mesh))
  assert metrics["train/finite"]
  poisoned = jax.tree.map(np.array, batch)
  poisoned.queries[0][3, 2, 1, 0] = np.nan
  bad, metrics = update(good, poisoned.put(players.mesh))
  assert not metrics["train/finite"] and bad.step == good.step + 1
  kept = jax.tree.map(lambda a, b: np.array_equal(a, b), bad.replace(step=0), good.replace(step=0))
  assert all(jax.tree.leaves(kept))
  again, metrics = update(bad, batch.put(players.mesh))
  assert metrics["train/finite"] and settings.difference(again.query_params, bad.query_params) > 0


def test_a_run_that_stays_broken_stops_with_a_capsule(tmp_path, capsys):
  """A normalisation that overflows: three bad steps, status 3; the replay blames the first view."""
  flags = [
    *FLAGS,
    "--config.max_bad_steps=3",
    "--config.data.std=(1e-40,1e-40,1e-40)",
    "--config.method.bank.init=random",
  ]
  assert main.main([*flags, f"--workdir={tmp_path}/run"]) == 3
  error = capsys.readouterr().err
  folder = error.split("--config.capsule=")[1].strip()
  assert folder.endswith("capsules/2") and "max_bad_steps=3" in error
  assert main.main(["--config=configs/replay_step.py", f"--config.capsule={folder}"]) == 0
  said = capsys.readouterr().out
  assert (
    "in float32, batch" in said and "first tensor that is not finite: view 0 of queries" in said
  )
  assert main.main(["--config=configs/replay_step.py", "--config.capsule=/nowhere"]) == 2
  facts, run = json.loads(open(f"{folder}/capsule.json").read()), str(tmp_path / "run")
  with open(f"{folder}/capsule.json", "w") as file:
    json.dump(facts | {"compute_dtype": "bfloat16"}, file)  # of a run on another machine
  main.main(["--config=configs/replay_step.py", f"--config.capsule={folder}"])
  assert "in bfloat16, batch" in capsys.readouterr().out
  with open(f"{folder}/capsule.json", "w") as file:
    json.dump(facts, file)
  assert capsule.place(run, facts) == ("2", True)  # the same command came here again
  assert capsule.place(run, facts | {"config": {"of": "another"}}) == ("2-2", False)
  with open(f"{folder}/capsule.json", "w") as file:
    json.dump(facts | {"format": 3}, file)
  with pytest.raises(ConfigError, match="of another version; replay it with the one that wrote it"):
    capsule.read(folder)
  with open(f"{folder}/capsule.json", "w") as file:
    file.write("{")
  assert main.main(["--config=configs/replay_step.py", f"--config.capsule={folder}"]) == 2
  assert "its capsule.json is damaged" in capsys.readouterr().err
  os.remove(f"{folder}/capsule.json")
  assert capsule.place(run, facts) == ("2-2", False)  # a state that may be of another run


def test_replay_blames_the_layer_that_overflows():
  """Its inputs are finite, so are all weights; layers come in the order of the forward pass."""
  encoder = Encoder("resnet18", 0.125, "small", 16, 4)
  images = np.random.RandomState(0).standard_normal((4, 8, 8, 3)).astype(np.float32)
  variables = jax.tree.map(np.array, encoder.init(jax.random.key(0), images, False))
  variables["params"]["backbone"]["layer2_1"]["conv2"]["kernel"][:] = 3e38
  found = [
    (name, bool(np.isfinite(x).all())) for name, x in layers(encoder, variables, images, "query")
  ]
  first = [name for name, finite in found].index("query/backbone/layer2_1/conv2")
  assert [finite for _, finite in found[: first + 1]] == [True] * first + [False]


def test_failed_saves_are_told_and_end_the_run_at_last(tmp_path, capsys):
  """The checkpoint folder disappears under a run."""
  setting = settings.tiny_config().save
  checkpoints = Checkpoints(tmp_path, 2)
  saver = Saver(setting, 1, checkpoints, 0)
  mesh = sharding.create_mesh(jax.devices()[:1])
  state = {"x": jax.device_put(np.arange(4.0, dtype=np.float32), sharding.replicated(mesh))}
  saver.save(1, state, lambda: None)
  saver.finish(1)
  folder = tmp_path / "checkpoints"
  os.rename(folder, tmp_path / "away")
  folder.write_text("a file where a folder should be")
  with pytest.raises(RunError, match="max_failures=3"):
    for step in range(2, 30):
      if saver.due(step, ending=True):
        saver.save(step, state, lambda: None)
      time.sleep(0.3)  # the save fails in the background
  assert "a save failed" in capsys.readouterr().out


def test_a_last_state_whose_save_failed_is_not_called_saved(tmp_path, capsys):
  def full_disk():
    raise OSError(28, "No space left on device")

  checkpoints = Checkpoints(tmp_path, 2)
  saver = Saver(settings.tiny_config().save, 1, checkpoints, 0)
  saver.save(1, {"x": np.ones(4)}, full_disk)
  with pytest.raises(RunError, match="the last state is lost; no checkpoint is left"):
    saver.finish(1)
  assert "metrics.jsonl: No space left on device" in capsys.readouterr().out
  saver.save(2, {"x": np.ones(4)}, lambda: None)
  saver.finish(2)
  assert checkpoints.latest_step() == 2


def test_a_step_that_a_signal_broke_is_left_with_everything_saved(tmp_path, capsys, monkeypatch):
  """As Slurm and `timeout` do it: SIGTERM to the whole group ends the compiler that XLA had started."""
  wait = Program.wait

  def broken(self):
    if self.name == "training":  # after two steps of the bank's initialisation
      os.kill(os.getpid(), signal.SIGTERM)
      raise RuntimeError("ptxas exited with non-zero error code 15")
    wait(self)

  monkeypatch.setattr(Program, "wait", broken)
  assert main.main([*FLAGS, f"--workdir={tmp_path}"]) == 42
  said = capsys.readouterr().err.strip().split("\n")
  assert len(said) == 1 and "SIGTERM: saved, then met an error (RuntimeError: ptxas" in said[0]
  assert Checkpoints(tmp_path).latest_step() == 2


def test_an_error_without_a_signal_and_one_that_costs_the_state_stay_errors(tmp_path):
  for heard, saved in ((False, True), (True, False)):
    with guard.Guard(tmp_path, 0) as watch, pytest.raises(RuntimeError, match="broken"):
      watch.nothing_unsaved = False
      with watch.errors(lambda s=saved: s):
        if heard:
          os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("broken")
  with guard.Guard(tmp_path, 0) as watch, pytest.raises(ConfigError):
    watch.nothing_unsaved = False
    with watch.errors(lambda: True):
      os.kill(os.getpid(), signal.SIGTERM)
      raise ConfigError("what a user got wrong")


@pytest.mark.slow
def test_verify_resume_across_an_extension(tmp_path, capsys):
  flags = ["--config=configs/verify_resume.py", "--config.of=configs/adco_digits.py", "--config.kills=2"]  # fmt: skip
  small = "--config.flags=--config.eval.every_epochs=0 --config.model.width=0.125 --config.bn.group_size=8"
  more = ["--config.extend_at=11", "--config.extend_flags=--config.epochs=3 --config.method.temperature=0.3"]  # fmt: skip
  assert main.main([*flags, small, *more, "--config.steps=20", f"--workdir={tmp_path}/run"]) == 0
  said = capsys.readouterr().out
  assert "arrays: 0.0" in said and "equal" in said and said.count("killed at step") == 2


@pytest.mark.slow
def test_verify_resume(tmp_path, capsys):
  """The task that lets users check the promise: killed twice, difference 0.0."""
  flags = [
    "--config=configs/verify_resume.py",
    "--config.of=configs/adco_digits.py",
    "--config.kills=2",
  ]
  small = "--config.flags=--config.eval.every_epochs=0 --config.model.width=0.125 --config.bn.group_size=8"
  assert main.main([*flags, small, "--config.steps=20", f"--workdir={tmp_path}/run"]) == 0
  said = capsys.readouterr().out
  assert "arrays: 0.0" in said and "equal" in said and said.count("killed at step") == 2


def test_verify_resume_needs_a_pre_training_and_whole_flags(tmp_path, capsys):
  ask = lambda *flags: (
    main.main(["--config=configs/verify_resume.py", *flags, f"--workdir={tmp_path}/run"]),
    capsys.readouterr().err,
  )
  status, said = ask("--config.of=nothing.py")
  assert status == 2 and "config.of='nothing.py'" in said
  status, said = ask("--config.of=knn")
  assert status == 2 and "config.of='knn': is for the task knn" in said
  status, said = ask("--config.of=adco_digits", "--config.flags=--config.data.dir='/a b")
  assert status == 2 and "No closing quotation" in said and not (tmp_path / "run").exists()


def test_a_signal_ends_an_evaluation_between_two_batches(tmp_path):
  """It may take minutes; what was asked for is left undone, so that the restart does it."""
  with guard.Guard(tmp_path, 0) as watch:
    watch.nothing_unsaved = False
    done = []
    with pytest.raises(guard.Leaving):
      for batch in watch.over(range(100)):
        done.append(batch)
        if batch == 2:
          os.kill(os.getpid(), signal.SIGTERM)
          while not watch.leaves_at(0):
            time.sleep(0.01)
    assert done == [0, 1, 2]
