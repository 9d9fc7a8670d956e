"""Every launch script, run as far as a machine without Slurm, TPU and Kubernetes goes."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from adco_jax import main
from adco_jax.runtime.sharding import compiler_options
from tests.faults.job import JOB

pytestmark = pytest.mark.processes  # the slow ones' group

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = sorted(
  [*ROOT.glob("launch/*.sh"), *ROOT.glob("benchmarks/*.sh"), ROOT / "launch" / "slurm.sbatch"]
)
SHORT = ["--config.epochs=1", "--config.eval.every_epochs=0", "--config.stop_at_step=4"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_shellcheck_has_nothing_to_say(script):
  command = ["shellcheck", "-x", str(script.relative_to(ROOT))]
  found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert found.returncode == 0, found.stdout


def stub(folder, name, text):
  """An executable `name` in `folder`, which then comes first in PATH."""
  folder.mkdir(exist_ok=True)
  (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
  (folder / name).chmod(0o755)


def launch(script, *args, path="", **environment):
  """(status, output) of a script; `path` comes first in PATH, this Python next."""
  python = os.path.dirname(sys.executable)
  around = os.environ | {
    "PATH": f"{path}:{python}:{os.environ['PATH']}",
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "",
  }
  command = ["bash", f"launch/{script}", *map(str, args)]
  found = subprocess.run(
    command, cwd=ROOT, env=around | environment, capture_output=True, text=True, timeout=300
  )
  return found.returncode, found.stdout + found.stderr


@pytest.mark.slow
def test_local_starts_processes_that_train_as_one(tmp_path):
  status, said = launch("local.sh", 2, *JOB, *SHORT, f"--workdir={tmp_path}/run")
  assert status == 0 and "2 x cpu" in said and said.count("stopped at step 4") == 1, said
  status, said = launch(
    "local.sh", 2, "--config=configs/adco_digits.py", "--config.method.bank.size=0"
  )
  assert status == 2 and said.count("config.method.bank.size=0") == 2
  assert launch("local.sh", "--config=x")[0] == 2


@pytest.mark.slow
def test_slurm_s_variables_are_enough(tmp_path):
  """srun and scontrol play their parts: two tasks on this node; a preempted job is requeued."""
  stub(tmp_path / "bin", "srun", """
shift 2  # --kill-on-bad-exit --cpus-per-task
ids=()
for i in 0 1; do
  SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NODELIST=localhost,other "$@" &
  ids+=($!)
done
status=0
for id in "${ids[@]}"; do wait "$id" || status=$?; done
exit $status""")  # fmt: skip
  stub(tmp_path / "bin", "scontrol", f'echo "$@" >> {tmp_path}/scontrol')
  around = {"path": tmp_path / "bin", "SLURM_JOB_ID": str(os.getpid()), "SLURM_SUBMIT_DIR": str(ROOT), "PYTHON": sys.executable}  # fmt: skip
  status, said = launch("slurm.sbatch", *JOB, *SHORT, f"--workdir={tmp_path}/run", **around)
  assert status == 0 and "2 x cpu" in said and said.count("stopped at step 4") == 1, said
  assert not (tmp_path / "scontrol").exists()
  stub(tmp_path / "bin", "srun", "exit 42")
  assert launch("slurm.sbatch", **around)[0] == 42
  assert (tmp_path / "scontrol").read_text() == f"requeue {os.getpid()}\n"
  stub(tmp_path / "bin", "srun", "exit 2")
  assert launch("slurm.sbatch", **around)[0] == 2
  assert (tmp_path / "scontrol").read_text().count("requeue") == 1


PYTHON = """case "$*" in
  *--markers) printf '@pytest.mark.steps: group: x\n@pytest.mark.slow: y\n@pytest.mark.kills: group: z\n' ;;
  *kills*) echo "$@"; exit 1 ;;
  *) echo "$@" ;;
esac"""


def test_a_night_goes_on_after_a_group_that_failed(tmp_path):
  """In a checkout whose Python only says what it was asked: its groups, one that fails, and no GPU described."""
  (tmp_path / "launch").mkdir()
  (tmp_path / "tests").mkdir()
  for name in ("nightly.sh", "venv.sh"):
    shutil.copy(ROOT / "launch" / name, tmp_path / "launch")
  for name in ("requirements.txt", "tests/requirements.txt"):
    (tmp_path / name).touch()
  stub(tmp_path / "bin", "python", PYTHON)
  stub(tmp_path / "bin", "activate", f"PATH={tmp_path}/.venv/bin:$PATH")
  (tmp_path / ".venv").mkdir()
  (tmp_path / "bin").rename(tmp_path / ".venv" / "bin")
  night = lambda *groups: subprocess.run(
    ["bash", f"{tmp_path}/launch/nightly.sh", *groups], capture_output=True, text=True
  )
  row = lambda found: [line.split()[:2] for line in found.stdout.splitlines()[-len(groups) :]]
  groups = ["kills", "steps", "budget"]
  found = night(*groups)
  assert found.returncode == 1 and "no GPU is described" in found.stderr
  assert row(found) == [["kills", "FAILED"], ["steps", "passed"], ["budget", "FAILED"]]
  assert "-m pytest -n 0 -m slow and steps" in found.stdout
  every = night()
  assert [name for name, _ in row(every)] == ["steps", "kills", "budget"]
  assert night("steps").returncode == 0


@pytest.mark.parametrize("statuses, ends", [([43, 137, 0], 0), ([42], 42), ([2], 2), ([1], 1)])
def test_gpu_node_starts_again_what_may_go_on(tmp_path, statuses, ends):
  stub(tmp_path, "sleep", "")
  stub(tmp_path, "fake", f"""
