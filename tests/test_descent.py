"""Clipping, decay masks and curves, layer-wise rates and frozen arrays, together and one by one, and in whole steps."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from adco_jax import build, main
from adco_jax.errors import ConfigError
from adco_jax.models import heads, resnet
from adco_jax.runtime import sharding
from adco_jax.training import optimizers, train_step
from adco_jax.training.log import Log
from adco_jax.workdir.metrics import MetricsWriter, read_metrics
from tests import settings
from tests.test_end_to_end import ONE_BLOCK, TINY, fingerprint, run, untimed
from tests.test_flat import flattened
from tests.test_train_step import run as steps_of

pytestmark = pytest.mark.steps  # the slow ones' group

STEPS, CLIP, MOMENTUM, BETA2, TRUST, HEAD, LAYER = 20, 3.0, 0.9, 0.99, 0.02, 3.0, 0.65
DECAYS = 0.04, 0.4  # first and last weight decay
RATES = np.minimum(1, np.arange(1, STEPS + 1) / 5) * np.linspace(0.1, 0.01, STEPS)


def slow(*values):
  """Parameters of a test for the night."""
  return pytest.param(*values, marks=pytest.mark.slow)


def layer_of(path, depth):
  """BEiT's, of timm's names."""
  if path[0] in ("patch_embed", "cls_token", "pos_embed", "reg_token"):
    return 0
  return int(path[0][7:]) + 1 if path[0].startswith("blocks_") else depth + 1


def arrays(size, depth):
  """{names on the way: (shape, rate, whether it decays)} of a ViT of this width and depth, its head and a predictor."""
  below, rate = ("encoder", "backbone"), lambda layer: LAYER ** (depth + 1 - layer)
  found = {
    (*below, "patch_embed", "proj", "kernel"): ((2, 2, 3, size), 0.0, False),
    (*below, "patch_embed", "proj", "bias"): ((size,), 0.0, False),
    (*below, "cls_token"): ((1, 1, size), rate(0), False),
    (*below, "pos_embed"): ((1, 5, size), rate(0), False),
    (*below, "reg_token"): ((1, 2, size), rate(0), False),
    (*below, "norm", "scale"): ((size,), 1.0, False),
    ("encoder", "head", "fc0", "kernel"): ((size, 3), 1.0, True),
    ("objective", "predictor", "kernel"): ((3, 3), HEAD, True),
    ("objective", "predictor", "bias"): ((3,), HEAD, False),
  }
  for i in range(depth):
    block = (*below, f"blocks_{i}")
    found[*block, "attn", "qkv", "kernel"] = ((size, 3 * size), rate(i + 1), True)
    found[*block, "norm1", "bias"] = ((size,), rate(i + 1), False)
  return found


def nested(leaves):
  tree = {}
  for path, value in leaves.items():
    branch = tree
    for key in path[:-1]:
      branch = branch.setdefault(key, {})
    branch[path[-1]] = value
  return tree


def is_frozen(path):
  return "patch_embed" in path


def draw(size, depth):
  """({path: first value}, {path: gradients of all steps}), the frozen ones' gradients by far the longest."""
  random = np.random.RandomState(size)
  start = {p: random.standard_normal(shape) for p, (shape, *_) in arrays(size, depth).items()}
  lengths = np.linspace(0.2, 2, STEPS) * CLIP / np.sqrt(sum(x.size for x in start.values()))
  gradients = {}
  for path, x in start.items():
    scale = lengths.reshape(-1, *[1] * x.ndim) * (100 if is_frozen(path) else 1)
    gradients[path] = scale * random.standard_normal((STEPS, *x.shape))
  return start, gradients


