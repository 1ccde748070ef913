# make demo | make test: each makes .venv and installs everything by itself.
#
# TORCH names the torch build, installed first and by exact version: a plain `torch` would take the newest build,
# with several gigabytes of CUDA libraries even where there is no GPU. On a GPU box choose yours, with pip's own options:
#   make test TORCH="torch==2.11.0 --index-url ADDRESS"
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint unit quantised drills install lock clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,dev]'
	touch $@

demo: install
	$(BIN)/python recipes/demo/run.py

test: lint unit quantised

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A worker for each core; the tests of a file stay together, since they share what takes long to make.
unit: install
	$(BIN)/pytest -n logical --dist loadfile

# transformers imports these wherever they are installed, slowly and with warnings: they lie beside the environment, for their tests alone.
$(VENV)/quantisers: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $@ bitsandbytes==0.50.2 torchao==0.18.0
	touch $@
quantised: $(VENV)/quantisers
	PYTHONPATH=$(VENV)/quantisers $(BIN)/pytest tests/online/test_quantised.py

# Hundreds of kills of ranks, full disks and failing file systems: ten to twenty minutes; strace and mounts are used where they are allowed.
KILLS ?= 300
drills: install
	PYTHONPATH=tests/teacher_dump $(BIN)/python benchmarks/drills.py --kills $(KILLS) --save benchmarks/results/drills.json

# The lock: what is installed now, torch aside (TORCH chooses it).
lock: install
	$(BIN)/pip freeze --exclude-editable | grep -viE '^(torch|triton|nvidia-.*|cuda-.*)==' > constraints.txt

clean:
	rm -rf $(VENV) out
