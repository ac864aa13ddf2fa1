#!/usr/bin/env bash
# Builds the package with colcon against the ROS wheels of a virtual environment, as a ROS workspace would, and
# looks at what was installed: the generated messages are imported from there, nothing from the source tree. Building
# needs ROS alone, so that it can go on while pip installs the rest.
#
# usage: check_colcon.sh build|inspect VENV WORKSPACE
set -euo pipefail
usage="usage: check_colcon.sh build|inspect VENV WORKSPACE"
root="$(cd "$(dirname "$0")/.." && pwd)"
step="${1:?$usage}"
venv="$(cd "${2:?$usage}" && pwd)"
workspace="${3:?$usage}"
# make's job server is not for ninja: its pipe is closed here.
unset MAKEFLAGS MFLAGS
export PATH="$venv/bin:$PATH" AMENT_PREFIX_PATH="$venv" CMAKE_PREFIX_PATH="$venv"

if [ "$step" = inspect ]; then
  workspace="$(cd "$workspace" && pwd)"
  # setup.bash reads variables that may be unset.
  set +u
  # shellcheck disable=SC1091
  source "$workspace/install/setup.bash"
  set -u
  cd "$workspace"
  # As in a workspace: its site-packages come before those of the environment, so nothing is read from the sources.
  python "$root/scripts/inspect_install.py"
  exit
fi

rm -rf "$workspace"
mkdir -p "$workspace/src"
workspace="$(cd "$workspace" && pwd)"
# A copy of what belongs to the package, so that colcon neither walks the environments nor sees old builds.
(cd "$root" && tar -cf - --exclude='__pycache__' \
  CMakeLists.txt package.xml action config launch msg srv picopose_ros plain_ros scripts) |
  (mkdir "$workspace/src/picopose_ros" && tar -xf - -C "$workspace/src/picopose_ros")

cd "$workspace"
packages="$(colcon list --names-only)"
if [ "$packages" != picopose_ros ]; then
  echo "colcon must find picopose_ros alone (plain_ros/ is not for ROS machines), it found: $packages" >&2
  exit 1
fi
colcon build --event-handlers console_cohesion- console_direct- \
  --cmake-args -G Ninja -DBUILD_TESTING=OFF -DPython3_EXECUTABLE="$venv/bin/python" \
  -DCMAKE_PROJECT_INCLUDE="$root/plain_ros/fix_wheels.cmake" || {
  cat log/latest_build/picopose_ros/stdout_stderr.log >&2
  exit 1
}
