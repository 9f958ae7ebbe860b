# Every target is one command that a person would type. Needs Python 3.10 to 3.12 (PYTHON=...), nothing else.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install demo test test-slow docs reproduce lint format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/:/' | column -t -s:

install: $(INSTALLED)  ## make .venv with the pinned versions of constraints.txt

$(INSTALLED): setup.py constraints.txt tools/mend_torchvision.py
	@echo "Installing evatok_hf into $(VENV) with the versions of constraints.txt (about two minutes)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e ".[train,eval,demo,bulk,dev,docs]"
	$(BIN)/python tools/mend_torchvision.py
	@touch $@

demo: $(INSTALLED)  ## reconstruct the sample clip into out/demo.mp4 and out/demo.png (MODEL=folder or Hub id)
	@echo "Reconstructing the sample clip with $(or $(MODEL),the bundled checkpoint)"
	$(BIN)/evatok reconstruct src/evatok_hf/assets/bikes.mp4 out/demo.mp4 --side-by-side --picture out/demo.png --codec hevc \
		--perceptual perceptual-effnet-lite0 $(if $(MODEL),--model $(MODEL))

test: $(INSTALLED)  ## run the linter and the tests
	@echo "Running the linter and the tests (a few minutes)"
	$(BIN)/python tools/install_browser.py
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/check_cards.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(INSTALLED)  ## run the slow tests
	$(BIN)/python -m pytest -m slow

docs: $(INSTALLED)  ## build the documentation site into out/site
	@echo "Building the documentation; open out/site/index.html"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

reproduce: $(INSTALLED)  ## all stages and tables in small, compared with the committed results (half an hour to an hour)
	@echo "Reproducing the method in small into out/reproduce (half an hour to an hour on two cores; goes on where it was stopped)"
	$(BIN)/python training/reproduce.py

lint: $(INSTALLED)  ## check style and cards
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/check_cards.py

format: $(INSTALLED)  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and everything made
	rm -rf $(VENV) out build *.egg-info src/*.egg-info
