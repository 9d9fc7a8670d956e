"""A run that goes on with another config: what may change, what is recorded, that it stays the same run."""

import contextlib
import functools
import io
import itertools
import json
import os
import shutil

import numpy as np
import pytest

from adco_jax import encoders, main
from adco_jax.config import plan as planning
from adco_jax.data.sources.base import Source
from adco_jax.errors import ConfigError
from adco_jax.report import report
from adco_jax.workdir import opening
from adco_jax.workdir.files import flatten, read_history, read_opened, undone
from adco_jax.workdir.metrics import read_metrics
from adco_jax.workdir.opening import open_workdir, record_extension, record_return
from tests.test_end_to_end import ONE_BLOCK, TINY, fingerprint, run, untimed

QUIET = ["--config.eval.every_epochs=0", "--config.augment.policy=none", ONE_BLOCK]
FIRST = ["--extend", "--config.epochs=2", "--config.optim.learning_rate=0.03"]
SECOND = ["--extend", "--config.epochs=3", "--config.optim.learning_rate=0.03", "--config.method.temperature=0.3"]  # fmt: skip


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
  """Workdirs of a run of one epoch, and of the same extended to two and in the midst of the second to three, and what
  the last one printed."""
  folder = tmp_path_factory.mktemp("stages")
  run(folder / "first", *QUIET, "--config.epochs=1")
  shutil.copytree(folder / "first", folder / "extended")
  run(folder / "extended", *QUIET, *FIRST, "--config.stop_at_step=33")
  with contextlib.redirect_stdout(io.StringIO()) as said:
    run(folder / "extended", *QUIET, *SECOND, "--config.stop_at_step=50")
  return folder / "first", folder / "extended", said.getvalue()


@pytest.fixture
def extended(stages):
  return stages[1]


def test_an_extended_run_goes_on_from_its_last_state(extended):
  """One bank initialisation, one line per step, the rate of each plan at its steps, the changes on record."""
  lines = {line["step"]: line for line in read_metrics(extended)}
  assert list(lines) == [*range(5, 51, 5)]
  base, final = 0.06, 0.0006
  assert lines[20]["train/learning_rate"] == pytest.approx(base)  # first of one epoch
  half = final + (0.03 - final) * 0.5
  assert [lines[s]["train/learning_rate"] for s in (25, 30)] == pytest.approx([half, half])
  third = final + (0.03 - final) * 0.75
  assert lines[35]["train/learning_rate"] == pytest.approx(third)
  assert read_history(extended) == [
    {"step": 22, "changes": [["epochs", 1, 2], ["optim.learning_rate", 0.06, 0.03]]},
    {"step": 33, "changes": [["epochs", 2, 3], ["method.temperature", 0.4, 0.3]]},
  ]
  plan = json.load(open(extended / "plan.json"))
  assert plan["total_steps"] == 62 and plan["data"]
  assert encoders.run_config(extended).method.temperature == 0.3
  then = encoders.run_config(extended, step=22)
  assert (then.epochs, then.optim.learning_rate, then.method.temperature) == (1, 0.06, 0.4)
  then = encoders.run_config(extended, step=33)
  assert (then.epochs, then.optim.learning_rate, then.method.temperature) == (2, 0.03, 0.4)
  assert undone(extended, 50) == {}
  report.write_report(str(extended))
  page = (extended / "report.html").read_text()
  assert "Changed on the way" in page and "<td>33<td>method.temperature<td>0.4<td>0.3" in page


@pytest.mark.slow
@pytest.mark.kills
def test_stopped_between_and_started_again_without_the_flag_it_is_the_same_run(
  stages, tmp_path, capsys
):
  first, extended, said = stages
  workdir = shutil.copytree(first, tmp_path / "run")
  run(workdir, *QUIET, *FIRST, "--config.stop_at_step=27")
  run(workdir, *QUIET, *FIRST[1:], "--config.stop_at_step=33")
  run(workdir, *QUIET, *SECOND, "--config.stop_at_step=34")
  run(workdir, *QUIET, *SECOND, "--config.stop_at_step=50")
  end = capsys.readouterr().out
  assert end.split("; state ")[-1].split(";")[0] == fingerprint(said)
  assert untimed(workdir) == untimed(extended) and read_history(workdir) == read_history(extended)


