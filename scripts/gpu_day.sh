#!/usr/bin/env bash
# What only a GPU can show, in some ten minutes: device tests, parity in fp32 and fp16, the benchmark, one training
# step, an onboarding drawn by EGL. Prints one table; every part's whole output stays in build/gpu_day/.
#
# usage: scripts/gpu_day.sh [DEVICE]      DEVICE: cuda (default), cuda:1; cpu only to see that the script runs
#        VENV=.venv  PARTS="parity training"  SECONDS_PER_PART=300
set -uo pipefail
cd "$(dirname "$0")/.."
device="${1:-cuda}"
venv="${VENV:-.venv}"
limit="${SECONDS_PER_PART:-300}"
out=build/gpu_day
mkdir -p "$out"
python="$venv/bin/python"
[ -x "$python" ] || {
  echo "no Python in $venv: run make setup first, or give VENV=" >&2
  exit 2
}
"$python" - "$device" <<'PY' || exit 2
import sys, torch
device = torch.device(sys.argv[1])
if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
    sys.exit(f"PyTorch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices: no {device}")
name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
print(f"{name}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}")
PY

tests() { "$python" -m pytest -q test/test_devices.py test/test_fast.py; }
parity() { "$python" scripts/gpu/parity.py "$device" "$1"; }
bench() { "$python" scripts/bench --device "$device" --part network --part tiny --part memory --no-document; }
training() { "$python" scripts/gpu/step.py "$device"; }
onboarding() { # EGL alone, into a cache of its own: nothing may come from an earlier run
  rm -rf "$out/meshes" "$out/cache"
  "$python" -c 'import sys; from pathlib import Path; from picopose_ros.demo.objects import write_meshes
folder = Path(sys.argv[1]); folder.mkdir(parents=True); write_meshes(folder)' "$out/meshes" &&
    PYOPENGL_PLATFORM=egl "$venv/bin/picopose" onboard "$out/meshes" --device "$device" --cache-dir "$out/cache"
}

status=0
rows=()
run() { # NAME COMMAND...
  local name="$1" begin=$SECONDS result
  shift
  if [ -n "${PARTS:-}" ] && [[ " $PARTS " != *" ${name%%_*} "* ]]; then return; fi
  # A part runs in a process group of its own, so that a time-out ends all of it.
  if timeout "$limit" bash -c "$(declare -f tests parity bench training onboarding); python=$python venv=$venv \
device=$device out=$out; \"\$@\"" _ "$@" >"$out/$name.log" 2>&1; then
    result=ok
  else
    result="FAILED ($?)"
    status=1
  fi
  rows+=("$(printf '| %-12s | %-12s | %5d | %s |' "$name" "$result" $((SECONDS - begin)) \
    "$(grep -v '^$' "$out/$name.log" | tail -n 1 | tr '|' '/' | cut -c1-100)")")
}
run tests tests
run parity_fp32 parity fp32
run parity_fp16 parity fp16
run training training
run onboarding onboarding
run bench bench

printf '\n| part         | result       |     s | last line |\n|---|---|---|---|\n'
printf '%s\n' "${rows[@]}"
exit "$status"