def ours(name, start, gradients, depth):
  """({path: last value}, optimiser's state, norms, whether clipped), by what build makes for such a config."""
  frozen = optimizers.frozen_by("patch_embed")
  layers = functools.partial(layer_of, depth=depth), depth
  transform = optimizers.make_optimizer(
    name, MOMENTUM, DECAYS[0], no_decay="vectors", beta2=BETA2, trust=TRUST,
    multiplier=optimizers.make_multiplier(HEAD, LAYER, *layers), frozen=frozen,
  )  # fmt: skip
  clip, decay = optimizers.make_clip(CLIP, frozen), optimizers.make_decay(*DECAYS, STEPS)

  @jax.jit
  def step(gradients, state, params, rate, number):
    gradients, metrics = clip(gradients, True)
    given = dict(learning_rate=rate, weight_decay=decay(number))
    updates, state = transform.update(gradients, state, params, **given)
    return optax.apply_updates(params, updates), state, metrics

  params = jax.tree.map(jnp.asarray, nested(start))
  state, lines = transform.init(params), []
  for i, rate in enumerate(RATES):
    given = nested({path: g[i] for path, g in gradients.items()})
    params, state, metrics = step(given, state, params, jnp.asarray(rate), jnp.asarray(i))
    lines.append(jax.device_get(metrics))

  def leaf(path):
    return np.asarray(functools.reduce(lambda tree, key: tree[key], path, params))

  norms, clipped = ([line[f"optim/{n}"] for line in lines] for n in ("gradient_norm", "clipped"))
  return {path: leaf(path) for path in start}, state, norms, clipped


def curve():
  """DINO's cosine of the weight decay, in NumPy."""
  first, last = DECAYS
  return last + 0.5 * (first - last) * (1 + np.cos(np.pi * np.arange(STEPS) / STEPS))


def torch_s(name, start, gradients, depth):
  """({path: last value}, norms) by torch: parameter groups, clip_grad_norm_ of what has a gradient, AdamW or SGD."""
  table = arrays(*depth)
  theirs = {p: torch.nn.Parameter(torch.from_numpy(x.copy())) for p, x in start.items()}
  moving = [path for path in theirs if not is_frozen(path)]
  groups = [{"params": [theirs[path]]} for path in moving]
  make = {
    "sgd": lambda: torch.optim.SGD(groups, lr=1.0, momentum=MOMENTUM),
    "adamw": lambda: torch.optim.AdamW(groups, lr=1.0, betas=(MOMENTUM, BETA2)),
  }
  optimizer, norms = make[name](), []
  for i, decay in enumerate(curve()):
    for path, group in zip(moving, optimizer.param_groups, strict=True):
      theirs[path].grad = torch.from_numpy(gradients[path][i].copy())
      group["lr"], group["weight_decay"] = (
        RATES[i] * table[path][1], decay if table[path][2] else 0.0,
      )  # fmt: skip
    norms.append(float(torch.nn.utils.clip_grad_norm_([theirs[p] for p in moving], CLIP)))
    optimizer.step()
  return {path: x.detach().numpy() for path, x in theirs.items()}, norms


def numpy_s_lars(_, start, gradients, depth):
  """The same by hand: SimCLR's LARS, whose rate lies inside of the momentum."""
  table = arrays(*depth)
  values, norms = {path: x.copy() for path, x in start.items()}, []
  moving = [path for path in values if not is_frozen(path)]
  velocity = {path: np.zeros_like(values[path]) for path in moving}
  for i, decay in enumerate(curve()):
    norms.append(np.sqrt(sum(np.sum(gradients[path][i] ** 2) for path in moving)))
    for path in moving:
      _, rate, decays = table[path]
      gradient, ratio = gradients[path][i] * min(1, CLIP / (norms[-1] + 1e-6)), 1.0
      if decays:
        gradient = gradient + decay * values[path]
        ratio = TRUST * np.linalg.norm(values[path]) / np.linalg.norm(gradient)
      velocity[path] = MOMENTUM * velocity[path] + RATES[i] * rate * ratio * gradient
      values[path] = values[path] - velocity[path]
  return values, norms


