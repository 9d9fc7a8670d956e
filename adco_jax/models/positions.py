"""Where the patches of a ViT are: fixed positions, and positions of one grid for another.

Flow: vit adds them to the patches; import and export resample those of a file.
Shapes: [1, T, F], the patches row after row.
Paper: fixed ones, Chen et al. 2021 (moco-v3, build_2d_sincos_position_embedding: columns first, which on a square is a name).
"""

from collections.abc import Sequence

import jax
import numpy as np


def resample(positions: jax.Array, before: tuple[int, int], now: tuple[int, int]) -> jax.Array:
  """[1, h w, F] for another grid: bicubic (a = -.5) with antialiasing, as timm's resample_abs_pos_embed."""
  if before == now:
    return positions
  dim = positions.shape[-1]
  grid = positions.reshape(1, *before, dim)
  return jax.image.resize(grid, (1, *now, dim), "cubic").reshape(1, -1, dim)


def sincos(grid: int, dim: int, own: int) -> np.ndarray:
  """MoCo v3's fixed positions [1, own + grid^2, F], float64; zeros for what is no patch."""
  rates = 1 / 10000 ** (np.arange(dim // 4) / (dim // 4))
  rows, columns = np.divmod(np.arange(grid**2), grid)
  angles = [np.outer(place, rates) for place in (columns, rows)]
  found = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], 1)
  return np.concatenate([np.zeros((own, dim)), found])[None]


def describe(grid: int, patch: int, sides: Sequence[int]) -> list[str]:
  """A line about views whose patches are not those that positions are for, or none."""
  others = sorted({side for side in sides if side // patch != grid})
  told = ", ".join(f"{side // patch} x {side // patch} (views of {side} pixels)" for side in others)
  return [f"positions of {grid} x {grid} patches are resampled for {told}"] if others else []
