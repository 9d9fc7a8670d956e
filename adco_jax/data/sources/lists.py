"""Images that a list names: a CSV of files and labels, or lines of path and class number as Caffe and Places205 have them.

Flow: loading asks for one of them; voc and subset refuse with the same words.
Shapes: labels int32 [N], or int8 [N, C] where an image may have several, or None.
Holds: the order is the list's; what a list says of files or labels that are not there, or twice, is refused with the
  first three and the number of the rest.
Not here: images that no list names, which do not count.
"""

import collections
import csv
import os
import re
from collections.abc import Iterable, Sequence

import numpy as np

from adco_jax.data.sources import splits
from adco_jax.data.sources.base import Source
from adco_jax.data.sources.files import Paths, Strings
from adco_jax.errors import ConfigError, NoSplit, require

FILE_KEYS = ("file", "filename", "file_name", "image", "path")
ONE, SEVERAL = (
  "label",
  "labels",
)  # columns with one class, and with any number of them between semicolons
MARKS = {"1": 1, "0": 0, "-1": -1, "": -1}  # in a column that is a class
# Where the images of a list lie, below the folder that is given; the last is Places205's own.
ROOTS = ("", "images", "images256", "data/vision/torralba/deeplearning/images256")


def load_csv(directory: str, split: str, image_key: str = "", label_key: str = "") -> Source:
  """DIR/<split>.csv with a header; files are named relative to DIR.

  A column `file` (or as image_key says), and either `label` (or as label_key says): one class; or `labels`: any number
  between semicolons; or one column per class with 1, 0, and -1 or nothing where it does not count. Raises ConfigError.
  """
  require(os.path.isdir(directory), "data.dir", directory, "no such folder; name that of the lists")
  stems = [n.removesuffix(".csv") for n in sorted(os.listdir(directory)) if n.endswith(".csv")]
  taken = splits.choose(stems, split, directory)
  if not taken:
    has = f"only {', '.join(f'{s}.csv' for s in stems[:5])}" if stems else "and no other .csv"
    raise NoSplit(f"config.{splits.key_of(split)}={split!r}: {directory} has no {split}.csv, {has}")
  path = os.path.join(directory, f"{taken}.csv")
  header, rows = _read_csv(path)
  key = image_key or next((k for k in FILE_KEYS if k in header), "")
  remedy = f"{path} has the columns {', '.join(header)}; name that of the files with --config.data.image_key, or call it file"
  require(key in header, "data.image_key", image_key, remedy)
  names = [os.path.normpath(row[header.index(key)]) for row in rows]
  refuse_absent(path, directory, names)
  labels, classes = _csv_labels(path, header, rows, key, label_key)
  files = Paths(directory, Strings.of(names))
  return Source(_base(directory), None, files, labels, classes, taken)


def load_list(directory: str, split: str) -> Source:
  """A text file of lines `path number`, as <split>.txt or <split>_places205.csv in DIR or in a folder of it.

  Paths are relative to the list's folder, to DIR or to where Places205 has its images. Raises ConfigError.
  """
  require(os.path.isdir(directory), "data.dir", directory, "no such folder; name that of the lists")
  path, taken = _find_list(directory, split)
  pairs = [re.fullmatch(r"(.+?)[\s,]+(\d+)", line) for line in read_lines(path)]
  bad = [line for line, pair in zip(read_lines(path), pairs, strict=True) if not pair]
  remedy = f"{len(bad)} lines of {path} are not a path and a class number: {first_three(bad)}"
  require(not bad, "data.dir", directory, remedy)
  names = [os.path.normpath(pair[1]) for pair in pairs if pair]
  roots = [os.path.dirname(path), *(os.path.join(directory, r) for r in (*ROOTS, taken))]
  root = next((r for r in roots if os.path.exists(os.path.join(r, names[0]))), directory)
  refuse_absent(path, root, names)
  labels = np.array([int(pair[2]) for pair in pairs if pair])
  return Source(_base(directory), None, Paths(root, Strings.of(names)), labels, (), taken)


def read_lines(path: str, option: str = "data.dir") -> list[str]:
  """The lines of a text file that are not empty; `option`: that named it. Raises ConfigError if there is none."""
  try:
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
      lines = [line.strip() for line in file]
  except OSError as error:
    raise ConfigError(
      f"config.{option}: {path} cannot be read ({error.strerror}); name another"
    ) from error
  lines = [line for line in lines if line]
  if not lines:
    raise ConfigError(f"config.{option}: {path} is an empty list; name one with a line per image")
  return lines


def require_of(path: str, condition: object, remedy: str, option: str = "data.dir") -> None:
  """Raises the one-line ConfigError of the file at `path` unless `condition` holds; `option`: that led to it."""
  if not condition:
    raise ConfigError(f"config.{option}: {path} {remedy}")


def first_three(names: Sequence[str]) -> str:
  """'a, b, c and 4 more'."""
  more = f" and {len(names) - 3} more" if len(names) > 3 else ""
  return f"{', '.join(names[:3])}{more}"


def refuse_absent(path: str, root: str, names: Sequence[str]) -> None:
  """Refuses the list at `path` if a file below `root` is not there, or is named twice. Raises ConfigError."""
  refuse_twice(path, names)
  there = {
    folder: _entries(os.path.join(root, folder)) for folder in {*map(os.path.dirname, names)}
  }
  absent = [n for n in names if os.path.basename(n) not in there[os.path.dirname(n)]]
  remedy = f"names {len(absent)} files that are not in {root}: {first_three(absent)}; take them out, or name another folder"
  require_of(path, not absent, remedy)


