# Every target works on a fresh machine that has Python 3.11 or later and make; those of GPUs use
# what is installed for $(PYTHON), and end in time to tell what they found.

PYTHON ?= python3
GPU_SECONDS ?= 570
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench bench-full gpu-test gpu-bench train clean

demo: $(VENV)/installed-core
	$(BIN)/python examples/demo.py

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed-bench
	$(BIN)/python benchmarks/reading.py
	$(BIN)/python benchmarks/bandwidth.py
	$(BIN)/python benchmarks/accuracy.py --networks n337
	$(BIN)/python benchmarks/convolution.py --quick

bench-full: bench
	$(BIN)/python benchmarks/bandwidth.py --threads 1
	$(BIN)/python benchmarks/convolution.py --threads 1
	$(BIN)/python benchmarks/convolution.py
	$(BIN)/python benchmarks/networks.py --whole
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/accuracy.py
	$(BIN)/python benchmarks/planning.py
	$(BIN)/python benchmarks/streaming.py
	$(BIN)/python benchmarks/feeding.py
	$(BIN)/python benchmarks/simulation.py
	$(BIN)/python benchmarks/simulation.py --real
	$(BIN)/python benchmarks/cluster.py
	OPENBLAS_NUM_THREADS=1 $(BIN)/python benchmarks/together.py
	$(BIN)/python benchmarks/ways.py
	$(BIN)/python pipelines/study.py
	$(BIN)/python benchmarks/chart.py

gpu-test:
	PYTHONPATH=".:$$PYTHONPATH" timeout --signal=INT $(GPU_SECONDS) $(PYTHON) -m pytest tests/test_gpu.py -m gpu \
		-p no:xdist -p no:cacheprovider -rfEs --durations=10

gpu-bench:
	PYTHONPATH=".:$$PYTHONPATH" timeout --signal=INT $(GPU_SECONDS) $(PYTHON) benchmarks/gpu.py

clean:
	rm -rf $(VENV) demo build *.egg-info

$(VENV)/installed-core: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[viz]'
	touch $@

$(VENV)/installed-bench: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	touch $@

$(VENV)/installed-dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
