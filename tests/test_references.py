"""Every objective against PyTorch by hand: a linear encoder, whole steps in float64, on one device and on eight.

The reference has every method's equations written once more, by tensors of the whole batch and torch's autograd and SGD; nothing
of adco_jax is used but the numbers that both sides start from, and, for MoCHi, the draws.
"""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from adco_jax.config import method
from adco_jax.config.plan import Sizes, in_place
from adco_jax.data.batch import Batch, Constants
from adco_jax.models.heads import embed
from adco_jax.objectives.base import holds
from adco_jax.runtime import rng as streams
from adco_jax.runtime import sharding
from adco_jax.training import optimizers, train_step
from adco_jax.training.state import create_state
from adco_jax.training.train_step import StepSpec, make_update
from tests.settings import difference

B, SIDE, D, CLASSES, GROUP, STEPS = 32, 3, 6, 5, 4, 6
RATE, MOMENTUM, DECAY, EMA = 0.05, 0.9, 1e-3, 0.9
# Two steps are an epoch: prototypes move from step 2 on, mixing starts there, the queue fills from step 1 to 3.
SETTINGS = {
  "moco": dict(temperature=0.2, in_batch=False, queue_size=80),
  "mochi": dict(temperature=0.3, queue_size=80, hardest=5, mixed=4, mixed_with_query=3, start_epochs=1.0),
  "simclr": dict(temperature=0.5),
  "byol": dict(predictor_width=10),
  "mocov3": dict(temperature=0.3, predictor_width=10),
  "swav": dict(temperature=0.2, prototypes=7, epsilon=0.1, frozen_epochs=1.0, queue_size=64, queue_epochs=0.5),
  "caco": dict(temperature=0.2, bank=dict(size=24, temperature=0.1, learning_rate=1.0, warmup_epochs=1.0)),
  "still": dict(temperature=0.2, bank=dict(size=24)),
  "random": dict(temperature=0.2, bank=dict(size=24)),
  "query_softmax": dict(temperature=0.2, bank=dict(size=24, temperature=0.1, learning_rate=1.0, weight_decay=1e-2)),
  "supervised": dict(label_smoothing=0.1),
}  # fmt: skip
REDUCTION = {"byol": "sum", "mocov3": "sum", "caco": "sum", "swav": "mean"}


class Linear(nn.Module):
  """z = x W; no statistics."""

  @nn.compact
  def __call__(self, images, train, head=True):
    del train, head
    x = images.reshape(len(images), -1)
    kernel = self.param("kernel", nn.initializers.normal(0.3), (x.shape[1], D), images.dtype)
    return x @ kernel

  dtype = np.dtype(np.float64)


def create(name, devices, group, count=2, settings=None, optimizer="sgd"):
  """(objective, what the step is made of, the state before)."""
  cls = method.find(name)
  objective = method.create(cls, method.laid_over(method.table(cls), settings or SETTINGS[name]))
  mode = {1: "one", 2: "symmetric"}.get(count, "symmetric_multicrop")
  reduction = REDUCTION.get(name, "directions")
  encoder = Linear()
  spec = StepSpec(
    embed=functools.partial(embed, encoder, head=objective.sees == "projections"),
    objective=objective,
    sizes=Sizes(B, D, 2 * B, CLASSES, devices, mode, count, reduction, group),
    descender=optimizers.make_optimizer(optimizer, MOMENTUM, DECAY, apart=holds(objective)),
    rate=lambda step: jax.numpy.full((), RATE),
    ema_rate=lambda step: jax.numpy.full((), 1 - EMA),
    fill_steps=0,
    running_from="mean",
    mesh=sharding.create_mesh(jax.devices()[:devices]),
  )
  rngs = jax.random.key(0), jax.random.key(1)
  shape = 1, SIDE, SIDE, 3
  make = lambda: create_state(rngs, encoder, objective, spec.descender, shape, spec.sizes)
  return objective, spec, jax.device_get(jax.jit(make)())


