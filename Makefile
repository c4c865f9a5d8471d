# make train_gpt && ./train_gpt       train on the default corpus, on the CPU
# make train_gpt_cu && ./train_gpt_cu the same on the GPU
# make test                           every check that fits into four minutes
# make test SANITIZE=address,undefined    make train_gpt MARCH=x86-64-v3    make test CXX=clang++
CXX      ?= g++
MARCH    ?= native
OPT      ?= -O3
WARN     := -Wall -Wextra -Wpedantic
SANITIZE ?=
DOCTEST_DIR ?=
ifneq ($(SANITIZE),)
SANFLAGS := -fsanitize=$(SANITIZE) -fno-omit-frame-pointer -fno-sanitize-recover=undefined
OPT      := -O1 -g -D_GLIBCXX_ASSERTIONS
endif
# The thread sanitizer needs clang, whose OpenMP tells it about barriers; it knows no emulated GPU.
ifeq ($(SANITIZE),thread)
override CXX := clang++
TEST_PARTS   := cpu
TEST_ENV     := TSAN_OPTIONS=suppressions=checks/tsan.supp
endif
# Each way of building has its own folder of objects.
comma    := ,
BUILD    := build/$(notdir $(CXX))-$(MARCH)$(subst $(comma),-,$(SANITIZE:%=-%))
CXXFLAGS := -std=c++20 $(OPT) -fno-math-errno -march=$(MARCH) -fopenmp $(WARN) $(SANFLAGS) $(EXTRA)
# Apple's clang has no OpenMP of its own: brew install libomp. On Apple's CPUs "native" is -mcpu's word.
ifeq ($(shell uname -s)$(findstring clang,$(shell $(CXX) --version 2>/dev/null)),Darwinclang)
OMP_DIR  ?= $(firstword $(wildcard /opt/homebrew/opt/libomp /usr/local/opt/libomp) /opt/homebrew/opt/libomp)
CXXFLAGS := $(subst -march=native,-mcpu=native,$(subst -fopenmp,-Xpreprocessor -fopenmp -I$(OMP_DIR)/include \
    -L$(OMP_DIR)/lib -lomp -Wno-unused-command-line-argument,$(CXXFLAGS)))
endif
# Where memory is short: one file at a time, and a compiler that frees memory early (g++; half of it, in twice the time).
MEMORY   := $(shell awk '/^MemAvailable/ {print int($$2 / 1024)}' /proc/meminfo 2>/dev/null)
SHORT_OF_MEMORY := $(shell [ $(or $(MEMORY),9999) -lt 3000 ] && echo yes)
ifeq ($(SHORT_OF_MEMORY)$(findstring clang,$(CXX)),yes)
CXXFLAGS += --param ggc-min-expand=20 --param ggc-min-heapsize=65536
endif
TESTFLAGS := $(if $(DOCTEST_DIR),-I$(DOCTEST_DIR))
# Two files at a time, unless make was told otherwise.
ifeq ($(filter -j%,$(MAKEFLAGS))$(SHORT_OF_MEMORY),)
MAKEFLAGS += -j2
endif

# Runs a command that takes a while: says what it makes, and at the end how long that took. V=1 shows the command.
say   = $(if $(V),,@)echo "$(1) ..." && began=$$(date +%s) && $(2) && echo "$(1): done, $$(($$(date +%s) - began)) s"
# Ends with a line on what to install where a program or a file is missing.
need  = $(if $(V),,@)$(1) > /dev/null 2>&1 || { echo "error: $(2)" >&2; exit 1; }
APT  := $(if $(shell command -v sudo),sudo )apt-get install

# train_gpt is built beside prepare_data, which then writes the default corpus.
train_gpt: $(BUILD)/train_gpt data/stories/dataset.json
	@cp $< $@
prepare_data: $(BUILD)/prepare_data
	@cp $< $@
$(BUILD)/%: %.cpp tinygpt.hpp | $(BUILD)
	$(call say,compiling $<,$(CXX) $(CXXFLAGS) $< -o $@)
$(BUILD):
	$(call need,command -v $(firstword $(CXX)),there is no $(firstword $(CXX)) here: $(APT) g++)
	$(call need,printf '\043include <omp.h>' | $(CXX) $(CXXFLAGS) -E -x c++ -,$(CXX) has no OpenMP here: $(APT) libomp-dev; on macOS brew install libomp)
	@mkdir -p $@
data/stories/dataset.json: | prepare_data
	$(if $(V),,@)./prepare_data

# Several processes, or GPUs, train one model: docs/many-machines.md. Needs MPI; on GPUs NCCL too.
MPICXX   ?= mpicxx
MPI      := -DTINYGPT_MPI -DOMPI_SKIP_MPICXX -DMPICH_SKIP_MPICXX
MPICOMPILE = OMPI_CXX="$(CXX)" MPICH_CXX="$(CXX)" $(MPICXX) $(CXXFLAGS) $(MPI)
NEED_MPI  = $(call need,command -v $(MPICXX),there is no $(MPICXX) here: $(APT) libopenmpi-dev openmpi-bin)
train_gpt_mpi: $(BUILD)/train_gpt_mpi data/stories/dataset.json
	@cp $< $@
