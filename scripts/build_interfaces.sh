#!/usr/bin/env bash
# Generates ROS interfaces that PyPI does not have (of the folders in plain_ros, or of this package) and installs them
# into a virtual environment that holds the ROS wheels; such an environment is a ROS prefix.
#
# usage: build_interfaces.sh VENV BUILD_FOLDER SOURCE...
set -euo pipefail
usage="usage: build_interfaces.sh VENV BUILD_FOLDER SOURCE..."
root="$(cd "$(dirname "$0")/.." && pwd)"
venv="$(cd "${1:?$usage}" && pwd)"
mkdir -p "${2:?$usage}"
build="$(cd "$2" && pwd)"
shift 2
# make's job server is not for ninja: its pipe is closed here.
unset MAKEFLAGS MFLAGS
export PATH="$venv/bin:$PATH" AMENT_PREFIX_PATH="$venv"

for source in "${@:?$usage}"; do
  source="$(cd "$source" && pwd)"
  folder="$build/$(basename "$source")"
  if [ "$source" = "$root" ]; then folder="$build/picopose_ros"; fi
  log="$folder.log"
  echo "generating the messages of $(basename "$folder")"
  {
    cmake -G Ninja -S "$source" -B "$folder" -DBUILD_TESTING=OFF \
      -DCMAKE_INSTALL_PREFIX="$venv" -DCMAKE_PREFIX_PATH="$venv" -DPython3_EXECUTABLE="$venv/bin/python" \
      -DCMAKE_PROJECT_INCLUDE="$root/plain_ros/fix_wheels.cmake" &&
      cmake --build "$folder" &&
      # All but the component "modules": those are imported from the source tree.
      cmake --install "$folder" --component Unspecified
  } >"$log" 2>&1 || {
    tail -n 40 "$log" >&2
    echo "failed; the whole log is $log" >&2
    exit 1
  }
done

# The modules come from the source tree and the messages join them: the part that lies here must not be a
# package by itself, nor a distribution that pip would take for the installed one.
site="$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
rm -rf "$site"/picopose_ros/__init__.py "$site"/picopose_ros/__pycache__ "$site"/picopose_ros-*.egg-info
