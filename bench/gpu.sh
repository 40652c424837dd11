#!/bin/bash
# The packages for bench/gpu.py on a GPU machine without a package registry.
#
#   bash bench/gpu.sh         here: download them into wheels/ (ignored by git), for Python 3.12 on Linux x86_64
#   bash bench/gpu.sh run     there, from the root of the repository: install them and run bench/gpu.py; arguments go to it
#   bash bench/gpu.sh --help  this text
#
# The other machine needs torch, torchvision, timm, numba, scikit-learn, pandas, safetensors, accelerate and matplotlib, the
# repository, and wheels/. `OUT=folder bash bench/gpu.sh run` writes to that folder; `python bench/gpu.py --merge
# folder/gpu.jsonl` puts its lines into bench/results/gpu.json here. PYTHON_VERSION and WHEELS change version and folder.
set -euo pipefail
cd "$(dirname "$0")/.."
wheels=${WHEELS:-wheels} version=${PYTHON_VERSION:-3.12}
packages=(open_clip_torch ftfy wcwidth regex infomap anywidget psygnal ipywidgets comm traitlets ipython pygments
  lazy_loader "fastcore<2") # what importing the package needs beyond the above; infomap is used by two checks
case ${1:-gather} in
gather)
  rm -rf "$wheels" && mkdir -p "$wheels"
  platforms=(--platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64)
  pip download -q --no-deps --only-binary=:all: --python-version "$version" "${platforms[@]}" -d "$wheels" "${packages[@]}"
  git describe --always --dirty >"$wheels/commit"
  size=$(du -sm "$wheels" | cut -f1)
  echo "$(ls "$wheels"/*.whl | wc -l) wheels, $size MB, in $wheels"
  ((size < 60)) || { echo "more than 60 MB" >&2; exit 1; }
  ;;
run)
  shift
  pip install -q --no-index --no-deps "$wheels"/*.whl
  PYTHONPATH=. exec python bench/gpu.py "$@"
  ;;
*) sed -n '2,/^set/{/^set/!p}' "$0" | sed 's/^# \{0,1\}//' ;;
esac