@pytest.mark.parametrize("size, depth", [(3, 1), (8, 3), slow(33, 12)])
@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_all_at_once_is_torch_s(float64, name, size, depth):
  """20 steps in float64: warm-up, clipping in half of them, decays, rates of layers, a frozen part."""
  start, gradients = draw(size, depth)
  found, state, norms, clipped = ours(name, start, gradients, depth)
  oracle = numpy_s_lars if name == "lars" else torch_s
  wanted, lengths = oracle(name, start, gradients, (size, depth))
  assert 5 < sum(clipped) < 15 and clipped == [float(x + 1e-6 > CLIP) for x in lengths]
  worst = max(np.abs(found[p] - wanted[p]).max() / np.abs(wanted[p]).max() for p in start)
  worst = max(worst, np.abs(np.array(norms) / lengths - 1).max())
  print(f"{name}, {size} wide, {depth} blocks: largest relative difference {worst:.1e}")
  assert worst < 1e-12
  for path, x in start.items():
    assert found[path].tobytes() == x.tobytes() if is_frozen(path) else (found[path] != x).all()
  momenta = [
    x for path, x in jax.tree_util.tree_leaves_with_path(state) if "patch_embed" in str(path)
  ]
  assert momenta and not any(np.any(x) for x in momenta)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_what_is_frozen_keeps_every_bit(float64, name, dtype):
  """Zeros with their sign too, with a momentum from before it was frozen, and a decay."""
  values = np.array([-0.0, 0.0, 1e-30, -3.0], dtype)
  tree = lambda x: {"encoder": {"backbone": {"patch_embed": x, "blocks_0": x}}}
  free, held = (
    optimizers.make_optimizer(name, 0.9, 0.1, frozen=optimizers.frozen_by(part))
    for part in ("", "patch_embed")
  )
  params = jax.tree.map(jnp.asarray, tree(values))
  given = dict(learning_rate=jnp.asarray(0.1))
  _, state = free.update(tree(jnp.ones(4, dtype)), free.init(params), params, **given)
  move = lambda g, s, p: optax.apply_updates(p, held.update(g, s, p, **given)[0])
  for sign, run_it in ((1, jax.jit(move)), (-1, jax.jit(move)), (1, move)):
    moved = run_it(tree(jnp.full(4, sign, dtype)), state, params)["encoder"]["backbone"]
    assert np.asarray(moved["patch_embed"]).tobytes() == values.tobytes()
    assert (np.asarray(moved["blocks_0"]) != values).all()


def test_decay_curve_is_counted_as_the_rate_is():
  decay = optimizers.make_decay(0.04, 0.4, 100)
  found = [float(decay(jnp.int32(step))) for step in (-5, 0, 50, 99, 100, 130)]
  last = 0.4 - 0.36 * 0.5 * (1 + np.cos(np.pi * 0.99))
  assert found == pytest.approx([0.04, 0.04, 0.22, last, 0.4, 0.4], abs=1e-7)
  assert float(optimizers.make_decay(0.1, 0.0, 10)(jnp.int32(10))) == pytest.approx(0, abs=1e-8)
  assert optimizers.make_decay(0.04, optimizers.CONSTANT, 100) is None


def test_resnet_layers_are_its_stages():
  names = {"conv1": 0, "bn1": 0, "layer1_0": 1, "layer4_2": 4, "layer12_0": 12}
  assert {name: resnet.layer_of([name, "kernel"]) for name in names} == names


# --- whole steps


class Patches(nn.Module):
  """A backbone with a ViT's names that says which layer an array is of."""

  dtype: jnp.dtype = jnp.float32
  layers = 2

  def layer_of(self, path):
    return layer_of(path, self.layers)

  @nn.compact
  def __call__(self, images, train):
    width, kept = 8, jnp.promote_types(self.dtype, jnp.float32)
    x = nn.Conv(width, (4, 4), 4, dtype=self.dtype, param_dtype=kept, name="patch_embed")(images)
    x = x.reshape(len(x), -1, width)
    for name, tokens in (("cls_token", 1), ("pos_embed", x.shape[1])):
      start = nn.initializers.normal(0.5)
      x = x + self.param(name, start, (1, tokens, width), kept).astype(x.dtype)
    for i in range(self.layers):
      y = nn.LayerNorm(dtype=self.dtype, param_dtype=kept, name=f"blocks_{i}")(x)
      x = x + nn.gelu(y @ jnp.roll(jnp.eye(width, dtype=y.dtype), i + 1, 1))
    return nn.LayerNorm(dtype=self.dtype, param_dtype=kept, name="norm")(x).mean(1).astype(kept)


