# Builds, tests and shows flightsvc. `make` lists what there is to make. Needs Go, Python 3.11, a JDK 17,
# gcc and make; all else is installed below this folder (.venv, bin, build) at pinned versions.

PYTHON  ?= python3
UV      := build/uv/bin/uv
VENV    := .venv
PY      := $(VENV)/bin/python
SITE    := $(VENV)/lib/python3.11/site-packages
TF      := build/libtensorflow
GLIBC   := build/glibc-2.28
OLDER   := build/tensorflow-2.19

MAVEN        := build/maven/bin/mvn
MAVEN_URL    := https://repo.maven.apache.org/maven2/org/apache/maven/apache-maven/3.9.16/apache-maven-3.9.16-bin.tar.gz
MAVEN_SHA512 := 831a8591fe20c8243b1dbe7d71e3244f31d1665b0804b2e825e38cbbe5ce0cafb8338851f90780735568773e0a6cd07bbec107cda0b896b008b861075358b6f6
PLUGIN       := build/spark-plugin/flightsvc-spark-plugin.jar
JAVA_CLIENT  := build/java-client/flightsvc-java-client.jar
S3           := build/s3/versitygw

VERSION := $(shell cat VERSION)
WHEEL   := dist/flightsvc-$(VERSION)-py3-none-manylinux_2_28_x86_64.whl
COMMIT  := $(shell git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
LDFLAGS := -s -w -X flightsvc/internal/build.Version=$(VERSION) -X flightsvc/internal/build.Commit=$(COMMIT) \
           -extldflags "-B$(CURDIR)/$(GLIBC) -Wl,-z,lazy -Wl,--allow-shlib-undefined"
SOURCES := $(shell find cmd handlers gpu modelcache internal -name '*.go' -o -name '*.c' -o -name '*.h') go.mod go.sum VERSION

# The compiler finds TensorFlow by variables of its own, and all go commands have the same flags: what Go compiles
# then depends neither on the command nor on where this folder lies, and is compiled once.
export GOFLAGS         := -trimpath
export CPATH           := $(CURDIR)/$(TF)/include
export LIBRARY_PATH    := $(CURDIR)/$(TF)
export LD_LIBRARY_PATH := $(CURDIR)/$(TF):$(LD_LIBRARY_PATH)
export PYSPARK_PYTHON  := $(CURDIR)/$(PY)

# Two recipes run beside each other; what they write is whole lines.
MAKEFLAGS += --jobs=2

# Notes the seconds of a command for the table at the end of a run.
CLOCK  := $(PYTHON) tools/suites.py --clock
SUITES := $(PYTHON) tools/suites.py
PYTEST := $(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=5 pyspark-shim/tests
RUFF   := pyspark-shim examples benchmarks testdata tools internal
GO     := cmd handlers gpu modelcache internal benchmarks

# Packages that start goroutines and do not link the drivers of the stores, which compile for minutes. `make prove` races all.
RACED  := ./cmd/flightsvc-runner ./gpu ./handlers/... ./internal/batch ./internal/client ./internal/rundir ./modelcache ./modelcache/tuning

.PHONY: help build wheel demo show check test test-go test-race test-fuzz test-python test-spark lint lint-go lint-python format fuzz prove bench bench-quick bench-pictures bench-tuning spark-plugin java-client s3 spark-3.5 lock clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

build: bin/flightsvc bin/flightsvc-runner $(VENV)/.shim ## both binaries into bin/, the Python package into .venv

wheel: $(WHEEL) ## the package with both programs and the Spark plugin, for pip, into dist/

demo: ## Spark labels photographs through flightsvc; ends with a table and build/demo.png
	@$(SUITES) show

show: build
	@$(CLOCK) $@ '$(PY) examples/demo.py'

check: export SKIPPED := or slow
check: ## before every commit: lint, types, Go, Python without Java; 4 minutes
	@$(SUITES) lint-go lint-python test-go test-python

test: export FRESH := -count=1
test: ## what CI runs: all suites; 10 minutes
	@$(SUITES) lint-go lint-python test-go test-fuzz test-python test-spark

lint: lint-go lint-python ## the house rules, gofmt, go vet, staticcheck, ruff, mypy

lint-go: | $(TF)
	@$(CLOCK) $@ 'test -z "$$(gofmt -l $(GO))" || { gofmt -d $(GO); exit 1; }; go vet ./... && go tool staticcheck ./...'

lint-python: $(VENV)/.locked
	@$(CLOCK) $@ '$(PYTHON) tools/house.py && \
		$(VENV)/bin/ruff check --quiet --config pyspark-shim/pyproject.toml $(RUFF) && \
		$(VENV)/bin/ruff format --quiet --check --config pyspark-shim/pyproject.toml $(RUFF) && \
		$(VENV)/bin/mypy --no-error-summary --config-file pyspark-shim/pyproject.toml pyspark-shim/src'

# Seeds of fuzz targets run without the race detector, which makes the largest ones take seconds.
test-go: build build/models/.done $(S3)
	@$(CLOCK) $@ 'go test -vet=off $(FRESH) -race -skip ^Fuzz -timeout 10m $(RACED) && \
		go test -vet=off $(FRESH) -run ^Fuzz ./handlers/... && \
		go test -vet=off $(FRESH) -timeout 10m $(filter-out $(shell go list $(RACED)),$(shell go list ./...))'

test-race: build build/models/.done $(S3) ## all Go tests under the race detector
	@go test -race -timeout 15m ./...

test-fuzz: build
	@$(CLOCK) $@ '$(PY) tools/fuzz.py --executions 20000 --parallel 1 --unguided'

test-python: build build/models/.done $(VENV)/.compiled
	@$(CLOCK) $@ '$(PYTEST) -m "not (spark or java or wheel $(SKIPPED))"'

test-spark: build build/models/.done $(VENV)/.compiled $(PLUGIN) $(JAVA_CLIENT) $(WHEEL)
	@$(CLOCK) $@ '$(PYTEST) -m "spark or java or wheel"'

format: build ## rewrite Go and Python in the house format
	@gofmt -w $(GO)
	@$(VENV)/bin/ruff check --quiet --fix --config pyspark-shim/pyproject.toml $(RUFF)
	@$(VENV)/bin/ruff format --quiet --config pyspark-shim/pyproject.toml $(RUFF)

fuzz: build ## every parser of bytes off the wire, 1,000,000 executions each
	@$(PY) tools/fuzz.py

prove: build build/models/.done $(PLUGIN) $(JAVA_CLIENT) $(S3) $(WHEEL) $(OLDER) $(VENV)/.compiled build/spark-3.5/.locked ## the full counts of every promise, into build/prove.json; resumes where it stopped
	@$(PY) tools/prove.py

bench: build build/models/.done $(VENV)/.compiled ## start-up and latency, as ratios to an echo, into build/bench/
	@$(PY) benchmarks/latency.py

bench-quick: build build/models/.done $(VENV)/.compiled ## EfficientNet-Lite0 on 1,000 pictures: ours beside predict_batch_udf, into build/bench/; 10 minutes
	@$(PY) benchmarks/quick.py

bench-pictures: build build/models/.done $(VENV)/.compiled ## decode and resize beside the same kernels in tf.data, into build/bench/
	@$(PY) benchmarks/pictures.py

bench-tuning: build build/models/.done $(VENV)/.compiled ## what tuning chooses for two networks, beside the best there is and a raw session, into build/bench/
	@$(PY) benchmarks/tuning.py

spark-plugin: $(PLUGIN) ## the Spark plugin, a jar, into build/spark-plugin/ and the Python package

java-client: $(JAVA_CLIENT) ## the client in Java, an example, into build/java-client/

s3: $(S3) ## an S3-compatible server for trying things, on port 9000 of this host; its bucket is build/s3/data/models
	@mkdir -p build/s3/data/models build/s3/about
	@echo 'AWS_ACCESS_KEY_ID=flightsvc AWS_SECRET_ACCESS_KEY=flightsvc'
	@echo 's3://models/NAME?endpoint=http://127.0.0.1:9000&use_path_style=true&region=us-east-1'
	@$(S3) --access flightsvc --secret flightsvc --port 127.0.0.1:9000 posix --sidecar build/s3/about build/s3/data

spark-3.5: build/spark-3.5/.locked ## an environment with Spark 3.5, into build/spark-3.5

lock: $(UV) ## renew the locked requirements in pyspark-shim from the files .in beside them
	@for name in requirements requirements-3.5; do $(UV) pip compile --quiet --generate-hashes --no-header \
		--no-emit-index-url --python-version 3.11 pyspark-shim/$$name.in -o pyspark-shim/$$name.lock || exit 1; done

clean: ## remove what was built, but not .venv
	rm -rf bin dist build/bench build/java-client build/demo build/demo.png build/models build/prove build/prove.json build/spark-plugin \
		pyspark-shim/src/flightsvc/_bin pyspark-shim/src/flightsvc/_jars

# How it is made.

# Front and runner check that they are of one build, so they are always built together.
bin/flightsvc bin/flightsvc-runner &: $(SOURCES) | $(TF) $(GLIBC) build/.compiled
	@echo "building bin/flightsvc and bin/flightsvc-runner"
	@LDFLAGS='$(LDFLAGS)' $(CLOCK) programs 'go build -ldflags "$$LDFLAGS" -o bin/flightsvc ./cmd/flightsvc && \
		go build -ldflags "$$LDFLAGS" -o bin/flightsvc-runner ./cmd/flightsvc-runner'

# What needs no TensorFlow is compiled while that is installed.
build/.compiled:
	@echo "compiling Go packages (minutes)"
	@mkdir -p build
	@$(CLOCK) 'download of Go modules' 'go list -deps ./cmd/... >/dev/null'
	@$(CLOCK) 'Go packages without TensorFlow' 'go list -f "{{.ImportPath}} {{.Deps}}" ./cmd/... ./internal/... | \
		grep -v flightsvc/internal/tensorflow | cut -d" " -f1 | xargs go build'
	@touch $@

$(UV):
	@echo "installing uv"
	@$(PYTHON) -c 'import sys; assert sys.version_info[:2] == (3, 11), "flightsvc is built with Python 3.11; set PYTHON=python3.11"'
	@$(PYTHON) -m venv build/uv
	@$(CLOCK) 'download of uv' 'build/uv/bin/pip install --quiet --disable-pip-version-check uv==0.13.9'

$(VENV)/.locked: pyspark-shim/requirements.lock | $(UV)
	@echo "installing Python dependencies into .venv (about 2.5 GB, TensorFlow and Spark)"
	@test -x $(PY) || $(UV) venv --quiet --python $(PYTHON) $(VENV)
	@$(CLOCK) 'Python packages' 'VIRTUAL_ENV=$(VENV) $(UV) pip sync --require-hashes pyspark-shim/requirements.lock'
	@touch $@

# As pip does it: where Python may not write beside its packages, TensorFlow else imports in 10 s, not 4.
$(VENV)/.compiled: $(VENV)/.locked
	@echo "compiling Python packages in .venv"
	@$(PY) -m compileall -qq -j 2 $(SITE) || true # some packages hold files that are not for this Python
	@touch $@

$(VENV)/.shim: $(VENV)/.locked pyspark-shim/pyproject.toml VERSION bin/flightsvc bin/flightsvc-runner
	@mkdir -p pyspark-shim/src/flightsvc/_bin
	@ln -sfn $(CURDIR)/bin/flightsvc $(CURDIR)/bin/flightsvc-runner pyspark-shim/src/flightsvc/_bin/
	@VIRTUAL_ENV=$(VENV) $(UV) pip install --quiet --no-deps --no-build-isolation --editable pyspark-shim
	@touch $@

$(WHEEL): $(VENV)/.shim $(PLUGIN) pyspark-shim/setup.py tools/wheel.py $(shell find pyspark-shim/src pyspark-shim/scripts -name '*.py' -o -name flightsvc -type f)
	@echo "making $@"
	@$(PY) tools/wheel.py dist $(SITE)/tensorflow

# The oldest TensorFlow that answers are compared on; of the package only its libraries.
$(OLDER): | $(UV)
	@echo "installing the libraries of TensorFlow 2.19.1 into $@ (downloads 250 MB, keeps 750 MB)"
	@rm -rf $@ $@.all
	@$(UV) pip install --quiet --no-cache --no-deps --python $(PYTHON) --target $@.all tensorflow-cpu==2.19.1
	@mkdir -p $@/tensorflow && mv $@.all/tensorflow/libtensorflow*.so.2 $@/tensorflow/
	@rm -rf $@.all

# The library and the headers lie in the tensorflow wheel; the linker wants them under other names.
$(TF): $(VENV)/.locked
	@mkdir -p $(TF)
	@ln -sfn $(CURDIR)/$(SITE)/tensorflow/include $(TF)/include
	@ln -sfn $(CURDIR)/$(SITE)/tensorflow/libtensorflow_cc.so.2 $(TF)/libtensorflow_cc.so.2
	@ln -sfn $(CURDIR)/$(SITE)/tensorflow/libtensorflow_cc.so.2 $(TF)/libtensorflow.so
	@ln -sfn $(CURDIR)/$(SITE)/tensorflow/libtensorflow_framework.so.2 $(TF)/libtensorflow_framework.so.2
	@ln -sfn $(CURDIR)/$(SITE)/tensorflow/libtensorflow_framework.so.2 $(TF)/libtensorflow_framework.so
	@touch $(TF)

# Both programs run on every glibc since 2.28, whatever glibc this machine has. zig goes when the folder is made.
$(GLIBC): tools/glibc.sh | $(UV)
	@echo "making what gcc needs to link for glibc 2.28 (20 s; downloads zig, 100 MB)"
	@$(CLOCK) zig '$(UV) pip install --no-cache --no-deps --python $(PYTHON) --target build/zig ziglang==0.17.1'
	@tools/glibc.sh build/zig/ziglang/zig $@
	@rm -rf build/zig
	@touch $@

# Two Sparks cannot live in one environment; the tests start this one's Python.
build/spark-3.5/.locked: pyspark-shim/requirements-3.5.lock | $(UV)
	@echo "installing Spark 3.5 into build/spark-3.5 (about 600 MB)"
	@test -x build/spark-3.5/bin/python || $(UV) venv --quiet --python $(PYTHON) build/spark-3.5
	@VIRTUAL_ENV=build/spark-3.5 $(UV) pip sync --quiet --compile-bytecode --require-hashes pyspark-shim/requirements-3.5.lock
	@touch $@

build/models/.done: pyspark-shim/tests/make_models.py $(VENV)/.locked
	@echo "making the models for the tests"
	@$(CLOCK) models '$(PY) pyspark-shim/tests/make_models.py build/models'
	@touch $@

# The Java client's tests build nothing: they take the jar.
$(MAVEN):
	@echo "installing Maven into build/maven"
	@mkdir -p build/maven
	@$(PYTHON) -c 'import urllib.request; urllib.request.urlretrieve("$(MAVEN_URL)", "build/maven.tar.gz")'
	@echo "$(MAVEN_SHA512)  build/maven.tar.gz" | sha512sum --check --quiet
	@tar -xzf build/maven.tar.gz --strip-components=1 -C build/maven
	@rm build/maven.tar.gz

# A module of its own: nothing of it is in the product.
$(S3): tools/s3/go.mod tools/s3/go.sum
	@echo "building the S3-compatible server for the tests (a minute)"
	@$(CLOCK) 'S3 server' 'cd tools/s3 && CGO_ENABLED=0 go build -o $(CURDIR)/$(S3) github.com/versity/versitygw/cmd/versitygw'

$(PLUGIN): spark-plugin/pom.xml $(shell find spark-plugin/src -name '*.java') | $(MAVEN)
	@echo "building the Spark plugin"
	@$(MAVEN) --batch-mode --quiet --no-transfer-progress -Dmaven.repo.local=$(CURDIR)/build/m2 -f spark-plugin package
	@mkdir -p pyspark-shim/src/flightsvc/_jars
	@ln -sfn $(CURDIR)/$(PLUGIN) pyspark-shim/src/flightsvc/_jars/
	@touch $@

$(JAVA_CLIENT): examples/java-client/pom.xml $(shell find examples/java-client/src -name '*.java') | $(MAVEN)
	@echo "building the Java client"
	@$(MAVEN) --batch-mode --quiet --no-transfer-progress -Dmaven.repo.local=$(CURDIR)/build/m2 -f examples/java-client package
	@touch $@
