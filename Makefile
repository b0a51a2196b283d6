# make install   the environment .venv, with the command megadistill in it
# make check     format, lint, types, import layers
# make smoke     the whole job on this machine: text, teacher, two students, a table
# make pictures  the pictures of docs/images, of what `make smoke` made; needs chromium
# make test      the tests that need no cluster, within 20 minutes on two cores
# make test-all  what `make test` leaves out: a Slurm of its own, the commands of a built wheel, and the fault drill
# make drill     every fault that a run must survive, on a real run (about ten minutes)
# make results   the table of docs/results/distillation.md: 26 small runs, within an hour; resumes where it stopped
# make lock      the versions in constraints.txt, from the environment that just passed

PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/.ready
SMOKE := runs/smoke

# The ranks of a CPU run share its cores.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false

.PHONY: install smoke pictures test test-all drill results check format lock clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

ACTIVATE = @echo "megadistill is in $(BIN); to have it on your PATH, type: source $(BIN)/activate"

install: $(READY)
	$(ACTIVATE)

test: $(READY)
	$(BIN)/python -m pytest --ignore tests/slurm -m 'not thorough'

test-all: $(READY)
	$(BIN)/python -m pytest tests/slurm -rs
	$(BIN)/python -m pytest tests/e2e -m thorough
	$(BIN)/python -m tests.drill

drill: $(READY)
	$(BIN)/python -m tests.drill

results: $(READY)
	$(BIN)/python -m benchmarks.distillation

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# torch's build decides on triton and the CUDA libraries: a version of another build would refuse it.
lock: $(READY)
	( sed -n '1p' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | \
	    sed -e 's/+cpu$$//' -e '/^triton==/d' -e '/^nvidia-/d' ) > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf $(SMOKE)

# The main job, by the commands that a cluster uses. A second `make smoke` resumes where the first one stopped.
smoke: $(SMOKE)/labels-hf/config.json $(SMOKE)/distill-hf/config.json
	$(BIN)/megadistill evaluate $(SMOKE)/labels-hf $(SMOKE)/distill-hf --teacher $(SMOKE)/teacher-hf \
	    --data $(SMOKE)/data/heldout/manifest.json --json $(SMOKE)/evaluation.json
	$(BIN)/megadistill report $(SMOKE)/teacher $(SMOKE)/labels $(SMOKE)/distill --evaluation $(SMOKE)/evaluation.json \
	    --output $(SMOKE)
	@echo "curves: $(BIN)/tensorboard --logdir $(SMOKE)"
	$(ACTIVATE)

# docs/images: the report, calibration and deciles of the smoke runs, and the timeline of a plan.
pictures: $(READY)
	$(BIN)/python -m benchmarks.pictures $(SMOKE)
	$(BIN)/megadistill timeline recipes/llama3-70b-to-8b/8-nodes.yaml --nodes 8 --gpus-per-node 8 --gpu h100 \
	    --sequence-length 8192 --teacher-config recipes/models/llama-3.1-70b --output $(SMOKE)/timeline
	cp $(SMOKE)/timeline/timeline.png docs/images/timeline-plan.png

$(SMOKE)/data/heldout/manifest.json: | $(READY)
	rm -rf $(SMOKE)/data
	$(BIN)/megadistill tokenize "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')" \
	    --include '*.py' --exclude '*test*' --exclude 'site-packages/*' --exclude 'idlelib/*' \
	    --vocab-size 2000 --sequence-length 128 --heldout-fraction 0.03 --output $(SMOKE)/data

$(SMOKE)/teacher-hf/config.json: $(SMOKE)/data/heldout/manifest.json
	rm -rf $(SMOKE)/teacher-hf
	$(BIN)/torchrun --standalone --nproc_per_node 2 -m megadistill train recipes/smoke-teacher.yaml
	$(BIN)/megadistill export $(SMOKE)/teacher --output $(SMOKE)/teacher-hf --max-shard-mb 4

$(SMOKE)/labels-hf/config.json: $(SMOKE)/data/heldout/manifest.json
	rm -rf $(SMOKE)/labels-hf
	OMP_NUM_THREADS=2 $(BIN)/megadistill train recipes/smoke-labels.yaml
	$(BIN)/megadistill export $(SMOKE)/labels --output $(SMOKE)/labels-hf

# Stopped half-way on purpose, then started again by the same command: it resumes from its checkpoint.
$(SMOKE)/distill-hf/config.json: $(SMOKE)/teacher-hf/config.json
	rm -rf $(SMOKE)/distill-hf
	$(BIN)/deepspeed --num_gpus 2 --module megadistill train recipes/smoke.yaml --stop-after 200
	$(BIN)/deepspeed --num_gpus 2 --module megadistill train recipes/smoke.yaml
	$(BIN)/megadistill export $(SMOKE)/distill --output $(SMOKE)/distill-hf