PATCHES = f"{__name__}:Patches"


def config_of(mode="single", **more):
  given = dict(compute_dtype="float64", objective="adco", optim__clip_norm=0.01)
  given |= {} if more.get("objective") else {"method__bank__init": "random"}
  return settings.tiny_config(mode, **given | more)


def test_clipping_shortens_what_descends_and_leaves_the_adversary(float64):
  """One step of SGD: moved by share times as far, to the length that was asked for; the bank as without."""
  (free, plain), (cut, metrics) = (
    steps_of(config_of(optim__clip_norm=norm, optim__weight_decay=0.0), 1, 1, np.float64)
    for norm in (0.0, 0.01)
  )
  start = jax.device_get(settings.create_players(config_of(), 1)[2])
  length = lambda new: optax.tree.norm(
    jax.tree.map(np.subtract, new.query_params, start.query_params)
  )
  norm, rate = metrics[0]["optim/gradient_norm"], metrics[0]["train/learning_rate"]
  assert norm > 0.1 and metrics[0]["optim/clipped"] == 1
  assert length(free) == pytest.approx(rate * norm, rel=1e-9)
  assert length(cut) == pytest.approx(rate * 0.01 * norm / (norm + 1e-6), rel=1e-9)
  assert settings.difference(free.objective.adversary, cut.objective.adversary) == 0
  assert "optim/clipped" not in plain[0] and metrics[0].keys() - plain[0].keys() == {
    "optim/gradient_norm", "optim/clipped",
  }  # fmt: skip


@pytest.mark.parametrize(
  "devices, more, arch",
  [
    slow(8, {}, {}),
    (2, {"accumulate": 2}, {}),
    (
      8,
      {},
      {
        "model__arch": "vit_tiny", "model__width": 0.125, "model__vit__depth": 2, "model__vit__patch": 4, "model__vit__registers": 1, "bn__group_size": 0,
        "optim__name": "adamw", "optim__no_decay": "vectors", "optim__layer_decay": 0.65,
        "optim__freeze": "patch_embed", "optim__weight_decay_final": 0.4, "optim__weight_decay": 0.04, "optim__learning_rate": 0.001,
      },
    ),
  ],
)  # fmt: skip
def test_devices_and_parts_clip_alike(float64, devices, more, arch):
  """Three steps, of which one is clipped or more, to the same state and the same norms as on one device as a whole."""
  one, lines = steps_of(config_of(**arch), 1, 3, np.float64)
  other, found = steps_of(config_of(**arch, **more), devices, 3, np.float64)
  assert sum(line["optim/clipped"] for line in lines) >= 1
  assert settings.difference(one, other) < 1e-9 and settings.difference(lines, found) < 1e-9
  if arch:
    start = settings.create_players(config_of(**arch), 1)[2].query_params["backbone"]
    same = {k: settings.difference(v, one.query_params["backbone"][k]) for k, v in start.items()}
    assert same.pop("patch_embed") == 0 and min(same.values()) > 1e-5
    decays = [line["train/weight_decay"] for line in lines]
    assert decays[0] == pytest.approx(0.04) and decays == sorted(decays) and decays[2] > 0.1


@pytest.mark.slow
def test_split_momenta_clip_alike(float64):
  """optim.shard on 8 devices, two steps of AdamW with a curve of the decay."""
  states = []
  for shard in (False, True):
    config = config_of(
      optim__shard=shard, optim__name="adamw", optim__no_decay="vectors", model__dim=128, optim__weight_decay_final=0.5,
      model__width=1.0,
    )  # fmt: skip
    plan, mesh = settings.tiny_plan(config, 8), sharding.create_mesh()
    built = build.build(config, plan, mesh)
    out = built.shardings, sharding.replicated(mesh)
    update = jax.jit(train_step.make_update(built.spec, plan.phases[-1]), out_shardings=out)
    state = built.create_state()
    for step in range(2):
      batch = settings.random_batch(plan, plan.train_pairing, step, np.float64)
      state, metrics = update(state, batch.put(mesh))
    assert metrics["optim/clipped"] == 1
    states.append(jax.device_get((state, metrics)))
  assert settings.difference(*states) < 1e-9


