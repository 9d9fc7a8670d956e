#!/usr/bin/env bash
# Fresh machine -> linted, its types checked and tested, by two processes. Arguments go to pytest: `bash launch/test.sh -m slow -n 0` runs
# the slow tests, one after the other: they start processes of their own and kill them (half an hour to an hour on two cores).
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/venv.sh requirements.txt tests/requirements.txt

ruff check --quiet .
ruff format --quiet --check .
mypy --no-error-summary
python -m pytest -n 2 --dist worksteal "$@"
