# SPDX-License-Identifier: Apache-2.0
#
# loramill - one non-recursive Makefile. `make help` lists what there is.
#
#   V=1                          show the commands
#   CI=1                         warnings are errors
#   SANITIZE=address,undefined|thread   (or one of the first two alone)
#   CUDA=0|1                     kernels/cuda; found automatically through nvcc (ops/setup.sh cuda)
#   CUDA_ARCH=...                nvcc's -gencode, for other GPUs
#   WORKER=0                     engine and kernels only: needs neither librdkafka nor Avro
#   BUILD=DIR                    instead of build, for instance for other flags
#   DEPS=DIR                     where `make setup` puts what Debian does not package
#   RDKAFKA=DIR                  another librdkafka's prefix; with a BUILD of its own
#   CC, CXX, NVCC, OPT           compilers; optimisation (-O2 -g)
#   PREFIX=DIR DESTDIR=DIR       where `make install` installs
#
# Objects, dependencies and programs live under $(BUILD), one folder a configuration, so switching
# SANITIZE or CUDA never mixes objects. A stamp rebuilds all when flags change.

comma := ,
.DEFAULT_GOAL := all
.DELETE_ON_ERROR:
.SUFFIXES:
MAKEFLAGS += --no-builtin-rules

VERSION  := 0.1.0
DEPS     ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/loramill
PREFIX   ?= /usr/local
WORKER   ?= 1
SANITIZE ?=
V        ?= 0

ifeq ($(V),1)
Q :=
say = @:
else
Q := @
say = @printf '  %-6s %s\n'
endif

# ---- configuration ------------------------------------------------------------------------

# CUDA 13: a system's toolkit first, else the one that `ops/setup.sh cuda` puts below $(DEPS).
CUDA_PYPI := $(lastword $(wildcard $(DEPS)/venv-cuda/lib/python3*/site-packages/nvidia/cu13))
NVCC ?= $(firstword $(wildcard /usr/local/cuda/bin/nvcc) $(shell command -v nvcc 2>/dev/null) \
        $(wildcard $(CUDA_PYPI)/bin/nvcc))