def test_what_an_extension_may_not_be(extended, capsys):
  before = (extended / "config.json").read_text()
  refused = lambda *flags: (
    main.main([*TINY, *QUIET, f"--workdir={extended}", *flags]),
    capsys.readouterr().err,
  )
  status, said = refused(*SECOND[1:], "--config.epochs=9")
  assert status == 2 and "add --extend to go on in it" in said and "there: 3  here: 9" in said
  status, said = refused(*SECOND, "--config.data.batch_size=128", "--config.model.width=.25")
  assert (
    status == 2 and "data.batch_size, model.width cannot change" in said and "init_from" in said
  )
  status, said = refused(*SECOND, "--config.epochs=2")
  assert status == 2 and "is at step 50, this config ends at 42; give more config.epochs" in said
  assert (extended / "config.json").read_text() == before
  flags = ["--config=configs/knn.py", f"--config.pretrained={extended}", "--extend"]
  assert main.main(flags) == 2 and "--extend" in capsys.readouterr().err


def test_every_fixed_key_is_one_of_the_config():
  from configs import adco_r50

  base = adco_r50.get_config()
  known = [*flatten(base.to_dict()), *base]  # a group may be empty: method
  for fixed in planning.FIXED:
    assert fixed == "images" or any(f"{name}.".startswith(f"{fixed}.") for name in known), fixed
  assert not any(planning.is_fixed(key, "adco") for key in planning.MAY_CHANGE)
  assert planning.is_fixed("model.dim", "adco") and not planning.is_fixed(
    "method.bank.learning_rate", "adco"
  )


def test_a_run_that_took_no_step_is_begun_anew_and_kept_beside(tmp_path, capsys):
  """Its config, its evaluation of the untrained encoder and a first state that came from another run."""
  workdir, plan = str(tmp_path), {"total_steps": 9}
  open_workdir(workdir, {"seed": 0}, plan, [])
  os.makedirs(tmp_path / "checkpoints" / "0")
  (tmp_path / "metrics.jsonl").write_text('{"step": 0, "knn/top1": 0.5}\n{"step": 50}\n')
  for seed in (1, 2):
    assert open_workdir(workdir, {"seed": seed}, plan, []) == []
    assert json.load(open(tmp_path / "config.json"))["config"] == {"seed": seed}
    said = capsys.readouterr().out
    assert f"begun anew, what was there is in {workdir}/before-{seed}" in said
    assert ("the last one in metrics.jsonl is 50" in said) == (seed == 1)
  first = tmp_path / "before-1"
  assert {"config.json", "plan.json", "metrics.jsonl", "checkpoints"} == set(os.listdir(first))
  assert read_metrics(workdir) == [] and not (tmp_path / "checkpoints").exists()
  assert json.load(open(tmp_path / "before-2" / "config.json"))["config"] == {"seed": 1}
  for name in ("7", "7.damaged"):  # a step was taken, though its checkpoint may be damaged
    os.makedirs(tmp_path / "checkpoints" / name)
    with pytest.raises(ConfigError, match="another config"):
      open_workdir(workdir, {"seed": 3}, plan, [])
    os.rmdir(tmp_path / "checkpoints" / name)


def test_a_run_that_is_begun_anew_may_be_killed_at_any_moment(tmp_path, monkeypatch):
  """Whatever was moved by then, and whichever of both commands comes next, a whole run is there and the other beside it."""
  for moment, seed in itertools.product(range(8), (0, 1)):
    folder = tmp_path / f"{moment}-{seed}"
    workdir, left = str(folder), [moment]
    open_workdir(workdir, {"seed": 0}, {"total_steps": 9}, [])
    os.makedirs(folder / "checkpoints" / "0")
    os.makedirs(folder / "before-1")  # a user's own
    (folder / "metrics.jsonl").write_text('{"step": 5}\n')

    def work(function, *names, left=left, **facts):
      if left[0] == 0:
        raise KeyboardInterrupt
      left[0] -= 1
      return function(*names, **facts)

    with monkeypatch.context() as patched:
      for name in ("rename", "replace", "unlink"):
        patched.setattr(os, name, functools.partial(work, getattr(os, name)))
      with contextlib.suppress(KeyboardInterrupt):
        open_workdir(workdir, {"seed": 1}, {"total_steps": 9}, [])
    assert open_workdir(workdir, {"seed": seed}, {"total_steps": 9}, []) == []
    assert json.load(open(folder / "config.json"))["config"] == {"seed": seed}
    kept = [json.load(open(path))["config"]["seed"] for path in folder.glob("before-*/config.json")]
    moved = list(folder.glob("before-*/metrics.jsonl"))
    assert (
      not os.listdir(folder / "before-1") and len(moved) + (folder / "metrics.jsonl").exists() == 1
    )
    assert (folder / "plan.json").exists() and (0 in kept or seed == 0), (moment, kept)


