# What `make test` is too short for. Included by the Makefile.

# Sanitizers, other compilers and machines, the emulator's own tests, the CUDA compile, the README.
check: test
	$(MAKE) test SANITIZE=address,undefined
	$(MAKE) test SANITIZE=thread
	$(MAKE) tidy
	$(MAKE) valgrind
	$(MAKE) test CXX=clang++ OPT=-O2
	$(MAKE) portable
	$(MAKE) test_emulator
	$(MAKE) cuda_compiles
	$(MAKE) test_show
	$(MAKE) readme

# What the commands print at 80 x 24 and 120 x 40, in build/screens. Needs tmux.
screens: train_gpt
	checks/screens.sh

# Every command of README.md, in a fresh clone; what is skipped is listed with the reason.
readme:
	checks/readme.sh

# Compilers, systems and instruction sets, each built and run as far as it can be here: docs/platforms.md.
# Then the matmul, attention and gradient checks on other instruction sets; aarch64 under qemu-user.
PORTABLE := -std=c++20 -O2 -fopenmp $(WARN) -fno-math-errno -DTINYGPT_TEST_PORTABLE
portable: | $(BUILD)
	CHROOT="$(CHROOT)" LIBOMP="$(LIBOMP)" checks/portable.sh $(ROWS)
	for m in x86-64 x86-64-v3 x86-64-v4; do \
	    g++ $(PORTABLE) -march=$$m $(TESTFLAGS) test_gpt.cpp -o $(BUILD)/portable && \
	    $(BUILD)/portable -tc="matmul*,attention*,gradients*" || exit 1; done
	aarch64-linux-gnu-g++ $(PORTABLE) -static $(TESTFLAGS) test_gpt.cpp -o $(BUILD)/portable-aarch64
	qemu-aarch64 $(BUILD)/portable-aarch64 -tc="matmul*,attention*,gradients*"

# One run on 1, 2, 4 and 8 ranks: the same bytes, and what faults leave. Needs Open MPI; about a minute.
mpi_test: $(BUILD)/train_gpt $(BUILD)/train_gpt_mpi $(BUILD)/prepare_data train_gpt_cu_on_cpu train_gpt_cu_mpi_on_cpu
	checks/mpi_test.sh $(BUILD) ./train_gpt_cu_mpi_on_cpu ./train_gpt_cu_on_cpu

# The tests of cuda_on_cpu itself.
test_emulator:
	$(MAKE) -C cuda_on_cpu test CXX="$(CXX)" BUILD=$(abspath $(BUILD)) DOCTEST_DIR="$(DOCTEST_DIR)"

# nvcc compiles without a warning (nor waits for each wgmma), and the attention kernels keep everything in
# registers, of which those of a wgmma are left alone, and do nothing in fp64. checks/kernels.txt is what the
# emulator takes kernels to be: make kernel_table writes it anew.
CUOBJDUMP  ?= $(or $(shell command -v cuobjdump),$(wildcard $(dir $(NVCC))cuobjdump))
ARCHS      := 75 80 86 89 90a 100 120
NVCC_TRY    = $(NVCC) -std=c++20 -O3 -diag-suppress 1675 -Xcompiler -fopenmp,-march=$(MARCH),-Wall,-Wextra,-Wno-restrict,-Wno-parentheses
$(BUILD)/ptxas-%.txt: $(CUDA_SOURCE) | $(BUILD)
	$(NVCC_TRY) -gencode=arch=compute_$*,code=sm_$* -Xptxas -v -cubin train_gpt.cu -o $(BUILD)/k-$*.cubin > $@ 2>&1 || { cat $@; rm $@; exit 1; }
cuda_compiles: $(ARCHS:%=$(BUILD)/ptxas-%.txt)
	! $(NVCC_TRY) -gencode=arch=compute_80,code=compute_80 -c train_gpt.cu -o $(BUILD)/train_gpt_cu.o 2>&1 | grep .
	checks/kernels.py $(WRITE) checks/kernels.txt $^
	@if [ -n "$(CUOBJDUMP)" ]; then $(CUOBJDUMP) -sass $(BUILD)/k-90a.cubin | python3 checks/wgmma_registers.py; \
	    else echo "there is no cuobjdump here (CUOBJDUMP=...): the registers of wgmma were not checked"; fi
kernel_table:
	$(MAKE) cuda_compiles WRITE=--write