CUDA_SOURCES := $(wildcard kernels/cuda/*.cu)
# Sanitizers and the CUDA runtime do not mix; instrumented builds are for the CPU.
CUDA ?= $(if $(and $(NVCC),$(CUDA_SOURCES),$(if $(SANITIZE),,1)),1,0)
ifeq ($(CUDA),1)
ifeq ($(NVCC),)
$(error CUDA=1 but no nvcc: run ops/setup.sh cuda, put nvcc on the PATH, set NVCC=, or use CUDA=0)
endif
CUDA_HOME ?= $(patsubst %/bin/,%,$(dir $(realpath $(NVCC))))
CUDA_LIB  := $(firstword $(wildcard $(CUDA_HOME)/lib64 $(CUDA_HOME)/lib))
# The packages from PyPI have versioned names only.
CUBLASLT  := $(notdir $(lastword $(sort $(wildcard $(CUDA_LIB)/libcublasLt.so.[0-9][0-9]))))
ifeq ($(CUBLASLT),)
$(error CUDA=1: no libcublasLt.so.NN in $(CUDA_LIB), which belongs to $(NVCC); CUDA 13 is needed)
endif
else ifneq ($(CUDA),0)
$(error CUDA=$(CUDA) is unknown; use 0 or 1)
endif

# What address and undefined instrument does not overlap, and one run finds what two would.
SANITIZERS := $(subst $(comma), ,$(SANITIZE))
ifneq ($(filter-out address undefined thread,$(SANITIZERS)),)
$(error SANITIZE=$(SANITIZE) is unknown; use address, undefined, both with a comma, or thread)
endif
ifneq ($(and $(filter thread,$(SANITIZERS)),$(filter address,$(SANITIZERS))),)
$(error SANITIZE=$(SANITIZE): address and thread exclude each other)
endif

BUILD ?= build$(if $(SANITIZE),/$(SANITIZE))
SAN_address   := -fsanitize=address -fno-omit-frame-pointer
SAN_undefined := -fsanitize=undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
SAN_thread    := -fsanitize=thread -fno-omit-frame-pointer
SANFLAGS := $(foreach s,$(SANITIZERS),$(SAN_$(s)))
# What instrumentation makes of the control flow misleads these two; the plain build has them on.
SANWARN  := $(if $(SANITIZE),-Wno-format-truncation -Wno-maybe-uninitialized)

RDKAFKA ?= $(DEPS)/librdkafka
# With its path, as $(shell) does not see exported variables before GNU make 4.4.
PKG_CONFIG ?= PKG_CONFIG_PATH='$(RDKAFKA)/lib/pkgconfig:$(DEPS)/yyjson/lib/pkgconfig:$(PKG_CONFIG_PATH)' pkg-config
LIBS_LOW  := jansson libpcre2-8 openblas libcrypto
LIBS_HIGH := $(if $(filter 1,$(WORKER)),rdkafka avro-c libcurl libmicrohttpd yyjson)

# Make's own default is cc.
ifeq ($(origin CC),default)
CC      := gcc
endif
# Sanitizers instrument what the optimiser unrolled: -O1 keeps their builds to seconds a file.
OPT     ?= $(if $(SANITIZE),-O1,-O2) -g
WARN    := -Wall -Wextra -Wstrict-prototypes -Wmissing-prototypes -Wvla -Wwrite-strings \
           -Wpointer-arith -Wformat=2 -fno-common
WERROR  ?= $(if $(CI),-Werror)
PKG_CFLAGS := $(shell $(PKG_CONFIG) --cflags $(LIBS_LOW) $(LIBS_HIGH) 2>/dev/null)
# System headers, so that our warnings judge our code only.
PKG_CFLAGS := $(patsubst -I%,-isystem %,$(PKG_CFLAGS))
CPPFLAGS += -I. -D_GNU_SOURCE -DLORAMILL_VERSION='"$(VERSION)"' $(PKG_CFLAGS)
CFLAGS  += -std=gnu11 $(OPT) $(WARN) $(SANWARN) $(WERROR) -fstack-protector-strong -pthread $(SANFLAGS)
LDFLAGS += -pthread $(SANFLAGS) -Wl,--as-needed -Wl,-rpath,$(RDKAFKA)/lib
LDLIBS  += $(shell $(PKG_CONFIG) --libs $(LIBS_HIGH) $(LIBS_LOW) 2>/dev/null) \
           -l:libutf8proc.a -lm -ldl

# What one thread of a worker allocates another frees, which mimalloc is made for. It is linked to
# take malloc's name, before libc; sanitizers bring an allocator of their own.
MALLOC := $(if $(and $(filter 1,$(WORKER)),$(if $(SANITIZE),,1)),\
          -Wl$(comma)--no-as-needed -lmimalloc -Wl$(comma)--as-needed)

ifeq ($(CUDA),1)
CPPFLAGS += -DLORAMILL_CUDA
LDFLAGS  += -L$(CUDA_LIB) -Wl,-rpath,$(CUDA_LIB)
CUDA_LDLIBS := -l:libcudart_static.a -l:$(CUBLASLT) -lstdc++ -lrt -lpthread -ldl
LDLIBS   += $(CUDA_LDLIBS)
# sm_80 runs on 8.x, sm_90a is Hopper's own, and the PTX is for what comes after.
CUDA_ARCH ?= -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90a,code=sm_90a \
             -gencode=arch=compute_90,code=compute_90
NVCCFLAGS := -std=c++17 -O3 -lineinfo -I. $(CUDA_ARCH) --threads 0 --expt-relaxed-constexpr \
             -Xcompiler=-Wall,-Wextra,-Wno-unused-function$(if $(CI),$(comma)-Werror) \
             $(if $(CI),-Werror=all-warnings)
endif

# ---- sources ------------------------------------------------------------------------------

KERNEL_SRC := $(wildcard kernels/*.c kernels/cpu/*.c kernels/sim/*.c)
CUDA_SRC   := $(if $(filter 1,$(CUDA)),$(CUDA_SOURCES) $(wildcard kernels/cuda/*.c))
ENGINE_SRC := $(wildcard engine/*.c)
WORKER_SRC := $(if $(filter 1,$(WORKER)),\
              $(filter-out worker/main.c,$(wildcard worker/*.c worker/*/*.c)))
