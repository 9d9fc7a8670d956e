"""Where a run begins: at its newest intact checkpoint, at another run's encoders, or at nothing.

Flow: pretrain calls `check_same` when it knows what to do, `restore_or_create_state` before its loop.
Holds: whichever it was is printed; a bank that is taken over is one that had been initialised.
Not here: files of a checkpoint (checkpoint), first values (state).
"""

import json

from adco_jax import processes, remote
from adco_jax.checkpoint import restore_parts
from adco_jax.metrics import say
from adco_jax.plan import ConfigError
from adco_jax.workdir import canonical, differences, read_config, read_json


def check_same(facts):
  """Raises ConfigError on all processes, with a key that differs, unless all hold the same nested dictionary."""
  first, *others = map(json.loads, processes.gather_texts(json.dumps(canonical(facts))))
  for number, other in enumerate(others, 1):
    if rows := differences(first, other, ()):
      key, there, here = rows[0]
      more = f", and {len(rows) - 1} more differ" if len(rows) > 1 else ""
      raise ConfigError(
        f"{key}: {there!r} in process 0, {here!r} in process {number}{more}; start all with the same options and data"
      )


def restore_or_create_state(config, plan, parts, checkpoints):
  """(state, step, kept): the newest intact checkpoint, else a new state (from init_from where given).

  kept: whether a restart would find the same state again; the newest of another run it may not.
  """
  restored = checkpoints.restore(parts.abstract_state)
  if restored:
    say(f"resuming at step {restored[1]} of {plan.total_steps}")
    return *restored, True
  state = parts.create_state()
  if config.init_from:
    state = start_from(config.init_from, config, state, parts.abstract_state, plan)
  return state, int(state.step), not config.init_from


def start_from(workdir, config, state, abstract, plan):
  """A new state with the encoders of another run, and with its bank if that is of the same shape and filled.

  A bank that was taken over needs no initialisation: the run starts behind it. Raises ConfigError.
  """
  other, facts = read_config(workdir), read_json(f"{remote.local(workdir)}/plan.json")
  take = lambda names: restore_parts(workdir, {name: getattr(abstract, name) for name in names})
  taken, step = take(["query_params", "query_stats", "key_params", "key_stats"])
  same = [other["objective"], other["bank"]["size"], other["model"]["dim"]]
  with_bank = same == [config.objective, config.bank.size, config.model.dim]
  with_bank = with_bank and step >= facts["fill_steps"]
  if with_bank:
    taken |= take(["ascend", "slots"])[0]
  say(f"starting from {workdir}, step {step}: encoders{', second player' if with_bank else ''}")
  return state.replace(**taken, step=state.step + (plan.fill_steps if with_bank else 0))
