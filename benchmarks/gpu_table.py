"""The table of benchmarks/gpu.sh: what its parts left in a folder, as text and as JSON.

python -m benchmarks.gpu_table FOLDER OUT
"""

import json
import pathlib
import sys

from benchmarks import against_torch

STATUS = {"0": "done", "-": "left out, too little time", "124": "stopped, it took too long", "137": "stopped, it took too long"}  # fmt: skip


def read(folder):
  """{part: {status, seconds, last lines of its output, result}} in the order in which they ran."""
  rows = (folder / "parts.tsv").read_text() if (folder / "parts.tsv").exists() else ""
  return {name: read_part(folder / name, status, float(seconds))
          for name, status, seconds in (row.split("\t") for row in rows.splitlines())}  # fmt: skip


def read_part(folder, status, seconds):
  """One of them."""
  log, results = folder / "log", sorted(folder.glob("*.json"))
  lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
  result = json.loads(results[-1].read_text()) if results else None
  return {"status": status, "seconds": seconds, "last": lines[-6:], "result": result}


def show(parts):
  """Lines of the whole table."""
  lines = [machine(parts)]
  for name, part in parts.items():
    status = STATUS.get(part["status"], f"failed with status {part['status']}")
    lines += ["", f"== {name}: {status} ({part['seconds']:.0f} s)"]
    lines += ["   " + line for line in show_part(part)]
  return lines


def show_part(part):
  """Its own table where it has one, else the last that it said."""
  result = part["result"] or {}
  if "sides" in result:
    return against_torch.show(result["sides"], result["ratios"])
  if "kernels" in result:
    from benchmarks import kernels

    return kernels.show(result)
  if "starts" in result:
    names = ("with nothing compiled", "again")
    return [f"{x['done']['seconds']:.1f} s to the end of the first step, {name}"
            for name, x in zip(names, result["starts"], strict=True)]  # fmt: skip
  return [line[:160] for line in part["last"]]


def machine(parts):
  """Device, versions and commit of the first part that tells them."""
  for part in parts.values():
    if found := part["result"]:
      torch = next((x["version"] for name, x in found.get("sides", {}).items() if name.startswith("torch") and "version" in x), "-")  # fmt: skip
      return f"{found['device']}, {found['processor']}; jax {found['jax']}, torch {torch}; commit {found['commit']}, {found['date']}"
  return "no part has a result"


def run(folder, out):
  """Prints and writes both forms."""
  parts = read(pathlib.Path(folder))
  text = "\n".join(show(parts)) + "\n"
  out = pathlib.Path(out)
  (out / "table.txt").write_text(text)
  (out / "table.json").write_text(json.dumps(parts, indent=2) + "\n")
  print(text, end="")
  print(f"{out}/table.txt, table.json, log.txt")


if __name__ == "__main__":
  run(*sys.argv[1:])
