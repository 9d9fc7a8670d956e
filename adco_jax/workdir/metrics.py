"""What a run measures, kept: metrics.jsonl and TensorBoard.

Flow: pretrain writes a line per logged step and one per evaluation; report and people read them.
Shapes: a line is {'step': int, 'epoch': float, 'group/name': float, ...}; `time/...` alone may differ
  between a run and its repetition.
Holds: a line is written before the next step is taken, on disk before a save; after a restart at step n no line is past n and
  none is written twice. TensorBoard's events are written here because tensorboardX 2.6.5 leaves that to a thread, which dies on a
  full disk, whereupon the run waits for ever, and loses what it has not flushed where a process leaves at once; clu's writers
  need TensorFlow or torch.
Not here: what is measured (losses, evaluation).
"""

import contextlib
import io
import json
import os
import socket
import struct
import sys
import time
import types
from typing import Any

import jax

from adco_jax.runtime import remote
from adco_jax.runtime.files import Json, write_text


class MetricsWriter:
  """Appends to `workdir`/metrics.jsonl and tensorboard/; drops lines past the restored step first.

  Only the first process of a run writes, and only it knows what is on file. A line that finds the disk
  full waits for room: `sync` says whether all are on disk.
  """

  def __init__(self, workdir: str, step: int) -> None:
    self._workdir, self._path = workdir, os.path.join(workdir, "metrics.jsonl")
    self._writes, self._waiting, self._written = jax.process_index() == 0, b"", set()
    self.lines = []  # that are on file at the start
    if not self._writes:
      return
    self.lines = lines = [line for line in read_metrics(workdir) if line["step"] <= step]
    self._written = {(line["step"], name) for line in lines for name in line}
    write_text(self._path, "".join(json.dumps(line) + "\n" for line in lines))
    self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 (it lives as long as the run)
    self._board = TensorBoard(os.path.join(workdir, "tensorboard"), step)

  def has(self, step: int, name: str) -> bool:
    """Whether metric `name` of `step` is already on file."""
    return (step, name) in self._written

  def write(self, step: int, epoch: float, values: dict[str, float]) -> None:
    """One line, unless the same one is on file."""
    if not self._writes or all(self.has(step, name) for name in values):
      return
    line = {"step": step, "epoch": round(epoch, 6), **values}
    self._written |= {(step, name) for name in values}
    self._waiting += json.dumps(line).encode() + b"\n"
    with contextlib.suppress(OSError):
      self._push()
    self._board.write(step, values)

  def text(self, step: int, name: str, text: str) -> None:
    """Markdown for TensorBoard alone."""
    if self._writes:
      self._board.text(step, name, text)

  def picture(self, step: int, path: str) -> None:
    """A PNG for TensorBoard alone, under the file's name."""
    if self._writes and os.path.exists(path):
      with open(path, "rb") as file:
        self._board.picture(step, os.path.basename(path).partition(".")[0], file.read())

  def sync(self) -> None:
    """Returns when all lines are where the workdir lasts. Raises OSError."""
    if self._writes:
      self._push()
      os.fsync(self._file.fileno())
      remote.push(self._workdir)

  def close(self) -> None:
    """Closes both."""
    if self._writes:
      with contextlib.suppress(OSError):
        self._push()
      self._file.close()
      self._board.close()

  def _push(self):
    while self._waiting:
      self._waiting = self._waiting[self._file.write(self._waiting) :]


class TensorBoard:
  """Scalars, texts and pictures for TensorBoard through its own record writer, without TensorFlow or a thread.

  A file begins with the first thing that is written: a run that has nothing to add leaves none.
  """

  def __init__(self, folder: str, step: int) -> None:
    # tensorboard.compat imports all of TensorFlow (seconds) unless this module says that it is absent.
    sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("notf"))
    from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2
    from tensorboard.summary.writer.record_writer import RecordWriter

    self._event, self._summary, self._records = event_pb2.Event, summary_pb2.Summary, RecordWriter
    self._metadata, self._tensor = summary_pb2.SummaryMetadata, tensor_pb2.TensorProto
    self._folder = folder
    self._file: io.FileIO | None = None
    # Tells TensorBoard that what an interrupted run wrote past this step is void.
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._first: dict[str, Any] | None = {"step": step + 1, "session_log": start}

  def write(self, step: int, values: dict[str, float]) -> None:
    """One event of scalars."""
    self._add(step, [self._summary.Value(tag=k, simple_value=float(v)) for k, v in values.items()])

  def text(self, step: int, name: str, text: str) -> None:
    """Markdown."""
    plugin = self._metadata(plugin_data=self._metadata.PluginData(plugin_name="text"))
    tensor = self._tensor(dtype=7, string_val=[text.encode()])  # 7: DT_STRING
    self._add(step, [self._summary.Value(tag=name, metadata=plugin, tensor=tensor)])

  def picture(self, step: int, name: str, png: bytes) -> None:
    """The bytes of a PNG."""
    width, height = struct.unpack(">II", png[16:24])
    image = self._summary.Image(width=width, height=height, colorspace=3, encoded_image_string=png)
    self._add(step, [self._summary.Value(tag=name, image=image)])

  def close(self) -> None:
    """Closes the file."""
    with contextlib.suppress(OSError):
      if self._file:
        self._file.close()

  def _add(self, step, values):
    """An event that finds the disk full is lost (metrics.jsonl keeps it); the next one tries a new file."""
    try:
      if self._file is None:
        os.makedirs(self._folder, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(os.path.join(self._folder, name), "ab", buffering=0)  # noqa: SIM115
        self._record(file_version="brain.Event:2")
      if self._first:
        self._record(**self._first)
        self._first = None
      self._record(step=step, summary=self._summary(value=values))
    except OSError:
      self._file = None

  def _record(self, **content):
    event = self._event(wall_time=time.time(), **content)
    self._records(self._file).write(event.SerializeToString())


def read_metrics(workdir: str) -> list[dict[str, Json]]:
  """All whole lines of metrics.jsonl; one that a crash cut short, or a disk spoiled, is left out."""
  path = os.path.join(workdir, "metrics.jsonl")
  lines = []
  if os.path.exists(path):
    with open(path, "rb") as file:
      for text in file:
        with contextlib.suppress(ValueError):
          lines.append(json.loads(text))
  return lines


def as_markdown(values: dict[str, Json]) -> str:
  """A table of two columns, sorted by name."""
  rows = "".join(f"| {name} | {value} |\n" for name, value in sorted(values.items()))
  return f"| key | value |\n|---|---|\n{rows}"
