# Sourced by the other scripts: makes .venv and installs the package with the extras in $1, once per pyproject.toml.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
extras="${1:-}"
stamp=".venv/.installed${extras//[^a-z]/-}"
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "error: $("$python" --version) is too old; Fathom needs Python 3.11 or newer (set PYTHON=python3.11)" >&2
  exit 2
fi
[ -x .venv/bin/python ] || "$python" -m venv .venv
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
  echo "installing into .venv (a few minutes the first time)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".$extras"
  touch "$stamp"
fi
