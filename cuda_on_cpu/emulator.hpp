// emulator.hpp: runs the threads of a CUDA block on a CPU, and watches what they do.
//
// Every thread of a block is a fibre: a stack of its own, on which the kernel runs as an ordinary
// function until it must wait for other threads (a barrier, a shuffle, a tensor-core operation).
// Then the next thread of the block gets its turn. One block is worked on by one thread of the
// operating system; several blocks run at once under OpenMP. Shared and global memory lie between
// guard pages. A mistake ends the launch with an exception, cuda_on_cpu::Error, that names kernel,
// block and thread.
//
// In gdb: `break cuda_on_cpu::mistake_found` stops where a mistake is noticed; threadIdx and
// blockIdx are variables and can be printed.
#pragma once

#include <cxxabi.h>
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>
#if !defined(__x86_64__) || defined(CUDA_ON_CPU_UCONTEXT)
#define CUDA_ON_CPU_USES_UCONTEXT 1
#else
#define CUDA_ON_CPU_USES_UCONTEXT 0
#endif
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

// Under the address sanitizer every switch of stacks is announced to it.
#if defined(__SANITIZE_ADDRESS__)
#define CUDA_ON_CPU_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CUDA_ON_CPU_ASAN 1
#endif
#endif
#ifdef CUDA_ON_CPU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define CUDA_ON_CPU_ASAN 0
#endif

// The build with CUDA_ON_CPU_WATCH sees every load and store of a kernel: watch.hpp.
#ifndef CUDA_ON_CPU_WATCH
#define CUDA_ON_CPU_WATCH 0
#endif

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
    constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

// The four built-in variables. They are set whenever a thread of a block gets its turn.
inline constinit thread_local uint3 threadIdx{}, blockIdx{};
inline constinit thread_local dim3 blockDim{}, gridDim{};
inline constexpr int warpSize = 32;

namespace cuda_on_cpu {

// =================================================================================================
// Mistakes, and where they happened
// =================================================================================================

enum class Mistake {
    barrier,        // not every thread of the block arrives
    warp,           // a shuffle, vote or tensor-core operation that not every named lane reaches
    shared_memory,  // access past a shared array
    global_memory,  // access past, before or after the life of a cudaMalloc buffer
    uninitialised,  // a value read before it was written (found only with CUDA_ON_CPU_WATCH)
    race,           // a missing barrier (with CUDA_ON_CPU_WATCH; else by check_orders)
    order,          // results change with the order of threads (check_orders)
    launch,         // sizes or arguments that no GPU would accept
    forbidden,      // against this project's rules: floating-point atomics
    alignment,      // an address that the operation cannot take
    other,
};

struct Error : std::runtime_error {
    Mistake mistake;
    std::string kernel;
    uint3 block, thread;
    Error(Mistake mistake, const std::string& message, std::string kernel, uint3 block,
          uint3 thread)
        : std::runtime_error(message), mistake(mistake), kernel(std::move(kernel)), block(block),
          thread(thread) {}
};

// printf into a string.
[[gnu::format(printf, 1, 2)]] inline std::string text(const char* pattern, ...) {
    va_list args, again;
    va_start(args, pattern);
    va_copy(again, args);
    std::string out(size_t(std::vsnprintf(nullptr, 0, pattern, args)), '\0');
    std::vsnprintf(out.data(), out.size() + 1, pattern, again);
    va_end(args);
    va_end(again);
    return out;
}
inline std::string text(uint3 v) { return text("(%u,%u,%u)", v.x, v.y, v.z); }

// Set a breakpoint here: called with the message before anything is thrown.
[[gnu::noinline]] inline void mistake_found(const char* message) {
    __asm__ volatile("" ::"r"(message) : "memory");
}

// A place in the source and what stands there.
struct Site {
    const char* what = "";
    const char* file = "";
    int line = 0;
};
inline std::string text(const Site& s) { return text("%s (%s:%d)", s.what, s.file, s.line); }

// =================================================================================================
// Settings: the order of threads, the device that is pretended
// =================================================================================================

// The first three run all threads in turn, so that no warp gets far ahead of another. In the last,
// a warp runs alone for as long as it can, seed 1: the first one that can, other seeds: any.
enum class Order { ascending, descending, random, warps };

inline const char* text(Order order) {
    return order == Order::ascending    ? "ascending"
           : order == Order::descending ? "descending"
           : order == Order::random     ? "random"
                                        : "warps";
}

struct Settings {
    Order order = Order::ascending;
    uint64_t seed = 1;
    int device_count = 1;
    std::string card = "CUDA on CPU";
    int major = 9, minor = 0;               // compute capability
    int multiprocessors = 4;                // few, so that grids sized by it stay small
    size_t memory_bytes = size_t(8) << 30;  // what cudaMalloc may hand out in total
    bool late_streams = false;              // streams do nothing until they are waited for
    bool has_code = true;                   // the program holds code for this device
    bool old_driver = false;                // the driver is older than the Toolkit
    uint64_t refusals = 0;                  // cuBLASLt refuses what is optional: at random by this
};                                          // seed, all of it with 1, nothing with 0

// Cards by name. What a capability decides is in limits().
struct Card {
    const char* name;
    int major, minor, multiprocessors;
    size_t gigabytes;
};
inline constexpr Card cards[] = {{"v100", 7, 0, 80, 16},     {"t4", 7, 5, 40, 16},
                                 {"a100", 8, 0, 108, 40},    {"rtx3060", 8, 6, 28, 12},
                                 {"rtx4090", 8, 9, 128, 24}, {"h100", 9, 0, 132, 80},
                                 {"b200", 10, 0, 148, 180},  {"rtx5090", 12, 0, 170, 32}};
inline void play_card(Settings& s, const std::string& name) {
    std::string names;
    for (const Card& c : cards) {
        names += std::string(" ") + c.name;
        if (name != c.name) continue;
        s.card = c.name, s.major = c.major, s.minor = c.minor;
        s.multiprocessors = c.multiprocessors, s.memory_bytes = c.gigabytes << 30;
        return;
    }
    throw std::runtime_error("TINYGPT_EMULATED_GPU: expected one of" + names + ", found " + name);
}

// TINYGPT_EMULATED_GPU=a card's name, CUDA_ON_CPU_ORDER=ascending|descending|random[:seed]|
// warps[:seed], CUDA_ON_CPU_DEVICES=n, CUDA_ON_CPU_MEMORY=bytes, CUDA_ON_CPU_CAPABILITY=7.5,
// CUDA_ON_CPU_STREAMS=late, CUDA_ON_CPU_REFUSALS=1 (all of what is optional) or another seed
inline Settings settings_from_environment() {
    Settings s;
    if (const char* card = std::getenv("TINYGPT_EMULATED_GPU")) play_card(s, card);
    if (const char* order = std::getenv("CUDA_ON_CPU_ORDER")) {
        std::string value = order;
        if (value == "descending")
            s.order = Order::descending;
        else if (value.rfind("random", 0) == 0)
            s.order = Order::random;
        else if (value.rfind("warps", 0) == 0)
            s.order = Order::warps;
        else if (value != "ascending")
            throw std::runtime_error(
                "CUDA_ON_CPU_ORDER: expected ascending, descending, random:seed or warps:seed, "
                "found " +
                value);
        const size_t colon = value.find(':');
        if (colon != value.npos) s.seed = std::strtoull(value.c_str() + colon + 1, nullptr, 10);
    }
    if (const char* count = std::getenv("CUDA_ON_CPU_DEVICES")) s.device_count = std::atoi(count);
    if (const char* bytes = std::getenv("CUDA_ON_CPU_MEMORY"))
        s.memory_bytes = std::strtoull(bytes, nullptr, 10);
    if (const char* capability = std::getenv("CUDA_ON_CPU_CAPABILITY"))
        if (std::sscanf(capability, "%d.%d", &s.major, &s.minor) != 2)
            throw std::runtime_error("CUDA_ON_CPU_CAPABILITY: expected such as 7.5");
    if (const char* seed = std::getenv("CUDA_ON_CPU_REFUSALS"))
        s.refusals = std::strtoull(seed, nullptr, 10);
    if (const char* streams = std::getenv("CUDA_ON_CPU_STREAMS"))
        s.late_streams = std::string(streams) == "late";
    return s;
}
inline Settings& settings() {
    static Settings s = settings_from_environment();
    return s;
}
inline void set_order(Order order, uint64_t seed = 1) {
    settings().order = order;
    settings().seed = seed;
}

// The finaliser of SplitMix64: the only randomness here.
inline uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

// =================================================================================================
// Memory between guard pages
// =================================================================================================

// What memory holds before it is written. Every float and bf16 of it is a NaN, every int is -1.
inline constexpr unsigned char poison_byte = 0xff;

// Addresses that cannot be used yet. Every byte of them is a fault.
inline void* reserve_addresses(size_t bytes) {
    void* p = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    return p;
}
#if CUDA_ON_CPU_WATCH
void* reserve_watched_addresses(size_t bytes);
#else
inline void* reserve_watched_addresses(size_t bytes) { return reserve_addresses(bytes); }
#endif

// Functions of the emulator that touch a kernel's memory on their own account, unwatched.
#if !CUDA_ON_CPU_WATCH
#define CUDA_ON_CPU_UNWATCHED
#elif defined( \
    __clang__)  // its no_sanitize would still replace atomic operations, and be inlined away