def played(name, views, labels, devices, group, count, optimizer):
  """[{name of an array: array}] after every step, as the system plays, and the state before."""
  objective, spec, state = create(name, devices, group, count, optimizer=optimizer)
  start, phase = state, objective.phases(spec.sizes)[-1]
  update = jax.jit(make_update(spec, phase))
  found = []
  for x, y in zip(views, labels, strict=True):
    x = x.reshape(-1, B, SIDE, SIDE, 3)
    batch = Batch.of(
      [x[v] for v in phase.pairing.query_views], [x[v] for v in phase.pairing.key_views]
    )
    state, metrics = jax.device_get(
      update(state, batch._replace(labels=y if objective.needs_labels else None))
    )
    loss = metrics.get("train/loss", metrics.get("train/query_loss"))
    found.append({"loss": loss, **arrays(state)})
  return found, start


def arrays(state):
  """{name: array} of what a step changes."""
  found = {"kernel": state.query_params["kernel"]}
  if state.key_params:
    found["key"] = state.key_params["kernel"]
  for tree in state.objective:
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
      found["/".join(str(entry.key) for entry in path)] = x
  return found


def unit(x):
  return F.normalize(x, dim=-1)


class Game:
  """The reference's arrays, and a step of them."""

  def __init__(self, name, start, group, optimizer="sgd"):
    self.name, self.group = name, group or B
    self.settings = method.laid_over(method.table(method.find(name)), SETTINGS[name])
    tensor = lambda x: torch.tensor(np.array(x))
    named = {key: tensor(x) for key, x in arrays(start).items()}
    self.kernel, self.key = named.pop("kernel").requires_grad_(), named.pop("key", None)
    own = {"/".join(str(e.key) for e in path) for path, _ in jax.tree_util.tree_leaves_with_path(start.objective.params)}  # fmt: skip
    self.params = {key: x.requires_grad_() for key, x in named.items() if key in own}
    self.rest = {key: x for key, x in named.items() if key not in own}
    self.velocity = torch.zeros_like(self.rest["bank"]) if "bank" in self.rest else None
    made = [self.kernel, *self.params.values()]
    make = {
      "sgd": functools.partial(torch.optim.SGD, momentum=MOMENTUM),
      "adamw": functools.partial(torch.optim.AdamW, betas=(MOMENTUM, 0.999)),
    }
    self.optimizer = make[optimizer](made, lr=RATE, weight_decay=DECAY)

  def step(self, x, labels, step):
    """{name of an array: array} after it."""
    late = self.name == "byol"
    if self.key is not None and not late:
      self.key = EMA * self.key + (1 - EMA) * self.kernel.detach()
    q = [view @ self.kernel for view in x]
    k = [] if self.key is None else [view @ self.key for view in x]
    self.optimizer.zero_grad(set_to_none=True)
    loss = getattr(self, self.name)(q, [unit(each).detach() for each in k], labels, step)
    loss.backward()
    if self.name == "swav" and step < 2:
      self.params["prototypes"].grad = None
    self.optimizer.step()
    if self.name == "swav":
      with torch.no_grad():
        self.params["prototypes"].copy_(unit(self.params["prototypes"]))
    if self.key is not None and late:
      self.key = EMA * self.key + (1 - EMA) * self.kernel.detach()
    left = {"loss": loss, "kernel": self.kernel, **self.params, **self.rest}
    left |= {} if self.key is None else {"key": self.key}
    return {key: x.detach().numpy().copy() for key, x in left.items()}

  def against(self, q, k, rows, in_batch):
    """Mean over both directions of InfoNCE: own key first, then rows, then the batch's other keys."""
    losses = []
    for one, other in ((0, 1), (1, 0)):
      z, t = unit(q[one]), self.settings["temperature"]
      keys = z @ k[other].T
      positive = keys.diagonal()[:, None]
      others = keys.masked_fill(torch.eye(B, dtype=torch.bool), -torch.inf)
      logits = torch.cat([positive, z @ unit(rows).T, *([others] if in_batch else [])], 1) / t
      losses.append(F.cross_entropy(logits, torch.zeros(B, dtype=torch.long)))
    return (losses[0] + losses[1]) / 2

  def enqueue(self, k, step):
    new = torch.cat(k)
    for i, row in enumerate(new):
      self.rest["queue"][(step * len(new) + i) % len(self.rest["queue"])] = row

  def ascend(self, gradient, decay, rate):
    bank = self.rest["bank"]
    self.velocity = MOMENTUM * self.velocity - gradient + decay * bank
    self.rest["bank"] = bank - rate * self.velocity

  def moco(self, q, k, labels, step):
    loss = self.against(q, k, self.rest["queue"].clone(), False)
    self.enqueue(k, step)
    return loss

  def still(self, q, k, labels, step):
    return self.against(q, k, self.rest["bank"], True)

  random = still

  def query_softmax(self, q, k, labels, step):
    s = self.settings["bank"]
    loss = self.against(q, k, self.rest["bank"], True)
    bank = self.rest["bank"].clone().requires_grad_()
    each = [
      torch.logsumexp(unit(bank) @ unit(z.detach()).T / s["temperature"], 1).mean() for z in q
    ]
    (gradient,) = torch.autograd.grad(sum(each) / 2, bank)
    self.ascend(gradient, s["weight_decay"], s["learning_rate"])
    return loss

  def simclr(self, q, k, labels, step):
    z = unit(torch.cat(q))
    logits = (z @ z.T / self.settings["temperature"]).masked_fill(
      torch.eye(2 * B, dtype=torch.bool), -torch.inf
    )
    return F.cross_entropy(logits, torch.arange(2 * B).roll(B))

  def mochi(self, q, k, labels, step):
    s, queue = self.settings, self.rest["queue"].clone()
    total = 0.0
    key = streams.rng_for(0, streams.OBJECTIVE, step)
    for number, (one, other) in enumerate(((0, 1), (1, 0))):
      z = unit(q[one])
      sim = z @ queue.T
      near = sim.detach().argsort(dim=1, descending=True, stable=True)[:, : s["hardest"]]
      parts = [(z * k[other]).sum(1, keepdim=True), sim]
      if step >= 2:
        first, second, member, a, b = jax.random.split(jax.random.fold_in(key, number), 5)
        draw = lambda r, n: torch.tensor(
          np.array(jax.random.randint(r, (B, n), 0, s["hardest"]))
        ).long()
        share = lambda r, n, most: torch.tensor(
          np.array(jax.random.uniform(r, (B, n), np.float64, 0, most))
        )[..., None]
        pick = lambda places, near=near: queue[near.gather(1, places)]
        a, b = share(a, s["mixed"], 1.0), share(b, s["mixed_with_query"], 0.5)
        two = a * pick(draw(first, s["mixed"])) + (1 - a) * pick(draw(second, s["mixed"]))
        own = b * z.detach()[:, None] + (1 - b) * pick(draw(member, s["mixed_with_query"]))
        parts += [(z[:, None] * unit(rows)).sum(-1) for rows in (two, own)]
      logits = torch.cat(parts, 1) / s["temperature"]
      total = total + F.cross_entropy(logits, torch.zeros(B, dtype=torch.long)) / 2
    self.enqueue(k, step)
    return total

  def predict(self, q):
    """Each view alone, BatchNorm over groups of neighbours; running statistics are the mean over groups."""
    made = []
    for z in q:
      hidden = (z @ self.params["predictor/fc0/kernel"]).reshape(-1, self.group, 10)
      mean, var = hidden.mean(1, keepdim=True), hidden.var(1, keepdim=True, unbiased=False)
      for name, now in (("mean", mean), ("var", hidden.var(1, keepdim=True))):
        running = self.rest[f"predictor/fc1/{name}"]
        self.rest[f"predictor/fc1/{name}"] = 0.9 * running + 0.1 * now.detach().mean((0, 1))
      x = ((hidden - mean) / (var + 1e-5).sqrt()).reshape(B, 10)
      x = F.relu(x * self.params["predictor/fc1/scale"] + self.params["predictor/fc1/bias"])
      made.append(x @ self.params["predictor/fc3/kernel"] + self.params["predictor/fc3/bias"])
    return [unit(x) for x in made]

  def byol(self, q, k, labels, step):
    p = self.predict(q)
    return sum((2 - 2 * (p[i] * k[1 - i]).sum(1)).mean() for i in (0, 1))

  def mocov3(self, q, k, labels, step):
    p, t = self.predict(q), self.settings["temperature"]
    return sum(2 * t * F.cross_entropy(p[i] @ k[1 - i].T / t, torch.arange(B)) for i in (0, 1))

  def swav(self, q, k, labels, step):
    s, c = self.settings, self.params["prototypes"]
    z = [unit(each) for each in q]
    queue = self.rest["queue"].flatten(1, 2)  # newest batch first
    full = bool((queue[:, -1] != 0).any())
    total = 0.0
    for assigned in (0, 1):
      scores = (z[assigned] @ c.T).detach()
      if full:
        scores = torch.cat([queue[assigned] @ c.detach().T, scores])
      assignment = torch.exp(scores / s["epsilon"]).T
      assignment /= assignment.sum()
      for _ in range(s["iterations"]):
        assignment /= assignment.sum(1, keepdim=True) * assignment.shape[0]
        assignment /= assignment.sum(0, keepdim=True) * assignment.shape[1]
      target = (assignment * assignment.shape[1]).T[-B:]
      losses = [
        -(target * F.log_softmax(z[v] @ c.T / s["temperature"], 1)).sum(1).mean()
        for v in range(len(z))
        if v != assigned
      ]
      total = total + torch.stack(losses).mean() / 2
    if step >= 1:
      new = torch.stack([each.detach() for each in z[:2]])
      self.rest["queue"] = torch.cat([new, queue[:, :-B]], 1).reshape(2, -1, B, D)
    return total

  def caco(self, q, k, labels, step):
    s, bank = self.settings, self.rest["bank"]
    n, total, gradient = unit(bank), 0.0, torch.zeros_like(bank)
    t = s["bank"]["temperature"]
    for i in (0, 1):
      y = (k[1 - i] @ n.T).argmax(1)
      z = unit(q[i])
      total = total + F.cross_entropy(z @ n.T / s["temperature"], y)
      z = z.detach()
      p = torch.softmax(z @ n.T / t, 1)
      weights = torch.where(F.one_hot(y, len(bank)).bool(), 1 - p, p)
      pull = weights.T @ z / B - (weights * (z @ n.T)).mean(0)[:, None] * n
      gradient += pull / (bank.norm(dim=1, keepdim=True) * t)
    self.ascend(gradient, 0.0, s["bank"]["learning_rate"] * min(1.0, (step + 1) / 2))
    return total

  def supervised(self, q, k, labels, step):
    logits = q[0] @ self.params["classifier/kernel"] + self.params["classifier/bias"]
    return F.cross_entropy(logits, torch.tensor(labels).long(), label_smoothing=0.1)


