# Every target sets up what it needs. `make demo` and `make test` are all a new machine has to know.
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test coverage lint bench setup clean

demo: setup
	$(BIN)/python scripts/demo.py

# Two at a time, a file's tests in one process: most of them wait for something. Alone: make test ARGS="-n 0 tests/unit"
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# Apart from the gate: tracing slows the tests that make calls by the hundred thousand, as those of crashes do.
coverage: setup
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered $(ARGS)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# make bench NAME=gateway ARGS="--rounds 5 --json out.json"
bench: setup
	$(BIN)/python -m benchmarks $(NAME) $(ARGS)

setup:
	@scripts/setup.sh $(VENV)

clean:
	rm -rf $(VENV) .venv-bench .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage
