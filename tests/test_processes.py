"""Two real processes on this machine: they train as one, leave together and fail together."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from adco_jax import main
from adco_jax.metrics import read_metrics
from adco_jax.verify_resume import untimed
from tests.faults.job import JOB, Job

SHORT = ["--config.epochs=2", "--config.eval.every_epochs=1", "--config.model.arch=resnet8"]


def test_two_processes_train_as_one_and_leave_together(tmp_path):
  """SIGINT to the second: both save at one step and leave with 42; two devices of one process go on."""
  job = Job(f"{tmp_path}/pair", *SHORT, processes=2, cached=False)
  job.wait(lambda: len(read_metrics(job.workdir)) > 12)
  job.processes[1].send_signal(signal.SIGINT)
  assert job.end() == [42, 42], job.said()
  said = []
  for log in job.logs:
    with open(log) as file:
      said.append([line for line in file if "saved at step" in line])
  assert said[0][0].split(";")[0].split(": ")[1] == said[1][0].split(";")[0].split(": ")[1]
  go_on = Job(f"{tmp_path}/pair", *SHORT, devices=2, cached=False)
  assert go_on.end() == [0] and "resuming at step" in go_on.said()
  alone = Job(f"{tmp_path}/alone", *SHORT, devices=2, cached=False)
  assert alone.end() == [0]
  lines, expected = untimed(go_on.workdir), untimed(alone.workdir)
  assert [set(line) for line in lines] == [set(line) for line in expected]
  for line, other in zip(lines, expected, strict=True):
    assert line.get("train/query_loss", 0) == pytest.approx(
      other.get("train/query_loss", 0), rel=1e-2
    )


def test_what_fails_on_one_process_ends_all_with_its_message(tmp_path):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  started = []
  for i, source in enumerate(("digits", "folder")):
    flags = [*JOB, f"--workdir={tmp_path}/run", f"--config.data.source={source}"]
    around = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    around |= {"JAX_PROCESS_ID": str(i), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "adco_jax.main", *flags, "--config.data.dir=/nowhere"]
    started.append(
      subprocess.Popen(command, env=os.environ | around, stderr=subprocess.PIPE, text=True)
    )
  for process in started:
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2 and "config.data.dir='/nowhere': no such folder" in said
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  "count, number, wrong", [("two", "0", "COUNT"), ("2", "", "ID"), ("2", "2", "ID=2")]
)
def test_a_wrong_environment_is_one_line(count, number, wrong, monkeypatch, capsys):
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
  monkeypatch.setenv("JAX_NUM_PROCESSES", count)
  monkeypatch.setenv("JAX_PROCESS_ID", number)
  assert main.main(["--config=configs/adco_digits.py"]) == 2
  said = capsys.readouterr().err
  assert said.count("\n") == 1 and wrong.replace("COUNT", "JAX_NUM_PROCESSES='two'") in said
