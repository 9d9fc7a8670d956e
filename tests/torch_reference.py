"""PyTorch doing what adco_jax does: a ResNet with torchvision's names, and the authors' step.

Written from the equations and from the order of the authors' program (docs/method.md), with torch's own
modules, autograd for the encoder and the closed form for the bank; one process plays all of theirs.
"""

import torch
from torch import nn
from torch.nn import functional as F

STAGES = {
  "tiny": (1,),
  "resnet8": (1, 1, 1),
  "resnet10": (1, 1, 1, 1),
  "resnet18": (2, 2, 2, 2),
  "resnet50": (3, 4, 6, 3),
}


def block(channels, stride, bottleneck):
  """(convolutions as (channels, size, stride), width of the output)."""
  if bottleneck:
    return [(channels, 1, 1), (channels, 3, stride), (4 * channels, 1, 1)], 4 * channels
  return [(channels, 3, stride), (channels, 3, 1)], channels


class Block(nn.Module):
  """Either kind of residual block."""

  def __init__(self, inputs, channels, stride, bottleneck):
    super().__init__()
    convs, outputs = block(channels, stride, bottleneck)
    self.count, width = len(convs), inputs
    for i, (features, size, step) in enumerate(convs, 1):
      conv = nn.Conv2d(width, features, size, step, size // 2, bias=False)
      setattr(self, f"conv{i}", conv)
      setattr(self, f"bn{i}", nn.BatchNorm2d(features))
      width = features
    self.downsample = None
    if stride > 1 or inputs != outputs:
      conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
      self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))

  def forward(self, x):
    y = x
    for i in range(1, self.count + 1):
      y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
      y = F.relu(y) if i < self.count else y
    return F.relu(y + (self.downsample(x) if self.downsample else x))


