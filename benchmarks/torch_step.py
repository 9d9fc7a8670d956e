"""One training step of AdCo in PyTorch, as fast as PyTorch's own tools make it: what against_torch compares with.

Flow: against_torch makes a `Step` of a config and plays it; a test holds its losses, bank and encoder against ours.
Shapes: views uint8 [B, H, W, 3], normalised here; bank [K, D].
Holds: the same method and the same views as ours without augmentation. All for torch's good: channels_last, fused SGD, the
  key encoder's average as one multi-tensor operation, the bank's gradient in closed form from the product that the
  loss has already; on a GPU the encoders in bfloat16 by autocast and the bank's products in TF32, where ours are float32.
  BatchNorm is over the whole batch, as torch's is; ours is over groups of bn.group_size.
Not here: augmentation, schedules, the bank's initialisation; clocks (against_torch).
"""

import functools

import torch
from torch import nn
from torch.nn import functional as F

from adco_jax.config.plan import get
from adco_jax.errors import require
from adco_jax.models import positions, vit
from adco_jax.models.resnet import base_channels
from tests.torch_packages import timm
from tests.torch_reference import STAGES, ResNet

TOKENS = ("cls_token", "pos_embed", "reg_token")  # arrays that are vectors in all but name
VARIANTS = ("eager", "compile", "reduce-overhead", "graph")


def check(config):
  """Raises ConfigError for what this step does not do."""
  known = sorted([*(name for name in STAGES if name != "tiny"), *vit.ARCHITECTURES])
  require(config.model.arch in known, "model.arch", config.model.arch, f"use one of {known}")
  only = {
    "objective": "adco",
    "method.in_batch": True,
    "accumulate": 1,
    "model.head.layers": 2,
    "model.head.norm": "none",
  }
  for name, value in only.items():
    require(
      get(config, name) == value, name, get(config, name), f"torch's side has {value!r} alone"
    )
  name = config.optim.name
  require(name in ("sgd", "adamw"), "optim.name", name, "torch's side has sgd and adamw alone")
  order = config.method.bank.order
  require(
    order == "simultaneous", "method.bank.order", order, "torch's side has 'simultaneous' alone"
  )


def create_encoder(config):
  """Backbone and projection of a config: torch's ResNet, or timm's ViT."""
  model = config.model
  if model.arch not in vit.ARCHITECTURES:
    return ResNet(model.arch, base_channels(model.width), model.dim, stem=model.stem)
  return Transformer(config)


class Transformer(timm.models.vision_transformer.VisionTransformer):
  """timm's (torch's scaled_dot_product_attention inside) and the projection of AdCo."""

  def __init__(self, config):
    form = vit.form_of(config.model.vit, config.views.crops)
    dim, depth, heads = vit.sizes(config.model.arch, config.model.width, form)
    super().__init__(
      form.grid * form.patch, form.patch, num_classes=0, embed_dim=dim, depth=depth, num_heads=heads, fc_norm=False,
      global_pool={"token": "token", "mean": "avg"}[form.pool], init_values=form.layer_scale or None, dynamic_img_size=True,
      reg_tokens=form.registers, no_embed_class=form.registers > 0, drop_path_rate=form.drop_path,
    )  # fmt: skip
    if form.positions == "sincos":
      fixed = positions.sincos(form.grid, dim, 0 if form.registers else 1)
      self.pos_embed.data.copy_(torch.from_numpy(fixed))
      self.pos_embed.requires_grad_(False)
    self.patch_embed.requires_grad_(config.optim.freeze != "patch_embed")
    self.fc = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, config.model.dim))

  def forward(self, images):
    """Projections of normalised images [B, 3, H, W]."""
    return self.fc(super().forward(images))


