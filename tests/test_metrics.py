"""metrics.jsonl after restarts, TensorBoard, the clock."""

import glob
import json
import resource

import pytest

from adco_jax import metrics


def test_lines_past_the_restored_step_are_dropped(tmp_path):
  writer = metrics.MetricsWriter(tmp_path, 0)
  for step in (10, 20, 30):
    writer.write(step, step / 10, {"train/query_loss": float(step)})
  writer.close()
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write('{"step": 40, "train/que')  # a crash in the middle of a line
  writer = metrics.MetricsWriter(tmp_path, 20)
  assert writer.has(20, "train/query_loss") and not writer.has(30, "train/query_loss")
  writer.write(20, 2.0, {"train/query_loss": 20.0})  # already there
  writer.write(20, 2.0, {"knn/top1": 0.5})
  writer.write(30, 3.0, {"train/query_loss": 31.0})
  writer.close()
  lines = [json.loads(line) for line in open(tmp_path / "metrics.jsonl")]
  assert lines == metrics.read_metrics(tmp_path)
  assert [(x["step"], x.get("train/query_loss"), x.get("knn/top1")) for x in lines] == [
    (10, 10.0, None), (20, 20.0, None), (20, None, 0.5), (30, 31.0, None)
  ]  # fmt: skip


def test_tensorboard_reads_back(tmp_path):
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

  writer = metrics.MetricsWriter(tmp_path, 0)
  writer.write(5, 0.5, {"train/query_loss": 1.25})
  writer.close()
  assert glob.glob(str(tmp_path / "tensorboard" / "events.*"))
  events = EventAccumulator(str(tmp_path / "tensorboard"))
  events.Reload()
  (event,) = events.Scalars("train/query_loss")
  assert (event.step, event.value) == (5, 1.25)


def test_clock_counts_steps_and_waiting():
  clock = metrics.Clock()
  for _ in range(3):
    clock.wait_for(iter([0]))
  values = clock.read(batch_size=8)
  rate = values["time/images_per_second"] * values["time/seconds_per_step"]
  assert abs(rate - 8) < 1e-6 and 0 <= values["time/waiting_for_data"] <= 1


def test_durations_as_people_say_them():
  said = [metrics.duration(s) for s in (5, 65, 3700, 90000)]
  assert said == ["5s", "1m05s", "1h01m", "1d01h"]


def test_lines_wait_for_room_on_the_disk(tmp_path):
  """A file that may not grow: nothing is raised but by sync, and no line is lost, cut or written twice."""
  writer = metrics.MetricsWriter(tmp_path, 0)
  writer.write(1, 0.0, {"train/query_loss": 1.0})
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (90, limits[1]))
    for step in (2, 3, 4):
      writer.write(step, 0.0, {"train/query_loss": 1.0})
    with pytest.raises(OSError):
      writer.sync()
    assert len(metrics.read_metrics(tmp_path)) == 1  # and a part of the second
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  writer.sync()
  assert [line["step"] for line in metrics.read_metrics(tmp_path)] == [1, 2, 3, 4]
  writer.close()
