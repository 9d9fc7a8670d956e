"""Workdirs in gs://, through the real clients (gcsfs, tensorstore) against a stand-in for the service."""

import json
import os

import jax
import jax.numpy as jnp
import pytest
from etils import epath

import adco_jax
from adco_jax import main
from adco_jax.errors import ConfigError
from adco_jax.runtime import remote
from adco_jax.workdir.checkpoint import Checkpoints
from adco_jax.workdir.metrics import read_metrics
from adco_jax.workdir.opening import open_workdir
from tests.faults.job import Job
from tests.storage import Storage
from tests.test_end_to_end import TINY, fingerprint, untimed

pytestmark = pytest.mark.storage  # the slow ones' group

BUCKET = "gs://bucket-of-ours"
SHORT = [*TINY, "--config.epochs=1", "--config.eval.every_epochs=0"]


@pytest.fixture(scope="module", autouse=True)
def service():
  """A stand-in for the service on this machine."""
  server = Storage(0, "bucket-of-ours")
  server.start()
  where = f"http://localhost:{server.server_port}"
  names = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL")
  os.environ.update(dict.fromkeys(names, where) | {"NO_GCE_CHECK": "true"})
  yield server
  server.shutdown()
  for name in (*names, "NO_GCE_CHECK"):
    del os.environ[name]


def run(workdir, *flags):
  assert main.main([*SHORT, f"--workdir={workdir}", *flags]) == 0
  assert not remote._copies


def test_checkpoints_last_there():
  """Saved, damaged, set aside, restored from the one before; one that was never finished does not count."""
  url, states = f"{BUCKET}/states", [{"a": jnp.arange(5.0) + n} for n in range(3)]
  checkpoints = Checkpoints(url, keep=2)
  for step, state in enumerate(states):
    checkpoints.save(step, state)
    checkpoints.finish()
  assert checkpoints.latest_step() == 2 and names(f"{url}/checkpoints") == {"1", "2"}
  (epath.Path(url) / "checkpoints" / "7" / "state").mkdir(parents=True)
  (epath.Path(url) / "checkpoints" / "7" / "state" / "half").write_text("")
  for data in (epath.Path(url) / "checkpoints" / "2" / "state" / "d").iterdir():
    data.write_bytes(b"nothing")
  assert Checkpoints(url).latest_step() == 2
  state, step = Checkpoints(url, keep=2).restore(jax.eval_shape(lambda: states[0]))
  assert step == 1 and state["a"].tolist() == states[1]["a"].tolist()
  assert names(f"{url}/checkpoints") >= {"1", "2.damaged"}
  remote.close()


def test_a_copy_sees_what_others_write_and_gives_back_what_it_wrote():
  url = f"{BUCKET}/copy"
  (epath.Path(url) / "metrics.jsonl").write_text("old")
  folder = remote.local(f"{url}/")
  assert open(f"{folder}/metrics.jsonl").read() == "old" and remote.local(url) == folder
  (epath.Path(url) / "config.json").write_text("{}")
  (epath.Path(url) / "other" / "config.json").write_text("another run's")
  (epath.Path(url) / "embeddings-train-5.npz").write_text("large")
  remote.refresh(folder)
  assert set(os.listdir(folder)) == {"metrics.jsonl", "config.json"}
  os.makedirs(f"{folder}/eval")
  with open(f"{folder}/eval/knn-5.json", "w") as file:
    file.write("new")
  remote.close()
  assert (epath.Path(url) / "eval" / "knn-5.json").read_text() == "new"
  assert (epath.Path(url) / "embeddings-train-5.npz").read_text() == "large"
  assert not os.path.exists(folder)


