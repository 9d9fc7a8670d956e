"""What ends a run with one line instead of a traceback, and the exit status of each.

Flow: raised anywhere; main tells it and leaves with its status.
Not here: errors of this program itself, which keep their traceback.
"""


class ConfigError(Exception):
  """What a user asked for cannot be done; the message is one line that says what to do instead."""

  status = 2  # of the process


class NoSplit(ConfigError):
  """The data set is there, and has no split of this name."""


class RunError(Exception):
  """What had started cannot go on; the message is one line."""

  status = 3


class Preempted(Exception):
  """A signal ended the run, all is saved."""

  status = 42


def require(condition: object, name: str, value: object, remedy: str) -> None:
  """Raises the one-line ConfigError of option `name` unless `condition` holds."""
  if not condition:
    raise ConfigError(f"config.{name}={value!r}: {remedy}")