CASES = [(name, GROUP, 1 if name == "supervised" else 2, "sgd") for name in SETTINGS]
# BatchNorm over all devices; two small crops; an optimiser that counts its steps.
CASES += [("byol", 0, 2, "sgd"), ("swav", GROUP, 4, "sgd"), ("swav", GROUP, 2, "adamw")]


@pytest.mark.parametrize("name, group, count, optimizer", CASES)
def test_steps_by_hand(float64, name, group, count, optimizer):
  random = np.random.RandomState(0)
  views = random.standard_normal((STEPS, count, B, SIDE * SIDE * 3))
  labels = random.randint(0, CLASSES, (STEPS, B)).astype(np.int32)
  told = []
  for devices in (1, 8):
    ours, start = played(name, views, labels, devices, group, count, optimizer)
    game = Game(name, start, group, optimizer)
    hand = [
      game.step(torch.tensor(x), y, step)
      for step, (x, y) in enumerate(zip(views, labels, strict=True))
    ]
    assert [sorted(each) for each in ours] == [sorted(each) for each in hand]
    gaps = [{key: np.abs(a[key] - b[key]).max() / max(np.abs(b[key]).max(), 1e-3) for key in a} for a, b in zip(ours, hand, strict=True)]  # fmt: skip
    told.append(max(gap for each in gaps for gap in each.values()))
    print(
      f"{name:14} {devices} devices: loss {hand[-1]['loss']:.4f}, largest difference {told[-1]:.1e}"
    )
  for key, first in hand[0].items():
    still = (
      key in ("prototypes", "queue")
      and name == "swav"
      or key == "bank"
      and name in ("still", "random")
    )
    assert still or np.abs(hand[-1][key] - first).max() > 1e-4, f"{key} has not moved"
  assert max(told) < 1e-10


