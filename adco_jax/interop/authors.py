"""The checkpoint of AdCo's and MoCo's PyTorch programs: both encoders, bank or queue, momenta.

Flow: files.read -> `split` -> `put_into` a new state; replay and the import task continue from there.
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

PREFIXES = ("encoder_q.", "encoder_k.")
BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "queue", "queue_ptr")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """What a file holds, names without prefixes; None or empty where it holds nothing of the kind."""

  query: dict
  key: dict
  bank: np.ndarray | None  # [K, D]
  bank_momentum: np.ndarray | None
  queue: np.ndarray | None  # [K, D], oldest row first
  momentum: dict  # of the query encoder, by torch's names
  epoch: int

  @property
  def facts(self):
    """What the query encoder is, and 'bank_size' (0: neither bank nor queue)."""
    rows = self.bank if self.bank is not None else self.queue
    return describe(self.query) | {"bank_size": 0 if rows is None else len(rows)}


def split(content):
  """The `Checkpoint` of a file's content: the authors', MoCo's, or a bare state dict of a ResNet.

  Raises ValueError if it is none of them.
  """
  state = content.get("state_dict", content)
  if not isinstance(state, dict):
    raise ValueError("its state_dict is not a dictionary")
  state = {name.removeprefix("module."): value for name, value in state.items()}
  query, key = (_under(prefix, state) for prefix in PREFIXES)
  query = query or state
  describe(query)
  bank = content.get("Memory_Bank") or {}
  bank = {name.removeprefix("module."): np.asarray(value) for name, value in bank.items()}
  queue = state.get("queue")
  return Checkpoint(
    query=query,
    key=key,
    bank=bank["W"].T if "W" in bank else None,
    bank_momentum=bank["v"].T if "v" in bank else None,
    queue=None if queue is None else np.roll(queue.T, -int(state.get("queue_ptr", [0])[0]), 0),
    momentum=_momentum(content.get("optimizer") or {}, state),
    epoch=int(content.get("epoch", 0)),
  )


def put_into(state, checkpoint, first_row=0):
  """(state with everything that `checkpoint` holds, report of names). Raises ValueError.

  `state`: a new TrainState, on the host, of the same architecture and bank size; an encoder without a key
  counterpart in the file stands for both players. `first_row`: where MoCo writes next.
  """
  query = {"params": state.query_params, "batch_stats": state.query_stats}
  key = {"params": state.key_params, "batch_stats": state.key_stats}
  query, report = import_encoder(checkpoint.query, query)
  key, _ = import_encoder(checkpoint.key or checkpoint.query, key)
  if report["missing"]:  # a head that the file lacks: both players start with the same one
    key["params"]["head"] = jax.tree.map(np.array, query["params"]["head"])
  state = state.replace(
    query_params=query["params"],
    query_stats=query["batch_stats"],
    key_params=key["params"],
    key_stats=key["batch_stats"],
  )
  return _with_momentum(_with_rows(state, checkpoint, first_row), checkpoint), report


def _under(prefix, state):
  return {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}


def _momentum(optimizer, state):
  """{torch's name: momentum} of the query encoder's parameters."""
  names = [n for n in state if n.rpartition(".")[2] not in BUFFERS]
  entries = optimizer.get("state", {})
  found = {
    names[int(i)]: e["momentum_buffer"] for i, e in entries.items() if "momentum_buffer" in e
  }
  return _under(PREFIXES[0], {n: v for n, v in found.items() if v is not None})


def _with_rows(state, checkpoint, first_row):
  if "bank" in state.ascend and checkpoint.bank is not None:
    state = state.replace(ascend={"bank": _like(checkpoint.bank, state.ascend["bank"])})
    if checkpoint.bank_momentum is not None:
      momentum = {"bank": _like(checkpoint.bank_momentum, state.ascend["bank"])}
      state = state.replace(ascend_optimizer=optax.tree.set(state.ascend_optimizer, trace=momentum))
  if "queue" in state.slots and checkpoint.queue is not None:
    queue = np.roll(checkpoint.queue, first_row, 0)
    state = state.replace(slots={"queue": _like(queue, state.slots["queue"])})
  return state


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
