#!/usr/bin/env bash
# Sets up one TPU VM host (Ubuntu), from a clone of the repository: a virtual environment in .venv with jax for TPUs.
# On a pod every host needs it:
#   gcloud compute tpus tpu-vm ssh NAME --zone ZONE --worker=all --command="cd ringbpt && bash tpu_requirements.sh"
# Then, on every host at once:  . .venv/bin/activate && python -m ringbpt.train ...
# PYTHON=python3.12 chooses another interpreter; EXTRAS=tpu,wandb other extras of pyproject.toml.
set -euo pipefail
cd "$(dirname "$0")"

PYTHON="${PYTHON:-python3.11}"
EXTRAS="${EXTRAS:-tpu,hf}"
sudo="$(command -v sudo || true)"

# The images of Ubuntu 22.04 come with Python 3.10, which jax no longer supports.
if ! "$PYTHON" -c 'import venv, ensurepip' 2>/dev/null; then
  echo "installing $PYTHON"
  $sudo apt-get update -q
  $sudo apt-get install -q -y software-properties-common
  $sudo add-apt-repository -y ppa:deadsnakes/ppa
  $sudo apt-get install -q -y "$PYTHON" "$PYTHON-venv"
fi

# The TPU runtime pins large host buffers: without huge pages its start and its transfers take several times longer.
hugepages=/sys/kernel/mm/transparent_hugepage/enabled
if [ -e "$hugepages" ]; then
  echo always | $sudo tee "$hugepages" >/dev/null || echo "could not turn on transparent huge pages; going on"
fi

"$PYTHON" -m venv --clear .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$EXTRAS]"

# No jax.devices() here: on a pod it would wait for all the other hosts.
.venv/bin/python -c '
from importlib.metadata import version
import libtpu
print("ready:", ", ".join(name + " " + version(name) for name in ("ringbpt", "jax", "libtpu")))'