#define CUDA_ON_CPU_UNWATCHED __attribute__((disable_sanitizer_instrumentation, noinline))
#else
#define CUDA_ON_CPU_UNWATCHED __attribute__((no_sanitize("thread")))
#endif

// `bytes` bytes that end at a page nobody may touch, as near as the alignment allows, with another
// such page before. What is left over inside the pages stays poisoned and is checked later.
struct GuardedMemory {
    char* map = nullptr;
    char* data = nullptr;
    size_t bytes = 0, map_bytes = 0;

    static size_t page() { return 4096; }
    char* inside() const { return map + page(); }               // first byte that can be touched
    char* outside() const { return map + map_bytes - page(); }  // one behind the last
    bool covers(const void* p) const { return map && p >= map && p < map + map_bytes; }
    bool holds(const void* p, size_t n) const {
        return p >= data && static_cast<const char*>(p) + n <= data + bytes;
    }

    void allocate(size_t size, size_t alignment, bool on_host = false) {
        bytes = size;
        size_t body = (std::max<size_t>(size, 1) + alignment + page() - 1) / page() * page();
        map_bytes = body + 2 * page();
        map = static_cast<char*>(on_host ? reserve_addresses(map_bytes)
                                         : reserve_watched_addresses(map_bytes));
        if (mprotect(inside(), body, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
        data = reinterpret_cast<char*>(uintptr_t(outside() - size) / alignment * alignment);
        std::memset(inside(), poison_byte, body);
    }
    // Gives the memory back but keeps the addresses, so that a later use is noticed.
    void retire() {
        mmap(map, map_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1,
             0);
    }

    // The distance from data of a byte near the array that somebody changed; 0 if there is none.
    // Far from the array (more than 256 bytes before it) nobody looks: there the pages may be
    // large.
    CUDA_ON_CPU_UNWATCHED long find_damage() const {
        for (const char* p = std::max(inside(), data - 256); p < data; p++)
            if (static_cast<unsigned char>(*p) != poison_byte) return long(p - data);
        for (const char* p = data + bytes; p < outside(); p++)
            if (static_cast<unsigned char>(*p) != poison_byte) return long(p - data);
        return 0;
    }
};

struct Buffer {
    GuardedMemory memory;
    int number = 0;  // in the order of allocation, from 1
    bool live = true;
    bool on_host = false;  // page-locked host memory
};

// All buffers that cudaMalloc or cudaMallocHost ever gave out, by the start of their mapping.
struct Buffers {
    std::mutex mutex;
    std::map<uintptr_t, Buffer> by_address;
    int count = 0;
    size_t bytes_in_use = 0;

    Buffer* find(const void* p) {
        auto it = by_address.upper_bound(uintptr_t(p));
        if (it == by_address.begin()) return nullptr;
        Buffer& b = std::prev(it)->second;
        return b.memory.covers(p) ? &b : nullptr;
    }
};
inline Buffers& buffers() {
    static Buffers* all = new Buffers;  // never destroyed: kernels may run until the very end
    return *all;
}

// "buffer 3 (4096 bytes)", and where p lies relative to it.
inline std::string describe_address(const Buffer& b, const void* p) {
    long offset = long(static_cast<const char*>(p) - b.memory.data), size = long(b.memory.bytes);
    std::string place = offset < 0       ? text("%ld bytes before", -offset)
                        : offset >= size ? text("%ld bytes past the end of", offset - size)
                                         : text("at byte %ld of", offset);
    return text("%s %s buffer %d (%ld bytes%s)", place.c_str(), b.on_host ? "host" : "global",
                b.number, size, b.live ? "" : ", already freed");
}

// =================================================================================================
// Fibres
// =================================================================================================

// One stack, and where its thread stopped.
struct Fibre {
    char* stack = nullptr;  // lowest byte; a guard page lies below
    size_t stack_bytes = 0;
    void* stack_pointer = nullptr;
    ucontext_t context;  // used on machines without a switch of their own
    void* asan_fake_stack = nullptr;
    bool started = false;
};

#if !CUDA_ON_CPU_USES_UCONTEXT
// Saves the registers that a call must preserve (System V ABI, x86-64) and the stack pointer to
// *save, and takes up where `load` was saved.
[[gnu::naked, gnu::noinline]] inline void switch_stack(void** /*save: rdi*/, void* /*load: rsi*/) {
    __asm__ volatile(
        "pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
        "movq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
        "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\t"
        "ret");
}
#endif

// Prepares `f` so that the first switch to it calls `entry`, which must never return.
inline void prepare_fibre(Fibre& f, void (*entry)()) {
    f.started = true;
    f.asan_fake_stack = nullptr;
#if CUDA_ON_CPU_USES_UCONTEXT
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack;
    f.context.uc_stack.ss_size = f.stack_bytes;
    f.context.uc_link = nullptr;
    makecontext(&f.context, entry, 0);
#else
    // From the top: a zero where a caller's address would be (a debugger stops there), the entry,
    // and six registers.
    void** top = reinterpret_cast<void**>(f.stack + f.stack_bytes);
    std::memset(top - 8, 0, 8 * sizeof(void*));
    top[-2] = reinterpret_cast<void*>(entry);
    f.stack_pointer = top - 8;
#endif
}

inline void switch_fibres(Fibre& from, [[maybe_unused]] Fibre& to) {
#if CUDA_ON_CPU_ASAN
    __sanitizer_start_switch_fiber(&from.asan_fake_stack, to.stack, to.stack_bytes);
#endif
#if CUDA_ON_CPU_USES_UCONTEXT
    swapcontext(&from.context, &to.context);
#else
    switch_stack(&from.stack_pointer, to.stack_pointer);
#endif
#if CUDA_ON_CPU_ASAN
    __sanitizer_finish_switch_fiber(from.asan_fake_stack, nullptr, nullptr);
#endif
}

// =================================================================================================
// A block and its threads
// =================================================================================================

enum class State : uint8_t { unstarted, ready, running, at_barrier, at_warp_operation, finished };

// What a warp operation does once all lanes are there: lanes[i] is what lane i brought, for the
// lanes of the mask. It fills in every lane's result.
using WarpFunction = void (*)(void* const* lanes, unsigned mask);

// A copy to shared memory that has been asked for and not yet been waited for.
struct AsyncCopy {
    alignas(16) unsigned char bytes[16];
    void* to;
};

// A wgmma that was started and has not been waited for, as one lane of it sees it.
struct GroupProduct {
    float* d;          // its 32 accumulators, which hold poison until then
    float result[32];  // what they become
    uint64_t descriptor;
    bool columns;
    std::vector<uint16_t> b;  // what lane 0 read of shared memory
};
// What every warp of a group must say alike.
struct GroupWord {
    uint64_t descriptor;
    bool columns, add;
    int line;
};
// How far a thread's copies are on their way to wgmma, which reads shared memory behind the back of
// ordinary loads and stores: they need fence.proxy.async, and then a barrier.
enum class Copies : uint8_t { published, arrived, behind_barrier, fenced_late };

struct Thread {
    uint3 index{};
    unsigned rank = 0;  // in the block
    State state = State::unstarted;
    Fibre* fibre = nullptr;
    Site site;  // where it waits, or last waited
    // At a warp operation: whom it waits for, what it brought, what is to be done.
    unsigned mask = 0;
    void* lane_data = nullptr;
    WarpFunction function = nullptr;
    // At a barrier: which kind, its contribution, the outcome.
    int barrier_kind = 0, barrier_input = 0, barrier_result = 0;
    // Copies in flight, oldest first; group_ends[i] is how many belong to the first i + 1 groups.
    std::vector<AsyncCopy> copies;
    std::vector<size_t> group_ends;
    Copies copied = Copies::published;
    // wgmma: products under way, oldest first; product_ends as group_ends; between fence and commit.
    std::vector<GroupProduct> products;
    std::vector<size_t> product_ends;
    bool group_begun = false;
};

struct KernelSize;

// A launch: what stands between <<< and >>>, and what to call for each thread.
struct Launch {
    const char* kernel;
    const char* file;
    int line;
    dim3 grid, block;
    size_t shared_bytes;
    size_t shared_limit;     // of the dynamic part
    bool shared_opted;       // cudaFuncSetAttribute was called: together they may take 227 KB
    const KernelSize* size;  // null: not known
    void (*call)(const void* arguments);
    const void* arguments;
};

// A shared array with a name.
struct SharedArray {
    const void* tag = nullptr;  // one per declaration
    const char* name = "";
    GuardedMemory memory;
    uint64_t used_in_block = 0;  // the block (counted by the worker) that touched it last
};

// Does one block after another, on one thread of the operating system.
struct Worker {
    const Launch* launch = nullptr;
    std::vector<Thread> threads;         // of the running block, by rank
    std::vector<unsigned> order;         // the ranks in the order of their turns
    std::vector<unsigned> warp_waiting;  // for each warp: the lanes at a warp operation
    size_t position = 0;                 // in order
    unsigned arrived = 0, finished = 0;
    uint64_t blocks_done = 0;
    dim3 indexed_for{0, 0, 0};  // the block size for which threads[].index is right
    std::vector<std::unique_ptr<Fibre>> fibres;
    std::vector<Fibre*> idle;
    Fibre scheduler;  // the ordinary stack
    std::vector<std::unique_ptr<SharedArray>> shared_arrays;
    std::map<size_t, std::unique_ptr<SharedArray>> dynamic_by_size;
    SharedArray* dynamic = nullptr;
    size_t dynamic_alignment = 16;                    // what its declaration asks for
    std::vector<std::vector<GroupWord>> group_words;  // by group of four warps, and how many of
    std::vector<size_t> warp_words;                   // them each warp has said
    size_t static_bytes = 0;                          // of this block, so far
    std::exception_ptr failure;
    sigjmp_buf on_fault;
    std::string fault_message;
    Mistake fault_mistake = Mistake::other;
    uint3 fault_thread{};
    std::vector<char> signal_stack;
};

// The GPU thread and the worker that run on this thread of the operating system; null on the host.
inline constinit thread_local Thread* self = nullptr;
inline constinit thread_local Worker* worker = nullptr;

// Throws an Error about the running thread, or about `thread` if one is given.
[[noreturn]] inline void report(Mistake mistake, const std::string& message,
                                const Thread* thread = nullptr) {
    if (!thread) thread = self;
    uint3 index = thread ? thread->index : uint3{};
    std::string full = "cuda_on_cpu: ";
    if (worker && worker->launch)
        full += text("kernel %s, block %s, thread %s: ", worker->launch->kernel,
                     text(blockIdx).c_str(), text(index).c_str());
    full += message;
    mistake_found(full.c_str());
    throw Error(mistake, full, worker && worker->launch ? worker->launch->kernel : "", blockIdx,
                index);
}

inline Thread& running_thread(const char* what) {
    if (!self)
        report(Mistake::other, text("%s is called on the host; it belongs in a kernel", what));
    return *self;
}

#if CUDA_ON_CPU_WATCH
void watch_launch();                            // a new kernel
void watch_barrier();                           // of the running block
void watch_syncwarp();                          // passed by the running thread
void watch_shared_array(const GuardedMemory&);  // is new, and unwritten
void watch_copy_started(void* shared_address);  // cp.async of 16 bytes by the running thread
void watch_copy_done(void* shared_address);
void watch_read(const void* address, size_t bytes, const Thread& by);
void watch_host_write(void* address, size_t bytes);  // by cudaMemcpy and the like
long watch_first_unwritten(const void* address,
                           size_t bytes);  // the offset of a byte never written; -1
void watch_new_buffer(const GuardedMemory&);
void watch_atomic(const void* address, size_t bytes);
#else
inline void watch_launch() {}
inline void watch_barrier() {}
inline void watch_syncwarp() {}
inline void watch_shared_array(const GuardedMemory&) {}
inline void watch_copy_started(void*) {}
inline void watch_copy_done(void*) {}
inline void watch_read(const void*, size_t, const Thread&) {}
inline void watch_host_write(void*, size_t) {}
inline long watch_first_unwritten(const void*, size_t) { return -1; }
inline void watch_new_buffer(const GuardedMemory&) {}
inline void watch_atomic(const void*, size_t) {}
#endif

// -------------------------------------------------------------------------------------------------
// Taking turns. A sweep goes once through the threads in the chosen order and runs each one that
// can run until it waits or ends. Fibres switch straight to the next one; the scheduler gets its
// turn at the end of a sweep.

inline void fibre_entry();

inline constexpr size_t fibre_stack_bytes =
    CUDA_ON_CPU_ASAN || CUDA_ON_CPU_WATCH ? 256 << 10 : 128 << 10;

// Why so large: a function with big local arrays may step over a small one.
inline constexpr size_t fibre_guard_bytes = 256 << 10;

inline std::unique_ptr<Fibre> new_fibre(size_t number) {
    auto f = std::make_unique<Fibre>();
    void* p = mmap(nullptr, fibre_guard_bytes + fibre_stack_bytes, PROT_NONE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    f->stack = static_cast<char*>(p) + fibre_guard_bytes;
    if (mprotect(f->stack, fibre_stack_bytes, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
    // Why: stacks that all start at the same place of a page would fight for the same cache lines.
    f->stack_bytes = fibre_stack_bytes - number % 16 * 256;
    return f;
}

inline Fibre* take_idle_fibre(Worker& w) {
    if (w.idle.empty()) {
        w.fibres.push_back(new_fibre(w.fibres.size()));
        w.idle.push_back(w.fibres.back().get());
    }
    Fibre* f = w.idle.back();
    w.idle.pop_back();
    if (!f->started) prepare_fibre(*f, fibre_entry);
    return f;
}

// The next fibre to run: that of the next thread in this sweep that can, else the scheduler.
inline Fibre* advance(Worker& w) {
    while (++w.position < w.order.size()) {
        Thread& t = w.threads[w.order[w.position]];
        if (t.state != State::unstarted && t.state != State::ready) continue;
        if (t.state == State::unstarted) t.fibre = take_idle_fibre(w);
        t.state = State::running;
        self = &t;
        threadIdx = t.index;
        return t.fibre;
    }
    self = nullptr;
    return &w.scheduler;
}

// Lets others run until somebody makes this thread ready again.
inline void wait_here(State state) {
    Worker& w = *worker;
    Thread& t = *self;
    t.state = state;
    Fibre* next = advance(w);
    if (next != t.fibre) switch_fibres(*t.fibre, *next);
}

// The life of a fibre: one thread after another, each to its end.
inline void fibre_entry() {
#if CUDA_ON_CPU_ASAN
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
    Worker& w = *worker;
    for (;;) {
        Fibre* mine = self->fibre;
        try {
            w.launch->call(w.launch->arguments);
        } catch (...) {
            w.failure = std::current_exception();
        }
        if (w.failure) switch_fibres(*mine, w.scheduler);  // for good: the block is given up
        self->state = State::finished;
        w.finished++;
        w.idle.push_back(mine);
        Fibre* next = advance(w);  // takes this fibre again if the next thread has none yet
        if (next != mine) switch_fibres(*mine, *next);
    }
}

// After a failure: the stacks of all threads are given up as they are.
inline void give_up_fibres(Worker& w) {
    w.idle.clear();
    for (auto& f : w.fibres) {
        f->started = false;
#if CUDA_ON_CPU_ASAN
        __asan_unpoison_memory_region(f->stack, f->stack_bytes);
#endif
        w.idle.push_back(f.get());
    }
    for (Thread& t : w.threads) {
        t.copies.clear();
        t.group_ends.clear();
        t.products.clear();
        t.product_ends.clear();
    }
    self = nullptr;
}

// -------------------------------------------------------------------------------------------------
// Why nobody can go on

inline const char* describe(State s) {
    return s == State::finished ? "has finished" : s == State::at_barrier ? "waits at" : "is at";
}
inline std::string describe(const Thread& t) {
    std::string name = "thread " + text(t.index) + " " + describe(t.state);
    return t.state == State::finished ? name : name + " " + text(t.site);
}

// A lane that `t` waits for and that does not come; null if the block has no such thread.
inline const Thread* missing_lane(Worker& w, const Thread& t, unsigned& lane) {
    unsigned first = t.rank / 32 * 32;
    for (lane = 0; lane < 32; lane++) {
        if (!(t.mask >> lane & 1)) continue;
        if (first + lane >= w.threads.size()) return nullptr;
        const Thread& other = w.threads[first + lane];
        bool there = other.state == State::at_warp_operation && other.function == t.function &&
                     other.mask == t.mask;
        if (!there) return &other;
    }
    return &t;
}

[[noreturn]] inline void report_stalled_warp(Worker& w, const Thread& t) {
    unsigned lane = 0;
    const Thread* missing = missing_lane(w, t, lane);
    std::string why =
        !missing ? text("lane %u does not exist in a block of %zu threads", lane, w.threads.size())
                 : text("lane %u never comes: ", lane) + describe(*missing);
    if (missing && missing->state == State::at_warp_operation)
        why += text(" with mask 0x%08x", missing->mask);
    report(Mistake::warp,
           text("%s waits for the lanes of mask 0x%08x, but %s. Let every lane of the mask reach "
                "it, "
                "or take the lane out of the mask",
                text(t.site).c_str(), t.mask, why.c_str()),
           &t);
}

[[noreturn]] inline void report_stall(Worker& w) {
    const Thread *at_barrier = nullptr, *finished = nullptr;
    for (const Thread& t : w.threads) {
        if (t.state == State::at_warp_operation) report_stalled_warp(w, t);
        if (t.state == State::at_barrier && !at_barrier) at_barrier = &t;
        if (t.state == State::finished && !finished) finished = &t;
    }
    report(Mistake::barrier,
           text("%s is reached by %u of %zu threads and %u have finished, the first of them thread "
                "%s. "
                "Every thread of the block must reach every barrier: move it out of the branch, "
                "and return only after the last one",
                text(at_barrier->site).c_str(), w.arrived, w.threads.size(), w.finished,
                finished ? text(finished->index).c_str() : "none"),
           at_barrier);
}

// -------------------------------------------------------------------------------------------------
// Barriers and warp operations, as a kernel sees them

inline constexpr int barrier_plain = 0, barrier_count = 1, barrier_and = 2, barrier_or = 3;

// All threads are there: work out the result and let them go on.
inline void release_barrier(Worker& w) {
    int kind = self->barrier_kind, count = 0;
    for (Thread& t : w.threads) {
        if (t.barrier_kind != kind)
            report(Mistake::barrier, "different barriers meet: this thread is at " +
                                         text(self->site) + ", " + describe(t));
        count += t.barrier_input != 0;
    }
    int result = kind == barrier_count ? count
                 : kind == barrier_and ? count == int(w.threads.size())
                                       : count > 0;
    for (Thread& t : w.threads) {
        t.barrier_result = result;
        if (t.state == State::at_barrier) t.state = State::ready;
        if (t.copied == Copies::arrived) t.copied = Copies::behind_barrier;
        if (t.copied == Copies::fenced_late) t.copied = Copies::published;
    }
    w.arrived = 0;
    watch_barrier();
}

// Waits until every thread of the block is here; the number, all or any of the nonzero inputs.
inline int block_barrier(int kind, int input, Site site) {
    Thread& t = running_thread(site.what);
    t.site = site;
    t.barrier_kind = kind;
    t.barrier_input = input;
    if (++worker->arrived == worker->threads.size())
        release_barrier(*worker);
    else
        wait_here(State::at_barrier);
    return t.barrier_result;
}

// True if all lanes of t's mask are at the same operation as t.
inline bool all_lanes_there(Worker& w, const Thread& t) {
    unsigned first = t.rank / 32 * 32;
    if ((w.warp_waiting[t.rank / 32] & t.mask) != t.mask) return false;
    for (unsigned m = t.mask; m; m &= m - 1) {
        const Thread& other = w.threads[first + unsigned(__builtin_ctz(m))];
        if (other.function != t.function || other.mask != t.mask) return false;
    }
    return true;
}

// Brings `data` to an operation of the lanes in `mask`. The last lane to come does the work for
// all. An `aligned` operation (PTX: .aligned) must be the same instruction for every lane.
inline void warp_operation(unsigned mask, void* data, WarpFunction function, bool aligned,
                           Site site) {
    Thread& t = running_thread(site.what);
    Worker& w = *worker;
    t.site = site;
    t.mask = mask;
    t.lane_data = data;
    t.function = function;
    unsigned lane = t.rank % 32, first = t.rank - lane;
    if (!(mask >> lane & 1))
        report(Mistake::warp, text("%s: lane %u calls it, but is not in the mask 0x%08x",
                                   text(site).c_str(), lane, mask));
    unsigned& waiting = w.warp_waiting[t.rank / 32];
    waiting |= 1u << lane;
    if (!all_lanes_there(w, t)) return wait_here(State::at_warp_operation);

    void* lanes[32] = {};
    for (unsigned m = mask; m; m &= m - 1) {
        Thread& other = w.threads[first + unsigned(__builtin_ctz(m))];
        lanes[other.rank % 32] = other.lane_data;
        if (aligned && other.site.line != site.line)
            report(Mistake::warp,
                   text(site) + ": all lanes must execute the same instruction together, but " +
                       describe(other));
    }
    waiting &= ~mask;
    function(lanes, mask);
    for (unsigned m = mask; m; m &= m - 1) {
        Thread& other = w.threads[first + unsigned(__builtin_ctz(m))];
        if (other.state == State::at_warp_operation) other.state = State::ready;
    }
}

// -------------------------------------------------------------------------------------------------
// Shared memory, as a kernel sees it

// Programming Guide, "Technical Specifications per Compute Capability".
struct Limits {
    int capability;           // and later ones, up to the next row
    size_t shared, reserved;  // KB of a multiprocessor; of that, taken by the system for each block
    int threads, blocks;      // of a multiprocessor
};
inline const Limits& limits() {
    static constexpr Limits rows[] = {{0, 96, 0, 2048, 32},   {75, 64, 0, 1024, 16},
                                      {80, 164, 1, 2048, 32}, {86, 100, 1, 1536, 16},
                                      {87, 164, 1, 1536, 16}, {89, 100, 1, 1536, 24},
                                      {90, 228, 1, 2048, 32}, {120, 100, 1, 1536, 24}};
    const int capability = 10 * settings().major + settings().minor;
    return *std::prev(
        std::upper_bound(std::begin(rows), std::end(rows), capability,
                         [](int value, const Limits& row) { return value < row.capability; }));
}
inline constexpr size_t shared_limit_plain = 48 << 10, registers_of_multiprocessor = 65536;
// What a block may have if it asks.
inline size_t shared_limit_opted() { return (limits().shared - limits().reserved) << 10; }

// What ptxas says of a kernel: bytes of static shared memory, and registers of a thread (the most
// of all architectures). The emulator cannot know them; a program that does loads them from a file
// of lines "static registers name<arguments>".
struct KernelSize {
    size_t static_bytes = 0, registers = 0;
};
inline std::map<std::string, KernelSize>& kernel_sizes() {
    static auto* sizes = new std::map<std::string, KernelSize>;
    return *sizes;
}
inline bool load_kernel_sizes(const char* path) {
    FILE* file = std::fopen(path, "r");
    if (!file) return false;
    char line[4096], name[4000];
    KernelSize size;
    while (std::fgets(line, sizeof line, file))
        if (std::sscanf(line, "%zu %zu %3999[^\n]", &size.static_bytes, &size.registers, name) == 3)
            kernel_sizes()[name] = size;
    std::fclose(file);
    return true;
}
// "name<arguments>" of a kernel, by the symbols of the program (link it with -rdynamic).
inline std::string name_of(const void* kernel) {
    Dl_info found;
    if (!dladdr(kernel, &found) || !found.dli_sname) return "";
    int status = 0;
    char* plain = abi::__cxa_demangle(found.dli_sname, nullptr, nullptr, &status);
    std::string name = plain ? plain : "";
    std::free(plain);
    name = name.substr(0, name.find('('));
    const size_t arguments = name.find('<'), begin = name.rfind("::", arguments);
    return begin == name.npos ? name.substr(name.rfind(' ', arguments) + 1)
                              : name.substr(begin + 2);
}
// Null where nothing is known.
inline const KernelSize* size_of(const void* kernel) {
    static std::mutex mutex;
    static std::map<const void*, std::string> names;
    std::lock_guard lock(mutex);
    if (kernel_sizes().empty()) return nullptr;
    auto [name, fresh] = names.try_emplace(kernel);
    if (fresh) name->second = name_of(kernel);
    auto size = kernel_sizes().find(name->second);
    return size == kernel_sizes().end() ? nullptr : &size->second;
}
// Registers of a block: a warp takes a multiple of 256.
inline size_t registers_of_block(size_t registers, size_t threads) {
    return (threads + 31) / 32 * ((registers * 32 + 255) / 256 * 256);
}

// The largest alignment that an `extern __shared__` array of the program asks for. ptxas rounds the
// static shared memory of every kernel that has some up to it, because the dynamic part follows.
inline size_t& dynamic_shared_alignment() {
    static size_t alignment = 1;
    return alignment;
}

inline size_t rounded_static(size_t bytes) {
    const size_t unit = dynamic_shared_alignment();
    return (bytes + unit - 1) / unit * unit;
}
inline void check_shared_size(Worker& w) {
    const KernelSize* size = w.launch->size;
    if (size && rounded_static(w.static_bytes) > size->static_bytes)
        report(Mistake::launch, text("its __shared__ arrays take %zu bytes, and ptxas said %zu",
                                     rounded_static(w.static_bytes), size->static_bytes));
    size_t total =
        (size ? size->static_bytes : rounded_static(w.static_bytes)) + w.launch->shared_bytes;
    size_t limit = w.launch->shared_opted ? shared_limit_opted() : shared_limit_plain;
    if (w.static_bytes > shared_limit_plain)
        report(Mistake::launch, text("the __shared__ arrays of one kernel take %zu bytes; 49152 is "
                                     "the limit. Use extern __shared__",
                                     w.static_bytes));
    if (total > limit)
        report(Mistake::launch,
               text("static and dynamic shared memory together take %zu bytes; %zu is the limit%s",
                    total, limit,
                    w.launch->shared_opted
                        ? ""
                        : " until cudaFuncSetAttribute(kernel, "
                          "cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)"));
}

// The running block's copy of a shared array, poisoned when the first thread of the block meets it.
inline void* use_static_shared(const void* tag, const char* name, size_t bytes, size_t alignment) {
    Worker& w = *worker;
    SharedArray* array = nullptr;
    for (auto& a : w.shared_arrays)
        if (a->tag == tag) array = a.get();
    if (!array) {
        w.shared_arrays.push_back(std::make_unique<SharedArray>());
        array = w.shared_arrays.back().get();
        array->tag = tag;
        array->name = name;
        array->memory.allocate(bytes, alignment);
    }
    if (array->used_in_block != w.blocks_done) {
        array->used_in_block = w.blocks_done;
        w.static_bytes += bytes;
        check_shared_size(w);
        std::memset(array->memory.data, poison_byte, bytes);
        watch_shared_array(array->memory);
    }
    return array->memory.data;
}

template <typename Holder>
Holder& static_shared(const char* name) {
    static const char tag = 0;
    running_thread("__shared__");
    return *static_cast<Holder*>(use_static_shared(&tag, name, sizeof(Holder), alignof(Holder)));
}

template <typename Holder>
inline const bool alignment_counted = [] {  // before main, as ptxas does it before any launch
    dynamic_shared_alignment() = std::max(dynamic_shared_alignment(), alignof(Holder));
    return true;
}();

template <typename Holder>
Holder& dynamic_shared() {
    (void)alignment_counted<Holder>;
    running_thread("extern __shared__");
    if (!worker->dynamic)
        report(Mistake::launch,
               "the kernel uses extern __shared__ memory but was launched with none: <<<grid, "
               "block, bytes>>>");
    char* data = worker->dynamic->memory.data;
    if (uintptr_t(data) % alignof(Holder) != 0)
        report(Mistake::alignment,
               text("extern __shared__ memory wants alignment %zu, but the launch gives %zu bytes; "
                    "make that a multiple of it",
                    alignof(Holder), worker->launch->shared_bytes));
    worker->dynamic_alignment = alignof(Holder);
    return *reinterpret_cast<Holder*>(data);
}

// The shared array of the running block that has p within its pages; null if none has.
inline SharedArray* find_shared(Worker& w, const void* p) {
    if (w.dynamic && w.dynamic->memory.covers(p)) return w.dynamic;
    for (auto& a : w.shared_arrays)
        if (a->used_in_block == w.blocks_done && a->memory.covers(p)) return a.get();
    return nullptr;
}

// Stops unless [p, p + bytes) lies inside one shared array of this block and p is aligned to
// `bytes`.
inline void check_shared_access(const void* p, size_t bytes, const char* what, const Thread& t) {
    SharedArray* a = find_shared(*worker, p);
    if (!a)
        report(Mistake::shared_memory, text("%s: the address %p is not in shared memory", what, p),
               &t);
    if (!a->memory.holds(p, bytes))
        report(Mistake::shared_memory,
               text("%s: byte %ld of shared array '%s', which has %zu bytes", what,
                    long(static_cast<const char*>(p) - a->memory.data), a->name, a->memory.bytes),
               &t);
    if (uintptr_t(p) % bytes != 0)
        report(Mistake::alignment,
               text("%s: byte %ld of shared array '%s' is not at a multiple of %zu", what,
                    long(static_cast<const char*>(p) - a->memory.data), a->name, bytes),
               &t);
}

// =================================================================================================
// Faults: an access to a guard page arrives as a signal and leaves as an Error
// =================================================================================================

inline const Thread* thread_of_stack(Worker& w, const void* p) {
    for (Thread& t : w.threads) {
        if (!t.fibre) continue;
        const char* guard = t.fibre->stack - fibre_guard_bytes;
        if (p >= guard && p < t.fibre->stack) return &t;
    }
    return nullptr;
}

// What lies at the address that a kernel was not allowed to touch.
inline std::string describe_fault(Worker& w, int signal, const void* p, Mistake& mistake) {
    mistake = Mistake::other;
    if (signal == SIGFPE) return "integer division by zero";
    if (SharedArray* a = find_shared(w, p)) {
        long offset = long(static_cast<const char*>(p) - a->memory.data),
             size = long(a->memory.bytes);
        mistake = Mistake::shared_memory;
        return text("%ld bytes %s shared array '%s' of %ld bytes",
                    offset < 0 ? -offset : offset - size, offset < 0 ? "before" : "past the end of",
                    a->name, size);
    }
    if (thread_of_stack(w, p))
        return text("past the stack of this thread (%zu bytes): are its local arrays too large?",
                    fibre_stack_bytes);
    mistake = Mistake::global_memory;
    if (Buffer* b = buffers().find(p)) return describe_address(*b, p);
    return p ? text("at address %p, which is in no buffer", p)
             : "at no valid address (a null pointer, or one that was never set)";
}

// How to find the line of an instruction; gdb stops there by itself.
inline uintptr_t start_of_program() {
    uintptr_t start = 0;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* out) {
            *static_cast<uintptr_t*>(out) = info->dlpi_addr;
            return 1;  // the first is the program itself
        },
        &start);
    return start;
}
inline std::string describe_instruction(const void* instruction, const void* other = nullptr) {
    char program[1024] = "";
    if (readlink("/proc/self/exe", program, sizeof program - 1) < 0) return "";
    auto in_program = [](const void* p) {
        return static_cast<unsigned long>(uintptr_t(p) - start_of_program());
    };
    std::string command = text(". Show the line%s: addr2line -Cipe %s 0x%lx", other ? "s" : "",
                               program, in_program(instruction));
    return other ? command + text(" 0x%lx", in_program(other)) : command;
}

// Gives the running block up from wherever a thread of it stands; run_block then throws the Error.
[[noreturn]] inline void leave_block(Mistake mistake, const std::string& message, uint3 thread) {
    Worker& w = *worker;
    w.fault_message = message;
    w.fault_mistake = mistake;
    w.fault_thread = thread;
    mistake_found(message.c_str());
#if CUDA_ON_CPU_ASAN
    __sanitizer_start_switch_fiber(nullptr, w.scheduler.stack, w.scheduler.stack_bytes);
#endif
    siglongjmp(w.on_fault, 1);
}

// What handled these signals before us, for faults that are not ours.
struct OldHandlers {
    struct sigaction segv, bus, fpe;
};
inline OldHandlers& old_handlers() {
    static OldHandlers h{};
    return h;
}

// The line of the access is not known here; the instruction is.
inline void on_signal(int signal, siginfo_t* info, void* context) {
    if (!self ||
        !worker) {  // not in a kernel: not ours. The access is repeated and meets the old handler.
        OldHandlers& old = old_handlers();
        sigaction(signal,
                  signal == SIGSEGV  ? &old.segv
                  : signal == SIGBUS ? &old.bus
                                     : &old.fpe,
                  nullptr);
        return;
    }
    Worker& w = *worker;
    std::string access = "access";
    [[maybe_unused]] void* instruction = nullptr;
#if defined(__x86_64__)
    auto* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    if (signal == SIGSEGV && info->si_addr) access = registers[REG_ERR] & 2 ? "write" : "read";
    instruction = reinterpret_cast<void*>(registers[REG_RIP]);
#else
    (void)context;
#endif
    Mistake mistake;
    std::string what = describe_fault(w, signal, info->si_addr, mistake);
    leave_block(mistake,
                (signal == SIGFPE ? "" : access + " ") + what + describe_instruction(instruction),
                self->index);
}

// Called before every launch: a test framework may have put its own handlers back in between.
inline void catch_signals() {
    struct sigaction ours = {}, now;
    ours.sa_sigaction = on_signal;
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, nullptr, &now);
    if (now.sa_sigaction == on_signal) return;
    sigaction(SIGSEGV, &ours, &old_handlers().segv);
    sigaction(SIGBUS, &ours, &old_handlers().bus);
    sigaction(SIGFPE, &ours, &old_handlers().fpe);
}

// =================================================================================================
// Running blocks
// =================================================================================================

// Why a stack for signals: one of them is the overflow of the ordinary stack.
inline void use_signal_stack(Worker& w) {
    stack_t alternate = {};
    alternate.ss_sp = w.signal_stack.data();
    alternate.ss_size = w.signal_stack.size();
    sigaltstack(&alternate, nullptr);
}

// The worker of this thread of the operating system, made when first asked for.
inline Worker& this_worker() {
    thread_local std::unique_ptr<Worker> mine;
    if (mine) return *mine;
    mine = std::make_unique<Worker>();
    mine->signal_stack.resize(128 << 10);
    use_signal_stack(*mine);
    pthread_attr_t attributes;
    void* low = nullptr;
    if (pthread_getattr_np(pthread_self(), &attributes) == 0) {
        pthread_attr_getstack(&attributes, &low, &mine->scheduler.stack_bytes);
        pthread_attr_destroy(&attributes);
    }
    mine->scheduler.stack = static_cast<char*>(low);
    return *mine;
}

// The threads of one warp that can run; none if no thread of the block can.
inline void choose_warp(Worker& w) {
    const uint64_t seed = settings().seed, warps = (w.threads.size() + 31) / 32;
    const uint64_t first = seed == 1 ? 0 : mix(mix(seed) + blockIdx.x) % warps;
    w.order.clear();
    for (uint64_t i = 0; i < warps && w.order.empty(); i++)
        for (uint64_t lane = 0, rank = (first + i) % warps * 32; lane < 32; lane++, rank++)
            if (rank < w.threads.size() && (w.threads[rank].state == State::unstarted ||
                                            w.threads[rank].state == State::ready))
                w.order.push_back(unsigned(rank));
}

// Puts the ranks into the chosen order; a random one is new in every sweep.
inline void choose_order(Worker& w, uint64_t sweep) {
    const Settings& s = settings();
    size_t n = w.threads.size();
    if (s.order == Order::warps) return choose_warp(w);
    if (sweep > 0 && s.order != Order::random) return;
    w.order.resize(n);
    for (size_t i = 0; i < n; i++)
        w.order[i] = unsigned(s.order == Order::descending ? n - 1 - i : i);
    if (s.order != Order::random) return;
    uint64_t block =
        blockIdx.x + uint64_t(gridDim.x) * (blockIdx.y + uint64_t(gridDim.y) * blockIdx.z);
    for (size_t i = n; i > 1; i--)
        std::swap(w.order[i - 1], w.order[mix(mix(mix(s.seed) + block) + sweep * 4096 + i) % i]);
}

inline void prepare_threads(Worker& w, dim3 block) {
    size_t n = size_t(block.x) * block.y * block.z;
    if (block.x != w.indexed_for.x || block.y != w.indexed_for.y || block.z != w.indexed_for.z) {
        w.threads.resize(n);
        for (unsigned i = 0; i < n; i++) {
            w.threads[i].rank = i;
            w.threads[i].index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
        }
        w.indexed_for = block;
    }
    for (Thread& t : w.threads) {
        t.state = State::unstarted;
        t.fibre = nullptr;
        t.barrier_kind = barrier_plain;
        if (!t.copies.empty()) t.copies.clear();
        if (!t.group_ends.empty()) t.group_ends.clear();
        t.copied = Copies::published;
        t.group_begun = false;
    }
    w.group_words.assign((n + 127) / 128, {});
    w.warp_words.assign((n + 31) / 32, 0);
    w.warp_waiting.assign((n + 31) / 32, 0);
    w.arrived = w.finished = 0;
}

inline void prepare_dynamic_shared(Worker& w) {
    w.static_bytes = 0;
    w.dynamic = nullptr;
    if (size_t bytes = w.launch->shared_bytes) {
        auto& slot = w.dynamic_by_size[bytes];
        if (!slot) {
            slot = std::make_unique<SharedArray>();
            slot->name = "extern __shared__";
            slot->memory.allocate(bytes, 16);
        }
        w.dynamic = slot.get();
        std::memset(slot->memory.data, poison_byte, bytes);
        watch_shared_array(slot->memory);
    }
}

// Small writes beside a shared array, inside its pages, are found when the block is done.
inline void check_shared_damage(Worker& w) {
    auto check = [&](const SharedArray& a) {
        if (long at = a.memory.find_damage()) {
            std::memset(a.memory.inside(), poison_byte, size_t(a.memory.data - a.memory.inside()));
            std::memset(a.memory.data + a.memory.bytes, poison_byte,
                        size_t(a.memory.outside() - a.memory.data) - a.memory.bytes);
            report(Mistake::shared_memory, text("some thread of the block wrote to byte %ld of "
                                                "shared array '%s', which has %zu bytes",
                                                at, a.name, a.memory.bytes));
        }
    };
    if (w.dynamic) check(*w.dynamic);
    for (auto& a : w.shared_arrays)
        if (a->used_in_block == w.blocks_done) check(*a);
}

// When all threads have finished: every wgmma was waited for, and said by all warps of its group.
inline void check_groups(Worker& w) {
    for (const Thread& t : w.threads)
        if (!t.products.empty())
            report(Mistake::other, "the thread has finished, but not waited for its wgmma", &t);
    for (size_t warp = 0; warp < w.warp_words.size(); warp++)
        if (w.warp_words[warp] != w.group_words[warp / 4].size())
            report(Mistake::warp,
                   text("a wgmma was reached by other warps of the group, but not by this one: it "
                        "said %zu of %zu",
                        w.warp_words[warp], w.group_words[warp / 4].size()),
                   &w.threads[warp * 32]);
}

inline void run_sweeps(Worker& w) {
    for (uint64_t sweep = 0; w.finished < w.threads.size(); sweep++) {
        choose_order(w, sweep);
        w.position = size_t(-1);
        Fibre* first = advance(w);
        if (first == &w.scheduler) report_stall(w);
        switch_fibres(w.scheduler, *first);
        if (w.failure) std::rethrow_exception(std::exchange(w.failure, nullptr));
    }
}

// Runs one block from start to end. Throws what went wrong in it.
inline void run_block(Worker& w, const Launch& launch, uint3 index) {
    worker = &w;
    w.launch = &launch;
    w.blocks_done++;
    blockIdx = index;
    blockDim = launch.block;
    gridDim = launch.grid;
    try {
        prepare_threads(w, launch.block);
        prepare_dynamic_shared(w);
        if (sigsetjmp(w.on_fault, 0)) {
#if CUDA_ON_CPU_ASAN
            __sanitizer_finish_switch_fiber(w.scheduler.asan_fake_stack, nullptr, nullptr);
#endif
            Thread at;
            at.index = w.fault_thread;
            self = nullptr;
            report(w.fault_mistake, w.fault_message, &at);
        }
        run_sweeps(w);
        check_groups(w);
        check_shared_damage(w);
    } catch (...) {
        give_up_fibres(w);
        worker = nullptr;
        throw;
    }
    worker = nullptr;
}

// =================================================================================================
// Launches
// =================================================================================================

struct KernelInfo {
    std::string name, file;
    int line = 0;
    long launches = 0;
};

struct KernelList {
    std::mutex mutex;
    std::map<std::string, KernelInfo> by_name;
    std::map<const void*, size_t> dynamic_limit;  // what cudaFuncSetAttribute allowed
};
inline KernelList& kernel_list() {
    static KernelList* list = new KernelList;
    return *list;
}

struct ListedKernel {
    const char* name;
    const char* file;
    int line;
};
// Called once per translated file, before main, with all its __global__ functions.
inline bool list_kernels(std::initializer_list<ListedKernel> kernels) {
    for (auto& k : kernels) {
        KernelInfo& info = kernel_list().by_name[k.name];
        info.name = k.name;
        info.file = k.file;
        info.line = k.line;
    }
    return true;
}

// Every __global__ function of the program, and how often it was launched (a template counts as
// one).
inline std::vector<KernelInfo> kernels() {
    std::lock_guard lock(kernel_list().mutex);
    std::vector<KernelInfo> all;
    for (auto& [name, info] : kernel_list().by_name) all.push_back(info);
    return all;
}

// "space::name<arguments>" without space and arguments.
inline std::string plain_name(std::string name) {
    name = name.substr(0, name.find('<'));
    while (!name.empty() && name.back() == ' ') name.pop_back();
    size_t colon = name.rfind(':');
    return colon == std::string::npos ? name : name.substr(colon + 1);
}

[[noreturn]] inline void refuse_launch(const Launch& l, const std::string& why) {
    std::string message =
        text("cuda_on_cpu: %s:%d: launch of kernel %s: %s", l.file, l.line, l.kernel, why.c_str());
    mistake_found(message.c_str());
    throw Error(Mistake::launch, message, l.kernel, {}, {});
}

// The limits of every GPU since compute capability 3, and of the card that is played.
inline void check_launch(const Launch& l) {
    const dim3 &g = l.grid, &b = l.block;
    size_t threads = size_t(b.x) * b.y * b.z;
    if (threads == 0 || threads > 1024 || b.z > 64)
        refuse_launch(l, text("a block has 1 to 1024 threads and at most 64 in z, this one has %u "
                              "x %u x %u",
                              b.x, b.y, b.z));
    if (g.x == 0 || g.y == 0 || g.z == 0 || g.x > 2147483647u || g.y > 65535 || g.z > 65535)
        refuse_launch(l, text("a grid has 1 to 2147483647 x 65535 x 65535 blocks, this one has %u "
                              "x %u x %u",
                              g.x, g.y, g.z));
    if (l.shared_bytes > l.shared_limit)
        refuse_launch(l, text("%zu bytes of dynamic shared memory; %zu is the limit%s",
                              l.shared_bytes, l.shared_limit,
                              l.shared_bytes <= shared_limit_opted()
                                  ? ". Allow more with cudaFuncSetAttribute(kernel, "
                                    "cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)"
                                  : ""));
    if (l.size && registers_of_block(l.size->registers, threads) > registers_of_multiprocessor)
        refuse_launch(l, text("%zu threads of %zu registers are more than 65536", threads,
                              l.size->registers));
    if (!settings().has_code) refuse_launch(l, "the program holds no code for this device");
}

// Called where a kernel with __launch_bounds__(most) starts.
inline void check_launch_bounds(size_t most) {
    if (worker->threads.size() > most)
        report(Mistake::launch, text("launched with %zu threads per block, but __launch_bounds__ "
                                     "promises at most %zu",
                                     worker->threads.size(), most));
}

// A pointer handed to a kernel must be null or point into live device (or page-locked host) memory.
inline void check_pointer_argument(const Launch& l, const void* p, int number) {
    if (!p) return;
    std::lock_guard lock(buffers().mutex);
    Buffer* b = buffers().find(p);
    if (!b)
        refuse_launch(l,
                      text("argument %d is a pointer to host memory; give memory from cudaMalloc",
                           number));
    if (!b->live)
        refuse_launch(l, text("argument %d points %s", number, describe_address(*b, p).c_str()));
}

// Small writes beside a global buffer, inside its pages.
inline void check_global_damage(const Launch& l) {
    std::lock_guard lock(buffers().mutex);
    for (auto& [address, b] : buffers().by_address) {
        if (!b.live) continue;
        if (long at = b.memory.find_damage()) {
            std::memset(b.memory.inside(), poison_byte, size_t(b.memory.data - b.memory.inside()));
            std::memset(b.memory.data + b.memory.bytes, poison_byte,
                        size_t(b.memory.outside() - b.memory.data) - b.memory.bytes);
            std::string message = text("cuda_on_cpu: kernel %s, some block and thread: write %s",
                                       l.kernel, describe_address(b, b.memory.data + at).c_str());
            mistake_found(message.c_str());
            throw Error(Mistake::global_memory, message, l.kernel, {}, {});
        }
    }
}

// Runs all blocks of a launch, several at once. Of several failures the one of the first block is
// thrown.
inline void run_grid(const Launch& l) {
    check_launch(l);
    catch_signals();
    use_signal_stack(this_worker());
    watch_launch();
    long blocks = long(l.grid.x) * l.grid.y * l.grid.z, failed_block = blocks;
    std::exception_ptr failure;
    std::atomic<bool> stop{false};
    std::mutex mutex;
    Order order = settings().order;
    auto work = [&](long i) {
        if (stop.load(std::memory_order_relaxed)) return;
        long block = order == Order::descending ? blocks - 1 - i : i;
        uint3 index{unsigned(block % l.grid.x), unsigned(block / l.grid.x % l.grid.y),
                    unsigned(block / l.grid.x / l.grid.y)};
        try {
            run_block(this_worker(), l, index);
        } catch (...) {
            std::lock_guard lock(mutex);
            if (block < failed_block) failure = std::current_exception(), failed_block = block;
            stop = true;
        }
    };
#if defined(_OPENMP) && !CUDA_ON_CPU_WATCH
#pragma omp parallel for schedule(dynamic, 1) if (blocks > 1)
#endif
    for (long i = 0; i < blocks; i++) work(i);
    if (failure) std::rethrow_exception(failure);
    check_global_damage(l);
}

// ---- Streams record what they are given while they are being captured into a graph. Late streams
// keep what they are given until something waits for them, so that a host that does not wait where
// it must reads old numbers, or changes memory that was not copied yet.
struct Stream;
struct Graph {
    std::vector<std::function<void()>> operations;
    std::vector<Stream*> streams;  // that are being captured into it
};
struct Stream {
    std::shared_ptr<Graph> capturing;  // null: operations run at once
    bool captures_first = false;       // the stream that cudaStreamBeginCapture was called on
    bool non_blocking = false;
    std::deque<std::function<void()>> waiting;
    uint64_t given = 0, done = 0;  // operations of a late stream
    // Does what was given before number `until`.
    void run(uint64_t until) {
        while (done < until) {
            auto operation = std::move(waiting.front());
            waiting.pop_front(), done++;
            operation();
        }
    }
};
inline std::set<Stream*>& streams() {
    static std::set<Stream*> all;
    return all;
}
inline void run_all_streams(bool but_non_blocking = false) {
    for (Stream* stream : std::set<Stream*>(streams()))
        if (!but_non_blocking || !stream->non_blocking) stream->run(stream->given);
}
// Runs `operation`, or records it if the stream is being captured, or keeps it if it is late.
template <typename Operation>
void submit(Stream* stream, Operation&& operation) {
    if (stream && stream->capturing)
        stream->capturing->operations.push_back(std::forward<Operation>(operation));
    else if (stream && settings().late_streams)
        stream->waiting.push_back(std::forward<Operation>(operation)), stream->given++;
    else {
        if (settings().late_streams) run_all_streams(true);  // the default stream waits for them
        if (stream) stream->run(stream->given);
        operation();
    }
}

// A kernel with its <<<...>>>; called with the kernel's arguments.
template <typename Call>
struct Launcher {
    Launch launch;
    Stream* stream;
    Call call;

    template <typename... Arguments>
    void operator()(Arguments... arguments) const {
        count_launch();
        int number = 0;
        auto check = [&](auto& argument) {
            number++;
            if constexpr (std::is_pointer_v<std::decay_t<decltype(argument)>>)
                check_pointer_argument(launch, argument, number);
        };
        (check(arguments), ...);
        using Pack = std::pair<Call, std::tuple<Arguments...>>;
        submit(stream, [l = launch,
                        pack = Pack(call, std::tuple<Arguments...>(arguments...))]() mutable {
            l.call = [](const void* p) {
                std::apply(static_cast<const Pack*>(p)->first, static_cast<const Pack*>(p)->second);
            };
            l.arguments = &pack;
            run_grid(l);
        });
    }
    void count_launch() const {
        std::string name = plain_name(launch.kernel);
        std::lock_guard lock(kernel_list().mutex);
        KernelInfo& info = kernel_list().by_name[name];
        info.name = name;
        info.launches++;
    }
};

// The address of a kernel, whatever its type.
struct AddressOf {
    template <typename... P>
    const void* operator()(void (*f)(P...)) const {
        return reinterpret_cast<const void*>(f);
    }
};

// What the translator makes of kernel<<<grid, block, shared, stream>>>.
template <typename Call, typename Address>
Launcher<Call> launch(const char* kernel, const char* file, int line, Call call, Address address,
                      dim3 grid, dim3 block, size_t shared_bytes = 0, Stream* stream = nullptr) {
    size_t limit = shared_limit_plain;
    bool opted = false;
    const KernelSize* size = size_of(address(AddressOf()));
    {
        std::lock_guard lock(kernel_list().mutex);
        auto it = kernel_list().dynamic_limit.find(address(AddressOf()));
        opted = it != kernel_list().dynamic_limit.end();
        if (opted) limit = it->second;
    }
    return {Launch{kernel, file, line, grid, block, shared_bytes, limit, opted, size, nullptr,
                   nullptr},
            stream, call};
}

// =================================================================================================
// The order test: what a missing barrier cannot pass
// =================================================================================================

struct Output {
    const void* data;  // host or device
    size_t bytes;
};

// Calls `run`, which must set up its inputs anew and launch, with the threads of each block taking
// turns in ascending, descending, random and warps' orders. Throws unless all outputs agree bit for
// bit.
inline void check_orders(const std::function<void()>& run, const std::vector<Output>& outputs,
                         uint64_t seed = 1) {
    struct Restore {
        Settings before = settings();
        ~Restore() { settings().order = before.order, settings().seed = before.seed; }
    } restore;
    std::vector<std::vector<char>> first;
    const std::pair<Order, uint64_t> turns[] = {{Order::ascending, 0}, {Order::descending, 0},
                                                {Order::random, seed}, {Order::random, seed + 1},
                                                {Order::warps, 1},     {Order::warps, seed + 2}};
    for (auto [order, turn_seed] : turns) {
        set_order(order, turn_seed);
        run();
        for (size_t i = 0; i < outputs.size(); i++) {
            std::vector<char> now(outputs[i].bytes);
            std::memcpy(now.data(), outputs[i].data, now.size());
            if (order == Order::ascending) {
                first.push_back(now);
                continue;
            }
            size_t at = 0;
            while (at < outputs[i].bytes && now[at] == first[i][at]) at++;
            if (at == outputs[i].bytes) continue;
            std::string message = text(
                "cuda_on_cpu: results change with the order of threads: output %zu differs at byte "
                "%zu between "
                "ascending and %s order. A barrier is missing, or two threads write to one place",
                i, at, text(order));
            mistake_found(message.c_str());
            throw Error(Mistake::order, message, "", {}, {});
        }
    }
}

}  // namespace cuda_on_cpu