LIB_SRC    := $(KERNEL_SRC) $(CUDA_SRC) $(ENGINE_SRC) $(WORKER_SRC)
UNIT_SRC   := $(wildcard tests/unit/test_*.c)
ifneq ($(WORKER),1)
UNIT_SRC   := $(filter-out tests/unit/test_worker_%.c,$(UNIT_SRC))
endif
FUZZ_SRC   := $(wildcard tests/fuzz/fuzz_*.c)
ifneq ($(WORKER),1)
FUZZ_SRC   := $(shell grep -L '"worker/' $(FUZZ_SRC))
endif

obj = $(patsubst %.c,$(BUILD)/%.o,$(patsubst %.cu,$(BUILD)/%.cu.o,$(1)))
LIB     := $(BUILD)/libloramill.a
BIN     := $(BUILD)/loramill
# Programs in which loramill starts a thread, or a library's thread calls it. The others can't race,
# so ThreadSanitizer has nothing to find in them and its builds leave them out. That the list is
# whole is seen in all other builds: there a program that is not on it dies in pthread_create.
THREADED   := test_engine test_upload $(addprefix test_engine,_alloc _echo _edge _fault _pool _random _shape) \
    $(addprefix test_kernels_,attention lora rows sample) test_golden test_merge test_tokenizer \
    $(addprefix test_worker_,avro batch_job bench claim codec consumer control delivery dev fatal group_protocol intake outbox parts registry renew resolver schemas scrape spans store submit \
    transaction url watchdog)
ONE_THREAD := $(filter-out $(THREADED),$(basename $(notdir $(UNIT_SRC) $(FUZZ_SRC))))
# WORKER=0 and `thread` leave some out; tests/run says which.
ALL_SRC  := $(wildcard tests/unit/test_*.c tests/fuzz/fuzz_*.c)
ifneq ($(filter thread,$(SANITIZERS)),)
UNIT_SRC := $(filter-out $(ONE_THREAD:%=tests/unit/%.c),$(UNIT_SRC))
FUZZ_SRC := $(filter-out $(ONE_THREAD:%=tests/fuzz/%.c),$(FUZZ_SRC))
endif
NOT_HERE := $(basename $(notdir $(filter-out $(UNIT_SRC) $(FUZZ_SRC),$(ALL_SRC))))
UNITS   := $(patsubst %.c,$(BUILD)/%,$(UNIT_SRC))
REPLAYS := $(patsubst %.c,$(BUILD)/%,$(FUZZ_SRC))

# The kernels are where the cycles go; instruction sets are chosen at run time, file by file.
# Instrumented, their unrolled loops would take minutes to compile: there they stay loops.
$(BUILD)/kernels/cpu/%.o: OPT := $(if $(SANITIZE),-O1 -g -DKN_NO_UNROLL,-O3 -g) -fno-math-errno \
    -fno-trapping-math
$(BUILD)/kernels/cpu/%_avx2.o: CFLAGS += -mavx2 -mfma -mf16c
$(BUILD)/kernels/cpu/%_avx512.o: CFLAGS += -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c

# ---- rules --------------------------------------------------------------------------------

.PHONY: all help setup demo test test-matrix unit chaos chaos-long soak lint bench fuzz install clean docs FORCE

all: $(BIN)

# stamp,NAME,TEXT: the file $(BUILD)/NAME changes when TEXT does.
define stamp
$(BUILD)/$(1): FORCE
	@mkdir -p $(BUILD)
	@printf '%s\n' '$(2)' | cmp -s - $$@ || printf '%s\n' '$(2)' > $$@