class Step(nn.Module):
  """Both encoders, the bank and the update of all three.

  `dtype`: bfloat16 runs the encoders under autocast, anything else is the dtype of everything.
  """

  def __init__(self, config, plan, dtype):
    super().__init__()
    self.query, self.key = create_encoder(config), create_encoder(config)
    self.key.load_state_dict(self.query.state_dict())
    self.key.requires_grad_(False)
    self.half = dtype == torch.bfloat16
    self.register_buffer("bank", torch.randn(config.method.bank.size, config.model.dim))
    self.register_buffer("velocity", torch.zeros_like(self.bank))
    for name in ("mean", "std"):
      value = torch.tensor(config.data[name], dtype=torch.float64)
      self.register_buffer(name, 255 * value.view(1, 3, 1, 1))
    for module in self.modules():
      if isinstance(module, nn.BatchNorm2d):
        module.num_batches_tracked = None  # one launch each, and nobody reads it
    self.to(torch.float32 if self.half else dtype, memory_format=torch.channels_last)
    self.pairs, self.settings, self.rate = plan.train_pairing.pairs, config, plan.learning_rate

  def optimizer(self):
    """The encoder's SGD or AdamW, all parameters of a decay in one kernel."""
    optim, named = self.settings.optim, [*self.query.named_parameters()]
    bare = lambda name, p: optim.no_decay == "vectors" and (p.ndim < 2 or name.endswith(TOKENS))
    groups = [
      {"params": [p for name, p in named if p.requires_grad and bare(name, p) == spared],
       "weight_decay": 0.0 if spared else optim.weight_decay} for spared in (False, True)
    ]  # fmt: skip
    groups = [group for group in groups if group["params"]]
    if optim.name == "sgd":
      return torch.optim.SGD(groups, self.rate, optim.momentum, fused=True)
    return torch.optim.AdamW(groups, self.rate, (optim.momentum, optim.beta2), fused=True)

  def forward(self, queries, keys):
    """(loss, differentiable in the query encoder; what `move_bank` needs); moves the key encoder first."""
    with torch.no_grad():
      averages, new = list(self.key.parameters()), list(self.query.parameters())
      torch._foreach_lerp_(averages, new, 1 - self.settings.ema.decay)
      k = [self.embed(self.key, x) for x in keys]
    q = [self.embed(self.query, x) for x in queries]
    lengths = self.bank.norm(dim=1, keepdim=True)
    unit, temperature = self.bank / lengths, self.settings.method.temperature
    far = [x @ unit.T for x in q]
    meetings = [(q[i], q[i] @ k[j].T, far[i], weight) for i, j, weight in self.pairs]
    loss = sum(
      weight * (total(near, rows, temperature) - near.diagonal() / temperature).mean()
      for _, near, rows, weight in meetings
    )
    with torch.no_grad():
      return loss, (*self.pulls(meetings), unit, lengths)

  def pulls(self, meetings):
    """The loss's gradient at the bank's temperature with respect to unit rows, [K, D], and its part along each, [K]."""
    temperature, pull, along = self.settings.method.bank.temperature, 0, 0
    for q, near, rows, weight in meetings:
      sums = total(near, rows, temperature)[:, None]
      share = torch.exp(rows / temperature - sums) * (weight / (len(q) * temperature))
      pull, along = pull + share.T @ q, along + (share * rows).sum(0)
    return pull, along

  def move_bank(self, pull, along, unit, lengths):
    """One step of SGD up that loss, along the sphere."""
    settings = self.settings.method.bank
    gradient = (pull - along[:, None] * unit) / lengths
    self.velocity.mul_(settings.momentum).add_(settings.weight_decay * self.bank - gradient)
    self.bank.sub_(self.velocity, alpha=settings.learning_rate)

  def embed(self, encoder, images):
    """Unit embeddings [B, D] of uint8 images [B, H, W, 3]."""
    x = (images.permute(0, 3, 1, 2).to(self.mean.dtype) - self.mean) / self.std
    with torch.autocast(images.device.type, torch.bfloat16, enabled=self.half):
      z = encoder(x)
    return F.normalize(z.to(self.mean.dtype), dim=1)


def total(near, far, temperature):
  """log of the sum of exp(cosine / temperature) over the batch's keys and the bank's rows, [B]."""
  return torch.logaddexp(
    torch.logsumexp(near / temperature, 1), torch.logsumexp(far / temperature, 1)
  )


def make_update(step, variant, queries, keys):
  """update() -> loss: one training step on these views, as `variant` runs it."""
  optimizer = step.optimizer()
  forward, move_bank = step.forward, torch.no_grad()(step.move_bank)
  if variant != "eager":
    mode = "reduce-overhead" if variant == "reduce-overhead" else "default"
    faster = functools.partial(torch.compile, mode=mode, fullgraph=True, dynamic=False)
    forward, move_bank = faster(forward), faster(move_bank)
  for x in (*queries, *keys):
    torch._dynamo.mark_static_address(x)  # CUDA graphs then read them where they are

  def update():
    torch.compiler.cudagraph_mark_step_begin()
    loss, found = forward(queries, keys)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    move_bank(*found)
    return loss.detach()

  return capture(update) if variant == "graph" else update


def capture(update):
  """The whole update as one CUDA graph: nothing is launched from Python any more."""
  stream = torch.cuda.Stream()
  stream.wait_stream(torch.cuda.current_stream())
  with torch.cuda.stream(stream):
    for _ in range(3):
      update()
  torch.cuda.current_stream().wait_stream(stream)
  graph = torch.cuda.CUDAGraph()
  with torch.cuda.graph(graph):
    loss = update()

  def replay():
    graph.replay()
    return loss

  return replay
