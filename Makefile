# `make demo` and `make test` set up everything they need; the second time they start at once.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
RUNS ?= 1000000

.PHONY: demo test test-fast check format compose-test chaos fuzz bench-relay bench-dropout bench-compression bench-signing \
  bench-startup bench-peers bench-merge bench-control bench-size bench-scale bench-attacks clean

demo: $(INSTALLED)  ## set up everything, then train the digits task to its target with 4 worker processes
	$(BIN)/fedqueue run examples/digits/federation.toml --workers 4

test: $(INSTALLED)  ## set up everything, then run all tests; fails below 90 % line coverage
	rm -f .coverage .coverage.*
	$(BIN)/coverage run -m pytest --numprocesses 2 --dist worksteal
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --skip-covered

test-fast: $(INSTALLED)  ## the tests that start no processes
	$(BIN)/pytest -m "not slow" --numprocesses 2 --dist worksteal

check: $(INSTALLED)  ## lint, format, types, insecure code, known vulnerabilities of what is pinned
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/bandit --quiet --recursive --configfile pyproject.toml shared coordinator worker
	$(BIN)/python .ci/audit.py

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

compose-test: $(INSTALLED)  ## build the images and run, scale and kill a whole federation; needs a Docker engine
	$(BIN)/python tests/compose/run.py

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage* runs

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fedqueue needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

fuzz: $(INSTALLED)  ## coverage-guided fuzzing of every decoder; RUNS=100000 for a short one, Linux only
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[fuzz]'
	$(BIN)/python tests/fuzz/fuzz.py --runs $(RUNS)

chaos: $(INSTALLED)  ## ten minutes of crashes, stalls, outages and failovers, then an audit; OPTIONS="--seconds 60 --seed 2"
	$(BIN)/python tests/chaos/survive.py $(OPTIONS)

bench-relay: $(INSTALLED)  ## updates per second beside a bare loop that moves the same bytes; OPTIONS="--quick"
	$(BIN)/python benchmarks/relay.py $(OPTIONS)

bench-dropout: $(INSTALLED)  ## what dying clients cost; OPTIONS="--quick"
	$(BIN)/python benchmarks/dropout.py $(OPTIONS)

bench-compression: $(INSTALLED)  ## bytes, speed and accuracy of every encoding; OPTIONS="--quick"
	$(BIN)/python benchmarks/compression.py $(OPTIONS)

bench-signing: $(INSTALLED)  ## what signatures cost end to end; OPTIONS="--quick"
	$(BIN)/python benchmarks/signing.py $(OPTIONS)

bench-startup: $(INSTALLED)  ## seconds to the first merged update, and of commands that only show; OPTIONS="--quick"
	$(BIN)/python benchmarks/startup.py $(OPTIONS)

# The peers are installed below .peers/ by OPTIONS="--install"; those that are not there are skipped.
bench-peers: $(INSTALLED)  ## fedqueue beside its peers, figures into docs/peers.json; OPTIONS="--quick", "--only fedqueue"
	$(BIN)/python benchmarks/beside_peers.py --json docs/peers.json $(OPTIONS)

bench-merge: $(INSTALLED)  ## merging an update beside the memory bus, for each encoding; OPTIONS="--quick"
	$(BIN)/python benchmarks/merge.py $(OPTIONS)

bench-control: $(INSTALLED)  ## what an update costs without its bytes, step by step; OPTIONS="--quick"
	$(BIN)/python benchmarks/control.py $(OPTIONS)

bench-size: $(INSTALLED)  ## models of 400 MB and 1.6 GB, and the memory they take; OPTIONS="--quick"
	$(BIN)/python benchmarks/size.py $(OPTIONS)

bench-scale: $(INSTALLED)  ## growth with workers, clients, versions and time; OPTIONS="--quick"
	$(BIN)/python benchmarks/scale.py $(OPTIONS)

bench-attacks: $(INSTALLED)  ## accuracy under attack with and without each defence; OPTIONS="--seeds 3"
	$(BIN)/python benchmarks/attacks.py $(OPTIONS)
