# Every target sets up what it needs in .venv; the second time it starts at once. `make help` lists the targets.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
RUNS ?= 1000000
# Few tests at a time go to a process, in the order of the collection: slow tests first, so all processes end together.
# Three processes keep two cores busy, because tests with real processes often wait.
IN_PARALLEL := --numprocesses 3 --dist load --maxschedchunk 4

.PHONY: help demo test test-fast test-benchmarks check docs format compose-test chaos fuzz bench-relay bench-dropout bench-compression bench-signing \
  bench-startup bench-peers bench-merge bench-control bench-size bench-scale bench-attacks bench-slow-line bench-secure bench-secure-kernels bench-secure-peers bench-privacy bench-utility dist release-check hooks clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(INSTALLED)  ## set up everything, then train the digits task to its target with 4 worker processes
	$(BIN)/fedqueue run examples/digits/federation.toml --workers 4

test: $(INSTALLED)  ## set up everything, then run the tests; fails below 90 % coverage of lines and branches
	rm -f .coverage .coverage.*
	$(BIN)/coverage run -m pytest -m "not benchmark" $(IN_PARALLEL)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --skip-covered

test-fast: $(INSTALLED)  ## run the tests that start no process but a Redis server
	$(BIN)/pytest -m "not slow" $(IN_PARALLEL)

test-benchmarks: $(INSTALLED)  ## run the short form of each benchmark that starts a whole federation; minutes
	$(BIN)/pytest -m benchmark

check: $(INSTALLED) docs  ## check lint, format, types, insecure code, known vulnerabilities of the pinned versions, and the documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/bandit --quiet --recursive --configfile pyproject.toml shared coordinator worker keeper
	$(BIN)/python .ci/audit.py

docs: $(INSTALLED)  ## build the documentation into docs/_build/html; every warning is an error, nothing is fetched
	$(BIN)/sphinx-build -W --keep-going --quiet --builder html docs docs/_build/html

format: $(INSTALLED)  ## fix lint and format in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

compose-test: $(INSTALLED)  ## build the images and run, scale and kill a whole federation; needs a Docker engine
	$(BIN)/python tests/compose/run.py

dist: $(INSTALLED)  ## build the wheel and the sdist into dist/, twice, and compare the bytes
	$(BIN)/python .ci/dist.py

release-check: $(INSTALLED)  ## check version, changelog and metadata before a release (RELEASING.md)
	$(BIN)/python .ci/release.py

hooks: $(INSTALLED)  ## run `make check`'s linters before each commit, and let git blame skip the moves
	$(BIN)/pre-commit install
	git config blame.ignoreRevsFile .git-blame-ignore-revs

clean:  ## delete the virtual environment, caches, archives and results
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage* dist runs

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fedqueue needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[all,dev]'
	touch $@

fuzz: $(INSTALLED)  ## fuzz every decoder, guided by coverage; RUNS=100000 for a short one, Linux only
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[fuzz]'
	$(BIN)/python -m tests.fuzz --runs $(RUNS)

chaos: $(INSTALLED)  ## run ten minutes of crashes, stalls, outages and failovers, then an audit; OPTIONS="--seconds 60 --seed 2"
	$(BIN)/python -m tests.chaos $(OPTIONS)

bench-relay: $(INSTALLED)  ## measure updates per second beside a bare loop that moves the same bytes; OPTIONS="--quick"
	$(BIN)/python benchmarks/relay.py $(OPTIONS)

bench-dropout: $(INSTALLED)  ## measure what dying clients cost; OPTIONS="--quick"
	$(BIN)/python benchmarks/dropout.py $(OPTIONS)

bench-compression: $(INSTALLED)  ## measure bytes, speed and accuracy of every encoding; OPTIONS="--quick"
	$(BIN)/python benchmarks/compression.py $(OPTIONS)

bench-signing: $(INSTALLED)  ## measure what signatures cost end to end; OPTIONS="--quick"
	$(BIN)/python benchmarks/signing.py $(OPTIONS)

bench-startup: $(INSTALLED)  ## measure seconds to the first merged update, and of commands that only read; OPTIONS="--quick"
	$(BIN)/python benchmarks/startup.py $(OPTIONS)

# OPTIONS="--install" installs the peers below .peers/; a peer that is not installed is skipped.
bench-peers: $(INSTALLED)  ## measure fedqueue beside its peers, into docs/peers.json; OPTIONS="--quick", "--only fedqueue"
	$(BIN)/python benchmarks/beside_peers.py --json docs/peers.json $(OPTIONS)

bench-merge: $(INSTALLED)  ## measure merging beside the memory bus, for each encoding; OPTIONS="--quick"
	$(BIN)/python benchmarks/merge.py $(OPTIONS)

bench-secure-kernels: $(INSTALLED)  ## measure rounding, masks and sums of secure aggregation beside the memory bus; OPTIONS="--quick"
	$(BIN)/python benchmarks/secure_kernels.py $(OPTIONS)

bench-control: $(INSTALLED)  ## measure what an update costs without its bytes, step by step; OPTIONS="--quick"
	$(BIN)/python benchmarks/control.py $(OPTIONS)

bench-size: $(INSTALLED)  ## measure models of 400 MB and 1.6 GB, and the memory they take; OPTIONS="--quick"
	$(BIN)/python benchmarks/size.py $(OPTIONS)

bench-scale: $(INSTALLED)  ## measure growth with workers, clients, versions and time; OPTIONS="--quick"
	$(BIN)/python benchmarks/scale.py $(OPTIONS)

bench-slow-line: $(INSTALLED)  ## measure a site on a slow line: seconds to deliver by bandwidth and encoding; OPTIONS="--quick"
	$(BIN)/python benchmarks/slow_line.py $(OPTIONS)

bench-secure: $(INSTALLED)  ## measure what keepers cost: updates per second, CPU by role, bytes, memory; OPTIONS="--quick"
	$(BIN)/python benchmarks/secure.py $(OPTIONS)

bench-privacy: $(INSTALLED)  ## measure what the keepers' noise costs: updates per second, CPU by role; OPTIONS="--quick"
	$(BIN)/python benchmarks/privacy.py $(OPTIONS)

bench-utility: $(INSTALLED)  ## measure accuracy over epsilon; OPTIONS="--json utility.json --picture utility.png"
	$(BIN)/python benchmarks/privacy_utility.py $(OPTIONS)

bench-secure-peers: $(INSTALLED)  ## measure a round of masks beside Flower's SecAgg+ and APPFL's masks; OPTIONS="--install", "--quick"
	$(BIN)/python benchmarks/secure_peers.py $(OPTIONS)

bench-attacks: $(INSTALLED)  ## measure accuracy under attack with and without each defence; OPTIONS="--seeds 3"
	$(BIN)/python benchmarks/attacks.py $(OPTIONS)