$(BUILD)/train_gpt_mpi: train_gpt.cpp tinygpt.hpp | $(BUILD)
	$(NEED_MPI)
	$(call say,compiling $< for ranks,$(MPICOMPILE) $< -o $@)

# CUDA: for every GPU of this machine; without one, for those named in CUDA_ARCHS. Beside it code that a driver
# compiles for later GPUs (PTX). Each list of architectures has a folder of its own, and is asked for only where it
# is built.
NVCC       ?= $(or $(shell command -v nvcc),/usr/local/cuda/bin/nvcc)
GPUS_HERE   = $(sort $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sed -n 's/^\([0-9]*\)\.\([0-9]*\)$$/\1\2/p'))
NVCC_KNOWS  = $(patsubst sm_%,%,$(shell $(NVCC) --list-gpu-code 2>/dev/null))
CUDA_ARCHS ?= $(or $(patsubst 90,90a,$(GPUS_HERE)),75 80 90a)
GENCODE     = $(foreach a,$(filter-out ptx,$1),-gencode=arch=compute_$(a),code=sm_$(a)) -gencode=arch=compute_80,code=compute_80
NVFLAGS     = -std=c++20 -O3 -diag-suppress 1675 -Xcompiler -fopenmp,-march=$(MARCH),-Wall,-Wextra,-Wno-restrict,-Wno-parentheses
CUDA_SOURCE := train_gpt.cu train_gpt.cpp tinygpt.hpp
NEED_NVCC   = $(call need,command -v $(NVCC),there is no nvcc here: install the CUDA Toolkit 12 or 13 (developer.nvidia.com/cuda-downloads) or name it: NVCC=...; without a GPU: make train_gpt_cu_on_cpu)
train_gpt_cu: data/stories/dataset.json
	$(NEED_NVCC)
	+@$(call build_cuda,$@) && cp $$folder/$@ $@
train_gpt_cu_mpi: data/stories/dataset.json
	$(NEED_NVCC)
	+@$(call build_cuda,$@) && cp $$folder/$@ $@
test_gpt_cu: build/test_gpt_cu
	$<
build/test_gpt_cu:
	$(NEED_NVCC)
	$(NEED_DOCTEST)
	+@$(call build_cuda,$(@F)) && cp $$folder/$(@F) $@
# Leaves out what this nvcc cannot compile: for a newer GPU there is PTX; an older one ends it.
build_cuda = archs=; for a in $(CUDA_ARCHS); do case " $(NVCC_KNOWS) " in \
	    *" $${a%a} "*) archs="$$archs $$a";; \
	    *) [ $${a%a} -gt 80 ] || { echo "this nvcc does not compile for compute capability $$a: it knows $(NVCC_KNOWS);" \
	        "CUDA Toolkit 12 has 50 to 90 (NVCC=...), or type make train_gpt && ./train_gpt"; exit 1; };; esac; done; \
	folder=build/cuda-$(MARCH)$$(echo "$$archs ptx" | tr ' ' -); echo "building for compute capability$$archs, and later ones"; \
	$(MAKE) --no-print-directory $$folder/$1
build/cuda-$(MARCH)-%/train_gpt_cu: $(CUDA_SOURCE)
	@mkdir -p $(@D)
	$(call say,compiling $<,$(NVCC) $(NVFLAGS) --threads 0 $(call GENCODE,$(subst -, ,$*)) $< -o $@ -lcublasLt)
build/cuda-$(MARCH)-%/train_gpt_cu_mpi: $(CUDA_SOURCE)
	$(NEED_MPI)
	@mkdir -p $(@D)
	$(call say,compiling $< for ranks,$(NVCC) -ccbin $(MPICXX) $(NVFLAGS) $(MPI) --threads 0 $(call GENCODE,$(subst -, ,$*)) $< -o $@ -lcublasLt -lnccl)
build/cuda-$(MARCH)-%/test_gpt_cu: test_gpt.cpp $(CUDA_SOURCE)
	@mkdir -p $(@D)
	$(call say,compiling the tests of the GPU,$(NVCC) $(NVFLAGS) --threads 0 $(call GENCODE,$(subst -, ,$*)) $(TESTFLAGS) -DTINYGPT_TEST_CUDA -x cu $< -o $@ -lcublasLt)

