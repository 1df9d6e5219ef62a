# make demo       a picture of "a red cube" from the shipped weights
# make test       the test suite
# make soak       kill the trainers again and again: they go on, to the same weights
# make lint       ruff: rules and format
# make tiny       the whole pipeline on the toy world: dVAE, prior, reranker, judge, a picture
# make emoji      the same on emoji in three styles, which npm brings
# make notebook   docs/walkthrough.ipynb from top to bottom, its outputs written anew
PYTHON ?= python3
RUN ?= runs/tiny
EMOJI = --run-dir runs/emoji --data emoji/train.tsv --val emoji/val.tsv
PAGE = docs/walkthrough.ipynb
BIN = .venv/bin

.PHONY: demo test soak tiny emoji notebook lint

demo: .venv/packages
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

emoji: .venv/installed emoji/train.tsv
	$(BIN)/python train_dvae.py --preset emoji $(EMOJI)
	$(BIN)/python train_prior.py $(EMOJI)
	$(BIN)/python train_clip.py $(EMOJI)
	$(BIN)/python -m lab.emoji --run-dir runs/emoji --candidates 32 -o runs/emoji/unseen.png
	$(BIN)/python sample.py "a 3D rocket" --run-dir runs/emoji -o runs/emoji/rocket.png

emoji/train.tsv: | .venv/installed
	$(BIN)/python -m data.emoji emoji

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

notebook: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/jupyter nbconvert --inplace --execute \
	  --ExecutePreprocessor.record_timing=False $(PAGE)
	$(BIN)/jupyter nbconvert --inplace --coalesce-streams $(PAGE)

.venv/packages: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.txt
	touch $@

.venv/installed: requirements-dev.txt .venv/packages
	$(BIN)/pip install --quiet --requirement requirements-dev.txt
	touch $@
