#!/usr/bin/env bash
# Checks for what pip cannot bring: a usable Python, a C++ compiler, an offscreen OpenGL. What is missing is
# installed where that needs no question (apt-get as root or with a password-less sudo); elsewhere the exact
# command is printed and the script fails.
#
# usage: check_system.sh PYTHON
set -euo pipefail
python="${1:?usage: check_system.sh PYTHON}"

fail() {
  printf 'picopose_ros set-up: %s\n' "$*" >&2
  exit 1
}

version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" ||
  fail "cannot run '$python'. Give a Python 3.10, 3.11 or 3.12: make setup PYTHON=/path/to/python3"
case "$version" in
  3.10 | 3.11 | 3.12) ;;
  *) fail "'$python' is Python $version; the pinned packages exist for 3.10 to 3.12. Give one: make setup PYTHON=/path/to/python3" ;;
esac
[ "$(uname -sm)" = "Linux x86_64" ] || fail "the ROS packages on PyPI exist for Linux on x86-64 only, this is $(uname -sm)"

has_library() { # in the loader's cache, so that it can be opened by name
  /sbin/ldconfig -p | grep -F "$1" >/dev/null
}
missing() { # prints the packages that are missing, one a line
  command -v g++ >/dev/null || echo g++
  "$python" -c 'import ensurepip, venv' 2>/dev/null || echo "python$version-venv"
  "$python" -c 'import os, sysconfig; open(os.path.join(sysconfig.get_path("include"), "Python.h"))' 2>/dev/null ||
    echo "python$version-dev"
  # pyrender draws on EGL. OSMesa, its fallback, is wanted only where there is no EGL.
  has_library libEGL.so.1 || echo libegl1
  has_library libGL.so.1 || echo libgl1
  has_library libEGL_mesa.so.0 || has_library libEGL_nvidia.so.0 || printf '%s\n' libegl-mesa0 libgl1-mesa-dri
}

packages="$(missing)"
[ -n "$packages" ] || exit 0
# shellcheck disable=SC2086
set -- $packages
command="apt-get update && apt-get install -y --no-install-recommends $*"
hint="Missing on this machine: $*. Install them and run make again:
  sudo sh -c '$command'"
if ! command -v apt-get >/dev/null; then
  fail "Missing on this machine (names of the Debian packages): $*"
elif [ "$(id -u)" = 0 ]; then
  run=(sh -c)
elif sudo -n true 2>/dev/null; then
  run=(sudo -n sh -c)
else
  fail "$hint"
fi
echo "picopose_ros set-up: installing $*"
DEBIAN_FRONTEND=noninteractive "${run[@]}" "$command" >/dev/null || fail "$hint"
packages="$(missing)"
[ -z "$packages" ] || fail "still missing after apt-get install: $packages"
