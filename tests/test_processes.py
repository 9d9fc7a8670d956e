"""Two real processes on this machine: they train as one, leave together and fail together."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Thread

import jax
import pytest

from adco_jax import main
from adco_jax.errors import ConfigError
from adco_jax.runtime import processes, rollcall
from adco_jax.tasks.verify_resume import untimed
from tests.conftest import FAST
from tests.faults.job import JOB, Job

pytestmark = pytest.mark.processes  # the slow ones' group

SHORT = ["--config.epochs=1", "--config.eval.every_epochs=1", "--config.model.arch=resnet8"]


@pytest.mark.slow
def test_two_processes_train_as_one_and_leave_together(tmp_path):
  """SIGINT to the second: both leave with 42. Its part of the newest checkpoint is damaged: both take the
  one before. At last the lines are those of one process with two devices."""
  flags = [*SHORT, "--config.save.every_steps=5"]
  how = {"xla": FAST}
  job = Job(f"{tmp_path}/pair", *flags, processes=2, **how)
  job.wait(lambda: job.step() > 12)
  job.processes[1].send_signal(signal.SIGINT)
  assert job.end() == [42, 42], job.all_said()
  (step,) = set(re.findall(r"saved at step (\d+)", job.all_said()))
  (data,) = (tmp_path / "pair" / "checkpoints" / step / "state" / "ocdbt.process_1").glob("d")
  for file in data.iterdir():
    os.truncate(file, file.stat().st_size // 2)
  job = Job(f"{tmp_path}/pair", *flags, processes=2, **how)
  assert job.end() == [0, 0], job.all_said()
  assert f"checkpoint {step} is damaged" in job.said() and "resuming at step" in job.said()
  alone = Job(f"{tmp_path}/alone", *flags, devices=2, **how)
  assert alone.end() == [0]
  lines, expected = untimed(job.workdir), untimed(alone.workdir)
  assert [set(line) for line in lines] == [set(line) for line in expected]
  for line, other in zip(lines, expected, strict=True):
    for name in ("train/query_loss", "bank/max_norm", "knn/top1"):
      assert line.get(name, 0) == pytest.approx(other.get(name, 0), rel=1e-3)
  views = [(tmp_path / run / "views.png").read_bytes() for run in ("pair", "alone")]
  assert views[0] == views[1]


def test_processes_with_other_options_are_refused(tmp_path):
  other = ["--config.seed=1", "--config.method.temperature=0.2"]
  for status, said in start_pair(
    tmp_path, ["--config.seed=0", "--config.method.temperature=0.2"], other
  ):
    assert status == 2 and said.count("\n") == 1
    assert "config.seed: 0 in process 0, 1 in process 1; start all with the same" in said


def test_what_fails_on_one_process_ends_all_with_its_message(tmp_path):
  """A bad value, and a folder that only one does not see."""
  other = ["--config.data.source=folder", "--config.data.dir=/nowhere"]
  for flags, message in (
    (["--config.method.bank.size=0"], "config.method.bank.size=0"),
    (other, "no such folder"),
  ):
    for status, said in start_pair(tmp_path, [], flags):
      assert status == 2 and message in said
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_workdir_that_not_all_see_is_refused(tmp_path):
  """Another folder, empty or with another run in it."""
  (tmp_path / "run").mkdir()
  for other in ("empty", "full"):
    (tmp_path / other).mkdir()
  for name in ("plan.json", "config.json"):
    (tmp_path / "full" / name).write_text("{}")
  for other in ("empty", "full"):
    for status, said in start_pair(tmp_path, [], [f"--workdir={tmp_path}/{other}"]):
      assert status == 2 and "share" in said and said.count("error:") == 1


def test_different_devices_are_refused(tmp_path):
  pair = start_pair(tmp_path, [], [], devices=(1, 2))
  for status, said in pair:
    assert status == 2 and "different devices (process 0: 1 x cpu, process 1: 2 x cpu)" in said


def call_roll(*calls, seconds=3):
  """What each of rollcall.meet(count, number) returns or says, all at once on a free port."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]

  def one(call):
    try:
      return rollcall.meet(f"localhost:{port}", *call, seconds)
    except ConfigError as error:
      return str(error)

  with ThreadPoolExecutor(len(calls)) as pool:
    return list(pool.map(one, calls)), port


def test_roll_call():
  assert call_roll((1, 0))[0] == [{}]
  met, port = call_roll(*((4, i) for i in range(4)))
  assert [set(lines) for lines in met] == [{1, 2, 3}, {0}, {0}, {0}]
  with socket.create_server(("", port)):  # JAX's service takes the same port, the lines still open
    pass
  with ThreadPoolExecutor(3) as pool:
    watching = {i: pool.submit(rollcall.watch, met[i]) for i in (0, 1, 3)}
    time.sleep(0.2)
    assert not any(found.done() for found in watching.values())
    met[2][0].close()
    assert watching[0].result() == (2, None)
    rollcall.say(met[0], 43)  # process 0 leaves then, and the others see that
    assert watching[1].result() == watching[3].result() == (0, 43)