def test_other_images_are_refused_whatever_is_asked(tmp_path):
  workdir, plan = str(tmp_path), {"total_steps": 9}
  open_workdir(workdir, {"epochs": 1}, plan, [], data="these")
  os.makedirs(tmp_path / "checkpoints" / "5")
  with pytest.raises(ConfigError, match="images cannot change"):
    open_workdir(workdir, {"epochs": 2}, plan, [], data="those", extend=True)
  rows = open_workdir(workdir, {"epochs": 2}, plan, [], data="these", extend=True)
  assert rows == [("epochs", 1, 2)]
  assert json.load(open(tmp_path / "config.json"))["config"] == {"epochs": 1}  # nothing yet
  record_extension(workdir, rows, {"epochs": 2}, plan, 5)
  assert open_workdir(workdir, {"epochs": 2}, plan, [], data="these") == []


def test_other_labels_are_other_images_to_a_run_on_labels(tmp_path):
  """Not to a run that was begun before labels were looked at, nor to one without; names alone may change."""
  pixels, labels = np.zeros((4, 2, 2, 3), np.uint8), np.array([0, 1, 1, 0])
  source = lambda labels, *classes: Source("a", pixels, None, labels, classes)
  first, renamed, other = (
    source(labels, "a", "b"),
    source(labels, "x", "y"),
    source(1 - labels, "a", "b"),
  )
  assert first.identity() == other.identity() == {**source(None).identity()}
  facts, plan = first.identity(labels=True), {"total_steps": 9}
  assert facts == renamed.identity(labels=True) != other.identity(labels=True)
  workdir = extendable(tmp_path, {}, plan, 5, data=facts)
  assert open_workdir(workdir, {}, plan, [], data=renamed.identity(labels=True)) == []
  with pytest.raises(ConfigError, match="images.labels cannot change"):
    open_workdir(workdir, {}, plan, [], data=other.identity(labels=True))
  older = extendable(tmp_path / "older", {}, plan, 5, data=first.identity())
  assert open_workdir(older, {}, plan, [], data=other.identity(labels=True)) == []


def extendable(tmp_path, config, plan, step, **facts):
  """A workdir of a run that came to `step`."""
  open_workdir(str(tmp_path), config, plan, [], **facts)
  os.makedirs(tmp_path / "checkpoints" / str(step))
  return str(tmp_path)


def test_an_extension_that_is_written_by_half_is_whole_at_the_next_start(tmp_path, monkeypatch):
  old, new = ({"epochs": n, "compute_dtype": d} for n, d in ((1, "auto"), (2, "bfloat16")))
  plans = [{"total_steps": n, "compute_dtype": d} for n, d in ((9, "float32"), (18, "bfloat16"))]
  workdir = extendable(tmp_path, old, plans[0], 5)
  rows = open_workdir(workdir, new, plans[1], [], extend=True)

  def once(path, value, write=opening.write_json):
    write(path, value)
    raise KeyboardInterrupt

  with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
    patched.setattr(opening, "write_json", once)
    record_extension(workdir, rows, new, plans[1], 5)
  with pytest.raises(ConfigError, match="another config"):
    open_workdir(workdir, old, plans[0], [])
  assert open_workdir(workdir, new, plans[1], []) == []
  assert read_opened(workdir)[0] == plans[1] | {"data": None}
  assert read_history(workdir) == [{"step": 5, "changes": [list(row) for row in rows]}]


def test_a_plan_is_of_these_devices_and_its_dtype_of_those_that_began(tmp_path):
  config, plan = {"compute_dtype": "auto"}, {"num_devices": 8, "compute_dtype": "bfloat16"}
  workdir = extendable(tmp_path, config, plan, 5)
  open_workdir(workdir, config, {"num_devices": 1, "compute_dtype": "float32"}, [])
  assert read_opened(workdir)[0] == {"num_devices": 1, "compute_dtype": "bfloat16", "data": None}


