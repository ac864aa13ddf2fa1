#!/usr/bin/env bash
# Prints the path of the pinned Python packages that go beside the ROS of a distribution.
#
# Jazzy and Kilted (Ubuntu 24.04): docker/requirements.txt, with NumPy 1. Lyrical and Rolling (Ubuntu 26.04): those of
# requirements/core.txt without NumPy and OpenCV, which apt brings there as cv_bridge needs them. The latter was not run.
#
# usage: pins.sh DISTRO
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
case "${1:?usage: pins.sh DISTRO}" in
  jazzy | kilted) echo "$here/requirements.txt" ;;
  lyrical | rolling)
    pins="$(mktemp --suffix=.txt)"
    sed -E '/^(numpy|opencv-python-headless)==/d' "$here/../requirements/core.txt" >"$pins"
    echo "$pins"
    ;;
  *)
    echo "ROS distribution $1 is unknown; use jazzy, kilted, lyrical or rolling" >&2
    exit 2
    ;;
esac
