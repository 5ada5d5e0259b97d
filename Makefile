# Each target is enough on a fresh machine with python3, pip and make; the environment is made again when its two files change.
PYTHON ?= python3
PIP = .venv/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

# threads that wait with a busy core make every step slow where another process shares the cores
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test attack lint house docs audit bench bench-gpu

demo: .venv/test.stamp
	.venv/bin/python examples/demo.py $(ARGS)

test: .venv/test.stamp
	.venv/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

# every attack at full size, and one table: fault, tried, survived, worst case
attack: .venv/test.stamp
	FMXNN_ATTACK=1 HYPOTHESIS_PROFILE=thorough .venv/bin/python -m pytest tests/faults --timeout 3600 $(ARGS)

lint: .venv/test.stamp
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/basedpyright --pythonpath .venv/bin/python

# the measures of the house, goal and now side by side; ARGS=core lists what is beyond them in core
house:
	$(PYTHON) tests/house.py $(ARGS)

docs: .venv/docs.stamp
	.venv/bin/mkdocs build --strict

# known faults of the pinned packages; it needs a network, and fails where a package could not be looked up
audit: .venv-audit/stamp
	.venv-audit/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt $(ARGS)

bench:
	$(PYTHON) benchmarks/run.py $(ARGS)

bench-gpu: .venv/test.stamp
	.venv/bin/python benchmarks/gpu.py $(ARGS)

.venv/test.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -e '.[test]'
	touch $@

.venv/docs.stamp: .venv/test.stamp
	$(PIP) -e '.[docs]'
	touch $@

.venv-audit/stamp:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip --disable-pip-version-check install --quiet pip-audit==2.10.1
	touch $@
