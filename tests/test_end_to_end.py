"""Through `main` with real flags: pre-train, stop, resume, kNN, linear, report; and what must not happen."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from adco_jax import main
from adco_jax.workdir.metrics import read_metrics
from tests import settings

pytestmark = pytest.mark.kills  # the slow ones' group

TINY = [
  "--config=configs/adco_digits.py", "--config.model.arch=resnet8", "--config.model.width=0.125",
  "--config.data.batch_size=64", "--config.bn.group_size=8", "--config.method.bank.size=128", "--config.epochs=2",
  "--config.log.every_steps=5", "--config.save.every_steps=10", "--config.eval.every_epochs=1",
  "--config.views.crops=((12,.5,1.),(12,.5,1.))",
]  # fmt: skip


ONE_BLOCK = f"--config.model.arch={settings.TINY}"  # which only this process knows


def run(workdir, *flags):
  assert main.main([*TINY, ONE_BLOCK, f"--workdir={workdir}", *flags]) == 0


def untimed(workdir):
  """Lines of metrics.jsonl without what may differ between a run and its repetition."""
  return [
    {k: v for k, v in line.items() if not k.startswith("time/")} for line in read_metrics(workdir)
  ]


def fingerprint(output):
  """The state's number in the last line of a run."""
  return output.split("; state ")[1].split(";")[0]


def test_workdir_of_a_finished_run(finished):
  finished, _ = finished
  names = set(os.listdir(finished))
  assert names == {
    "config.json",
    "plan.json",
    ".lock",
    "checkpoints",
    "metrics.jsonl",
    "tensorboard",
    "views.png",
    "neighbours.png",
    "adversary.png",
    "adversary.npz",
    "report.html",
  }
  lines = read_metrics(finished)
  steps = [x["step"] for x in lines if "train/query_loss" in x]
  assert steps == [5, 10, 15, 20, 25, 30, 35, 40]  # 2 of initialisation + 2 epochs of 20: 42 steps
  scored = [x for x in lines if "knn/top1" in x]
  assert [x["step"] for x in scored] == [0, 22, 42]
  assert all({"signal/rank_features", "signal/mean_cosine"} <= set(x) for x in scored)
  last = [x for x in lines if "bank/loss" in x][-1]
  assert {
    "bank/median_norm",
    "train/accuracy",
    "train/alignment",
    "train/in_batch_mass",
    "time/images_per_second",
  } <= set(last)
  assert last["train/chance"] == pytest.approx(np.log(128 + 64))


def test_stopped_and_resumed_equals_straight(finished, tmp_path, capsys):
  """Two stops, one inside the bank's initialisation: the same lines and the same bits."""
  straight, number = finished
  for stop in (1, 30):
    run(tmp_path, f"--config.stop_at_step={stop}")
    assert f"stopped at step {stop} of 42" in capsys.readouterr().out
  run(tmp_path)
  end = capsys.readouterr().out
  assert "resuming at step 30 of 42" in end
  assert untimed(tmp_path) == untimed(straight)
  for name in ("adversary.npz", "adversary.png"):
    assert (tmp_path / name).read_bytes() == (straight / name).read_bytes()
  run(tmp_path)  # says that all is done, changes nothing
  again = capsys.readouterr().out
  assert "resuming at step 42" in again and "done at step 42" in again
  assert fingerprint(end) == fingerprint(again) == number
  assert untimed(tmp_path) == untimed(straight)


def test_another_config_is_refused(finished, capsys):
  finished, _ = finished
  before = (finished / "config.json").read_text()
  assert (
    main.main(
      [*TINY, ONE_BLOCK, f"--workdir={finished}", "--config.seed=1", "--config.method.bank.size=64"]
    )
    == 2
  )
  first, *table = capsys.readouterr().err.strip().split("\n")
  assert "another config (2 keys differ" in first and "init_from" in first
  assert "method.bank.size, seed cannot change in a run that goes on" in first
  assert [row.split()[0] for row in table] == ["method.bank.size", "seed"]
  assert (finished / "config.json").read_text() == before


