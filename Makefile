# make test     the test suite          make demo     both stages, evaluation and a picture, on the CPU
# Each sets itself up: a virtual environment in .venv with the packages of requirements.txt.

PYTHON ?= python3
PIP_FLAGS ?=
RUN = .venv/bin/python

.PHONY: test test-first test-rest demo bench reproduce lint clean

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -r requirements.txt
	touch $@

# Two halves side by side, a core each; `pytest` alone runs the same in one process.
FIRST = $(addprefix tests/test_,kernels.py kernels_compile.py steps.py fsm.py predict.py evaluate.py)

test: .venv/installed
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j2 --output-sync=target test-first test-rest

test-first:
	$(RUN) -m pytest --durations=5 $(FIRST)

test-rest:
	$(RUN) -m pytest --durations=10 $(addprefix --ignore=,$(FIRST))

demo: .venv/installed
	rm -rf runs/demo
	$(RUN) train_stage1.py --out runs/demo --limit 600 --eval-every 20 --epochs 32 --distill-epochs 14
	$(RUN) train_stage2.py --stage1 runs/demo --eval-every 20 --fsm-epochs 2 --student-epochs 10
	$(RUN) evaluate.py runs/demo --json runs/demo/results.json --markdown runs/demo/results.md
	$(RUN) predict.py runs/demo --data synthetic --count 4 --panel runs/demo/panel.png

bench: .venv/installed
	$(RUN) -m benchmarks.bench_kernels
	$(RUN) -m benchmarks.bench_steps

reproduce: .venv/installed
	$(RUN) -m benchmarks.reproduce

lint:
	ruff check .

clean:
	rm -rf .venv runs