@pytest.mark.parametrize("extend", [False, True])
def test_a_run_whose_filling_came_before_its_epochs_is_refused(tmp_path, extend):
  """As it was before `method.bank.init_epochs` counted among them: the same step would be another one."""
  config = {"objective": "adco", "epochs": 5, "method": {"bank": {"init_epochs": 2.0}}}
  plan, now = {"total_steps": 35, "fill_steps": 10}, {"total_steps": 25, "fill_steps": 0}
  workdir = extendable(tmp_path, config, plan, 20)
  other = config | {"method": {"bank": {"init_epochs": 1.0}}}  # is any other difference
  with pytest.raises(ConfigError, match="another config"):
    open_workdir(workdir, other, now, [])
  with pytest.raises(
    ConfigError, match="was filled for 10 steps before the run's epochs, which are now among them"
  ):
    open_workdir(workdir, config | {"epochs": 5 + extend}, now, [], extend=extend)
  assert read_opened(workdir)[0] == plan | {"data": None}


def test_imported_weights_know_their_images_from_an_extension_on(tmp_path):
  plan = {"total_steps": 9, "fill_steps": 0, "steps_per_epoch": 5, "num_examples": 7}
  origin = {"imported": {"file": "x.pth", "epoch": 200}}
  workdir = str(tmp_path)
  open_workdir(workdir, {"epochs": 1}, plan | origin, [])
  for extend in (False, True):
    with pytest.raises(ConfigError, match="was not finished; remove it"):
      open_workdir(workdir, {"epochs": 1 + extend}, plan, [], data="these", extend=extend)
  os.makedirs(tmp_path / "checkpoints" / "0")
  rows = open_workdir(workdir, {"epochs": 2}, plan, [], data="these", extend=True)
  record_extension(workdir, rows, {"epochs": 2}, plan, 0, "these")
  assert read_opened(workdir)[0] == plan | origin | {"data": "these"}
  with pytest.raises(ConfigError, match="images cannot change"):
    open_workdir(workdir, {"epochs": 2}, plan, [], data="those")


def test_history_tells_what_each_checkpoint_was_trained_with(tmp_path):
  """Back to a checkpoint before the change, since that at the change is damaged; forth and back at one step."""
  config = lambda x, y=1: {"temperature": x, "epochs": y}
  workdir, plan = extendable(tmp_path, config(0.4), {"total_steps": 99}, 22), {"total_steps": 99}

  def extend(step, *values):
    rows = open_workdir(workdir, config(*values), plan, [], extend=True)
    record_extension(workdir, rows, config(*values), plan, step)

  extend(22, 0.3)
  record_return(workdir, 22)
  assert undone(workdir, 20) == {"temperature": 0.4}
  record_return(workdir, 15)
  assert undone(workdir, 20) == {} and undone(workdir, 15) == {"temperature": 0.4}
  extend(15, 0.2, 2)
  assert read_history(workdir) == [
    {"step": 15, "changes": [["temperature", 0.4, 0.2], ["epochs", 1, 2]]}
  ]
  extend(15, 0.4, 2)
  assert read_history(workdir) == [{"step": 15, "changes": [["epochs", 1, 2]]}]
  extend(15, 0.4, 1)
  assert read_history(workdir) == []


def test_a_dtype_that_the_state_is_of_cannot_change(tmp_path):
  plan = lambda dtype: ({"compute_dtype": dtype}, {"total_steps": 9, "compute_dtype": dtype})
  workdir = extendable(tmp_path, *plan("float32"), 5)
  assert open_workdir(workdir, *plan("bfloat16"), [], extend=True)
  with pytest.raises(ConfigError, match="compute_dtype cannot change"):
    open_workdir(workdir, *plan("float64"), [], extend=True)


def test_checkpoints_whose_config_is_gone_are_nobody_s(tmp_path):
  workdir = extendable(tmp_path, {"seed": 0}, {}, 5)
  os.remove(tmp_path / "config.json")
  with pytest.raises(ConfigError, match=r"without the config.json"):
    open_workdir(workdir, {"seed": 1}, {}, [])


@pytest.mark.parametrize("name", ["metrics.jsonl", "plan.json", "report.html", "eval"])
def test_files_of_others_are_not_written_over(name, tmp_path):
  (tmp_path / name).write_text('{"loss": 1}')
  with pytest.raises(ConfigError, match=f"holds {name} without the config.json that goes with it"):
    open_workdir(str(tmp_path), {"seed": 1}, {"total_steps": 9}, [])
  assert (tmp_path / name).read_text() == '{"loss": 1}' and len(list(tmp_path.iterdir())) == 1


def test_a_start_that_was_ended_before_its_config_was_written(tmp_path):
  plan = {"total_steps": 9}
  (tmp_path / "plan.json").write_text(json.dumps(plan))
  assert open_workdir(str(tmp_path), {"seed": 1}, plan, []) == []
