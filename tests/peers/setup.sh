#!/bin/sh
# Makes the Python environment that the peers of the benchmarks run in, outside the repository.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
to=${LACEWING_PEERS:-$HOME/.cache/lacewing-peers}
python3 -m venv "$to"
"$to/bin/pip" install --quiet --disable-pip-version-check --requirement "$here/requirements.txt"
"$to/bin/python" -c 'import cv2, numpy, onnxruntime, paho.mqtt.client, PIL, sqlite3' && echo "The peers are ready in $to"