@pytest.mark.parametrize("calls, says", [
  (((3, 0), (3, 1)), "processes 2 of 3 did not come within 1 s"),
  (((3, 0), (3, 1), (3, 1)), "two processes have the number 1"),
  (((2, 0), (3, 1)), "was started as one of 3, process 0 as one of 2"),
  (((2, 1),), "process 1 of 2 tried for 1 s and reached nobody"),
])  # fmt: skip
def test_a_roll_call_that_fails_fails_for_all_in_one_line(calls, says):
  said, _ = call_roll(*calls, seconds=1)
  assert all(says in text and "\n" not in text for text in said)


@pytest.mark.parametrize(
  "said", [b"", b"GET / HTTP/1.1\r\n\r\n\n", b"5\n", b"{}\n", b'{"count": [2], "number": 1}\n']
)
def test_a_stranger_s_connection_changes_nothing(said, monkeypatch):
  monkeypatch.setattr(rollcall, "SILENCE_SECONDS", 0.1)
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  with ThreadPoolExecutor(2) as pool:
    first = pool.submit(rollcall.meet, f"localhost:{port}", 2, 0, 20)
    for _ in range(100):
      with contextlib.suppress(OSError):
        stranger = socket.create_connection(("localhost", port))
        break
      time.sleep(0.05)
    stranger.sendall(said)
    time.sleep(0.3)
    assert not first.done()  # a stranger is not process 1
    second = pool.submit(rollcall.meet, f"localhost:{port}", 2, 1, 20)
    assert set(first.result()) == {1} and set(second.result()) == {0}  # both have met
    stranger.close()


@pytest.mark.parametrize("answer, why", [
  (None, "no answer"),
  (b"HTTP/1.1 400 Bad Request\r\n\r\n", "somebody else answers there"),
])  # fmt: skip
def test_what_is_at_the_address_instead_of_process_0_is_told(answer, why):
  """A port that takes no more connections, or one where something else listens."""
  with socket.create_server(("localhost", 0), backlog=64 if answer else 0) as there:
    address = there.getsockname()
    if answer:
      Thread(target=answer_all, args=(there, answer), daemon=True).start()
    with contextlib.ExitStack() as waiting:
      for _ in range(0 if answer else 3):  # in its queue: a fourth is not even refused
        one = waiting.enter_context(socket.socket())
        one.setblocking(False)
        one.connect_ex(address)
      with pytest.raises(ConfigError, match=f"1 of 2 tried for 1 s and reached nobody \\({why}"):
        rollcall.meet(f"localhost:{address[1]}", 2, 1, 1)


def answer_all(server, answer):
  """Says `answer` to everybody until the server is closed."""
  with contextlib.suppress(OSError):
    while True:
      visitor, _ = server.accept()
      with visitor:
        visitor.recv(4096)
        visitor.sendall(answer)


def test_a_task_that_cannot_share_is_refused_by_all(tmp_path):
  for status, said in start_pair(tmp_path, [], ["--config=configs/knn.py"]):
    assert status == 2 and said.count("error:") == 1 and "runs in one process" in said


@pytest.mark.parametrize("phase, dies", [
  pytest.param("compiling", 1, marks=pytest.mark.slow),
  pytest.param("saving", 0, marks=pytest.mark.slow),
  pytest.param("stepping", 1, marks=pytest.mark.slow),
])  # fmt: skip
def test_who_dies_takes_the_others_along(tmp_path, phase, dies):
  """SIGKILL in the middle of whatever it may be: the other leaves within seconds, with one line."""
  job = Job(f"{tmp_path}/run", "--config.save.every_steps=1", processes=2)
  job.wait(lambda: job.phase() == phase)
  job.processes[dies].kill()
  began = time.monotonic()
  statuses = job.end()
  assert time.monotonic() - began < 30  # JAX alone: after 60, with a page
  assert statuses[dies] == -signal.SIGKILL
  if dies == 0 and statuses[1] == -signal.SIGABRT:
    return  # the first holds JAX's service as well, and JAX saw it go before we did
  assert statuses[1 - dies] == 43, job.all_said()
  said = [line for line in job.all_said().splitlines() if "gone" in line]
  assert len(said) == 1 and said[0].startswith("error: another process of this run is gone (")


CRASH = """
from adco_jax import main
from adco_jax.runtime import processes
from adco_jax.training import saver
processes.GOODBYE_SECONDS = 1
def due(*_): raise MemoryError("in the second process")
saver.Saver.due = due
main.leave(main.main())
"""


