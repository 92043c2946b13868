# PYTHON picks the interpreter (3.11 to 3.14) of the environment; one that is there already is kept.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin

.PHONY: sample test fuzz format clean

# Install what sampling needs, no PyTorch, then make 64 pictures and a grid with the default model.
sample: $(VENV)/sampling
	$(RUN)/lutdeploy sample -n 64 --out samples
	@echo "see samples/grid.png"

# Set everything up, then run format, lint, types, layers and tests.
test: $(VENV)/installed
	PATH="$(abspath $(RUN)):$$PATH" bash ci/check.sh

# Damage every file that is read in thousands of ways, always others: about an hour.
fuzz: $(VENV)/installed
	HYPOTHESIS_PROFILE=fuzz $(RUN)/python -m pytest tests/test_fuzz.py --numprocesses logical

format: $(VENV)/installed
	$(RUN)/ruff format .
	$(RUN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/sampling: PACKAGES = .
$(VENV)/installed: PACKAGES = .[dev]
$(VENV)/sampling $(VENV)/installed: pyproject.toml constraints.txt
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --constraint constraints.txt --editable '$(PACKAGES)'
	touch $@
