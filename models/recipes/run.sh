#!/bin/sh
# Remakes one bundle: models/recipes/run.sh NAME [--data DIR] [--seed N] …   NAME: backbone | steel | steel_small | conveyor
# Makes a Python environment outside the repository on the first run.
set -eu
[ $# -ge 1 ] || { sed -n '2,3p' "$0" >&2; exit 2; }
name=$1
shift
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
case $name in
backbone | steel | steel_small | conveyor) ;;
*) echo "run.sh: no recipe named $name" >&2; exit 2 ;;
esac
venv=${LACEWING_ML_CACHE:-$HOME/.cache/lacewing-ml}/venv
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check -r "$here/requirements.txt"
exec "$venv/bin/python" "$here/$name.py" "$@"
