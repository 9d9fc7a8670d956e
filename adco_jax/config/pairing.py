"""Which query view meets which key view, with what weight, in every views mode.

Flow: plan makes one `Pairing` for training and one for the bank's initialisation; order and train_step
  read them.
Paper: symmetric losses are averaged and multi-crop losses summed, as the authors' program does.
"""

import dataclasses

PAIRED = ("single", "symmetric", "multicrop", "symmetric_multicrop")
MODES = ("one", *PAIRED)  # of the views

Pair = tuple[int, int, float]  # position in query_views, position in key_views, weight


@dataclasses.dataclass(frozen=True)
class Pairing:
  """Which views meet: `pairs`: each query view with the keys that it is held against."""

  query_views: tuple[int, ...]
  key_views: tuple[int, ...]
  pairs: tuple[Pair, ...]

  @property
  def views(self) -> tuple[int, ...]:
    """Every view that has to be cut, ascending."""
    return tuple(sorted({*self.query_views, *self.key_views}))


REDUCTIONS = ("directions", "sum", "mean")


def make_pairing(mode: str, num_views: int, reduction: str = "directions") -> Pairing:
  """The weighted pairs of a views mode.

  reduction: what a loss makes of its pairs: 'directions' averages the two directions and sums over crops, as AdCo's authors;
  'sum' and 'mean' treat all pairs alike. A mode of one view has no pairs.
  """
  last = range(num_views)
  views: list[Pair] = {
    "one": [],
    "single": [(0, 1, 1.0)],
    "symmetric": [(0, 1, 0.5), (1, 0, 0.5)],
    "multicrop": [(i, 0, 1.0) for i in last[1:]],
    "symmetric_multicrop": [(i, j, 0.5) for j in (0, 1) for i in last if i != j],
  }[mode]
  alike = {"sum": 1.0, "mean": 1.0 / max(1, len(views))}
  views = [(query, key, alike.get(reduction, weight)) for query, key, weight in views]
  queries = tuple(sorted({query for query, _, _ in views})) or (0,)
  keys = tuple(sorted({key for _, key, _ in views}))
  return Pairing(queries, keys, tuple((queries.index(q), keys.index(k), w) for q, k, w in views))


def make_online_pairing(mode: str, num_views: int, reduction: str = "directions") -> Pairing:
  """The same pairs where the query encoder embeds keys as well: both positions are in `query_views`, no view is a key."""
  momentum = make_pairing(mode, num_views, reduction)
  views = momentum.views
  place = lambda names, i: views.index(names[i])
  pairs = [
    (place(momentum.query_views, q), place(momentum.key_views, k), w) for q, k, w in momentum.pairs
  ]
  return Pairing(views, (), tuple(pairs))


def make_fill_pairing(mode: str, num_views: int, init_views: str) -> Pairing:
  """The one pair of the bank's initialisation.

  'training': the key view of training. 'authors': their `init_memory` encodes all views as training
  would (which moves the running statistics), and in multicrop takes the last, smallest crop as key.
  """
  if init_views == "authors" and mode == "multicrop":
    return Pairing(tuple(range(num_views - 1)), (num_views - 1,), ((0, 0, 1.0),))
  if init_views == "authors" and mode != "single":
    trained = make_pairing(mode, num_views)
    return Pairing(trained.query_views, trained.key_views, ((0, 1, 1.0),))
  query, key = (1, 0) if mode == "multicrop" else (0, 1)
  return Pairing((query,), (key,), ((0, 0, 1.0),))