# CUDA 12.4 as Debian 13 has it, in a folder of its own: needs root, debootstrap and the network.
CUDA_12 ?= build/debian-13
cuda_12:
	[ -d $(CUDA_12)/usr/lib ] || debootstrap --variant=minbase --components=main,contrib,non-free trixie $(CUDA_12)
	[ -x $(CUDA_12)/usr/bin/nvcc ] || chroot $(CUDA_12) sh -c 'apt-get update -q && \
	    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends nvidia-cuda-toolkit g++ make python3'
	mkdir -p $(CUDA_12)/tinygpt && cp -r Makefile checks cuda_on_cpu train_gpt.cu train_gpt.cpp tinygpt.hpp $(CUDA_12)/tinygpt
	chroot $(CUDA_12) make -C tinygpt cuda_compiles MARCH=x86-64-v3 ARCHS="75 80 86 89 90a"

# The CUDA tests on cards, as the emulator plays them: all on one of each kind of shared memory, on the others what
# depends on a card's sizes; 7.x has no bf16 and no tf32. Then products and whole models with a cuBLASLt that refuses what
# is optional: all of it, or some.
CARDS ?= v100 t4 a100 rtx3060 rtx4090 h100 b200 rtx5090
CARD_TESTS := cuda: attention*,cuda: head*,cuda: layernorm*,cuda: linear*,cuda: loss*,cuda: no GPU*
cuda_cards: $(BUILD)/test_gpt
	for card in $(CARDS); do echo "$$card"; not=none; tests="$(CARD_TESTS)"; \
	    case $$card in v100 | t4) not='*bf16*,*Tf32*,cuda: every kernel*';; esac; \
	    case $$card in t4 | rtx4090 | h100) tests='cuda:*';; esac; \
	    TINYGPT_EMULATED_GPU=$$card OMP_WAIT_POLICY=passive $< -tc="$$tests" -tce="$$not" || exit 1; done
	for seed in 1 2 3; do CUDA_ON_CPU_REFUSALS=$$seed OMP_WAIT_POLICY=passive $< \
	    -tc="cuda: linear*,cuda: loss*,cuda: GELUs*,cuda: ten*,cuda: PyTorch*" || exit 1; done

# Kills and interrupts of processes: about three minutes, a table at the end.
torture: $(BUILD)/torture
	$< $(ARGS)
$(BUILD)/torture: checks/torture.cpp checks/runs.hpp checks/faults.hpp train_gpt.cpp tinygpt.hpp | $(BUILD)
	$(CXX) $(CXXFLAGS) $< -o $@

# libFuzzer on every parser: make fuzz SECONDS=60. What it finds stays in build/.../corpus and is where
# the next one begins. The time limit of an input is long: it is of the clock, and a machine may stand still.
SECONDS ?= 30
FUZZ_TARGETS := json safetensors shard checkpoint options config tokenizer
FUZZ_BUILD   := clang++ -std=c++20 -fopenmp checks/fuzz.cpp
$(BUILD)/fuzz: checks/fuzz.cpp train_gpt.cpp tinygpt.hpp | $(BUILD)
	$(FUZZ_BUILD) -O2 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined -o $@
fuzz: $(BUILD)/fuzz
	$< seeds $(BUILD)/corpus
	for t in $(FUZZ_TARGETS); do OMP_NUM_THREADS=1 ASAN_OPTIONS=quarantine_size_mb=8 $< $$t \
	    -max_total_time=$(SECONDS) -runs=10000000 -max_len=4096 -rss_limit_mb=256 -malloc_limit_mb=256 -timeout=120 \
	    -print_final_stats=1 $(BUILD)/corpus/$$t || exit 1; done
