"""Who a process is, by the variables of each launcher as it sets them."""

import pytest

from adco_jax.errors import ConfigError
from adco_jax.runtime import clusters
from adco_jax.runtime.clusters import Place

ADDRESS = {"JAX_COORDINATOR_ADDRESS": "first:123"}
OWN = ADDRESS | {"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SLURM = {
  "SLURM_JOB_ID": "70000", "SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1",
  "SLURM_STEP_NODELIST": "gpu[07-08,11],other", "SLURM_NTASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "4(x4)",
}  # fmt: skip
MPI = {
  "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
  "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
ONE_PER_NODE = {"SLURM_STEP_TASKS_PER_NODE": "1(x16)"}
ALL_GPUS = {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}


@pytest.fixture
def find(monkeypatch):
  """find() in an environment of which nothing but the given variables is left."""

  def find(variables):
    monkeypatch.setattr(clusters.os, "environ", variables)
    return clusters.find()

  return find


@pytest.mark.parametrize("variables, place", [
  ({}, None),
  (OWN, Place("first:123", 4, 3)),
  (SLURM, Place("gpu07:61808", 16, 9)),
  (SLURM | ALL_GPUS, Place("gpu07:61808", 16, 9, [1])),
  (SLURM | {"CUDA_VISIBLE_DEVICES": "5"}, Place("gpu07:61808", 16, 9)),
  (SLURM | {"SLURM_STEP_NODELIST": "node3,node4"}, Place("node3:61808", 16, 9)),
  (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),  # a batch script, an interactive shell
  (SLURM | OWN, Place("first:123", 4, 3)),
  (SLURM | ALL_GPUS | ONE_PER_NODE, Place("gpu07:61808", 16, 9)),
  (SLURM | {"SLURM_STEP_NODELIST": "n[1-2]-ib", "SLURM_STEP_ID": "3"}, Place("n1-ib:61811", 16, 9)),
  (SLURM | MPI | ADDRESS, Place("first:123", 2, 1)),
  (OWN | {"ADCO_JAX_CLUSTER": "none"}, None),
  ({"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
  (SLURM | {"ADCO_JAX_CLUSTER": "none"}, None),
  (MPI | ADDRESS, Place("first:123", 2, 1)),
  (MPI | ADDRESS | ALL_GPUS, Place("first:123", 2, 1, [2, 3])),
  (ADDRESS | {"JAX_NUM_PROCESSES": "3", "JOB_COMPLETION_INDEX": "2"}, Place("first:123", 3, 2)),
  ({"JOB_COMPLETION_INDEX": "2"}, None),
  ({"TPU_WORKER_HOSTNAMES": "a,b"}, "tpu"),
  ({"TPU_WORKER_HOSTNAMES": "a"}, None),
  ({"ADCO_JAX_CLUSTER": "tpu"}, "tpu"),
])  # fmt: skip
def test_who_am_i(variables, place, find):
  assert find(variables) == place


@pytest.mark.parametrize("variables, says", [
  (MPI, "OMPI_COMM_WORLD_SIZE='2': set JAX_COORDINATOR_ADDRESS to HOST:PORT"),
  (ADDRESS, "JAX_NUM_PROCESSES='': use a whole number from 1"),
  (ADDRESS | {"JAX_NUM_PROCESSES": "3"}, "JAX_PROCESS_ID='': use a whole number from 0"),
  (OWN | {"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID=4: must be less than JAX_NUM_PROCESSES=4"),
  (OWN | {"JAX_COORDINATOR_ADDRESS": "first"}, "JAX_COORDINATOR_ADDRESS='first': use HOST:PORT"),
  (OWN | {"JAX_COORDINATOR_ADDRESS": "first:99999"}, "='first:99999': use HOST:PORT"),
  (OWN | {"JAX_NUM_PROCESSES": "²"}, "JAX_NUM_PROCESSES='²': use a whole number"),
  ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "set JAX_COORDINATOR_ADDRESS to HOST:PORT"),
  (SLURM | ALL_GPUS | {"SLURM_STEP_TASKS_PER_NODE": "3"}, "3 processes cannot share 4 GPUs"),
  (OWN | {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES='two': use a whole number from 1"),
  ({"ADCO_JAX_CLUSTER": "pbs"}, "ADCO_JAX_CLUSTER='pbs': use one of ompi, slurm, tpu, none"),
])  # fmt: skip
def test_what_is_wrong_is_one_line(variables, says, find):
  with pytest.raises(ConfigError) as error:
    find(variables)
  assert says in str(error.value) and "\n" not in str(error.value)