@pytest.mark.slow
def test_vectors_of_a_gpu_clip_alike(float64):
  """Parameters packed into one vector have the same length, and the same decay at every step."""
  given = dict(compute_dtype="float64", optim__clip_norm=0.01, optim__weight_decay_final=0.5)
  packed, plan, state, encoder = flattened(2, method__bank__init="random", **given)
  plain = functools.partial(heads.embed, encoder.encoder.clone(platform="cpu"))
  found = []
  for players, at in ((packed._replace(embed=plain), state), (packed, encoder.pack(state))):
    update = jax.jit(train_step.make_update(players, plan.phases[-1]))
    for step in range(2):
      batch = settings.random_batch(plan, plan.train_pairing, step, np.float64)
      at, metrics = update(at, batch.put(players.mesh))
    found.append((at, metrics))
  (trees, lines), (vectors, others) = found
  assert lines["optim/clipped"] == 1
  assert settings.difference(trees, encoder.unpack(vectors, state)) < 1e-12
  assert settings.difference(lines, others) < 1e-12


@pytest.mark.slow
def test_prototypes_that_do_not_train_have_no_length(float64):
  """SwAV's, which are held at first: the norm is the encoder's alone, and then that of both."""
  given = {"objective": "swav", "method__prototypes": 8, "model__head__norm": "hidden"}
  norms = []
  for epochs in (0.0, 1.0):
    config = config_of("symmetric", **given, method__frozen_epochs=epochs, optim__weight_decay=0.0)
    state, (line,) = steps_of(config, 1, 1, np.float64, shuffle=False)
    norms.append(line["optim/gradient_norm"])
    if not epochs:
      start = settings.create_players(config, 1)[2]
      share = 0.01 / (line["optim/gradient_norm"] + 1e-6) * line["train/learning_rate"]
      moved = jax.tree.map(np.subtract, state.query_params, jax.device_get(start.query_params))
      own = float(optax.tree.norm(moved)) / share
  assert norms[1] == pytest.approx(own, rel=1e-9) and norms[0] > norms[1] * 1.001


def test_a_line_tells_the_share_of_clipped_steps_since_the_last_one(tmp_path):
  """Of the bank's filling none; a log that begins inside of five steps counts on from what the one before it saved."""
  config = settings.tiny_config(log__every_steps=5)
  spec, plan, state = settings.create_players(config)
  clipped = [None, None, 1, 0, 0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0]
  for folder, stop in (("straight", 99), ("stopped", 8)):
    workdir, notes, first = tmp_path / folder, {}, 1
    workdir.mkdir()
    for last in (stop, len(clipped)):
      writer = MetricsWriter(workdir, first - 1)
      log = Log(config, plan, writer, spec)
      log.recall(notes)
      for step in range(first, min(last, len(clipped)) + 1):
        value = clipped[step - 1]
        own = {} if value is None else {"optim/clipped": jnp.float32(value)}
        log.step(step, state, {"train/finite": True, "train/loss": 1.0} | own, 0)
      notes, first = log.sync(), min(last, len(clipped)) + 1
      writer.close()
      assert notes == ({"clipped": [1.0, 1.0, 0.0]} if last == 8 else {})
    shares = {line["step"]: line["optim/clipped"] for line in read_metrics(workdir)}
    assert shares == pytest.approx({5: 1 / 3, 10: 3 / 5, 15: 0.0}) and len(untimed(workdir)) == 3


