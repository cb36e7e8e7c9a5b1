# Two commands matter: `make lab` opens the book, `make test` proves it. Both make .venv first if it is not there.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= out
# Chapters run on one thread each, two at a time; nothing in a test reaches for the internet or the reader's notes.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
QUIET_ENV := CNNBOOK_OFFLINE=1 CNNBOOK_HOME=$(CURDIR)/$(OUT)/home MPLBACKEND=agg 
TEST_ENV := $(ONE_THREAD) $(QUIET_ENV)
LAB_ROOT := $(shell [ "$$(id -u)" = 0 ] && echo --allow-root)

.PHONY: help setup lab test test-nb test-py test-peers test-real test-cuda test-lab sanitize check clean-nb export lint drift book budget processors order site slow student bench clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*##/\t/' | expand -t 12

# torch on a Jetson comes from NVIDIA; SYSTEM_TORCH=1 keeps the one that is there and pins it against replacement.
ifdef SYSTEM_TORCH
VENV_FLAGS := --system-site-packages
PIN = $(BIN)/python -m pip freeze | grep -E '^(torch|torchvision)(==| @)' > $(OUT)/pins.txt || \
	{ echo "SYSTEM_TORCH=1: expected torch and torchvision in the system's Python, got none"; exit 1; }
else
PIN = cp constraints.txt $(OUT)/pins.txt
endif

$(STAMP): settings.ini setup.py pyproject.toml constraints.txt $(wildcard cext/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"Python: expected 3.10 or newer, got {sys.version.split()[0]}")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	@mkdir -p $(OUT)
	@$(PIN)
	$(BIN)/python -m pip install -q -c $(OUT)/pins.txt -e '.[lab,dev]'
	@$(BIN)/python tools/after_install.py
	@touch $@

setup: $(STAMP)  ## make .venv, install, build the C++ part

lab: setup  ## open the book in JupyterLab (ARGS= passes options through)
	@mkdir -p $(OUT)
	$(BIN)/jupyter lab nbs/index.ipynb --ip=127.0.0.1 $(LAB_ROOT) $(ARGS)

test: setup test-nb test-py  ## run every chapter's cells and tests/

test-nb: setup
	$(TEST_ENV) $(BIN)/nbdev_test --n_workers 2 --do_print

test-py: setup
	$(TEST_ENV) $(BIN)/python -m pytest -m 'not slow and not real and not lab' $(ARGS)