# The same kernels on the CPU, without the CUDA Toolkit: cuda_on_cpu/README.md.
EMULATOR   := $(wildcard cuda_on_cpu/*.h cuda_on_cpu/*.hpp)
ON_CPU     := -Icuda_on_cpu -I. -g -Wno-unused-parameter
$(BUILD)/translate: cuda_on_cpu/translate.cpp | $(BUILD)
	@$(MAKE) --no-print-directory -C cuda_on_cpu BUILD=$(abspath $(BUILD)) $(abspath $@)
$(BUILD)/train_gpt_cu.cpp: train_gpt.cu $(BUILD)/translate
	$(if $(V),,@)$(BUILD)/translate $< $@
train_gpt_cu_on_cpu: $(BUILD)/train_gpt_cu.cpp $(CUDA_SOURCE) $(EMULATOR)
	$(call say,compiling the CUDA kernels for the CPU,$(CXX) $(CXXFLAGS) -O2 $(ON_CPU) $< -o $@)
train_gpt_cu_mpi_on_cpu: $(BUILD)/train_gpt_cu.cpp $(CUDA_SOURCE) $(EMULATOR)
	$(NEED_MPI)
	$(call say,compiling $< for ranks,$(MPICOMPILE) -O2 $(ON_CPU) $< -o $@)

# The tests, CPU and CUDA in one program. FILTER="matmul*" runs those whose names match, a * being any text.
test: $(BUILD)/test_gpt
	$(if $(V),,@)OMP_WAIT_POLICY=passive $(TEST_ENV) $(BUILD)/test_gpt $(if $(FILTER),-tc="$(FILTER)")
	$(if $(FILTER),,$(if $(V),,@)checks/cuda_build.sh)
NEED_DOCTEST = $(call need,printf '\043include <doctest/doctest.h>' | $(CXX) $(TESTFLAGS) -E -x c++ -,the tests need doctest: $(APT) doctest-dev; or give DOCTEST_DIR=FOLDER that has doctest/doctest.h)
TEST_PARTS ?= cpu cuda
TEST_SOURCE := test_gpt.cpp prepare_data.cpp $(wildcard docs/embedding.cpp checks/*.hpp) $(CUDA_SOURCE)
$(BUILD)/test_gpt: $(TEST_PARTS:%=$(BUILD)/test_%.o)
	$(if $(V),,@)$(CXX) $(CXXFLAGS) $^ -rdynamic -o $@
$(BUILD)/test_cpu.o: $(TEST_SOURCE) | $(BUILD)
	$(NEED_DOCTEST)
	$(call say,compiling the tests of the CPU,$(CXX) $(CXXFLAGS) $(if $(SANITIZE),,-O2) $(TESTFLAGS) -c $< -o $@)
$(BUILD)/test_cuda.o: $(TEST_SOURCE) $(BUILD)/train_gpt_cu.cpp $(EMULATOR)
	$(NEED_DOCTEST)
	$(call say,compiling the tests of the CUDA kernels,$(CXX) $(CXXFLAGS) $(if $(SANITIZE),,-O2) $(TESTFLAGS) $(ON_CPU) -I$(BUILD) -DTINYGPT_TEST_CUDA -c $< -o $@)

# Data that others made: fetched on request, checked, never part of the repository. URL=... overrides.
HUB_URL  := https://huggingface.co/openai-community/gpt2/resolve/607a30d783dfa663caf39e06633721c8d4cfcd7e
GPT2_URL := https://openaipublic.blob.core.windows.net/gpt-2/encodings/main
BOOK_URL := https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
BOOK     := 86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed
VOCAB    := 1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5
ENCODER  := 196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783
WEIGHTS  := 248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707
CONFIG   := 0daed7749b4f02b8f76240d5444551d7b08712dab4d0adb8239c56ba823bb7b4
shakespeare:
	@checks/fetch.sh "$(or $(URL),$(BOOK_URL))" $(BOOK) data/tinyshakespeare.txt
gpt2-vocab: # the two files of the tokenizer
	@checks/fetch.sh "$(or $(URL),$(GPT2_URL))/vocab.bpe" $(VOCAB) data/gpt2/vocab.bpe
	@checks/fetch.sh "$(or $(URL),$(GPT2_URL))/encoder.json" $(ENCODER) data/gpt2/encoder.json
gpt2: # the published weights of GPT-2 small: 551 MB
	@checks/fetch.sh "$(or $(URL),$(HUB_URL))/config.json" $(CONFIG) data/gpt2/config.json 665
	@checks/fetch.sh "$(or $(URL),$(HUB_URL))/vocab.json" $(ENCODER) data/gpt2/vocab.json 1042301
	@checks/fetch.sh "$(or $(URL),$(HUB_URL))/merges.txt" $(VOCAB) data/gpt2/merges.txt 456318
	@checks/fetch.sh "$(or $(URL),$(HUB_URL))/model.safetensors" $(WEIGHTS) data/gpt2/model.safetensors 548105171

experiment: $(if $(NAME),train_gpt prepare_data)
	@checks/experiment.sh $(NAME)
compare: train_gpt prepare_data
	@checks/experiment.sh device
include checks/checks.mk  # check, nightly, torture, fuzz, tidy, plot, count: what `make test` is too short for

clean: ; rm -rf build cuda_on_cpu/build train_gpt train_gpt_cu train_gpt_cu_on_cpu train_gpt_mpi train_gpt_cu_mpi train_gpt_cu_mpi_on_cpu test_gpt_cu prepare_data
.PHONY: train_gpt train_gpt_cu train_gpt_mpi train_gpt_cu_mpi prepare_data test test_gpt_cu build/test_gpt_cu shakespeare gpt2-vocab gpt2 experiment compare clean
