# Everything a machine without ROS needs. On a ROS machine use colcon; see README.md.
#
#   make setup   a virtual environment with the pinned packages, ROS from PyPI, the messages, this package
#   make demo    set-up, then the whole path on a made world: tables, pictures, build/demo/report.json
#   make test    set-up, linter, colcon build, tests
#   make plugins   the segmenter's proposals of SAM, SAM 2 and FastSAM with those packages, apart from .venv
#   make accuracy   the packaged weights on held-out objects; writes docs/accuracy.md
#   make bench   how fast everything is, 13 to 19 minutes; writes docs/performance.md
#   make soak    load and faults against the real node; writes docs/soak.md
#   make clean   removes the environments and all build results
#
#   ROS=jazzy|kilted            the ROS distribution (jazzy): .venv has the default's packages, .venv-kilted Kilted's
#   MASKS=own|late              `make demo` finds the masks itself; or gets them once a second and late, and follows (recorded)
#   SPEED=0.5                   with MASKS=late, seconds of the recording per second (1)
#   DEVICE=cuda                 where `make train` trains and what `make bench` measures (cpu)
#   WORKERS=1                   test files that run at the same time (3: node tests wait more than they compute)
#   PYTHON=python3.12           the Python to make the environment with (3.10 to 3.12)
#   TORCH_INDEX=URL             one more place where pip looks for torch: PyTorch's index of CPU
#                               builds saves gigabytes
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := setup

ROS ?= jazzy
PYTHON ?= python3
TORCH_INDEX ?=
PYTEST_ARGS ?=
WORKERS ?= 3
DURATION ?= 600
DEVICE ?= cpu
MASKS ?= recorded
SPEED ?= 1