def test_knn_linear_and_report(finished, capsys):
  finished, _ = finished
  for config in ("knn.py", "linear.py:small"):
    flags = [f"--config=configs/{config}", f"--config.pretrained={finished}", "--config.draws=2",
             "--config.labels_per_class=(1,10)"]  # fmt: skip
    flags += ["--config.map=60"] * (config == "knn.py")
    assert main.main(flags) == 0
    output = capsys.readouterr().out
    assert "1 per class" in output and "report: " in output
    assert main.main(flags) == 0  # a second call shows what is there
    assert "features of" not in capsys.readouterr().out
  for task in ("knn", "linear"):
    facts = json.load(open(finished / "eval" / f"{task}-digits-test-42.json"))
    assert (
      set(facts["results"]) == {"trained", "untrained", "pixels"} and facts["test_images"] == 500
    )
    trained, untrained = (facts["results"][name]["all"] for name in ("trained", "untrained"))
    assert (
      trained > untrained + 0.03
    )  # after 40 steps already: .604 and .502, the probe .688 and .610
    for scores in facts["results"].values():
      assert 0.1 < scores["all"] <= 1 and len(scores["10"]["draws"]) == 2
  probe = np.load(finished / "eval" / "linear-digits-test-42.npz")
  assert probe["kernel"].shape == (8, 10)
  page = (finished / "report.html").read_text()
  for piece in ("Loss", "Training accuracy", "Held-out accuracy", "Norms of the bank", "In-batch mass",
                "Neighbours", "Linear probe", "What the encoder is shown", "untrained", "pixels"):  # fmt: skip
    assert piece in page, piece
  assert "src='http" not in page and "href" not in page  # self-contained
  assert main.main([*flags, "--config.baselines=False", "--config.labels_per_class=()"]) == 0
  assert {"linear-digits-test-42.json", "linear-digits-test-42-2.json"} <= set(
    os.listdir(finished / "eval")
  )  # nothing overwritten


@pytest.mark.slow
def test_new_run_from_another_s_encoders(finished, tmp_path, capsys):
  """Same bank: taken over, no initialisation. Other bank: encoders only, initialised anew."""
  finished, _ = finished
  run(tmp_path / "same", f"--config.init_from={finished}", "--config.stop_at_step=3")
  said = capsys.readouterr().out
  assert "encoders, objective" in said and "compiling the step of training:" in said
  begun = read_metrics(tmp_path / "same")[0]  # behind the filling
  assert begun["step"] == 2 and begun["knn/top1"] == read_metrics(finished)[-1]["knn/top1"]
  assert (tmp_path / "same" / "views.png").exists()
  run(
    tmp_path / "other",
    f"--config.init_from={finished}",
    "--config.method.bank.size=64",
    "--config.augment.policy=none",
    "--config.stop_at_step=3",
  )
  assert "encoders\n" in capsys.readouterr().out
  assert read_metrics(tmp_path / "other")[0]["knn/top1"] == read_metrics(finished)[-1]["knn/top1"]


def test_a_bank_that_was_never_filled_is_not_taken_over(tmp_path, capsys):
  flags = [*TINY, ONE_BLOCK, "--config.stop_at_step=1"]
  settings.save_run(tmp_path / "early", main.parse(flags)[0], step=1)  # of two that fill the bank
  run(tmp_path / "next", f"--config.init_from={tmp_path}/early", "--config.stop_at_step=1")
  assert "step 1: encoders\n" in capsys.readouterr().out