def test_what_a_loss_knows_of_where_it_is(float64):
  """Epochs are of training, the filling is none; draws follow from seed and step."""
  objective, spec, state = create("adco", 1, GROUP, settings={"bank": {"size": 96}})
  phase, spec = objective.phases(spec.sizes)[-1], spec._replace(fill_steps=3)
  contexts = {
    (seed, step): train_step._make_context(
      spec, phase, state.replace(step=np.int32(step)), Constants(np.uint32(seed))
    )
    for seed in (0, 1)
    for step in (0, 2, 3, 5, 6)
  }
  assert [float(contexts[0, step].epoch) for step in (0, 2, 3, 5, 6)] == [0, 0, 0, 1, 1.5]
  draws = {tuple(np.array(jax.random.key_data(c.rng))) for c in contexts.values()}
  assert len(draws) == len(contexts) and contexts[0, 5].step == 5


@pytest.mark.parametrize(
  "name, given, own",
  [("byol", {}, True), ("byol", {"momentum_init": "copy"}, False), ("mocov3", {}, False)],
)
def test_byol_s_key_encoder_begins_on_its_own(float64, name, given, own):
  """From draws of its own, if not told otherwise; the others' as a copy."""
  _, _, state = create(name, 1, GROUP, settings=SETTINGS[name] | given)
  assert (difference(state.query_params, state.key_params) > 0.1) == own
  assert own or difference(state.query_params, state.key_params) == 0