def test_a_run_that_is_begun_anew_leaves_nothing_to_the_next(service):
  """Killed before its first save and started again from a bare machine; what was there before stays, all of it."""
  url, plan = f"{BUCKET}/anew", {"total_steps": 9}

  def session(seed, metrics=""):
    folder = remote.local(url)
    open_workdir(folder, {"seed": seed}, plan, [])
    remote.push(folder)
    found = read_metrics(folder)
    if metrics:
      (epath.Path(folder) / "metrics.jsonl").write_text(metrics)
      remote.close()
    remote._copies.clear()
    return found

  session(0, '{"step": 0, "knn/top1": 0.111}\n')
  (epath.Path(url) / "checkpoints" / "0" / "state").write_text("of another run")
  (epath.Path(url) / "tensorboard" / "events").write_text("points")
  assert session(1) == session(1) == session(2) == session(2) == []
  there = {
    name.removeprefix("anew/"): text
    for (_, name), (_, text) in service.objects.items()
    if name.startswith("anew/")
  }
  asked = {
    name: json.loads(text)["config"]["seed"]
    for name, text in there.items()
    if name.endswith("config.json")
  }
  assert asked == {"before-1/config.json": 0, "before-2/config.json": 1, "config.json": 2}
  files = ("plan.json", "metrics.jsonl", "tensorboard/events", "checkpoints/0/state")
  assert {*there} - {*asked} == {
    *(f"before-1/{name}" for name in files),
    "before-2/plan.json",
    "plan.json",
  }