@pytest.mark.parametrize(
  "place, told", [("", "no labels"), ("train/cats", "labels of a single class")]
)
def test_unlabelled_images_train(place, told, tmp_path, capsys):
  """A flat folder of photographs through tf.data, or one class of them: no probe, but ranks, cosines and neighbours."""
  from tests.test_data import write_images

  write_images(tmp_path / "photos" / place, 12, sizes=[(40, 50), (64, 33)])
  flags = ["--config.data.source=folder", f"--config.data.dir={tmp_path}/photos", "--config.data.batch_size=8",
           "--config.epochs=3", "--config.method.bank.size=8", "--config.augment.policy=none", "--config.bn.group_size=1", "--config.log.every_steps=1"]  # fmt: skip
  run(tmp_path / "run", *flags)
  output = capsys.readouterr().out
  assert f"{told}: no kNN and no probe" in output and "serves plans only" not in output
  lines = read_metrics(tmp_path / "run")
  assert [x["step"] for x in lines if "train/query_loss" in x] == [1, 2, 3, 4]
  evaluated = [x for x in lines if "signal/mean_cosine" in x]
  assert [x["step"] for x in evaluated] == [0, 2, 3, 4] and "knn/top1" not in evaluated[0]
  assert "and of training: usually" in output and "left" not in output.split("compiling")[0]
  page = (tmp_path / "run" / "report.html").read_text()
  assert "Nearest neighbours" in page and "Rank" in page


def test_moco_learns_in_the_same_trainer(tmp_path, capsys):
  flags = [flag for flag in TINY if "bank" not in flag]
  own = [
    "--config.objective=moco",
    "--config.method.queue_size=128",
    "--config.method.in_batch=False",
  ]
  more = ["--config.epochs=1", "--config.augment.policy=none", f"--workdir={tmp_path}"]
  assert main.main([*flags, ONE_BLOCK, *own, *more]) == 0
  assert "done at step 20" in capsys.readouterr().out
  first, *_, last = (x for x in read_metrics(tmp_path) if "train/query_loss" in x)
  assert last["train/query_loss"] < first["train/query_loss"] - 0.005 < last["train/chance"]
  assert "bank/loss" not in last and last["train/chance"] == pytest.approx(np.log(129))


@pytest.mark.slow
def test_killed_three_times_equals_straight(tmp_path):
  """SIGKILL at random moments, in fresh processes without test flags: same lines, same bits."""
  command = [
    sys.executable,
    "-m",
    "adco_jax.main",
    *TINY,
    "--config.epochs=10",
    "--config.save.every_steps=20",
  ]
  straight = subprocess.run(
    [*command, f"--workdir={tmp_path}/a"], capture_output=True, text=True, check=True
  )
  moments, killed = random.Random(0), 0
  while True:
    process = subprocess.Popen(
      [*command, f"--workdir={tmp_path}/b"], stdout=subprocess.PIPE, text=True
    )
    if killed == 3:
      break
    wait_for_step(tmp_path / "b", 20 + 50 * killed, process)
    time.sleep(moments.uniform(0, 0.5))
    process.send_signal(signal.SIGKILL)
    killed += process.wait() == -signal.SIGKILL
  output = process.communicate()[0]
  assert process.returncode == 0 and "resuming at step" in output
  assert untimed(tmp_path / "b") == untimed(tmp_path / "a")
  assert fingerprint(output) == fingerprint(straight.stdout)


def wait_for_step(workdir, step, process):
  """Until metrics.jsonl has reached a step; fails if the run ends first."""
  while max((x["step"] for x in read_metrics(workdir)), default=0) < step:
    assert process.poll() is None
    time.sleep(0.05)


def test_a_run_goes_on_without_the_one_that_it_started_from(finished, tmp_path, capsys):
  """Its first state is saved at once: the other run may be gone, or further on, by the next start."""
  other, _ = finished
  flags = [f"--config.init_from={other}", "--config.eval.every_epochs=0"]
  run(tmp_path / "run", *flags, "--config.stop_at_step=4")
  steps = sorted(int(name) for name in os.listdir(tmp_path / "run" / "checkpoints"))
  assert steps == [2, 4]
  shutil.rmtree(other)
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
  run(tmp_path / "run", *flags, "--config.stop_at_step=5")
  assert "resuming at step 2 of" in capsys.readouterr().out
  assert main.main([*TINY, ONE_BLOCK, f"--workdir={tmp_path}/new", *flags]) == 2
  assert "config.init_from=" in capsys.readouterr().err
