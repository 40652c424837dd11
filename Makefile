# make demo     train on drawn pedestrians and report    make lab       JupyterLab on the pages
# make test     every check and every page               make docs      the documentation site (needs quarto)
# make normal   format, clean and export the pages       make readme    README.md from nbs/index.ipynb
# make browser  the pages in a real browser (needs Chromium and its driver)
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
DEV    := $(VENV)/.ready-dev

.PHONY: demo test browser lab docs normal readme clean

demo: $(READY)
	$(BIN)/pclclip_demo --logs-dir runs/demo

test: $(DEV)
	$(BIN)/python .ci/check.py

browser: $(DEV)
	$(BIN)/python .ci/browser.py

lab: $(DEV)
	$(BIN)/jupyter lab --ServerApp.root_dir='$(CURDIR)' --LabApp.default_url=/lab/tree/nbs/index.ipynb

docs: $(DEV)
	@command -v quarto >/dev/null || { echo "make docs needs the program quarto: get it from https://quarto.org/docs/get-started and run make docs again"; exit 1; }
	@touch README.md # nbdev_docs writes it anew when index.ipynb is newer
	$(BIN)/nbdev_docs

normal: $(DEV)
	$(BIN)/python .ci/check.py normal

readme: $(DEV)
	$(BIN)/python .ci/check.py readme

clean:
	rm -rf $(VENV) _proc _docs

$(VENV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: try make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(READY): settings.ini setup.py | $(VENV)
	@echo "Installing into $(VENV): a few minutes and 8 GB, once"
	@if [ -e $(DEV) ]; then $(BIN)/pip install -q -e '.[dev]' && touch $(DEV); else $(BIN)/pip install -q -e .; fi
	@touch $@

$(DEV): settings.ini setup.py | $(VENV)
	@echo "Installing into $(VENV): a few minutes and 8 GB, once"
	@$(BIN)/pip install -q -e '.[dev]'
	@touch $(READY) $@