def filled(name, settings, views):
  """(arrays and losses at the end of `views`, number of updates that fill) on 8 devices, the first ones filling the bank."""
  objective, spec, state = create(name, 8, GROUP, settings=settings)
  phases = in_place(objective.phases(spec.sizes))
  steps = phases[-1].start
  spec = spec._replace(fill_steps=0 if phases[0].counted else steps)
  updates = {phase: jax.jit(make_update(spec, phase)) for phase in phases}
  losses = []
  for step, x in enumerate(views):
    phase = next((p for p in phases if step < p.stop), phases[-1])
    pairing = phase.pairing
    batch = Batch.of([x[v] for v in pairing.query_views], [x[v] for v in pairing.key_views])
    state, metrics = jax.device_get(updates[phase](state, batch))
    losses.append(metrics["train/query_loss"])
  return (arrays(state), np.array(losses)), steps


VIEWS = np.random.RandomState(0).standard_normal((6, 2, B, SIDE, SIDE, 3))


@pytest.mark.parametrize("init", ["trained", "keys"])
def test_still_is_adco_at_bank_rate_0(float64, init):
  """Three updates that fill 80 rows, three of training, from one state: the same but for the bank's optimiser."""
  bank = {"size": 80, "init": init}
  adco, steps = filled("adco", {"temperature": 0.2, "bank": bank | {"learning_rate": 0.0}}, VIEWS)
  still, _ = filled("still", {"temperature": 0.2, "bank": bank}, VIEWS)
  assert steps == 3 and adco[0].keys() == still[0].keys() == {"kernel", "key", "bank"}
  assert np.abs(np.linalg.norm(still[0]["bank"], axis=1) - 1).max() < 1e-12  # filled with keys
  assert difference(adco, still) < 1e-12


def test_caco_fills_its_bank_as_adco_at_its_own_temperature(float64):
  """Of .2, whatever the encoder's is (train_caco.py)."""
  caco, steps = filled("caco", {"temperature": 0.08, "bank": {"size": 80}}, VIEWS[:3])
  adco, _ = filled("adco", {"temperature": 0.2, "bank": {"size": 80}}, VIEWS[:3])
  other, _ = filled("adco", {"temperature": 0.08, "bank": {"size": 80}}, VIEWS[:3])
  assert steps == 3 and difference(caco, adco) < 1e-12 < 1e-4 < difference(adco, other)


@pytest.mark.parametrize("name", ["adco", "still", "query_softmax"])
def test_a_filling_of_whole_epochs_is_moco(float64, name):
  """Six updates of two directions, from one state: the encoders' are those of MoCo's queue, and the bank's rows are its keys."""
  settings = {"temperature": 0.2, "bank": {"size": 80, "init_epochs": 3.0}}
  bank, steps = filled(name, settings, VIEWS)
  moco, _ = filled("moco", {"temperature": 0.2, "queue_size": 80}, VIEWS)
  assert steps == 6
  assert np.abs(bank[1] - moco[1]).max() < 1e-12
  for array, of in (("kernel", "kernel"), ("key", "key"), ("bank", "queue")):
    assert np.abs(bank[0][array] - moco[0][of]).max() < 1e-12, array
