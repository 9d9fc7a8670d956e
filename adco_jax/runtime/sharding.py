"""One mesh axis, `data`, and the three ways an array lies on it.

Flow: build makes the mesh; loaders and evaluation put their arrays on it.
Shapes: batches and bank rows are split along their first axis; everything else is replicated.
Not here: the collectives of the step (train_step, losses).
"""

import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from adco_jax.runtime.dtypes import Tree

AXIS = "data"
GPU_OPTIONS = {
  # cuBLAS is faster here, and before jax 0.12 the fusion of Triton's products aborts on a strided operand.
  "xla_gpu_enable_triton_gemm": False,
  # Collectives (one gradient, a few small gathers) run beside the computation.
  "xla_gpu_enable_latency_hiding_scheduler": True,
}


def create_mesh(devices: Sequence[jax.Device] | np.ndarray | None = None) -> Mesh:
  """A one-axis mesh over `devices` (default: all). Auto axes: Explicit ones reject ordinary code."""
  devices = np.array(jax.devices() if devices is None else devices)
  return jax.sharding.Mesh(devices, (AXIS,), axis_types=(AxisType.Auto,))


def compiler_options(platform: str) -> dict[str, bool]:
  """XLA's settings of a step on this platform, whoever starts it; what XLA_FLAGS names is the user's to say."""
  flags = os.environ.get("XLA_FLAGS", "")
  options = GPU_OPTIONS if platform in ("gpu", "cuda") else {}
  return {name: value for name, value in options.items() if name not in flags}


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds the whole array."""
  return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Device i holds the i-th part of the first axis: batches and bank rows."""
  return NamedSharding(mesh, P(AXIS))


def from_specs(mesh: Mesh, specs: Tree) -> Tree:
  """A tree of shardings from a tree of PartitionSpecs."""
  return jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, P))


def round_up(count: int) -> int:
  """The next multiple of the number of devices: what a split first axis can have."""
  return -(-count // jax.device_count()) * jax.device_count()


def abstract(shapes: Tree, shardings: Tree) -> Tree:
  """Shapes with their shardings; `shardings`: a tree, or the upper part of one."""
  put = lambda s, part: jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), part
  )
  return jax.tree.map(put, shardings, shapes)


def put(tree: Tree, shardings: Tree) -> Tree:
  """This process's part (NumPy) of global arrays -> these arrays: its rows [b, ...] of what is split over the devices, the
  whole of what is replicated. `shardings`: a tree, or the upper part of one."""
  if jax.process_count() == 1:  # all at once, in a third of the time
    return jax.device_put(tree, shardings)
  whole = jax.make_array_from_process_local_data
  join = lambda s, part: jax.tree.map(lambda x: whole(s, np.asarray(x)), part)
  return jax.tree.map(join, shardings, tree)


def over_gloo() -> bool:
  """Whether collectives run over gloo, whose reduce-scatter now and then loses sums (jax issue 40830)."""
  return jax.default_backend() == "cpu" and jax.distributed.is_initialized()


def memory_bytes(device: jax.Device) -> int:
  """What arrays may take on a device; on a CPU its part of the host's memory."""
  stats = device.memory_stats() or {}
  host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return stats.get("bytes_limit") or host // jax.local_device_count()
