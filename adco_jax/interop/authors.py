"""The checkpoint of AdCo's and MoCo's PyTorch programs: both encoders, bank or queue, momenta.

Flow: files.read -> `parse_checkpoint` (wrappings finds the networks) -> `put_into` a new state; replay and the import
  task continue from there.
Shapes: Memory_Bank W and v, and MoCo's queue, are [D, K] there and [K, D] here.
Paper: save_dict of training/main_worker.py: epoch, arch, best_acc, state_dict, optimizer, Memory_Bank.
Holds: torch numbers the optimiser's entries by `model.parameters()`: all of encoder_q, then encoder_k.
Not here: names inside an encoder (torch_weights).
"""

import dataclasses

import jax
import numpy as np
import optax

from adco_jax.interop.torch_weights import describe, import_encoder
from adco_jax.interop.wrappings import choose, flatten, owner, under
from adco_jax.runtime.dtypes import Tree
from adco_jax.runtime.files import Json
from adco_jax.training.state import TrainState

BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "queue", "queue_ptr")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """What a file holds, names without prefixes; None or empty where it holds nothing of the kind."""

  query: dict[str, np.ndarray]
  key: dict[str, np.ndarray]
  bank: np.ndarray | None  # [K, D]
  bank_momentum: np.ndarray | None
  queue: np.ndarray | None  # [K, D], oldest row first
  momentum: dict[str, np.ndarray]  # of the query encoder, by torch's names
  epoch: int
  # prefixes of query and key encoder in the file, None for no key encoder
  taken_from: tuple[str, str | None]

  @property
  def facts(self) -> dict[str, Json]:
    """What the query encoder is, and 'bank_size' (0: neither bank nor queue)."""
    rows = self.bank if self.bank is not None else self.queue
    found = describe(self.query) | {"bank_size": 0 if rows is None else len(rows)}
    if found["arch"] == "vit_small" and f".{self.taken_from[0]}".endswith(".base_encoder."):
      found["vit"]["heads"] = 12  # MoCo v3's program; no array tells, timm's has 6
    return found


def parse_checkpoint(content: dict[str, Tree], prefix: str = "") -> Checkpoint:
  """The `Checkpoint` of a file's content: AdCo's, MoCo's, or any dictionary with a ResNet or a ViT somewhere in it.

  `prefix`: which network, where there are several, see `wrappings.choose`. Raises ValueError.
  """
  arrays = flatten(content)
  query_prefix, key_prefix = choose(arrays, prefix)
  query = under(query_prefix, arrays)
  describe(query)
  program = under(owner(query_prefix), arrays)
  bank = {name.rpartition(".")[2]: v for name, v in under("Memory_Bank.", arrays).items()}
  queue = program.get("queue")
  return Checkpoint(
    query=query,
    key=under(key_prefix, arrays) if key_prefix else {},
    bank=bank["W"].T if "W" in bank else None,
    bank_momentum=bank["v"].T if "v" in bank else None,
    queue=None if queue is None else np.roll(queue.T, -int(program.get("queue_ptr", [0])[0]), 0),
    momentum=under(query_prefix, _momentum(content.get("optimizer"), arrays, query_prefix)),
    epoch=_epoch(content.get("epoch")),
    taken_from=(query_prefix, key_prefix),
  )


def put_into(state: TrainState, checkpoint: Checkpoint) -> tuple[TrainState, dict[str, list[str]]]:
  """(state with everything that `checkpoint` holds, report of names). Raises ValueError.

  `state`: a new TrainState, on the host, of the same architecture and bank size, in which MoCo writes from
  row 0; an encoder without a key counterpart in the file stands for both players.
  """
  query = {"params": state.query_params, **state.query_stats}
  query, report = import_encoder(checkpoint.query, query)
  stats = lambda variables: {name: tree for name, tree in variables.items() if name != "params"}
  state = state.replace(query_params=query["params"], query_stats=stats(query))
  if state.key_params:  # not every objective has a key encoder
    key = {"params": state.key_params, **state.key_stats}
    key, _ = import_encoder(checkpoint.key or checkpoint.query, key)
    if report["missing"]:  # a head that the file lacks: both players start with the same one
      key["params"]["head"] = jax.tree.map(np.array, query["params"]["head"])
    state = state.replace(key_params=key["params"], key_stats=stats(key))
  return _with_momentum(_with_rows(state, checkpoint), checkpoint), report


def _epoch(value):
  """Epochs that the file says are behind it, 0 where it says nothing."""
  return int(value) if isinstance(value, (int, float, np.ndarray)) and np.size(value) == 1 else 0


def _momentum(optimizer, arrays, query):
  """{full name: momentum} of AdCo's and MoCo's programs; how others number their entries is not known."""
  before = owner(query)
  names = [n for n in arrays if n.startswith(before) and n.rpartition(".")[2] not in BUFFERS]
  if not isinstance(optimizer, dict) or not query.startswith(f"{before}encoder_q."):
    return {}
  try:
    entries = {int(i): entry.get("momentum_buffer") for i, entry in optimizer["state"].items()}
    return {names[i]: value for i, value in entries.items() if value is not None}
  except (AttributeError, IndexError, LookupError, TypeError, ValueError):
    return {}


def _with_rows(state, checkpoint):
  variables = state.objective
  if "bank" in variables.adversary and checkpoint.bank is not None:
    bank = variables.adversary["bank"]
    variables = variables._replace(adversary={"bank": _like(checkpoint.bank, bank)})
    if checkpoint.bank_momentum is not None:
      momentum = {"bank": _like(checkpoint.bank_momentum, bank)}
      moved = optax.tree.set(state.adversary_optimizer, trace=momentum)
      state = state.replace(adversary_optimizer=moved)
  if "queue" in variables.memory and checkpoint.queue is not None:
    queue = _like(checkpoint.queue, variables.memory["queue"])
    variables = variables._replace(memory={"queue": queue})
  return state.replace(objective=variables)


def _with_momentum(state, checkpoint):
  if not checkpoint.momentum:
    return state
  trace = optax.tree.get(state.optimizer, "trace")
  filled, _ = import_encoder(checkpoint.momentum, {"params": trace["encoder"], "batch_stats": {}})
  trace = trace | {"encoder": filled["params"]}
  return state.replace(optimizer=optax.tree.set(state.optimizer, trace=trace))


def _like(value, array):
  if value.shape != array.shape:
    raise ValueError(f"its bank is {list(value.shape)}, wanted {list(array.shape)}")
  return np.ascontiguousarray(value).astype(array.dtype)
