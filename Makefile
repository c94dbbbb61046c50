# make look     a trained model at work, in seconds     make demo     both stages and all figures, in minutes
# make test     the test suite                          make reproduce, make bench     the tables of benchmarks/
# Each sets itself up: a virtual environment in .venv with the packages of requirements.txt.

PYTHON ?= python3
PIP_FLAGS ?=
RUN = .venv/bin/python

.PHONY: look test test-first test-rest demo bench reproduce lint clean

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -r requirements.txt
	touch $@

look: .venv/installed
	mkdir -p runs/look
	$(RUN) predict.py docs/models --count 4 --panel runs/look/panel.png

# Two halves side by side, a core each; `pytest` alone runs the same in one process.
FIRST = $(addprefix tests/test_,kernels.py kernels_compile.py steps.py fsm.py predict.py evaluate.py bench.py train.py)

test: .venv/installed
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j2 --output-sync=target test-first test-rest

test-first:
	$(RUN) -m pytest --durations=5 $(FIRST)

test-rest:
	$(RUN) -m pytest --durations=10 $(addprefix --ignore=,$(FIRST))

demo: .venv/installed
	rm -rf runs/demo
	$(RUN) train_stage1.py --out runs/demo --limit 600 --epochs 28 --distill-epochs 14
	$(RUN) train_stage2.py --stage1 runs/demo --fsm-epochs 1 --student-epochs 10
	$(RUN) evaluate.py runs/demo --limit 200 --json runs/demo/results.json --markdown runs/demo/results.md
	$(RUN) predict.py runs/demo --count 4 --panel runs/demo/panel.png
	$(RUN) -m benchmarks.figures lost runs/demo/results.json --out runs/demo/lost.png
	$(RUN) -m benchmarks.figures curves runs/demo/log.jsonl --out runs/demo/curves.png
	$(RUN) -m benchmarks.figures prototypes runs/demo --out runs/demo/prototypes.png
	$(RUN) -m benchmarks.figures selection runs/demo --out runs/demo/selection.png

bench: .venv/installed
	$(RUN) -m benchmarks.bench

reproduce: .venv/installed
	$(RUN) -m benchmarks.reproduce scenes

lint:
	ruff check . && ruff format --check .

clean:
	rm -rf .venv runs