test-peers: setup  ## trainer, logs and measures held against other libraries (installs the peers extra)
	$(BIN)/python -m pip install -q -c $(OUT)/pins.txt -e '.[peers]'
	$(TEST_ENV) $(BIN)/python -m pytest $$(grep -l importorskip tests/*.py) -m 'not slow and not real and not lab' \
		-k 'lightning or tensorboard or wandb or torchmetrics or torchinfo or peers' -rs $(ARGS)

test-lab: setup  ## a chapter in JupyterLab in a real browser (needs chromium)
	$(TEST_ENV) $(BIN)/python -m pytest -m lab $(ARGS)

test-real: setup  ## tests on the real data sets under $$CNNBOOK_DATA
	@test -n "$$CNNBOOK_DATA" || { echo 'CNNBOOK_DATA: expected a folder with the real data sets, got nothing'; exit 2; }
	CNNBOOK_OFFLINE=1 $(BIN)/python -m pytest -m real -s $(ARGS)

test-cuda: setup  ## the cells flagged cuda, on a machine with a GPU
	CNNBOOK_OFFLINE=1 $(BIN)/nbdev_test --n_workers 1 --flags cuda --do_print

slow: setup  ## full rounds of the kill and fuzz tests, and the cells flagged slow
	CNNBOOK_FULL=1 CNNBOOK_OFFLINE=1 $(BIN)/nbdev_test --n_workers 1 --flags slow --do_print
	$(BIN)/python -m pytest -m slow $(ARGS)

# Python itself is not built with them, so their libraries must be there before it starts; it never frees all it has.
SANITIZE := -fsanitize=address,undefined
SANITIZED := $(CURDIR)/$(OUT)/sanitize
SANITIZERS = $(foreach l,libasan.so libubsan.so libstdc++.so,$(shell $${CXX:-g++} -print-file-name=$(l)))
sanitize: setup  ## the C++ part built with AddressSanitizer and UBSan, under its tests
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)
	cp -r setup.py settings.ini README.md pyproject.toml cext cnnbook data $(SANITIZED)
	rm -rf $(SANITIZED)/cnnbook/*.so
	cd $(SANITIZED) && CXXFLAGS='$(SANITIZE) -fno-sanitize-recover=all -fno-omit-frame-pointer -g1' \
		LDFLAGS='$(SANITIZE)' CNNBOOK_REQUIRE_CEXT=1 $(CURDIR)/$(BIN)/python setup.py -q build_ext --inplace
	$(TEST_ENV) CNNBOOK_SANITIZED=1 PYTHONPATH=$(SANITIZED) LD_PRELOAD='$(SANITIZERS)' ASAN_OPTIONS=detect_leaks=0 \
		UBSAN_OPTIONS=print_stacktrace=1 $(BIN)/pytest tests/test_boxes.py tests/test_nms.py \
		-m 'not slow' -k 'not flat and not faster and not compiler and not fault_64 and not 256_times' $(ARGS)

clean-nb: setup
	$(BIN)/nbdev_clean

export: clean-nb
	$(BIN)/nbdev_export

lint: setup
	$(BIN)/ruff check nbs tests tools benchmarks setup.py

check: export lint test drift  ## what to run before a commit

drift:
	@git diff --exit-code --stat -- nbs cnnbook || { echo 'drift: the files above changed; look at them and commit them'; exit 1; }
	@test -z "$$(git ls-files -o --exclude-standard nbs cnnbook)" || { git ls-files -o --exclude-standard nbs cnnbook; echo 'drift: the files above are not under git'; exit 1; }

book: setup  ## execute the chapters and store their outputs (NB= names some; CNNBOOK_FULL=1 with the slow cells)
	$(if $(CNNBOOK_FULL),,$(ONE_THREAD)) $(QUIET_ENV) $(BIN)/python tools/book.py $(NB)

budget: setup  ## measure each chapter's time and memory offline (nbs/budget.json); above 60 s or 2 GB it fails
	$(ONE_THREAD) $(QUIET_ENV) $(BIN)/python tools/book.py --measure $(NB)

# The last digit of a sum depends on the vector units and the threads; what a chapter asserts must not.
OLDER := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
processors: setup  ## every chapter's cells as other processors compute them: SSE, AVX2, two threads
	$(TEST_ENV) $(OLDER) $(BIN)/nbdev_test --n_workers 2 --do_print
	$(TEST_ENV) $(AVX2) $(BIN)/nbdev_test --n_workers 2 --do_print
	$(QUIET_ENV) OMP_NUM_THREADS=2 MKL_NUM_THREADS=2 $(BIN)/nbdev_test --n_workers 1 --do_print

order: setup  ## run each chapter after its own cells in a shuffled order: the numbers must stay (NB= names some)
	$(ONE_THREAD) $(QUIET_ENV) $(BIN)/python tools/order.py $(NB)

site: setup  ## the book as static pages in out/site (installs the site extra)
	$(BIN)/python -m pip install -q -c $(OUT)/pins.txt -e '.[site]'
	$(BIN)/python tools/make_site.py $(OUT)/site

student: setup  ## notebooks without solutions for a class, in OUT= (NB= names some chapters)
	$(BIN)/python -m cnnbook.teach student $(OUT) $(NB)

bench: setup  ## run the benchmarks; they write benchmarks/RESULTS.md
	$(BIN)/python benchmarks/run.py $(ARGS)

clean:  ## remove what make built, never data or notebooks
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis $(OUT) cnnbook/*.so cnnbook/__pycache__ $(STAMP)
