"""Workdirs in gs://, through the real clients (gcsfs, tensorstore) against a stand-in for the service."""

import json
import logging
import os
import socket

import pytest
from etils import epath

from adco_jax import main, remote
from adco_jax.plan import ConfigError
from tests.test_end_to_end import TINY, fingerprint, untimed

BUCKET = "gs://bucket-of-ours"
SHORT = [*TINY, "--config.epochs=1", "--config.eval.every_epochs=0"]


@pytest.fixture(scope="module", autouse=True)
def service():
  """An emulator of Google Cloud Storage on this machine, in memory."""
  from gcp_storage_emulator.server import create_server

  logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  where = f"http://localhost:{port}"
  names = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL")
  os.environ.update(dict.fromkeys(names, where) | {"NO_GCE_CHECK": "true"})
  server = create_server("localhost", port, in_memory=True, default_bucket="bucket-of-ours")
  server.start()
  yield
  server.stop()
  for name in (*names, "NO_GCE_CHECK"):
    del os.environ[name]


def run(workdir, *flags):
  assert main.main([*SHORT, f"--workdir={workdir}", *flags]) == 0
  assert not remote._copies


def names(url):
  return {path.name for path in epath.Path(url).iterdir()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """The same run on disk."""
  folder = tmp_path_factory.mktemp("disk")
  run(folder)
  return folder


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
  assert main.main(["--config=configs/knn.py", f"--config.pretrained={url}"]) == 0
  scores = json.loads((epath.Path(url) / "eval" / "knn-22.json").read_text())
  assert scores["config"]["pretrained"] == url
  out = tmp_path / "encoder.npz"
  flags = [f"--config.pretrained={url}", "--config.format=npz", f"--config.out={out}"]
  assert main.main(["--config=configs/export.py", *flags]) == 0 and out.exists()
  assert main.main(["--config=configs/embed.py", f"--config.pretrained={url}"]) == 0
  assert "embeddings-train-22.npz" in names(url)
  run(tmp_path / "next", f"--config.init_from={url}", "--config.stop_at_step=4")
  assert f"starting from {url}, step 22" in capsys.readouterr().out


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


def test_what_could_not_be_uploaded_stays_here(tmp_path, monkeypatch):
  folder = remote.local(f"{BUCKET}/lost")
  with open(f"{folder}/metrics.jsonl", "w") as file:
    file.write("{}")
  monkeypatch.setattr(remote._Copy, "push", lambda self: 1 / 0)
  with pytest.raises(OSError, match=f"not uploaded .*lie in {folder}"):
    remote.close()
  assert os.listdir(folder) == ["metrics.jsonl"] and not remote._copies
