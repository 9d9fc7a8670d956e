"""Every objective through `main`: stopped, resumed, scored, exported and read back; and what each refuses."""

import numpy as np
import pytest

import adco_jax
from adco_jax import main
from adco_jax.config import method
from tests import settings
from tests.conftest import FAST
from tests.faults.job import Job
from tests.test_end_to_end import fingerprint, untimed

pytestmark = pytest.mark.kills  # the slow ones' group

BASE = [
  "--config=adco_digits", f"--config.model.arch={settings.TINY}", "--config.model.width=0.125", "--config.model.dim=16",
  "--config.data.batch_size=128", "--config.bn.group_size=8", "--config.epochs=1", "--config.eval.every_epochs=0",
  "--config.eval.size=8", "--config.log.every_steps=1",
]  # fmt: skip
TWO = ["--config.views.mode=symmetric", "--config.views.crops=((8,.5,1.),(8,.5,1.))"]
FOUR = ["--config.views.mode=symmetric_multicrop", "--config.views.crops=((8,.5,1.),(8,.5,1.),(8,.2,.5))"]  # fmt: skip
# Ten steps, of which the run stops after the fourth: when prototypes have begun to move and the queue is half full.
OWN = {
  "adco": [*TWO, "method.bank.size=256", "method.bank.init=trained", "method.bank.init_epochs=.3"],
  "moco": [*TWO, "method.queue_size=512"],
  "mochi": [
    *TWO, "method.queue_size=512", "method.hardest=16", "method.mixed=4", "method.mixed_with_query=2", "method.start_epochs=.3",
  ],
  "simclr": TWO,
  "byol": [
    *TWO, "method.predictor_width=32", "views.reduction=sum", "ema.schedule=cosine", "model.head.norm=hidden",
    "model.head.width=32",
  ],
  "swav": [
    *FOUR, "method.prototypes=30", "views.reduction=mean", "method.frozen_epochs=.3", "method.queue_size=384",
    "method.queue_epochs=.2", "model.head.norm=hidden", "optim.name=lars",
  ],
  "mocov3": [*TWO, "method.predictor_width=32", "model.head.norm=all_plain", "model.head.layers=3", "optim.no_decay=vectors"],
  "caco": [*TWO, "method.bank.size=256", "model.head.layers=3", "model.head.norm=hidden"],
  "still": [*TWO, "method.bank.size=256"],
  "random": [*TWO, "method.bank.size=256"],
  "query_softmax": [*TWO, "method.bank.size=256"],
  "supervised": ["views.mode=one", "views.crops=((8,.5,1.),)", "optim.name=adamw", "optim.learning_rate=.003"],
}  # fmt: skip


def flags(name, *more):
  own = [flag if flag.startswith("--") else f"--config.{flag}" for flag in (*OWN[name], *more)]
  return [*BASE, f"--config.objective={name}", *own]


def run(capsys, argv):
  """What it printed."""
  status, said = main.main(argv), capsys.readouterr()
  assert status == 0, said.err
  return said.out


IN_THE_DAY = (
  "byol"  # a predictor, its statistics, an average that moves late: most that a state can hold
)
EACH = [
  pytest.param(name, marks=() if name == IN_THE_DAY else pytest.mark.slow)
  for name in method.OBJECTIVES
]


@pytest.mark.parametrize("name", EACH)
def test_stopped_and_resumed_equals_straight(name, tmp_path, capsys):
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  straight = run(capsys, [*flags(name), f"--workdir={whole}"])
  run(capsys, [*flags(name, "stop_at_step=4"), f"--workdir={parts}"])
  resumed = run(capsys, [*flags(name), f"--workdir={parts}"])
  assert "resuming at step 4" in resumed
  assert fingerprint(straight) == fingerprint(resumed)
  lines = untimed(whole)
  assert untimed(parts) == lines and len(lines) >= 10
  losses = [line.get("train/loss", line.get("train/query_loss")) for line in lines]
  assert np.isfinite(losses).all() and all(line["train/finite"] for line in lines)
  assert len(set(losses)) > 5 and all(
    (line.get("train/chance", 0) > 0) == (name != "random") for line in lines
  )
  page = (whole / "report.html").read_text()
  assert (
    "Prototypes in play" in page
    if name == "swav"
    else "Training accuracy" in page or name == "byol"
  )


@pytest.mark.slow
@pytest.mark.parametrize("name", method.OBJECTIVES)
def test_scored_exported_and_read_back(name, tmp_path, capsys):
  """Weights that were drawn: whatever the head, the file gives the projections of the run."""
  workdir = tmp_path / "run"
  settings.save_run(workdir, main.parse(flags(name))[0], step=3)
  of = f"--config.pretrained={workdir}"
  assert "trained" in run(
    capsys, ["--config=knn", of, "--config.labels_per_class=()", "--config.map=0"]
  )
  said = run(capsys, ["--config=export", of, "--config.format=npz"])
  path = said.split(": ")[1].split(", card ")[0]
  one, other = adco_jax.load_encoder(workdir), adco_jax.load_encoder(path)
  images = np.random.RandomState(0).standard_normal((4, 8, 8, 3)).astype(np.float32)
  embed = lambda e: np.asarray(e.module.apply(e.variables, images, False))
  assert np.array_equal(embed(one), embed(other)) and np.ptp(embed(one)) > 0
  card = open(f"{path}.md").read()
  assert f"a run of {name} with" in card
  assert ("images, labels used" in card) == (name == "supervised")


