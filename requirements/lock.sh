#!/usr/bin/env bash
# Writes the pinned *.txt from the *.in beside this script, for Python 3.10 to 3.12 at once. Needs uv on the path.
#
# The pins are complete, so all but torch are installed with `pip install --no-deps`: nothing can replace the torch
# build that is there (a CPU one, a vendor's), nor bring back the PyOpenGL that pyrender asks for.
set -euo pipefail
cd "$(dirname "$0")"

lock() {
  uv pip compile --quiet --universal --python-version 3.10 --no-annotate --override overrides.in \
    --custom-compile-command requirements/lock.sh "$@"
}

lock core.in -o core.txt
for name in dev training kilted jazzy; do
  lock --constraint core.txt "$name.in" -o "$name.txt"
done
# Linux only; and torch itself pins the CUDA packages that its build needs, which a CPU build has none of.
sed -i -E -e "/sys_platform == '(win32|emscripten)'/d" -e "s/ (and|;) sys_platform (!= 'emscripten'|== 'linux')//" \
  -e '/^(nvidia-|cuda-|triton==)/d' core.txt dev.txt training.txt kilted.txt jazzy.txt
# torch apart: it is installed with its dependencies, from the index that its user chooses.
grep -E '^(#|torch)' core.txt >torch.txt
sed -i -E '/^torch/d' core.txt