@pytest.mark.slow
def test_who_fails_alone_takes_the_others_along(tmp_path):
  """A failure that nobody foresaw: its traceback, its status, and one line of the others."""
  (status, said), (own, why) = start_pair(
    tmp_path, [], [], programs=(["-m", "adco_jax.main"], ["-c", CRASH])
  )
  assert own == 1 and "MemoryError: in the second process" in why
  assert status == 1 and "error: another process of this run has left with status 1, and" in said
  assert "Traceback" not in said


BLIND = """
import orbax.checkpoint as ocp
from adco_jax import main
restore = ocp.Checkpointer.restore
def fail_once(*_, **__):
  ocp.Checkpointer.restore = restore
  raise ValueError("cannot be read here")
ocp.Checkpointer.restore = fail_once
main.leave(main.main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("blind", [0, 1])
def test_what_one_process_cannot_restore_none_takes(tmp_path, blind):
  flags = ["--config.save.every_steps=5", "--config.stop_at_step=12"]
  assert all(status == 0 for status, _ in start_pair(tmp_path, flags, flags))
  programs = [["-m", "adco_jax.main"], ["-m", "adco_jax.main"]]
  programs[blind] = ["-c", BLIND]
  for status, said in start_pair(tmp_path, flags, flags, programs=programs):
    assert status == 0, said
  assert (tmp_path / "run" / "checkpoints" / "12.damaged").exists()


FULL = """
import errno
from orbax.checkpoint._src.path import atomicity
from adco_jax import main
from adco_jax.runtime import processes
processes.GOODBYE_SECONDS = 1
async def fail(*_, **__):
  raise OSError(errno.ENOSPC, "No space left on device")
atomicity.AtomicRenameTemporaryPath.create = fail
main.leave(main.main())
"""


@pytest.mark.slow
def test_a_disk_that_is_full_ends_all_processes(tmp_path):
  """The first cannot make the folder of a checkpoint while the other waits for it inside Orbax."""
  flags = ["--config.save.every_steps=5", "--config.stop_at_step=12"]
  (status, said), (other, line) = start_pair(
    tmp_path, flags, flags, programs=(["-c", FULL], ["-m", "adco_jax.main"])
  )
  assert status == 3 and "No space left on device" in said and said.count("error:") == 1
  assert other == 3 and "has left with status 3" in line


def test_a_lost_process_is_told_from_other_errors(monkeypatch, capsys):
  lost = jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Read error")
  assert main.lost_process(lost) is None  # a lone process loses nobody
  monkeypatch.setattr(processes, "several", lambda: True)
  for name in ("_told", "_gone"):
    monkeypatch.setattr(processes, name, Event())
  monkeypatch.setattr(processes, "LINE_SECONDS", 0.1)
  assert main.lost_process(lost) == 43
  assert capsys.readouterr().err.startswith(
    "error: another process of this run is gone (UNKNOWN: Gloo"
  )
  assert main.lost_process(jax.errors.JaxRuntimeError("out of memory")) is None
  assert main.lost_process(KeyError("gloo")) is None
  assert main.lost_process(ValueError("UNKNOWN: Gloo AllGather failed: Connection reset")) == 43
  processes._gone.set()
  assert main.lost_process(KeyError("whatever comes of it")) == 43


def test_a_taken_port_is_told():
  with socket.socket() as taken:
    taken.bind(("", 0))
    taken.listen()
    with pytest.raises(ConfigError, match="cannot listen there"):
      rollcall.meet(f"localhost:{taken.getsockname()[1]}", 2, 0, 1)


def start_pair(folder, *flags, devices=(1, 1), programs=(["-m", "adco_jax.main"],) * 2):
  """[(status, stderr)] of two processes of one run, each with flags of its own."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  started = []
  for i, own in enumerate(flags):
    around = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    around |= {"JAX_PROCESS_ID": str(i), "JAX_PLATFORMS": "cpu"}
    around["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices[i]}"
    job = [] if any(flag.startswith("--config=") for flag in own) else JOB
    command = [sys.executable, *programs[i], *job, f"--workdir={folder}/run", *own]
    started.append(
      subprocess.Popen(command, env=os.environ | around, stderr=subprocess.PIPE, text=True)
    )
  said = [process.communicate(timeout=120)[1] for process in started]
  return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


def test_a_wrong_environment_is_one_line(monkeypatch, capsys):
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost")
  assert main.main(["--config=configs/adco_digits.py"]) == 2
  said = capsys.readouterr().err
  assert said == "error: JAX_COORDINATOR_ADDRESS='localhost': use HOST:PORT of the first process\n"
