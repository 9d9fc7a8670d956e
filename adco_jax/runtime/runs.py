"""How long the runs of a loop over rows are: on a CPU, what a run makes shall stay in a core's cache.

Flow: losses (rows of the bank) and models.layers (images of a batch) ask.
Not here: the loops, and what a cache holds.
"""


def run_length(count: int, most: int) -> int:
  """Of `count` rows, how many to take at a time: a divisor, at most `most`.

  All of them where no divisor comes near: a prime number of rows has no runs worth their loop.
  """
  length = next(n for n in range(min(most, count), 0, -1) if count % n == 0)
  return count if 4 * length < most else length
