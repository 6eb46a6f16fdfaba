# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test check format benchmarks clean

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed; set PYTHON="'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch  # DeepSpeed's build looks for it
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

$(BIN)/kubectl: $(VENV)/ready tests/k8s/kubectl.py
	$(BIN)/python -m tests.k8s.kubectl $@  # renders the manifests in k8s/

quickstart: $(VENV)/ready
	$(BIN)/python -m jobs.quickstart .demo

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check $(BIN)/kubectl
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

benchmarks: $(VENV)/ready
	$(BIN)/python -m tests.benchmarks.bench_factorisation
	$(BIN)/python -m tests.benchmarks.bench_calibration
	$(BIN)/python -m tests.benchmarks.bench_merging
	$(BIN)/python -m tests.benchmarks.bench_forward
	$(BIN)/python -m tests.benchmarks.bench_distillation

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .demo