def refuse_twice(path: str, names: Sequence[str], option: str = "data.dir") -> None:
  """Refuses a list that names a file twice. Raises ConfigError."""
  twice = [name for name, count in collections.Counter(names).items() if count > 1]
  remedy = f"names {len(twice)} files twice: {first_three(twice)}; keep one line of each"
  require_of(path, not twice, remedy, option)


def sorted_classes(names: Iterable[str]) -> list[str]:
  """Names of classes in their order; those that are all numbers sort as such."""
  classes = sorted(set(names))
  return sorted(classes, key=int) if all(c.isdecimal() for c in classes) else classes


def mark(found: Sequence[Sequence[str]], classes: Sequence[str]) -> np.ndarray:
  """int8 [N, C] of the names of classes that each image has."""
  number = {name: i for i, name in enumerate(classes)}
  labels = np.zeros((len(found), len(classes)), np.int8)
  for row, names in zip(labels, found, strict=True):
    row[[number[name] for name in names]] = 1
  return labels


def _read_csv(path):
  """(header, rows of as many fields), blanks around fields taken away. Raises ConfigError."""
  try:
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
      reader = csv.reader(file, strict=True)
      lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
  except (OSError, csv.Error) as error:
    raise ConfigError(f"config.data.dir: {path} is no CSV that can be read ({error})") from error
  if len(lines) < 2:
    raise ConfigError(
      f"config.data.dir: {path} is an empty list; name one with a header and a line per image"
    )
  (_, header), *rows = lines
  twice = sorted({name for name in header if header.count(name) > 1})
  remedy = f"has the column {twice[0] if twice else ''!r} twice; rename one"
  require_of(path, not twice, remedy)
  number, row = next(((n, r) for n, r in rows if len(r) != len(header)), (0, []))
  remedy = f"line {number} has {len(row)} fields, the header {len(header)}; correct it"
  require_of(path, not number, remedy)
  return header, [row for _, row in rows]


def _csv_labels(path, header, rows, key, label_key):
  """(labels or None, classes) of a CSV whose files are in the column `key`. Raises ConfigError."""
  column = lambda name: [row[header.index(name)] for row in rows]
  remedy = f"{path} has the columns {', '.join(header)}; name one of them"
  require(not label_key or label_key in header, "data.label_key", label_key, remedy)
  if (one := label_key or ONE) in header and one != SEVERAL:
    cells = column(one)
    missing = [name for name, cell in zip(column(key), cells, strict=True) if not cell]
    remedy = f"has no label in the column {one} for {len(missing)} of {len(cells)} images: {first_three(missing)}; write them, or take the lines out"
    require_of(path, not missing, remedy)
    classes = sorted_classes(cells)
    number = {name: i for i, name in enumerate(classes)}
    return np.array([number[cell] for cell in cells], np.int32), tuple(classes)
  if SEVERAL in header:
    found = [[c.strip() for c in cell.split(";") if c.strip()] for cell in column(SEVERAL)]
    classes = sorted_classes(name for names in found for name in names)
    remedy = (
      f"{path} gives no image a label; name classes in the column {SEVERAL}, with ; between them"
    )
    require_of(path, classes, remedy)
    return mark(found, classes), tuple(classes)
  columns = tuple(name for name in header if name != key)
  return (_marks(path, header, rows, columns), columns) if columns else (None, ())


def _marks(path, header, rows, classes):
  """int8 [N, C] of columns that are classes. Raises ConfigError."""
  labels = np.empty((len(rows), len(classes)), np.int8)
  for c, name in enumerate(classes):
    cells = [row[header.index(name)] for row in rows]
    wrong = next((cell for cell in cells if cell not in MARKS), "")
    remedy = (
      f"the column {name} has {wrong!r}, where a class has 1, 0, -1 or nothing; call the column with the classes of an "
      f"image {ONE} or {SEVERAL}, or name it with --config.data.label_key"
    )
    require_of(path, not wrong, remedy)
    labels[:, c] = [MARKS[cell] for cell in cells]
  return labels


def _find_list(directory, split):
  """(path, the split's name in it) of the one list of a split. Raises ConfigError."""
  folders = [directory, *(os.path.join(directory, f) for f in splits.subfolders(directory))]
  found = [
    os.path.join(f, n) for f in folders for n in sorted(_entries(f)) if n.endswith((".txt", ".csv"))
  ]
  words = {path: splits.word_of(os.path.basename(path)) for path in found}
  taken = splits.choose(set(words.values()) - {""}, split, directory)
  paths = [path for path, word in words.items() if taken and word == taken]
  if not paths:
    key, seen = splits.key_of(split), ", ".join(map(os.path.basename, found[:5])) or "none"
    raise NoSplit(
      f"config.{key}={split!r}: {directory} has no list {split}.txt or {split}_*.csv, lists there: {seen}"
    )
  remedy = f"{first_three(paths)} are lists of {taken}; move all but one elsewhere"
  require(len(paths) < 2, "data.dir", directory, remedy)
  return paths[0], taken


def _entries(folder):
  """Names in a folder, none of one that is not there."""
  try:
    return {*os.listdir(folder)}
  except OSError:
    return set()


def _base(directory):
  return os.path.basename(os.path.abspath(directory))