endef
$(eval $(call stamp,flags,$(CC) $(CPPFLAGS) $(CFLAGS) $(LDFLAGS) $(MALLOC) $(LDLIBS)))

$(BUILD)/%.o: %.c $(BUILD)/flags
	@mkdir -p $(@D)
	$(say) CC $<
	$(Q)$(CC) $(CPPFLAGS) $(CFLAGS) -MMD -MP -c $< -o $@

$(BUILD)/kernels/cuda/%.o: CPPFLAGS += -isystem $(CUDA_HOME)/include
# Its conversions are vector code only then.
$(BUILD)/kernels/cuda/mat.o: OPT := -O3 -g -fno-math-errno -fno-trapping-math

$(eval $(call stamp,nvcc-flags,$(NVCC) $(NVCCFLAGS)))

$(BUILD)/%.cu.o: %.cu $(BUILD)/nvcc-flags
	@mkdir -p $(@D)
	$(say) NVCC $<
	$(Q)$(NVCC) $(NVCCFLAGS) -MD -MP -MF $(@:.o=.d) -c $< -o $@

# A source that is gone is in the archive no more.
$(eval $(call stamp,members,$(call obj,$(LIB_SRC))))

$(LIB): $(call obj,$(LIB_SRC)) $(BUILD)/members
	$(say) AR $@
	$(Q)rm -f $@ && ar rcs $@ $(filter %.o,$^)

$(call obj,worker/main.c): CPPFLAGS += $(if $(MALLOC),-DLORAMILL_MIMALLOC)

$(BIN): $(call obj,worker/main.c) $(LIB)
	$(say) LD $@
	$(Q)$(CC) $(LDFLAGS) $^ $(MALLOC) $(LDLIBS) -o $@

# CUDA kernels without a device: their source as host C++, on the emulator of tests/emu.
CXX ?= g++
EMU_CU  := rope attention attn_decode attn_prefill attn_wgmma attn_tma lora lora_few lora_merge \
    sample rows gemm_few gemm_tma gemm_mixed
