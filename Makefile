# Everything runs in .venv, which the first target that needs it makes. PYTHON may name another interpreter (3.11 or newer).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# constraints.txt pins torch to a build without CUDA where one is on offer; the package itself does not.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# On all cores. Tests of one xdist_group, which want much memory or disk, run one after the other. PYTEST_ARGS come last.
PYTEST := $(BIN)/python -m pytest -n auto

# Tests start many short processes, and pytest rewrites what it loads: compile each module once, not in every process.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-all slow lint types docs bench gpu reproduce clean

help: ## What there is to make.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/demo ## Train, forget, edit, measure, draw: LiNeS on handwritten digits, about two minutes.
	$(BIN)/python demo/digits.py

test: $(VENV)/dev ## The default suite.
	$(PYTEST) --dist worksteal -m "not slow" $(PYTEST_ARGS)

test-all: $(VENV)/peers ## Every test, the slow ones too.
	$(PYTEST) --dist loadgroup $(PYTEST_ARGS)

slow: $(VENV)/peers ## The slow tests alone; installs mergekit to compare with.
	$(PYTEST) --dist loadgroup -m slow $(PYTEST_ARGS)

lint: $(VENV)/dev ## Style and format.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev ## Types.
	$(BIN)/mypy

docs: $(VENV)/dev ## Regenerate docs/cli.md and docs/merge-methods.md, and the outputs shown in README.md and docs/tour.md.
	$(BIN)/python docs/generate.py

bench: $(VENV)/dev benchmarks/.venv-peers/done ## Measure lines against the disk and its peers (QUICK=1: small models, not saved).
	$(BIN)/python benchmarks/run.py $(if $(QUICK),--quick,--save)

gpu: $(VENV)/dev ## Hold a CUDA device against the CPU, in 8 minutes (needs a torch with CUDA in .venv).
	$(BIN)/python benchmarks/gpu.py

reproduce: $(VENV)/evidence ## Train, edit, merge and measure anew what docs/evidence.md says, 10 to 20 minutes (FULL=1: every item, hours).
	$(BIN)/python -m evidence $(if $(FULL),--full) --jobs $(or $(JOBS),2)

clean: ## Remove what was installed and built.
	rm -rf $(VENV) demo/out evidence/work benchmarks/models benchmarks/.venv-peers build *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first and alone: with it in place, no other package asks for another build of it.
$(VENV)/torch: $(VENV)/bin/python constraints.txt
	$(INSTALL) torch
	@touch $@

$(VENV)/demo: $(VENV)/torch pyproject.toml
	$(INSTALL) -e '.[demo]'
	@touch $@

$(VENV)/evidence: $(VENV)/torch pyproject.toml
	$(INSTALL) -e '.[evidence]'
	@touch $@

$(VENV)/dev: $(VENV)/torch pyproject.toml
	$(INSTALL) -e '.[dev]'
	@touch $@

$(VENV)/peers: $(VENV)/dev
	$(INSTALL) -e '.[peers]'
	@touch $@

# In an environment of their own, so that what they need is nobody else's. Without them, benchmarks/run.py leaves them out.
benchmarks/.venv-peers/done: constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt mergekit==0.1.5 sd-mecha==1.1.8 peft==0.21.2
	@touch $@