echo "$@" >> {tmp_path}/calls
statuses=({" ".join(map(str, statuses))})
exit ${{statuses[$(wc -l < {tmp_path}/calls) - 1]}}""")  # fmt: skip
  status, _ = launch("gpu_node.sh", "--config=x", path=tmp_path, PYTHON=str(tmp_path / "fake"))
  calls = (tmp_path / "calls").read_text().splitlines()
  assert status == ends and calls == ["-m adco_jax.main --config=x"] * len(statuses)


def test_gpu_node_passes_a_stop_on(tmp_path):
  """Who stops a container sends TERM to the script alone; training has to hear of it to save."""
  stub(tmp_path, "fake", f"trap 'echo saved > {tmp_path}/saved; exit 42' TERM\ntouch {tmp_path}/ready\nwhile true; do sleep .05; done")  # fmt: skip
  script = subprocess.Popen(
    ["bash", "launch/gpu_node.sh", "--config=x"], cwd=ROOT, env=os.environ | {"PYTHON": f"{tmp_path}/fake"}
  )  # fmt: skip
  while not (tmp_path / "ready").exists():
    time.sleep(0.05)
  script.send_signal(signal.SIGTERM)
  assert script.wait(60) == 42 and (tmp_path / "saved").read_text() == "saved\n"


def test_tpu_pod_passes_every_argument_on(tmp_path):
  """gcloud runs the command in a home that holds the checkout; the interpreter says what it was given."""
  home = tmp_path / "home"
  (home / "adco_jax" / ".venv" / "bin").mkdir(parents=True)
  (home / "adco_jax" / "launch").symlink_to(ROOT / "launch")
  stub(home / "adco_jax" / ".venv" / "bin", "python", 'printf "<%s>" "$ADCO_JAX_CLUSTER" "$@"')
  stub(tmp_path / "bin", "gcloud", f'for a in "$@"; do case "$a" in --command=*) HOME={home} bash -c "${{a#--command=}}";; esac; done')  # fmt: skip
  odd = "--config.views.crops=((96,.2,1.),(96,.2,1.))"
  status, said = launch(
    "tpu_pod.sh", "--config=a b.py", odd, path=tmp_path / "bin", TPU="t", ZONE="z"
  )
  assert status == 0 and said == f"<tpu><-m><adco_jax.main><--config=a b.py><{odd}>"
  assert launch("tpu_pod.sh", path=tmp_path / "bin")[0] != 0


def test_kubernetes_job_holds_a_command_that_parses():
  job = yaml.safe_load((ROOT / "launch" / "gke.yaml").read_text())
  (workers,) = job["spec"]["replicatedJobs"]
  spec = workers["template"]["spec"]
  (container,) = spec["template"]["spec"]["containers"]
  variables = {v["name"]: v.get("value") for v in container["env"]}
  assert variables["JAX_NUM_PROCESSES"] == str(spec["completions"]) == str(spec["parallelism"])
  name = job["metadata"]["name"]
  assert variables["JAX_COORDINATOR_ADDRESS"].startswith(f"{name}-{workers['name']}-0-0.{name}:")
  command = re.search(r"adco_jax\.main (.*)", container["args"][0])[1]
  main.parse(command.split())
  (rule,) = spec["podFailurePolicy"]["rules"]
  assert rule["onExitCodes"]["values"] == [2, 3]


@pytest.mark.slow
def test_a_signal_to_the_script_saves_everywhere(tmp_path):
  python = os.path.dirname(sys.executable)
  around = os.environ | {
    "PATH": f"{python}:{os.environ['PATH']}",
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "",
  }
  command = ["bash", "launch/local.sh", "2", *JOB, "--config.epochs=50", "--config.eval.every_epochs=0", f"--workdir={tmp_path}/run"]  # fmt: skip
  process = subprocess.Popen(
    command, cwd=ROOT, env=around, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )
  for line in process.stdout:
    if line.startswith("step ") and "loss" in line:
      break
  time.sleep(1)
  process.send_signal(signal.SIGTERM)
  rest = process.stdout.read()
  assert process.wait(timeout=100) == 42, rest
  assert "saved at step" in rest


def test_settings_of_a_gpu_travel_with_the_step(monkeypatch):
  """Whoever imports the package has them too; what the user says in XLA_FLAGS counts."""
  monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_latency_hiding_scheduler=false")
  assert (
    compiler_options("gpu") == compiler_options("cuda") == {"xla_gpu_enable_triton_gemm": False}
  )
  assert compiler_options("cpu") == compiler_options("tpu") == {}