class ResNet(nn.Module):
  """torchvision's resnet with `fc` replaced: two layers of the projection, a classifier, or nothing.

  `stem`: imagenet (7x7, stride 2, max-pool) or small (3x3).
  """

  def __init__(self, arch, width=64, dim=None, classes=None, stem="imagenet"):
    super().__init__()
    bottleneck = arch == "resnet50"
    self.pooled = stem == "imagenet"
    size, stride = (7, 2) if self.pooled else (3, 1)
    self.conv1 = nn.Conv2d(3, width, size, stride, size // 2, bias=False)
    self.bn1 = nn.BatchNorm2d(width)
    inputs, self.stages = width, len(STAGES[arch])
    for stage, count in enumerate(STAGES[arch]):
      blocks = []
      for i in range(count):
        stride = 2 if stage and not i else 1
        blocks.append(Block(inputs, width * 2**stage, stride, bottleneck))
        inputs = width * 2**stage * (4 if bottleneck else 1)
      setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
    self.fc = nn.Identity()
    if dim:
      self.fc = nn.Sequential(nn.Linear(inputs, inputs), nn.ReLU(), nn.Linear(inputs, dim))
    if classes:
      self.fc = nn.Linear(inputs, classes)

  def forward(self, x):
    x = F.relu(self.bn1(self.conv1(x)))
    x = F.max_pool2d(x, 3, 2, 1) if self.pooled else x
    for stage in range(self.stages):
      x = getattr(self, f"layer{stage + 1}")(x)
    return self.fc(x.mean((2, 3)))


class AdCo(nn.Module):
  """Both encoders, named as in the authors' checkpoint."""

  def __init__(self, arch, width, dim):
    super().__init__()
    self.encoder_q, self.encoder_k = ResNet(arch, width, dim), ResNet(arch, width, dim)
    self.encoder_k.load_state_dict(self.encoder_q.state_dict())
    self.encoder_k.requires_grad_(False)


def scramble(module, seed=0):
  """Random statistics and affine parameters, so that no mix-up of them goes unseen."""
  torch.manual_seed(seed)
  for m in module.modules():
    if isinstance(m, nn.BatchNorm2d):
      nn.init.uniform_(m.weight, 0.5, 1.5)
      nn.init.normal_(m.bias, 0, 0.2)
      m.running_mean.normal_(0, 0.2)
      m.running_var.uniform_(0.5, 1.5)
  return module


def images(views):
  """NHWC NumPy arrays -> NCHW tensors."""
  return [torch.from_numpy(v).permute(0, 3, 1, 2).contiguous() for v in views]


def encode(encoder, x, groups, order=None):
  """Unit embeddings in slot order; every group is a process of theirs, the first keeps its statistics."""
  order = torch.arange(len(x)) if order is None else torch.as_tensor(order)
  first, *others = x[order].chunk(groups)
  buffers = {name: value.clone() for name, value in encoder.named_buffers()}
  parts = [encoder(first)]
  for part in others:
    own = {name: value.clone() for name, value in buffers.items()}
    parts.append(torch.func.functional_call(encoder, own, (part,)))
  return F.normalize(torch.cat(parts)[torch.argsort(order)], dim=1)


class Trainer:
  """Steps of the authors' program. `bank` and `momentum` are [D, K]."""

  def __init__(
    self, model, bank, momentum, *, mode, groups, rate, bank_rate, tau=0.12, bank_tau=0.02
  ):
    self.model, self.bank, self.momentum = model, bank.clone(), momentum.clone()
    self.mode, self.groups, self.taus, self.bank_rate = mode, groups, (tau, bank_tau), bank_rate
    self.sgd = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=1e-4)

  def step(self, views, orders):
    """The loss of one step."""
    x = images(views)
    query, key = {
      "single": ([0], [1]), "symmetric": ([0, 1], [0, 1]),
      "multicrop": (list(range(1, len(x))), [0]),
    }[self.mode]  # fmt: skip
    q = self._queries(x, query)
    k = self._keys(x, key, orders)
    pairs = {
      "single": [(0, 0, 1.0)], "symmetric": [(0, 1, 0.5), (1, 0, 0.5)],
      "multicrop": [(i, 0, 1.0) for i in range(len(q))],
    }[self.mode]  # fmt: skip
    unit = F.normalize(self.bank, dim=0)
    label = torch.arange(len(x[0]))
    loss = sum(w * F.cross_entropy(self._logits(q[i], k[j], unit, 0), label) for i, j, w in pairs)
    self._descend(loss)
    with torch.no_grad():
      gradient = sum(w * self._bank_gradient(q[i], k[j], unit) for i, j, w in pairs)
      self.momentum = 0.9 * self.momentum + gradient + 1e-4 * self.bank
      self.bank = self.bank - self.bank_rate * self.momentum
    return loss.item()

  def fill(self, views, orders, row):
    """One step of their init_memory: one pair, no keys of the batch; its keys go to columns from `row`."""
    x = images(views)
    query, key, used = {
      "single": ([0], [1], 0), "symmetric": ([0, 1], [0, 1], 1),
      "multicrop": (list(range(len(x) - 1)), [len(x) - 1], 0),
    }[self.mode]  # fmt: skip
    q = self._queries(x, query)[0]
    k = self._keys(x, key, orders)[used]
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ F.normalize(self.bank, dim=0)], 1)
    loss = F.cross_entropy(logits / self.taus[0], torch.zeros(len(q), dtype=torch.long))
    self._descend(loss)
    columns = self.bank[:, row : row + len(k)]
    columns.copy_(k[: columns.shape[1]].T)
    return loss.item()

  def reset_key(self):
    """What follows the last filling step: parameters, not statistics."""
    for p, k in zip(
      self.model.encoder_q.parameters(), self.model.encoder_k.parameters(), strict=True
    ):
      k.data.copy_(p.data)

  def _queries(self, x, chosen):
    return [encode(self.model.encoder_q, x[v], self.groups) for v in chosen]

  @torch.no_grad()
  def _keys(self, x, chosen, orders):
    for p, k in zip(
      self.model.encoder_q.parameters(), self.model.encoder_k.parameters(), strict=True
    ):
      k.copy_(k * 0.999 + p * (1 - 0.999))
    return [
      encode(self.model.encoder_k, x[v], self.groups, o)
      for v, o in zip(chosen, orders, strict=True)
    ]

  def _descend(self, loss):
    self.sgd.zero_grad()
    loss.backward()
    self.sgd.step()

  def _logits(self, q, k, unit, which):
    return torch.cat([q @ k.T, q @ unit], 1) / self.taus[which]

  def _bank_gradient(self, q, k, unit):
    """-dL/dW of the mean loss at the bank's temperature: pull along the sphere, over |w|."""
    p = self._logits(q, k, unit, 1).softmax(1)[:, len(k) :]
    pull = q.T @ p / len(q) - (p * (q @ unit)).mean(0) * unit
    return -pull / self.bank.norm(dim=0) / self.taus[1]