ONE = ["views.mode=one", "views.crops=((8,.5,1.),)"]
REFUSED = {
  "no objective": (["objective=byl"], "config.objective='byl': did you mean byol? use one of adco, moco, mochi"),
  "another's key": (["objective=byol", *TWO, "method.temperature=.2"], "--config.method.temperature: no such key; the objective has method.momentum_init, method.predictor_width"),
  "another's group": (["objective=mochi", "method.bank.size=8"], "--config.method.bank.size: no such key; the objective has method.hardest, method.mixed"),
  "a bank that stands still has no rate": (["objective=still", "method.bank.learning_rate=1"], "no such key; the objective has method.bank.init"),
  "a key that is spelt otherwise": (["objective=swav", *TWO, "method.prototype=8"], "no such key; did you mean --config.method.prototypes?"),
  **{f"{name} of one direction": ([f"objective={name}"], f"config.views.mode='single': for {name} use symmetric") for name in ("simclr", "byol", "mocov3", "caco", "swav")},
  "adco of one view": (ONE, "config.views.mode='one': for adco use single, symmetric, multicrop or symmetric_multicrop"),
  "labels of two views": (["objective=supervised"], "config.views.mode='single': for supervised use one"),
  "one view, two crops": (["objective=supervised", "views.mode=one"], "config.views.mode='one': needs exactly one crop, views.crops has 2"),
  "no labels": (["objective=supervised", *ONE, "data.labels=False"], "config.objective='supervised': needs one label per image, which the data has not; name data with such labels"),
  "fewer images than prototypes": (["objective=swav", *TWO], "config.method.prototypes=3000: the data has 1297 images, fewer; use 1297 or less"),
  "a queue of half a batch": (["objective=swav", *TWO, "method.prototypes=8", "method.queue_size=192"], "config.method.queue_size=192: does not hold whole batches of 128; use 256"),
  "more hardest rows than rows": (["objective=mochi", "method.queue_size=512"], "config.method.hardest=1024: the queue has 512 rows; use 512 or less"),
  "a queue that holds no batch": (["objective=mochi", "method.queue_size=64"], "config.method.queue_size=64: a queue must hold a batch; use 128 or more"),
  "parts of one BatchNorm": (["objective=byol", *TWO, "bn.group_size=0", "accumulate=2"], "config.accumulate=2: a batch in parts has no statistics of all its images; use 1, or BatchNorm in groups"),
  "rows for 8 devices": (["objective=caco", *TWO, "method.bank.size=100"], "config.method.bank.size=100: does not divide over 8 devices; use 96 or 104"),
  "no layer": (["model.head.layers=0"], "config.model.head.layers=0: use 1 or more"),
  "no such norm": (["model.head.norm=batch"], "config.model.head.norm='batch': use one of none, hidden, all, all_plain"),
  "no such reduction": (["views.reduction=max"], "config.views.reduction='max': use one of directions, sum, mean"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_before_anything_is_written(case, tmp_path, capsys):
  words, line = REFUSED[case]
  given = [word if word.startswith("--") else f"--config.{word}" for word in words]
  assert main.main([*BASE, *given, f"--workdir={tmp_path}/run"]) == 2
  said = capsys.readouterr()
  assert line in said.err and said.err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_another_head_starts_no_run(tmp_path, capsys):
  """Its layers are named before anything is compiled."""
  settings.save_run(tmp_path / "one", main.parse(flags("byol"))[0], step=3)
  more = f"--config.init_from={tmp_path}/one", f"--workdir={tmp_path}/other"
  assert main.main([*flags("byol", "model.head.width=16"), *more]) == 2
  assert "holds another encoder, model.head.width=32 (here 16); use --config.model.head.width=32" in capsys.readouterr().err  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["simclr", "mochi", "byol", "swav", "caco", "supervised"])
def test_two_processes_train_as_one(name, tmp_path):
  """Over gloo, on the same images, labels and draws: the losses of one process with two devices, a state that both can save."""
  arch = "--config.model.arch=resnet8"  # which other processes know
  given = dict(job=[*flags(name), arch], xla=FAST)
  pair = Job(f"{tmp_path}/pair", processes=2, **given)
  assert pair.end() == [0, 0], pair.all_said()
  alone = Job(f"{tmp_path}/alone", devices=2, **given)
  assert alone.end() == [0], alone.all_said()
  lines, expected = untimed(pair.workdir), untimed(alone.workdir)
  assert len(lines) == len(expected) >= 10
  for line, other in zip(lines, expected, strict=True):
    assert line == pytest.approx(other, rel=1e-3, abs=1e-3)


def test_the_classifier_of_supervised_is_of_features():
  """Eight of the backbone, not sixteen of the projection."""
  config = settings.tiny_config("one", objective="supervised")
  _, plan, state = settings.describe_players(config)
  assert state.objective.params["classifier"]["kernel"].shape == (8, 10)
  assert plan.has_labels and not state.key_params and plan.train_pairing.pairs == ()