@pytest.mark.slow
def test_share_of_clipped_steps_and_a_run_that_goes_on(tmp_path, capsys):
  """Lines of 5 steps: stopped inside of one and gone on, its share is that of a run that was not; bank's filling has none."""
  flags = [
    "--config.optim.clip_norm=.06", "--config.eval.every_epochs=0", "--config.epochs=1", "--config.optim.weight_decay_final=.1",
    "--config.method.bank.init=keys",
  ]  # fmt: skip
  run(tmp_path / "single", *flags, "--config.log.every_steps=1")
  one = {line["step"]: line for line in read_metrics(tmp_path / "single")}
  run(tmp_path / "straight", *flags)
  straight = capsys.readouterr().out
  run(tmp_path / "stopped", *flags, "--config.stop_at_step=13")
  run(tmp_path / "stopped", *flags)
  assert fingerprint(capsys.readouterr().out.split("resuming at step 13")[1]) == fingerprint(
    straight
  )
  lines = untimed(tmp_path / "straight")
  assert untimed(tmp_path / "stopped") == lines
  assert (
    "optim/clipped" not in one[1] and one[8]["train/weight_decay"] > one[1]["train/weight_decay"]
  )
  shares = {
    n: np.mean([one[s]["optim/clipped"] for s in range(max(3, n - 4), n + 1)]) for n in (5, 10, 15, 20)
  }  # fmt: skip
  assert {line["step"]: line["optim/clipped"] for line in lines} == pytest.approx(shares)
  assert any(0 < share < 1 for share in shares.values())


# --- what is refused

REFUSED = {
  "a decay below nothing": ("optim.weight_decay_final=-.5", "use 0 or more, or -1 for a constant one"),
  "a norm below nothing": ("optim.clip_norm=-1.", "config.optim.clip_norm=-1.0: use 0 or more"),
  "another part": ("optim.freeze=head", "config.optim.freeze='head': use patch_embed"),
  "a ResNet's patches": ("optim.freeze=patch_embed", "config.optim.freeze='patch_embed': tiny has no such part; leave it empty"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, tmp_path, capsys):
  flag, wanted = REFUSED[case]
  assert main.main([*TINY, ONE_BLOCK, f"--workdir={tmp_path}/run", f"--config.{flag}"]) == 2
  error = capsys.readouterr().err
  assert error.startswith("error: ") and wanted in error and error.count("\n") == 1
  assert not (tmp_path / "run").exists()


class Bare(Patches):
  """Says which layers there are, but not how many."""

  layers = None


class Wrong(Patches):
  def layer_of(self, path):
    return 4


def test_outside_backbones_say_their_layers():
  known = lambda arch: heads.layers_of(build.create_encoder(config_of(model__arch=arch), "float32"))
  of, count = known(PATCHES)
  assert count == 2 and [of([n]) for n in ("pos_embed", "blocks_1", "norm")] == [0, 2, 3]
  assert known("flax.linen:Dense") is None and known(f"{__name__}:Bare") is None
  settings.tiny_plan(config_of(model__arch=PATCHES, optim__layer_decay=0.5))
  for arch in ("flax.linen:Dense", f"{__name__}:Bare"):
    with pytest.raises(ConfigError, match=r"optim.layer_decay=0.5: .* which layer .* use 1"):
      settings.tiny_plan(config_of(model__arch=arch, optim__layer_decay=0.5))
  multiplier = optimizers.make_multiplier(1.0, 0.5, Wrong().layer_of, 2)
  with pytest.raises(ConfigError, match="layer_of gives 4 for blocks_0.scale, give 0 to 3"):
    multiplier(("encoder", "backbone", "blocks_0", "scale"))


def test_frozen_parts_are_looked_for(float64):
  class_path = f"{__name__}:Nothing"
  config = config_of(model__arch=class_path, optim__freeze="patch_embed")
  with pytest.raises(ConfigError, match=r"optim.freeze='patch_embed': .*Nothing has no such part"):
    build.build(config, settings.tiny_plan(config), sharding.create_mesh(jax.devices()[:1]))


class Nothing(nn.Module):
  """Without patches."""

  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, images, train):
    return nn.Dense(4, param_dtype=jnp.float64)(images.mean((1, 2)))