EMU_OBJ := $(patsubst %,$(BUILD)/tests/emu/%.o,$(EMU_CU) emu emu_backend)
TWIN_OBJ := $(call obj,$(wildcard tests/twin/*.c))
EMU_CXXFLAGS := -std=c++17 -O2 -g -Wall -Wextra -Wno-unused-function $(WERROR) -I. \
    -isystem tests/emu -DKN_EMU -D__CUDACC__ -Wno-psabi
$(eval $(call stamp,emu-flags,$(CXX) $(EMU_CXXFLAGS)))

$(BUILD)/tests/emu/%.o: kernels/cuda/%.cu $(BUILD)/emu-flags
	@mkdir -p $(@D)
	$(say) CXX $<
	$(Q)$(CXX) $(EMU_CXXFLAGS) -Wno-unknown-pragmas -MMD -MP -x c++ -c $< -o $@

$(BUILD)/tests/emu/%.o: tests/emu/%.cc $(BUILD)/emu-flags
	@mkdir -p $(@D)
	$(say) CXX $<
	$(Q)$(CXX) $(EMU_CXXFLAGS) -MMD -MP -c $< -o $@

$(BUILD)/tests/unit/test_cuda_emulated: $(BUILD)/tests/unit/test_cuda_emulated.o $(TWIN_OBJ) \
    $(EMU_OBJ) $(LIB)
	$(say) LD $@
	$(Q)$(CC) $(LDFLAGS) $^ $(LDLIBS) -lcmocka -lstdc++ -o $@

$(BUILD)/tests/unit/%: $(BUILD)/tests/unit/%.o $(LIB)
	$(say) LD $@
	$(Q)$(CC) $(LDFLAGS) $^ $(LDLIBS) -lcmocka -o $@

# A worker whose engine some prompts kill or hang: the shipped objects, four calls wrapped.
POISON := $(BUILD)/tests/integration/poison_worker
$(POISON): $(BUILD)/tests/integration/poison_worker.o $(LIB)
	$(say) LD $@
	$(Q)$(CC) $(LDFLAGS) -Wl,--wrap=engine_submit,--wrap=engine_poll,--wrap=engine_stats,--wrap=engine_close \
	    $^ $(MALLOC) $(LDLIBS) -o $@

$(ONE_THREAD:%=$(BUILD)/tests/unit/%) $(ONE_THREAD:%=$(BUILD)/tests/fuzz/%): \
    $(BUILD)/tests/unit/one_thread.o
$(ONE_THREAD:%=$(BUILD)/tests/unit/%) $(ONE_THREAD:%=$(BUILD)/tests/fuzz/%): \
    private LDFLAGS += -Wl,--wrap=pthread_create

$(BUILD)/tests/unit/test_worker_watchdog: private LDFLAGS += -Wl,--wrap=pthread_create

# An allocator that has nothing left.
$(BUILD)/tests/unit/test_worker_job: private LDFLAGS += -Wl,--wrap=lm_malloc
$(BUILD)/tests/unit/test_worker_consumer $(BUILD)/tests/unit/test_worker_staging: \
    private LDFLAGS += -Wl,--wrap=lm_strdup

# What happens when the store is gone.
$(BUILD)/tests/unit/test_worker_fatal: private LDFLAGS += -Wl,--wrap=store_free

# An engine that is always full, and how a reply ends.
$(BUILD)/tests/unit/test_worker_intake: private LDFLAGS += -Wl,--wrap=engine_submit,--wrap=engine_adapter_unref,--wrap=outcome_reply,--wrap=journal_decoding

# The engine's events, and what is made of a stream.
$(BUILD)/tests/unit/test_worker_parts: private LDFLAGS += -Wl,--wrap=engine_poll,--wrap=engine_wake,--wrap=outcome_part,--wrap=outcome_reply,--wrap=lm_reallocarray

# What becomes of a reply.
$(BUILD)/tests/unit/test_worker_claim: private LDFLAGS += -Wl,--wrap=outcome_dead_letter,--wrap=outcome_claimed,--wrap=EVP_Digest

# Stand before the device: each of these can be made to fail, or to happen later.
OPS := $(addprefix op_,embed rmsnorm gemm rope_kv attention silu_mul gather_rows feed lora_shrink \
    lora_expand lora_merge sample gate_up)
DELAYED := copy_in copy_out copy zero scatter_cells gather_cells stream_free stream_sync event_free \
    event_sync event_record event_wait event_query $(OPS)
RECORDED := $(addprefix graph_,rows begin end run) $(OPS)
WRAPPED := alloc host_alloc free host_free stream_new event_new mat_new mat_free mat_upload \
    mat_save mat_restore $(DELAYED)
$(BUILD)/tests/unit/test_engine_device: private LDFLAGS += $(addprefix -Wl$(comma)--wrap=kn_,$(WRAPPED))
$(BUILD)/tests/unit/test_engine_order: private LDFLAGS += $(addprefix -Wl$(comma)--wrap=kn_,$(DELAYED))
$(BUILD)/tests/unit/test_engine_graph: private LDFLAGS += $(addprefix -Wl$(comma)--wrap=kn_,$(RECORDED))

$(BUILD)/tests/bench/%: $(BUILD)/tests/bench/%.o $(LIB)
	$(say) LD $@
	$(Q)$(CC) $(LDFLAGS) $^ $(LDLIBS) -o $@

$(BUILD)/tests/fuzz/fuzz_%: $(BUILD)/tests/fuzz/fuzz_%.o $(BUILD)/tests/fuzz/replay.o $(LIB)
	$(say) LD $@
	$(Q)$(CC) $(LDFLAGS) $^ $(LDLIBS) -o $@

# One file that a GPU machine needs: all but cuBLASLt is inside (see tests/gpu/gpu-check.sh).
GPU_SRC   := $(wildcard tests/gpu/*.c worker/tools/cmd_bench*.c) worker/store/adapter_dirs.c
GPU_CHECK := build/gpu/gpu-check

$(BUILD)/tests/gpu/%.o: CPPFLAGS += -isystem $(CUDA_HOME)/include
$(BUILD)/tests/gpu/blas.o: CFLAGS += -O3

$(GPU_CHECK): $(call obj,$(GPU_SRC)) $(TWIN_OBJ) $(LIB)
	@mkdir -p $(@D)
	$(say) LD $@
	$(Q)$(CC) $(LDFLAGS) -s $^ -Wl,-Bstatic -ljansson -lpcre2-8 -lcrypto -lutf8proc \
	    -Wl,-Bdynamic $(CUDA_LDLIBS) -lm -o $@

.PHONY: gpu-build gpu-check
gpu-build:
	$(Q)DEPS='$(DEPS)' ops/setup.sh cuda
	$(Q)$(MAKE) $(jobs) --no-print-directory CUDA=1 WORKER=0 BUILD=build/cuda $(GPU_CHECK)

# Builds what is not built yet; on a machine without a compiler, a prebuilt build/gpu will do.
gpu-check:
	$(Q)PART='$(or $(PART),smoke)' RESULTS='$(or $(RESULTS),build)' tests/gpu/gpu-check.sh

.SECONDARY:
# What is linked into programs without being one of theirs.
MORE_SRC := tests/integration/poison_worker.c tests/unit/one_thread.c tests/fuzz/replay.c \
    $(wildcard tests/bench/*.c)
-include $(patsubst %.o,%.d,$(call obj,$(LIB_SRC) worker/main.c $(UNIT_SRC) $(FUZZ_SRC) $(GPU_SRC) \
    $(MORE_SRC)) $(TWIN_OBJ) $(EMU_OBJ))

# Programs of the test tiers; `make test` installs what is missing, builds, and runs them all.
programs: $(if $(filter 1,$(WORKER)),$(BIN) $(POISON)) $(UNITS) $(REPLAYS)
.PHONY: programs

unit: $(UNITS) $(REPLAYS)
	$(Q)BUILD=$(BUILD) NOT_HERE='$(NOT_HERE)' tests/run unit fuzz

setup:
	$(Q)DEPS='$(DEPS)' ops/setup.sh build

# People type `make demo`: all cores build then, unless -j says otherwise.
jobs = $(if $(findstring -j,$(MAKEFLAGS)),,-j$(shell nproc))

demo:
	$(Q)DEPS='$(DEPS)' ops/setup.sh build
	$(Q)$(MAKE) $(jobs) --no-print-directory all
	$(Q)BUILD=$(BUILD) DEPS='$(DEPS)' ops/demo.sh

test:
	$(Q)DEPS='$(DEPS)' ops/setup.sh build test
	$(Q)$(MAKE) $(jobs) --no-print-directory programs
	$(Q)BUILD=$(BUILD) DEPS='$(DEPS)' NOT_HERE='$(NOT_HERE)' tests/run all

# The delivery tests over librdkafkas, brokers and group protocols; the last table is in docs/matrix.md.
test-matrix:
	$(Q)DEPS='$(DEPS)' ops/setup.sh build test matrix
	$(Q)DEPS='$(DEPS)' tests/matrix/run

# Ten minutes of faults with the shipped model, half of them in each delivery mode; many kills, so that
# suspicion of poison is raised all the time.
chaos:
	$(Q)DEPS='$(DEPS)' ops/setup.sh build test
	$(Q)$(MAKE) $(jobs) --no-print-directory all
	$(Q)for mode in exactly-once at-least-once; do \
	    BUILD=$(BUILD) DEPS='$(DEPS)' SECONDS_OF_FAULTS=300 PAUSE=2 KILLS=40 MODE=$$mode \
	        tests/chaos/run || exit 1; done

# 100,000 short prompts and at least 200 kills; no time limit. The result is kept in docs/chaos.md.
chaos-long:
	$(Q)DEPS='$(DEPS)' ops/setup.sh build test
	$(Q)$(MAKE) $(jobs) --no-print-directory all
	$(Q)BUILD=$(BUILD) DEPS='$(DEPS)' ENGINE=echo COUNT=100000 RATE=110 SECONDS_OF_FAULTS=930 KILLS=200 \
	    PAUSE=1 WAIT=900 tests/chaos/run

# A million messages in each mode, outages of minutes: half an hour. Results are kept in docs/soak.md.
soak:
	$(Q)DEPS='$(DEPS)' ops/setup.sh build test
	$(Q)$(MAKE) $(jobs) --no-print-directory all
	$(Q)BUILD=$(BUILD) DEPS='$(DEPS)' tests/soak/run $(PARTS)

lint:
	$(Q)tests/lint.sh

bench:
	$(Q)DEPS='$(DEPS)' ops/setup.sh build bench
	$(Q)$(MAKE) $(jobs) --no-print-directory all
	$(Q)BUILD=$(BUILD) DEPS='$(DEPS)' tests/bench/run.sh

# Coverage-guided fuzzing of one target: make fuzz TARGET=json SECONDS=60
fuzz:
	$(Q)BUILD=$(BUILD) DEPS='$(DEPS)' tests/fuzz/fuzz.sh '$(TARGET)' '$(or $(SECONDS),60)'

docs: $(BIN)
	$(Q)$(BIN) worker --help-markdown > docs/configuration.md
	$(Q)$(BIN) worker --help-sample > ops/loramill.properties

install: $(BIN)
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/share/loramill/schemas
	install -m 755 $(BIN) $(DESTDIR)$(PREFIX)/bin/loramill
	install -m 644 schemas/*.avsc $(DESTDIR)$(PREFIX)/share/loramill/schemas/
	install -m 644 ops/loramill.properties $(DESTDIR)$(PREFIX)/share/loramill/

# Of BUILD only what a build of ours has made: BUILD=worker is a mistake.
clean:
	$(Q)rm -rf build $(if $(wildcard $(BUILD)/flags),$(filter-out . .. /,$(BUILD)))

help:
	@echo 'make            build $(BIN)'
	@echo 'make demo       run the main job on this machine, with a small model (installs what it needs)'
	@echo 'make chaos      brokers, workers, store, registry and network fail at random: 10 minutes'
	@echo 'make chaos-long 100,000 prompts and 200 kills: 20 minutes and more'
	@echo 'make soak       PARTS="memory outage brokers": a million messages, minutes of outage'
	@echo 'make test       prove it: unit, golden, fuzz corpora, real broker, registry and store'
	@echo 'make test-matrix  the delivery tests over librdkafka 2.0 to 2.15, Kafka 2.8 to 4.3, both group protocols'
	@echo 'make unit       the tests that need no service'
	@echo 'make programs   build what the tests run'
	@echo 'make setup      install what the build needs (Debian packages, librdkafka)'
	@echo 'make lint       include direction, banned functions, sizes, generated files fresh'
	@echo 'make bench      CPU figures against transformers, engine overhead, messages/s'
	@echo 'make fuzz       TARGET=NAME SECONDS=N: coverage-guided fuzzing (clang)'
	@echo 'make gpu-build  compile kernels/cuda and its checks (needs no GPU)'
	@echo 'make gpu-check  PART=smoke|kernels|start|trace|full RESULTS=DIR: prove and measure it on a GPU'
	@echo 'make docs       regenerate docs/configuration.md and the sample properties'
	@echo 'make install    PREFIX=$(PREFIX) DESTDIR='
	@echo 'make clean      remove build/ and BUILD'
	@echo 'Variables: V=1  CI=1  SANITIZE=address,undefined|thread  CUDA=0|1  WORKER=0|1  BUILD=DIR  DEPS=$(DEPS)'
	@echo '           (the Makefile begins with all of them)'
