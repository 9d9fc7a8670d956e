# shellcheck shell=bash disable=SC1091
# Sourced by the other scripts: makes .venv in the checkout, installs the given requirement files into it
# if they changed, and activates it. PYTHON names an interpreter (3.11 to 3.13) other than the first found.
right='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'
if [ ! -x .venv/bin/python ]; then
  for candidate in "${PYTHON:-}" python3.12 python3.13 python3.11 python3; do
    if [ -n "$candidate" ] && "$candidate" -c "$right" 2>/dev/null; then break; fi
    candidate=
  done
  if [ -z "$candidate" ]; then
    echo "error: no Python 3.11, 3.12 or 3.13 found; install one or set PYTHON=/path/to/python" >&2
    exit 2
  fi
  "$candidate" -m venv .venv
fi
stamp=.venv/installed-$(cat "$@" | cksum | tr -d ' ')
if [ ! -e "$stamp" ]; then
  echo "installing into .venv: $*"
  files=()
  for file in "$@"; do files+=(-r "$file"); done
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "${files[@]}"
  touch "$stamp"
fi
. .venv/bin/activate
