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
  # pyrender draws on EGL; the window toolkit that it imports loads libXrender, even though no window is opened.
  has_library libEGL.so.1 || echo libegl1
  has_library libGL.so.1 || echo libgl1
  has_library libEGL_mesa.so.0 || has_library libEGL_nvidia.so.0 || printf '%s\n' libegl-mesa0 libgl1-mesa-dri
  has_library libXrender.so.1 || echo libxrender1
}
may_install() {
  command -v apt-get >/dev/null && { [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }
}
install() { # packages
  local apt=(apt-get)
  [ "$(id -u)" = 0 ] || apt=(sudo -n apt-get)
  echo "picopose_ros set-up: installing $*"
  "${apt[@]}" update -qq && DEBIAN_FRONTEND=noninteractive "${apt[@]}" install -y -qq --no-install-recommends "$@"
} >&2

packages="$(missing)"
if [ -n "$packages" ]; then
  # shellcheck disable=SC2086
  set -- $packages
  how="Missing on this machine: $*. Install them and run make again:
  sudo sh -c 'apt-get update && apt-get install -y --no-install-recommends $*'"
  may_install || fail "$how"
  install "$@" || fail "$how"
  packages="$(missing)"
  [ -z "$packages" ] || fail "still missing after apt-get install: $packages"
fi

# The fallback where EGL finds no driver. New distributions have it no more, so it is no condition.
if ! has_library libOSMesa.so; then
  { may_install && install libosmesa6; } ||
    echo "picopose_ros set-up: libosmesa6 is not here; rendering has EGL alone, and the tests of the fallback fail" >&2
fi
