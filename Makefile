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
OPT      := -O1 -g
endif
# One folder of objects for each way of building, so that changing a flag never mixes two builds.
empty    :=
comma    := ,
BUILD    := build/$(notdir $(CXX))-$(MARCH)$(subst $(comma),-,$(SANITIZE:%=-%))
CXXFLAGS := -std=c++20 $(OPT) -march=$(MARCH) -fopenmp $(WARN) $(SANFLAGS) $(EXTRA)
TESTFLAGS := $(if $(DOCTEST_DIR),-I$(DOCTEST_DIR))

train_gpt: $(BUILD)/train_gpt data/stories/dataset.json
	@cp $< $@
prepare_data: $(BUILD)/prepare_data
	@cp $< $@
$(BUILD)/%: %.cpp tinygpt.hpp | $(BUILD)
	$(CXX) $(CXXFLAGS) $< -o $@
$(BUILD):
	@mkdir -p $@
data/stories/dataset.json: | prepare_data
	./prepare_data

# The tests. FILTER="matmul*" runs those whose names match.
test: $(BUILD)/test_gpt
	OMP_WAIT_POLICY=passive $(BUILD)/test_gpt $(FILTER:%=-tc="%")
$(BUILD)/test_gpt: $(BUILD)/test_cpu.o
	$(CXX) $(CXXFLAGS) $^ -o $@
$(BUILD)/test_cpu.o: test_gpt.cpp tinygpt.hpp prepare_data.cpp | $(BUILD)
	$(CXX) $(CXXFLAGS) $(if $(SANITIZE),,-O2) $(TESTFLAGS) -c $< -o $@

# Data that others made: fetched on request, checked, never part of the repository.
SHAKESPEARE_URL := https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
SHAKESPEARE_SHA := 86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed
GPT2_URL        := https://openaipublic.blob.core.windows.net/gpt-2/encodings/main
VOCAB_SHA       := 1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5
ENCODER_SHA     := 196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783
shakespeare:
	@checks/fetch.sh "$(or $(URL),$(SHAKESPEARE_URL))" $(SHAKESPEARE_SHA) data/tinyshakespeare.txt
gpt2-vocab:
	@checks/fetch.sh "$(or $(URL),$(GPT2_URL))/vocab.bpe" $(VOCAB_SHA) data/gpt2/vocab.bpe
	@checks/fetch.sh "$(or $(URL),$(GPT2_URL))/encoder.json" $(ENCODER_SHA) data/gpt2/encoder.json

clean:
	rm -rf build train_gpt train_gpt_cu prepare_data
.PHONY: train_gpt prepare_data test shakespeare gpt2-vocab clean