def names(url):
  return {path.name for path in epath.Path(url).iterdir()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """The same run on disk."""
  folder = tmp_path_factory.mktemp("disk")
  run(folder)
  return folder


@pytest.mark.slow
def test_a_run_in_a_bucket_is_a_run(finished, capsys):
  """Stopped and resumed with a damaged checkpoint: files, lines and bits of the run on disk."""
  url = f"{BUCKET}/folder/run"
  run(url, "--config.stop_at_step=10")
  run(url, "--config.stop_at_step=12")
  (data, *_) = (epath.Path(url) / "checkpoints" / "12" / "state" / "d").iterdir()
  data.write_bytes(b"nothing")
  capsys.readouterr()
  run(url)
  said = capsys.readouterr().out
  assert "checkpoint 12 is damaged" in said and "set aside as 12.damaged" in said
  assert "resuming at step 10 of 22" in said and f"everything is in {url}" in said
  assert f"report: {url}/report.html" in said and "adco_jax-" not in said
  assert names(url) == set(os.listdir(finished)) - {".lock"}
  kept = set(os.listdir(finished / "checkpoints"))
  assert names(f"{url}/checkpoints") == kept | {"12.damaged"}
  assert untimed(remote.local(url)) == untimed(finished)
  remote.close()
  run(finished)
  assert fingerprint(said) == fingerprint(capsys.readouterr().out)


@pytest.mark.slow
def test_an_encoder_in_a_bucket_is_scored_exported_and_trained_on(tmp_path, capsys):
  url = f"{BUCKET}/scored"
  run(url)
  assert main.main(["--config=configs/knn.py", f"--config.pretrained={url}", "--config.map=0"]) == 0
  scores = json.loads((epath.Path(url) / "eval" / "knn-digits-test-22.json").read_text())
  assert scores["config"]["pretrained"] == url
  out = tmp_path / "encoder.npz"
  flags = [f"--config.pretrained={url}", "--config.format=npz", f"--config.out={out}"]
  assert main.main(["--config=configs/export.py", *flags]) == 0 and out.exists()
  there = ["--config=configs/export.py", f"--config.pretrained={url}", "--config.format=npz"]
  assert main.main(there) == 0 and names(f"{url}/export")
  assert main.main(there) == 2 and "exists; name another file" in capsys.readouterr().err
  assert main.main(["--config=configs/embed.py", f"--config.pretrained={url}"]) == 0
  assert "embeddings-digits-train-22.npz" in names(url)
  run(tmp_path / "next", f"--config.init_from={url}", "--config.stop_at_step=4")
  assert f"starting from {url}, step 22" in capsys.readouterr().out


@pytest.mark.slow
def test_a_program_finds_all_of_its_run_there():
  """What is made behind the last save too: the page, and scores of a classifier."""
  url = f"{BUCKET}/program"
  adco_jax.train(main.parse(SHORT)[0], url)
  assert {"report.html", "metrics.jsonl", "config.json"} <= {*names(url)}
  remote.close()


@pytest.mark.slow
def test_other_options_are_refused_there_too(capsys):
  run(f"{BUCKET}/other", "--config.stop_at_step=1")
  flags = [*SHORT, f"--workdir={BUCKET}/other", "--config.seed=5"]
  assert main.main(flags) == 2
  said = capsys.readouterr().err
  assert f"error: --workdir={BUCKET}/other: holds a run with another config" in said


@pytest.mark.parametrize("workdir, says", [
  ("s3://bucket/run", "use a folder or gs://BUCKET/NAME"),
  ("gs://", "use a folder or gs://BUCKET/NAME"),
  ("gs://no-such-bucket/run", "no-such-bucket"),
])  # fmt: skip
def test_what_cannot_be_is_one_line(workdir, says, capsys):
  assert main.main([*SHORT, f"--workdir={workdir}"]) == 2
  said = capsys.readouterr().err
  assert says in said and said.startswith("error: ") and said.count("\n") == 1


def test_without_the_client_is_one_line(monkeypatch):
  monkeypatch.setattr(remote.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ConfigError, match="needs gcsfs; pip install gcsfs"):
    remote.local(f"{BUCKET}/run")


def test_what_could_not_be_uploaded_stays_here(monkeypatch):
  folder = remote.local(f"{BUCKET}/lost")
  with open(f"{folder}/metrics.jsonl", "w") as file:
    file.write("{}")
  monkeypatch.setattr(remote._Copy, "push", lambda self: 1 / 0)
  with pytest.raises(OSError, match=f"not uploaded .*lie in {folder}"):
    remote.close()
  assert os.listdir(folder) == ["metrics.jsonl"] and not remote._copies


@pytest.mark.slow
def test_two_processes_in_a_bucket_train_as_one(tmp_path):
  """Both write their part of every checkpoint there; a signal to one saves and ends both; they resume."""
  url = f"{BUCKET}/two"
  flags = ["--config.epochs=2", "--config.eval.every_epochs=0", "--config.save.every_steps=5"]
  how = {"processes": 2, "cached": False, "logs": f"{tmp_path}/two"}
  job = Job(url, *flags, **how)
  job.wait(lambda: "step 12/" in job.said())
  job.processes[1].terminate()
  assert job.end() == [42, 42], job.all_said()
  job = Job(url, *flags, **how)
  assert job.end() == [0, 0], job.all_said()
  assert "resuming at step" in job.said() and f"everything is in {url}" in job.said()
  alone = Job(f"{tmp_path}/alone", *flags, devices=2)
  assert alone.end() == [0]
  lines, expected = untimed(remote.local(url)), untimed(alone.workdir)
  remote.close()
  assert [line["step"] for line in lines] == [line["step"] for line in expected]
  for line, other in zip(lines, expected, strict=True):
    assert line["train/query_loss"] == pytest.approx(other["train/query_loss"], rel=1e-3)


def test_a_service_that_is_away_is_one_line(service, capsys, monkeypatch):
  """At the start; while it is away nothing is said about checkpoints that cannot be seen."""
  monkeypatch.setattr("gcsfs.retry.asyncio.sleep", no_sleep)
  service.away = True
  try:
    assert main.main([*SHORT, f"--workdir={BUCKET}/away"]) == 2
    said = capsys.readouterr().err
    assert f"error: {BUCKET}/away: cannot be read" in said and said.count("\n") == 1
  finally:
    service.away = False


async def no_sleep(seconds):
  del seconds


@pytest.mark.parametrize("flags, says", [
  (["--config=configs/export.py", "--config.pretrained=x", "--config.format=npz", f"--config.out={BUCKET}/e.npz"], "config.out="),
  (["--config=configs/embed.py", "--config.pretrained=x", f"--config.out={BUCKET}/e.npz"], "config.out="),
  (["--config=configs/pack.py", "--config.data.dir=x", f"--config.out={BUCKET}/p"], "config.out="),
  ([*SHORT, f"--config.data.dir={BUCKET}/images"], "config.data.dir="),
])  # fmt: skip
def test_only_workdirs_can_be_in_a_bucket(flags, says, capsys):
  assert main.main(flags) == 2
  said = capsys.readouterr().err
  assert says in said and "only workdirs can be in gs://" in said
