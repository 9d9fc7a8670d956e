"""Which folder, shard or array is a split: train, val and test under the names that people give them.

Flow: sources and shards ask `find_folder` and `choose`; a folder that looks like a split is never a class.
Holds: the asked name, where it is there to the letter, always wins; what is taken in its place is the only
  one of its kind, and is said; what could be meant in two ways is refused with what to say.
Not here: reading what was found (sources, shards).
"""

import itertools
import os
import re
from collections.abc import Collection, Sequence

from adco_jax.data.sources.listing import JUNK, Tree, holds_true, image_endings, list_tree
from adco_jax.errors import NoSplit, require

WORDS = {
  "train": "train training trainset trn trainval",
  "val": "val valid validate validation valset dev devset eval evaluation",
  "test": "test testing testset tst holdout",
  "unlabeled": "unlabeled unlabelled",
}
KINDS = {word: kind for kind, words in WORDS.items() for word in words.split()}
FILLERS = set(re.findall(r"\w+", "image images img imgs pictures photos set split data dataset folder jpeg jpg png"))  # fmt: skip
KNOWN = rf"(?:{'|'.join(sorted(FILLERS | KINDS.keys(), key=len, reverse=True))})"
STAND_INS = {"train": ("train",), "val": ("val", "test"), "test": ("test", "val")}
AS_IT_IS = "."  # data.split that makes every folder a class, whatever its name
LOOKS = 1000  # entries of a folder that are looked at before it is held to have no images


def _words(name):
  """Words of a name in small letters, those of splits and FILLERS apart where they are glued: traindata."""
  for word in re.findall("[a-z]+", name.lower()):
    yield from re.findall(KNOWN, word) if re.fullmatch(f"{KNOWN}+", word) else [word]


def kind_of(name: str) -> str:
  """'train', 'val', 'test' or 'unlabeled' of a name that says nothing else: Train, val2017, testimages; else ''."""
  words = list(_words(name))
  kinds = [KINDS[w] for w in words if w in KINDS]
  return kinds[-1] if kinds and all(w in KINDS or w in FILLERS for w in words) else ""


def is_filler(name: str) -> bool:
  """Whether a folder's name says no more than that it holds images."""
  return all(w in FILLERS or w in KINDS for w in list(_words(name)) or ["?"])


def key_of(split: str) -> str:
  """The key under which a user names a split like this one."""
  return "data.test_split" if kind_of(split) in ("val", "test") else "data.split"


def choose(names: Collection[str], split: str, where: str) -> str:
  """The one of `names` that serves as `split`; '' if none does. Raises ConfigError if several could."""
  if split in names:
    return split
  key = key_of(split)
  for kind in STAND_INS.get(kind_of(split), ()):
    several = sorted(n for n in names if kind_of(n) == kind)
    remedy = (
      f"{where} has {', '.join(several)}; name one, such as --config.{key}={''.join(several[:1])}"
    )
    require(len(several) < 2, key, split, remedy)
    if several:
      return several[0]
  return ""


def word_of(name: str) -> str:
  """The last word of a file's name that names a split (val2017 of coco-val2017-000.tar), '' if none does."""
  return next((w for w in reversed(re.split(r"[^A-Za-z0-9]+", name)) if kind_of(w)), "")


def subfolders(directory: str) -> list[str]:
  """Sorted names of a directory's folders, hidden ones and JUNK left out."""
  with os.scandir(directory) as entries:
    return sorted(
      e.name for e in entries if e.name[0] != "." and e.name not in JUNK and holds_true(e.is_dir)
    )


def folder_of(directory: str, split: str) -> str:
  """The folder of `directory` that serves as `split`; '' if none does. Raises ConfigError if several could."""
  there = os.path.isdir(os.path.join(directory, split))
  return split if there else choose(subfolders(directory), split, directory)


def find_folder(directory: str, split: str) -> tuple[str, str]:
  """(the folder that holds `split`, its name below `directory`); (directory, '') where nothing looks like a split.

  Raises NoSplit, and ConfigError for folders that could be splits or classes.
  """
  if split == AS_IT_IS:
    return directory, AS_IT_IS
  names = [split] if os.path.isdir(os.path.join(directory, split)) else subfolders(directory)
  taken = choose(names, split, directory)
  if kind_of(taken) == "train":
    _refuse_a_class_named_train(directory, taken)
  if taken:
    return os.path.join(directory, _without_repetition(directory, taken)), taken
  seen, twins = [n for n in names if kind_of(n)], _twins(directory, names)
  if split != "train" and (seen or twins):
    raise no_split(directory, split, seen or twins)
  remedy = (
    f"{directory} has {', '.join(twins[:4])}, which look like splits: test images would be trained on; name the "
    f"one to train on, such as --config.data.split={twins[0]}, or, if all are classes, --config.data.split={AS_IT_IS}"
    if twins else ""
  )  # fmt: skip
  require(not twins, "data.split", split, remedy)
  _refuse_splits_as_classes(directory, seen, len(seen) < len(names))
  return directory, ""


def _without_repetition(directory, name):
  """train/train where train holds nothing else, as some archives unpack; else train."""
  with os.scandir(os.path.join(directory, name)) as entries:
    seen = [e.name for e in entries if e.name[0] != "." and e.name not in JUNK]
  twice = os.path.join(name, name)
  return twice if seen == [name] and os.path.isdir(os.path.join(directory, twice)) else name