ifeq ($(ROS),jazzy)
VENV := .venv
else ifeq ($(ROS),kilted)
VENV := .venv-kilted
else
$(error ROS=$(ROS) is unknown; use jazzy or kilted)
endif
# One folder per distribution: an environment of another one is not taken for finished.
STAMPS := $(VENV)/stamps/$(ROS)
WORKSPACE := build/colcon/$(ROS)
# Modules are compiled when they are first imported and kept; most of torch never is.
PIP := $(VENV)/bin/python -m pip install --quiet --no-compile
PINS := requirements/core.txt requirements/dev.txt requirements/training.txt requirements/$(ROS).txt
OTHERS := vision_msgs tf2_msgs yolo_msgs
MESSAGES := plain_ros/fix_wheels.cmake scripts/build_interfaces.sh \
	$(wildcard plain_ros/*/CMakeLists.txt plain_ros/*/package.xml plain_ros/*/msg/*)
INTERFACES := CMakeLists.txt package.xml \
	$(wildcard msg/* srv/* action/* launch/* config/* scripts/picopose* scripts/segmenter_node)

# The messages are generated while pip installs the rest.
MAKEFLAGS += --jobs=2

# A sourced ROS, or a shell that the Python of another environment started, must not leak into this one.
unexport PYTHONPATH PYTHONHOME AMENT_PREFIX_PATH CMAKE_PREFIX_PATH COLCON_PREFIX_PATH
unexport _ROS_WHEELS_BOOTSTRAP_COMPLETE
# Without compiled modules every process of the demo and of the tests compiles torch anew: 20 s instead of 6.
unexport PYTHONDONTWRITEBYTECODE
ifdef _ROS_WHEELS_BOOTSTRAP_COMPLETE
unexport LD_LIBRARY_PATH
endif

.PHONY: setup demo test plugins train accuracy bench soak lint colcon-build colcon clean

setup: $(STAMPS)/torch $(STAMPS)/interfaces $(STAMPS)/package

$(STAMPS)/python: scripts/check_system.sh
	scripts/check_system.sh "$(PYTHON)"
	@test -d $(STAMPS) || ! test -e $(VENV)/stamps || { echo "$(VENV) holds the packages of another ROS \
	distribution: remove it (rm -rf $(VENV)) and run make again" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

# ROS first: its messages are generated while pip goes on. Two pips must not work on one environment at the same time.
$(STAMPS)/ros: requirements/$(ROS).txt requirements/dev.txt $(STAMPS)/python
	$(PIP) --no-deps --requirement requirements/$(ROS).txt --constraint requirements/dev.txt cmake ninja
	@touch $@

$(STAMPS)/packages: $(PINS) $(STAMPS)/ros
	$(PIP) --no-deps $(PINS:%=--requirement %)
	@touch $@

# The only package whose dependencies are resolved: a CUDA build brings its own. What is pinned is there already.
$(STAMPS)/torch: requirements/torch.txt $(STAMPS)/packages
	$(PIP) --constraint requirements/core.txt $(TORCH_INDEX:%=--extra-index-url %) --requirement $<
	@touch $@

$(STAMPS)/messages: $(MESSAGES) $(STAMPS)/ros
	scripts/build_interfaces.sh $(VENV) build/interfaces/$(ROS) $(OTHERS:%=plain_ros/%)
	@touch $@

$(STAMPS)/interfaces: $(INTERFACES) $(STAMPS)/messages
	scripts/build_interfaces.sh $(VENV) build/interfaces/$(ROS) .
	@touch $@

# After torch: two pips must not work on one environment at the same time.
$(STAMPS)/package: pyproject.toml $(STAMPS)/torch
	$(PIP) --no-build-isolation --no-deps --editable .
	@touch $@

demo: setup
	$(VENV)/bin/python -m picopose_ros.demo --masks $(MASKS) --speed $(SPEED)

# Hours on two cores, and 16 GB; goes on where it was cut off. Copy runs/tiny_covered/weights.safetensors into the package
# after. First part: the weights of 850 steps, those of the same run made longer, and the mean of them all. Second part:
# from that mean, on more objects, of which others cover more.
RUN := runs/tiny
TRAIN := $(VENV)/bin/picopose train --device $(DEVICE) --config config
train: setup
	$(PIP) --no-deps --requirement requirements/imagenet.txt
	$(VENV)/bin/picopose pool data/pool --objects 671
	$(VENV)/bin/picopose pool data/pool_more --objects 840 --first-seed 671
	$(VENV)/bin/picopose pool data/pool_val --objects 48 --first-seed 1000000
	test -e $(RUN)/850.safetensors || \
	{ $(TRAIN)/train_tiny.yaml && cp $(RUN)/weights.safetensors $(RUN)/850.safetensors; }
	test -e $(RUN)/2000.safetensors || \
	{ $(TRAIN)/train_tiny.yaml --steps 2000 && cp $(RUN)/weights.safetensors $(RUN)/2000.safetensors; }
	$(TRAIN)/train_tiny.yaml --steps 2250
	$(VENV)/bin/picopose average $(RUN)/850.safetensors $(RUN)/2000.safetensors $(RUN)/weights.safetensors \
	--config config/train_tiny.yaml --out $(RUN)/mean.safetensors
	$(TRAIN)/train_tiny_covered.yaml

# Half an hour and more on two cores; reports that are there already are not made again.
accuracy: setup
	$(VENV)/bin/python scripts/accuracy.py

# Parts that are there already, of this commit, are not measured again; build/bench/ keeps them.
bench: setup
	$(VENV)/bin/python scripts/bench --device $(DEVICE)

# Load and faults, about 20 minutes; writes docs/soak.md. DURATION: seconds of steady load.
soak: setup
	$(VENV)/bin/python scripts/soak --duration $(DURATION) --report docs/soak.md --json build/soak.json

lint: setup
	$(VENV)/bin/ruff check .

# While pip installs torch, and beside the same messages for the environment.
colcon-build: $(STAMPS)/messages $(STAMPS)/packages
	scripts/check_colcon.sh build $(VENV) $(WORKSPACE)

colcon: setup colcon-build
	scripts/check_colcon.sh inspect $(VENV) $(WORKSPACE)

# Files in the order of conftest.py: by default those with few tests come last, and these are the long ones.
test: setup colcon-build
	$(VENV)/bin/ruff check .
	scripts/check_colcon.sh inspect $(VENV) $(WORKSPACE)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# FastSAM's package is AGPL-3.0: it is for these tests alone, and no part of the environment.
plugins: setup
	SAM2_BUILD_CUDA=0 $(PIP) --no-deps --no-build-isolation --upgrade --target build/plugins \
		--requirement requirements/plugins.txt
	PYTHONPATH=build/plugins $(VENV)/bin/python -m pytest test/test_proposal_plugins.py

clean:
	rm -rf .venv .venv-kilted build install log *.egg-info .pytest_cache .ruff_cache
