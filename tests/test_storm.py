"""The storm of faults, shortened; `python -m tests.faults.storm` runs it at full length."""

import pytest

from tests.faults import damage, storm

pytestmark = pytest.mark.kills  # the slow ones' group


@pytest.mark.slow
def test_every_damage_to_the_newest_checkpoint_is_found(tmp_path, capsys):
  assert damage.damage(str(tmp_path), 5, 1)
  said = capsys.readouterr().out
  assert said.count("intact") == 5 + len(damage.KINDS) + 1 and "all damaged: status 2" in said


def test_a_step_takes_the_same_examples_anywhere():
  assert damage.same_examples("configs/adco_digits.py")


@pytest.mark.slow
@pytest.mark.parametrize("kind, times", [("kill", 6), ("term", 2), ("devices", 0)])
def test_storm(tmp_path, kind, times):
  assert getattr(storm, kind)(str(tmp_path), times, 3)


@pytest.mark.slow
def test_memory_stays_flat_over_saves(tmp_path):
  assert damage.memory(str(tmp_path), 60, 0)