def _twins(directory, names):
  """Folders of images of which some have the word train and some another split's in their names (birds_train,
  old_test), or these glued to the same letters (finetrain, finetest); one of either kind first, train before it."""
  groups: dict[str | tuple[str, str], list[tuple[str, str]]] = {}
  for name in (n for n in names if not kind_of(n)):
    words = [w.lower() for w in re.findall("[A-Z]?[a-z]+|[A-Z]+", name)]
    kinds = [KINDS[w] for w in words if w in KINDS]
    glued = re.fullmatch(r"(.*?)(train|test|val)(.*)", name.lower())
    if len(kinds) == 1:
      groups.setdefault("", []).append((kinds[0], name))
    elif glued and not kinds:
      groups.setdefault((glued[1], glued[3]), []).append((KINDS[glued[2]], name))
  for group in groups.values():
    group = [(kind, n) for kind, n in group if holds_images(os.path.join(directory, n))]
    train, others = (
      [n for kind, n in group if (kind == "train") == wanted] for wanted in (True, False)
    )
    if train and others:
      return [train[0], others[0], *train[1:], *others[1:]]
  return []


def find_nested(directory: str, tree: Tree) -> str:
  """The one folder of a `Tree` that has splits in it (images, of D/images/train); '' if none has any.
  More than one folder deep only train and another kind side by side are splits.

  Raises ConfigError if several have: classes with splits of their own (D/cat/train, D/cat/test).
  """
  named = (f for f in tree.folders if os.sep in f and kind_of(os.path.basename(f)))
  folders = [f for f in named if tree.holds_images(f)]
  kinds: dict[str, set[str]] = {}
  for folder in folders:
    kinds.setdefault(os.path.dirname(folder), set()).add(kind_of(os.path.basename(folder)))
  above = [f for f in kinds if os.sep not in f]
  above = sorted(above or (f for f in kinds if "train" in kinds[f] and len(kinds[f]) > 1))
  remedy = (
    f"{', '.join(folders[:3])}{', ...' if len(folders) > 3 else ''} look like splits: test images would be trained on; name the "
    f"folder above one of them, such as {directory}/{above[0]}, or, to read everything, --config.data.split={AS_IT_IS}"
    if above else ""
  )  # fmt: skip
  require(len(above) < 2, "data.dir", directory, remedy)
  return above[0] if above else ""


def no_split(directory: str, split: str, seen: Sequence[str] = ()) -> NoSplit:
  """The `NoSplit` of a folder in which other names were `seen`."""
  has = f"only {', '.join(seen)}" if seen else "and none that looks like one"
  hint = f"{directory} has no folder {split}, {has}; evaluation needs one with labelled images, or another split"
  return NoSplit(f"config.{key_of(split)}={split!r}: {hint}")


def refuse_splits_below(folder: str, inside: Sequence[str]) -> None:
  """A split's own folders with images (`inside`) may be no splits again, but for one class of such a name among
  others. Raises ConfigError."""
  seen = [name for name in inside if kind_of(name)]
  fine = len({kind_of(name) for name in seen}) < 2 and len(seen) < max(2, len(inside))
  remedy = (
    f"its folders {', '.join(seen[:4])} look like splits, not like classes; name the folder that they lie in, "
    f"or, if they are classes, --config.data.dir={folder} --config.data.split={AS_IT_IS}"
  )
  require(fine, "data.dir", folder, remedy)


def _refuse_splits_as_classes(directory, seen, has_others):
  """Without a train folder no other split may hold images: they would be trained on."""
  if not seen:
    return
  tree = list_tree(directory)
  seen = [n for n in seen if tree.holds_images(n)]
  train = "" if has_others or not seen else f"train on one with --config.data.split={seen[0]}; "
  remedy = (
    f"{directory} has no folder of this name, and {', '.join(seen[:4])} would be trained on as if a class; "
    f"{train}move it elsewhere, or, if all folders are classes, --config.data.split={AS_IT_IS}"
  )
  require(not seen, "data.split", "train", remedy)


def _refuse_a_class_named_train(directory, name):
  """Pictures of trains beside pictures of cars: no other split, but two folders of images or more."""
  names = [n for n in subfolders(directory) if n != name]
  if any(kind_of(n) for n in names):
    return
  filled = [n for n in names if holds_images(os.path.join(directory, n))]
  remedy = (
    f"is {name} a split, or a class as {', '.join(filled[:3])}{', ...' if len(filled) > 3 else ''}? Say --config.data.split={AS_IT_IS} "
    f"if all folders are classes, --config.data.dir={directory}/{name} if only {name} is to be read"
  )
  require(len(filled) < 2, "data.dir", directory, remedy)


def holds_images(folder: str) -> bool:
  """Whether a few looks into a folder find an image, however deep."""
  waiting, looks, endings = [folder], LOOKS, image_endings()
  while waiting and looks > 0:
    with os.scandir(waiting.pop()) as entries:
      for entry in itertools.islice(entries, looks):
        looks -= 1
        if entry.name[0] == ".":
          continue
        if os.path.splitext(entry.name)[1].lower() in endings:
          return True
        if holds_true(entry.is_dir):  # links too; those in a circle end with the looks
          waiting.append(entry.path)
  return False