# The lines of every parser that what make fuzz has found reaches: at least 90 %.
fuzz_coverage:
	$(FUZZ_BUILD) -O1 -fsanitize=fuzzer -fprofile-instr-generate -fcoverage-mapping -o $(BUILD)/coverage
	for t in $(FUZZ_TARGETS); do OMP_NUM_THREADS=1 LLVM_PROFILE_FILE=$(BUILD)/corpus/$$t.raw \
	    $(BUILD)/coverage $$t -runs=0 $(BUILD)/corpus/$$t || exit 1; done
	llvm-profdata merge -sparse $(BUILD)/corpus/*.raw -o $(BUILD)/corpus.profile
	python3 checks/fuzz_coverage.py $(BUILD)/coverage $(BUILD)/corpus.profile

# Against transformers, both ways, and against llama.cpp. Needs Python with torch, transformers and
# llama-cpp-python; PYTHON=... names it.
PYTHON ?= python3
test_hf: $(BUILD)/train_gpt $(BUILD)/prepare_data
	$(PYTHON) checks/test_hf.py $(BUILD)/train_gpt $(BUILD)/prepare_data

# Pages of `train_gpt show` in a real browser. Needs chromium.
test_show: $(BUILD)/train_gpt $(BUILD)/prepare_data
	$(PYTHON) checks/test_show.py $(BUILD)/train_gpt
# docs/show-*.png: each panel, of the default run.
show_pictures: $(BUILD)/train_gpt out/stories/log.csv
	$(PYTHON) checks/test_show.py $(BUILD)/train_gpt docs out/stories
out/stories/log.csv: | train_gpt
	./train_gpt

nightly: check torture cuda_cards cuda_12
	python3 checks/mutate.py cuda
	$(MAKE) fuzz SECONDS=1200
	$(MAKE) fuzz_coverage

# Curves of runs side by side: make plot RUNS="out/a out/b"; without RUNS, all in out/.
plot:
	@RUNS="$(or $(RUNS),$(patsubst %/log.csv,%,$(wildcard out/*/log.csv)))" OUT="$(OUT)" checks/plot.sh

# What the compilers do not say. Their configurations, with reasons: .clang-tidy, checks/cppcheck.txt.
tidy:
	clang-tidy --quiet train_gpt.cpp prepare_data.cpp -- -std=c++20 -fopenmp -march=x86-64-v3
	cppcheck --std=c++20 --enable=warning,performance,portability --quiet --error-exitcode=1 \
	    --suppressions-list=checks/cppcheck.txt train_gpt.cpp prepare_data.cpp
	clang-format --dry-run -Werror *.hpp *.cpp *.cu checks/*.cpp checks/*.hpp cuda_on_cpu/*.h cuda_on_cpu/*.hpp \
	    cuda_on_cpu/*.cpp cuda_on_cpu/*.cu

# Of 100 sentences that the default model writes, how many the grammar of its stories can make.
grammar: $(BUILD)/grammar train_gpt
	./train_gpt sample --init-from out/stories/best --num-samples 30 --temperature 1 | $<
$(BUILD)/grammar: checks/grammar.cpp checks/stories.hpp prepare_data.cpp tinygpt.hpp | $(BUILD)
	$(CXX) $(CXXFLAGS) $< -o $@

# A tiny run under valgrind, built for a CPU that valgrind knows.
valgrind: data/stories/dataset.json
	$(MAKE) build/g++-x86-64-v3/train_gpt MARCH=x86-64-v3
	rm -rf build/valgrind
	GOMP_SPINCOUNT=0 valgrind --error-exitcode=1 --leak-check=full --show-leak-kinds=definite --errors-for-leak-kinds=definite \
	    build/g++-x86-64-v3/train_gpt --max-steps 2 --n-layer 1 --n-embd 16 --n-head 2 --batch-size 2 --seq-len 16 \
	    --eval-interval 0 --sample-interval 0 --threads 2 --output build/valgrind

# What the size promises are measured by: lines of code, lines and words of comment, width.
count:
	@for f in tinygpt.hpp train_gpt.cpp train_gpt.cu prepare_data.cpp test_gpt.cpp; do \
	    awk -v f=$$f '{gsub(/[\200-\277]/,""); t=$$0; sub(/^[ \t]+/,"",t); if(t~/^\/\//){c++; w+=split(t,q," ")-1} else if(t!="")k++; \
	    if(length($$0)>100)wide++} END{printf "%-18s %5d lines of code, %4d of comment (%.2f, %d words), %d wider than 100\n", \
	    f,k,c,c/k,w,wide+0}' $$f; done
	@awk '/^\/\/ What follows is plumbing/{exit} {t=$$0; sub(/^[ \t]+/,"",t); if(t!="" && t!~/^\/\//)k++} \
	    END{printf "tinygpt.hpp, what a student reads: %d lines of code\n",k}' tinygpt.hpp
	@cat checks/* .ci/run | awk '{t=$$0; sub(/^[ \t]+/,"",t); if(t!="" && t!~/^(\/\/|#[^i!])/)k++} END{printf "checks: %d lines of code\n",k}'
.PHONY: screens check mpi_test test_show show_pictures readme tidy grammar valgrind plot portable test_emulator cuda_compiles kernel_table cuda_12 cuda_cards torture fuzz fuzz_coverage test_hf nightly count
