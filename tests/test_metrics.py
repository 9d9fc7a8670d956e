"""metrics.jsonl after restarts, TensorBoard, the clock."""

import concurrent.futures
import glob
import json
import resource

import numpy as np
import pytest

from adco_jax.runtime import progress
from adco_jax.training.log import Log
from adco_jax.training.programs import Program
from adco_jax.workdir import metrics
from tests import settings


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


def test_tensorboard_forgets_points_past_the_restored_step(tmp_path):
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

  for start, steps in ((0, (10, 20, 30, 40)), (20, (30,))):
    writer = metrics.MetricsWriter(tmp_path, start)
    for step in steps:
      writer.write(step, 0.0, {"train/query_loss": float(start + step)})
    writer.close()
  events = EventAccumulator(str(tmp_path / "tensorboard"))
  events.Reload()
  found = [(event.step, event.value) for event in events.Scalars("train/query_loss")]
  assert found == [(10, 10.0), (20, 20.0), (30, 50.0)]


def test_tensorboard_gets_texts_and_pictures_and_no_empty_file(tmp_path):
  """A run that has nothing to add, as one that is done, leaves no file."""
  from PIL import Image
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

  writer = metrics.MetricsWriter(tmp_path, 0)
  writer.close()
  assert not (tmp_path / "tensorboard").exists()
  Image.new("RGB", (7, 5)).save(tmp_path / "views.png")
  writer = metrics.MetricsWriter(tmp_path, 0)
  writer.picture(0, str(tmp_path / "views.png"))
  writer.picture(0, str(tmp_path / "missing.png"))
  writer.text(0, "config", metrics.as_markdown({"method.bank.size": 8}))
  writer.close()
  events = EventAccumulator(str(tmp_path / "tensorboard"))
  events.Reload()
  (image,) = events.Images("views")
  assert (image.width, image.height) == (7, 5)
  (text,) = events.Tensors("config")
  assert "| method.bank.size | 8 |" in text.tensor_proto.string_val[0].decode()


def test_speeds_have_the_digits_that_matter():
  said = [progress.rate(x) for x in (12345.6, 315.4, 12.43, 1.26, 0.834, 0.00421, 0)]
  assert said == ["12346", "315", "12.4", "1.3", "0.83", "0.0042", "0"]
  assert progress.Clock().read(0, 8) == {}  # no step, no speed


class Late:
  """Batches that come at the third look, and a device that is done at the second, a second of the clock apart."""

  def __init__(self, monkeypatch, done_at):
    self.now, self._done_at, self._looks = 0.0, done_at, 0
    monkeypatch.setattr(progress.time, "perf_counter", lambda: self.now)

  def busy(self):
    self._looks += 1
    return self._looks < self._done_at

  def take(self, seconds):
    self.now += 1 if seconds else 4 - self.now
    if seconds and self.now < 4:
      raise TimeoutError
    return "batch"


@pytest.mark.parametrize("done_at,share", [(1, 1.0), (3, 0.6), (9, 0.0)])
def test_only_an_idle_device_waits(monkeypatch, done_at, share):
  """The batch comes after 4 s and is dispatched after 5; the device has been idle from the start, since 2 s, not at all."""
  late = Late(monkeypatch, done_at)
  clock = progress.Clock()
  assert clock.wait_for(0, late, late.busy) == "batch"
  late.now += 1
  clock.dispatches()
  values = clock.read(1, batch_size=10)
  assert values["time/images_per_second"] == 2 and values["time/seconds_per_step"] == 5
  assert values["time/waiting_for_data"] == pytest.approx(share)


class Device:
  """One that takes a second for a step, one behind the other, and batches that are there `late` seconds after the last one was
  taken; whoever looks at what a step gave waits until it is over."""

  def __init__(self, monkeypatch, late):
    self.now, self.late, self.there = 0.0, late, late
    self.ends = [0.0]  # of steps
    monkeypatch.setattr(progress.time, "perf_counter", lambda: self.now)

  def take(self, seconds):
    """A batch; raises TimeoutError."""
    if seconds and self.now + seconds < self.there:
      self.now += seconds
      raise TimeoutError
    self.now = max(self.now, self.there)
    self.there = self.now + self.late

  def __call__(self, state, batch, constants):
    """An update."""
    self.ends.append(max(self.now, self.ends[-1]) + 1)
    return state, {"train/finite": Result(self), "train/loss": 1.0}


class Result:
  """Of the newest step."""

  def __init__(self, device):
    self._device, self._end = device, device.ends[-1]

  def is_ready(self):
    return self._device.now >= self._end

  def __bool__(self):
    self._device.now = max(self._device.now, self._end)
    return True

  def __array__(self, dtype=None, copy=None):
    return np.array(bool(self), dtype)

  block_until_ready = __bool__


@pytest.mark.parametrize("late", [0.0, 0.5, 3.0])
def test_a_line_has_the_pace_of_its_steps_whatever_was_between(tmp_path, monkeypatch, late):
  """Evaluations within lines and at their ends, saves, a second program: no step is counted that is not over, none left out."""
  spec, plan, state = settings.create_players(config := settings.tiny_config(log__every_steps=5))
  device, writer = Device(monkeypatch, late), metrics.MetricsWriter(tmp_path, 0)
  filling, training = (
    Program(name, concurrent.futures.Future()) for name in ("filling", "training")
  )
  for program in (filling, training):
    program._future.set_result(device)
  log, begins = Log(config, plan, writer, spec), {}

  class Evaluation:
    size, pictures = 1, ()

    def __call__(self, state):
      device.now = max(device.now, device.ends[-1]) + 7
      return {"knn/top1": 0.5}

  for step in range(40):
    if step in (0, 3, 10, 19, 21):
      log.evaluation(step, Evaluation(), state)
      begins[step] = device.now
    if step in (24, 25, 32):
      log.sync()
    log.clock.wait_for(step, device, log.busy)
    log.step(step + 1, *log.update(filling if step < 12 else training, state, None, None), 0)
    if step in (0, 12):  # the first ones of a program are waited for
      begins[step + 1] = device.ends[-1]
  log.flush()
  writer.close()
  lines = [x for x in metrics.read_metrics(tmp_path) if "time/seconds_per_step" in x]
  assert [x["step"] for x in lines] == [*range(5, 41, 5)]
  for line in lines:
    end = line["step"]
    first = max(end - 5, *(s for s in begins if s < end))
    seconds = device.ends[end] - begins.get(first, device.ends[first])
    assert line["time/seconds_per_step"] == pytest.approx(seconds / (end - first), abs=2e-3)
    assert line["time/images_per_second"] == pytest.approx(16 * (end - first) / seconds, rel=2e-3)
    assert line["time/waiting_for_data"] == pytest.approx(1 - (end - first) / seconds, abs=2e-3)


def test_progress_says_a_line_every_five_seconds(monkeypatch, capsys):
  now = iter(range(0, 1000, 3))  # seconds: 3 more at each look, of which a line takes one more
  monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
  batches = progress.Progress("probe", 40).over(range(4), images=10)
  assert list(batches) == [0, 1, 2, 3]
  assert capsys.readouterr().out.splitlines() == [
    "probe: 20/40 images  1.7 images/s  left 12s",
    "probe: 30/40 images  1.7 images/s  left 6s",
    "probe: 40/40 images  1.7 images/s  left 0s",
  ]


def test_durations_as_people_say_them():
  said = [progress.duration(s) for s in (5, 65, 3700, 90000)]
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
