# Each target makes .venv by itself, from nothing but python3 (3.11 or newer) and a network, and installs only what it needs.

PYTHON ?= python3
OUT ?= demo
VENV := .venv
PIP := $(VENV)/bin/pip --disable-pip-version-check --quiet

# glibc gives a step's memory back to the system and faults it in again in the next: a quarter of the time on small CPUs.
# Others than glibc ignore the variable.
MALLOC := GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.trim_threshold=100000000000:glibc.malloc.mmap_max=0:glibc.malloc.top_pad=268435456

.PHONY: demo test lint compare soak kills clean

demo: $(VENV)/.installed
	$(MALLOC) $(VENV)/bin/python -m srpo_jax.emoji.demo --out $(OUT)

test: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# An update beside PyTorch's.
compare: $(VENV)/.installed-test
	$(MALLOC) $(VENV)/bin/python tests/compare/side_by_side.py

# What takes too long for the test suite: 2,000 updates of a micro model, whose memory and time stay flat; and a job of
# two processes that is killed ten times in a row and ends as if nothing had been.
soak: $(VENV)/.installed-test
	$(VENV)/bin/python tests/endurance/soak.py

kills: $(VENV)/.installed-test
	$(VENV)/bin/python tests/endurance/kills.py

lint: $(VENV)/.installed-lint
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

# A stamp per set of packages: present means installed, older than setup.py means install again.
$(VENV)/.installed: setup.py | $(VENV)/bin/python
	$(PIP) install --editable .
	@touch $@

$(VENV)/.installed-test: setup.py | $(VENV)/bin/python
	$(PIP) install --editable '.[test]'
	@touch $@

$(VENV)/.installed-lint: setup.py | $(VENV)/bin/python
	$(PIP) install --editable '.[lint]'
	@touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) $(OUT) build *.egg-info
