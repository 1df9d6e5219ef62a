# make demo   a picture of "a red cube" from the shipped weights
# make test   the test suite
# make soak   kill the trainers again and again: they go on, to the same weights
# make lint   ruff: rules and format
# make tiny   the whole pipeline on the toy world: dVAE, prior, reranker, judge, a picture
PYTHON ?= python3
RUN ?= runs/tiny
BIN = .venv/bin

.PHONY: demo test soak tiny lint

demo: .venv/installed
	$(BIN)/python sample.py "a red cube" --run-dir pretrained/tiny

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

soak: .venv/installed
	$(BIN)/python tests/soak.py

tiny: .venv/installed
	$(BIN)/python train_dvae.py --tiny --run-dir $(RUN)
	$(BIN)/python train_prior.py --tiny --run-dir $(RUN)
	$(BIN)/python train_clip.py --tiny --run-dir $(RUN)
	$(BIN)/python -m lab.judge --run-dir $(RUN) --candidates 32 -o $(RUN)/rerank.png
	$(BIN)/python sample.py "a red cube" --run-dir $(RUN) -o $(RUN)/red_cube.png

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements-dev.txt
	touch $@
