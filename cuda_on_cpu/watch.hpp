// watch.hpp: sees every load and store of a kernel, and tells which thread reads what nobody wrote,
// and which two threads meet at one place with no barrier between them.
//
// How: the file is compiled with -fsanitize=thread -DCUDA_ON_CPU_WATCH=1 but linked without that
// sanitizer. The compiler then calls __tsan_read4(address) and its like at every access, and those
// are defined here. Next to each 2 bytes of device and shared memory a Cell remembers who wrote and
// who read last. Blocks run one after another in this build, and a kernel takes about ten times as
// long.
//
// Two accesses to one place, at least one of them a write, are a race unless one thread made both,
// or a barrier (in one warp also __syncwarp) lies between them, or they belong to different
// kernels. Blocks of one kernel are never ordered, unless the later one used an atomic operation
// before (then nothing is said). A shuffle or vote orders nothing: the Programming Guide gives them
// no memory ordering. Places that are accessed in single bytes are checked for being written, not
// for races.
#pragma once

namespace cuda_on_cpu {

// One access, as a place remembers it.
struct Access {
    uint32_t block = 0;            // counted over all launches; 0: none
    uint32_t epoch = 0;            // barriers of the block so far
    uint32_t warp_epoch : 22 = 0;  // __syncwarp calls of the thread so far
    uint32_t rank : 10 = 0;        // of the thread in its block
    uint32_t instruction = 0;      // relative to the program's start
};

// What is known about 2 bytes.
struct Cell {
    Access write, read;
    uint8_t written = 0;       // bit i: byte i has a value
    bool outside = false;      // beside an array, inside its pages
    bool arriving = false;     // the target of a cp.async not yet waited for
    bool lanes_read = false;   // other lanes of the same warp read in the same epochs, too
    bool warps_read = false;   // other warps read since the last barrier, too
    bool blocks_read = false;  // an earlier block of this kernel read, too
};

struct Watch {
    static constexpr size_t address_bytes = size_t(64) << 30;
    char* addresses = nullptr;  // all device and shared memory lies in here
    Cell* cells = nullptr;      // one per 2 bytes of it; a page of them exists once it is used
    size_t used = 0;
    std::mutex mutex;
    uint32_t blocks = 0;        // blocks run so far, over all launches
    uint32_t first_block = 0;   // of this launch
    uint64_t worker_block = 0;  // which block of the worker `blocks` stands for
    uint32_t epoch = 0;
    bool used_atomics = false;          // by the running block
    std::vector<uint32_t> warp_epochs;  // by rank
    uintptr_t program = 0;
    std::string host_access;  // what the host did to device memory, to be told at the next launch

    Watch() {
        auto reserve = [](size_t bytes, int rights) {
            void* p =
                mmap(nullptr, bytes, rights, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (p == MAP_FAILED)
                throw std::runtime_error(
                    "cuda_on_cpu: the watched build needs more address space than this process may "
                    "have");
            return p;
        };
        addresses = static_cast<char*>(reserve(address_bytes, PROT_NONE));
        cells =
            static_cast<Cell*>(reserve(address_bytes / 2 * sizeof(Cell), PROT_READ | PROT_WRITE));
        program = start_of_program();
    }
};
// Why a plain pointer beside: an access asks for it before anything else, often before main.
inline Watch* the_watch = nullptr;
CUDA_ON_CPU_UNWATCHED inline Watch& watch() {
    if (!the_watch) the_watch = new Watch;
    return *the_watch;
}

inline void* reserve_watched_addresses(size_t bytes) {
    Watch& w = watch();
    std::lock_guard lock(w.mutex);
    if (w.used + bytes > Watch::address_bytes) throw std::bad_alloc();
    w.used += bytes;
    return w.addresses + w.used - bytes;
}

CUDA_ON_CPU_UNWATCHED inline bool is_watched(const Watch& w, const void* p) {
    return uintptr_t(p) - uintptr_t(w.addresses) < Watch::address_bytes;
}
CUDA_ON_CPU_UNWATCHED inline size_t offset_of(const Watch& w, const void* p) {
    return uintptr_t(p) - uintptr_t(w.addresses);
}

CUDA_ON_CPU_UNWATCHED inline uint3 index_of_rank(unsigned rank) {
    return rank < worker->threads.size() ? worker->threads[rank].index : uint3{};
}

// "shared array 'tile', byte 12" or "global buffer ...".
inline std::string describe_place(const void* p) {
    if (SharedArray* a = find_shared(*worker, p))
        return text("byte %ld of shared array '%s'",
                    long(static_cast<const char*>(p) - a->memory.data), a->name);
    std::lock_guard lock(buffers().mutex);
    Buffer* b = buffers().find(p);
    return b ? describe_address(*b, p) : text("address %p", p);
}

[[noreturn]] inline void report_race(Watch& w, const Thread& t, const void* p, const char* verb,
                                     const char* other_verb, const Access& other,
                                     const void* caller) {
    bool same_block = other.block == w.blocks;
    std::string who =
        same_block ? "thread " + text(index_of_rank(other.rank)) : "another block of this kernel";
    const char* advice =
        same_block ? "with no barrier between the two: __syncthreads() is missing"
                   : "and blocks have no order: give each its own place, or use a second kernel";
    leave_block(Mistake::race,
                text("%s %s, which %s %s, %s", verb, describe_place(p).c_str(), who.c_str(),
                     other_verb, advice) +
                    describe_instruction(caller,
                                         reinterpret_cast<void*>(w.program + other.instruction)),
                t.index);
}

// A value that is not there: never written, or not part of any array.
[[noreturn]] inline void report_no_value(const Cell& c, const Thread& t, const void* p,
                                         const char* verb, const void* caller) {
    Mistake mistake = Mistake::uninitialised;
    std::string what = describe_place(p);
    SharedArray* a = find_shared(*worker, p);
    Buffer* b = a ? nullptr : buffers().find(p);
    if ((a && !a->memory.holds(p, 1)) || (b && (!b->live || !b->memory.holds(p, 1))))
        what = describe_fault(*worker, SIGSEGV, p, mistake);
    else if (c.arriving)
        what += " before its copy_async_16 was waited for";
    else
        what += " before it was written";
    leave_block(mistake, std::string(verb) + " " + what + describe_instruction(caller), t.index);
}

// True if an earlier access is not ordered before what thread t does now.
CUDA_ON_CPU_UNWATCHED inline bool unordered(const Watch& w, const Access& earlier,
                                            const Thread& t) {
    if (earlier.block < w.first_block || earlier.block == 0) return false;  // another kernel
    if (earlier.block != w.blocks) return !w.used_atomics;
    if (earlier.epoch != w.epoch || earlier.rank == t.rank) return false;
    bool same_warp = earlier.rank / 32 == t.rank / 32;
    return !same_warp || earlier.warp_epoch == w.warp_epochs[t.rank];
}

// Catches up when the worker has begun another block since the last access.
CUDA_ON_CPU_UNWATCHED inline void meet_block(Watch& w) {
    if (w.worker_block == worker->blocks_done) return;
    w.worker_block = worker->blocks_done;
    w.blocks++;
    w.epoch = 0;
    w.used_atomics = false;
    w.warp_epochs.assign(worker->threads.size(), 0);
}

CUDA_ON_CPU_UNWATCHED inline Access access_by(const Watch& w, const Thread& t, const void* caller) {
    Access a;
    a.block = w.blocks;
    a.epoch = w.epoch;
    a.warp_epoch = w.warp_epochs[t.rank] & 0x3fffff;
    a.rank = t.rank & 1023;
    a.instruction = uint32_t(uintptr_t(caller) - w.program);
    return a;
}

CUDA_ON_CPU_UNWATCHED inline void note_read(Watch& w, Cell& c, const Thread& t,
                                            const void* caller) {
    Access now = access_by(w, t, caller);
    bool same_block = c.read.block == now.block,
         same_epoch = same_block && c.read.epoch == now.epoch;
    if (!same_epoch) {
        c.blocks_read =
            (c.blocks_read || !same_block) && c.read.block >= w.first_block && c.read.block != 0;
        c.lanes_read = c.warps_read = false;
        c.read = now;
    } else if (c.read.rank / 32 != now.rank / 32) {
        c.warps_read = true;
    } else if (c.read.warp_epoch != now.warp_epoch) {
        c.read = now;
        c.lanes_read = false;
    } else if (c.read.rank != now.rank) {
        c.lanes_read = true;
    }
}

// One thread reads `bytes` bytes.
CUDA_ON_CPU_UNWATCHED inline void watched_read(const void* p, size_t bytes, const Thread& t,
                                               const void* caller) {
    Watch& w = watch();
    meet_block(w);
    size_t at = offset_of(w, p);
    for (size_t i = at / 2; i <= (at + bytes - 1) / 2; i++) {
        Cell& c = w.cells[i];
        const void* place = w.addresses + std::max(2 * i, at);
        unsigned wanted = (2 * i < at ? 2u : 3u) & (2 * i + 2 > at + bytes ? 1u : 3u);
        if (c.arriving || (c.written & wanted) != wanted)
            report_no_value(c, t, place, "read", caller);
        if (bytes > 1 && unordered(w, c.write, t))
            report_race(w, t, place, "read", "writes", c.write, caller);
        note_read(w, c, t, caller);
    }
}

CUDA_ON_CPU_UNWATCHED inline void watched_write(const void* p, size_t bytes, const Thread& t,
                                                const void* caller) {
    Watch& w = watch();
    meet_block(w);
    size_t at = offset_of(w, p);
    Access now = access_by(w, t, caller);
    for (size_t i = at / 2; i <= (at + bytes - 1) / 2; i++) {
        Cell& c = w.cells[i];
        const void* place = w.addresses + std::max(2 * i, at);
        if (c.outside) report_no_value(c, t, place, "write", caller);
        unsigned covered = (2 * i < at ? 2u : 3u) & (2 * i + 2 > at + bytes ? 1u : 3u);
        if (bytes > 1) {
            if (unordered(w, c.write, t))
                report_race(w, t, place, "write", "writes, too", c.write, caller);
            bool in_epoch = c.read.block == w.blocks && c.read.epoch == w.epoch;
            bool others =
                in_epoch && (c.warps_read || (c.lanes_read && c.read.warp_epoch == now.warp_epoch));
            bool other_blocks = c.blocks_read && c.read.block >= w.first_block && !w.used_atomics;
            if (others || other_blocks || unordered(w, c.read, t))
                report_race(w, t, place, "write", "reads", c.read, caller);
        }
        c.written = uint8_t(c.written | covered);
        c.write = now;
    }
}

// ---- What emulator.hpp tells.

inline void watch_launch() {
    Watch& w = watch();
    w.first_block = w.blocks + 1;
    if (std::string what = std::exchange(w.host_access, ""); !what.empty())
        throw Error(Mistake::global_memory, "cuda_on_cpu: " + what, "", {}, {});
}
inline void watch_barrier() {
    meet_block(watch());
    watch().epoch++;
}
inline void watch_syncwarp() {
    meet_block(watch());
    watch().warp_epochs[self->rank]++;
}
CUDA_ON_CPU_UNWATCHED inline void clear_cells(const void* p, size_t bytes, bool written) {
    Watch& w = watch();
    size_t first = offset_of(w, p) / 2, last = (offset_of(w, p) + bytes - 1) / 2;
    for (size_t i = first; i <= last; i++) {
        Cell empty;
        empty.written = written ? 3 : 0;
        w.cells[i] = empty;
    }
}
// The rest of the pages, as far as it is near, belongs to nobody.
CUDA_ON_CPU_UNWATCHED inline void watch_new_buffer(const GuardedMemory& m) {
    Watch& w = watch();
    auto mark = [&](const char* from, const char* to) {
        for (size_t i = (offset_of(w, from) + 1) / 2; i < offset_of(w, to) / 2; i++)
            w.cells[i].outside = true;
    };
    mark(std::max(m.inside(), m.data - 256), m.data);
    mark(m.data + m.bytes, m.outside());
}
CUDA_ON_CPU_UNWATCHED inline void watch_shared_array(const GuardedMemory& m) {
    clear_cells(m.data, m.bytes, false);
    watch_new_buffer(m);
}
CUDA_ON_CPU_UNWATCHED inline void watch_host_write(void* p, size_t bytes) {
    Watch& w = watch();
    if (!is_watched(w, p) || bytes == 0) return;
    size_t at = offset_of(w, p);
    for (size_t i = at / 2; i <= (at + bytes - 1) / 2; i++) {
        unsigned covered = (2 * i < at ? 2u : 3u) & (2 * i + 2 > at + bytes ? 1u : 3u),
                 before = w.cells[i].written;
        w.cells[i] = Cell();
        w.cells[i].written = uint8_t(before | covered);
    }
}
CUDA_ON_CPU_UNWATCHED inline long watch_first_unwritten(const void* p, size_t bytes) {
    Watch& w = watch();
    if (!is_watched(w, p)) return -1;
    for (size_t i = 0, at = offset_of(w, p); i < bytes; i++)
        if (!(w.cells[(at + i) / 2].written >> ((at + i) % 2) & 1)) return long(i);
    return -1;
}
CUDA_ON_CPU_UNWATCHED inline void watch_read(const void* p, size_t bytes, const Thread& by) {
    if (is_watched(watch(), p)) watched_read(p, bytes, by, __builtin_return_address(0));
}
CUDA_ON_CPU_UNWATCHED inline void watch_copy_started(void* p) {
    Watch& w = watch();
    watched_write(p, 16, *self, __builtin_return_address(0));
    for (size_t i = 0; i < 8; i++) w.cells[offset_of(w, p) / 2 + i].arriving = true;
}
CUDA_ON_CPU_UNWATCHED inline void watch_copy_done(void* p) {
    Watch& w = watch();
    for (size_t i = 0; i < 8; i++) {
        Cell& c = w.cells[offset_of(w, p) / 2 + i];
        c.arriving = false;
        c.write = access_by(w, *self, __builtin_return_address(0));
    }
}
CUDA_ON_CPU_UNWATCHED inline void watch_atomic(const void* p, size_t bytes) {
    Watch& w = watch();
    if (!is_watched(w, p)) return;
    meet_block(w);
    if (watch_first_unwritten(p, bytes) >= 0)
        leave_block(Mistake::uninitialised,
                    "an atomic operation on " + describe_place(p) + ", which was never written",
                    self->index);
    w.used_atomics = true;
    clear_cells(p, bytes, true);
}

// ---- What the compiled program calls.

// On the host device memory must not be touched. Why not thrown from here: the compiler believes
// that its calls for the sanitizer never throw.
CUDA_ON_CPU_UNWATCHED inline void host_touches(const void* p, const void* caller) {
    Watch& w = watch();
    if (w.host_access.empty())
        w.host_access = text("host code touches device memory at %p; copy it with cudaMemcpy", p) +
                        describe_instruction(caller);
}

template <bool Write>
CUDA_ON_CPU_UNWATCHED inline void on_access(const void* p, size_t bytes, const void* caller) {
    if (!the_watch || !is_watched(*the_watch, p)) return;
    if (!self) return host_touches(p, caller);
    // What is not inside an array will fault, or is found at the end: nothing to remember.
    if (Write)
        watched_write(p, bytes, *self, caller);
    else
        watched_read(p, bytes, *self, caller);
}

}  // namespace cuda_on_cpu

#define CUDA_ON_CPU_HOOK(kind, name, bytes, write)                             \
    extern "C" CUDA_ON_CPU_UNWATCHED                                           \
        __attribute__((used, weak)) void __tsan_##kind##name##bytes(void* p) { \
        cuda_on_cpu::on_access<write>(p, bytes, __builtin_return_address(0));  \
    }
// clang-format off
#define CUDA_ON_CPU_HOOKS(kind)            \
    CUDA_ON_CPU_HOOK(kind, read, 1, false) \
    CUDA_ON_CPU_HOOK(kind, read, 2, false) \
    CUDA_ON_CPU_HOOK(kind, read, 4, false) \
    CUDA_ON_CPU_HOOK(kind, read, 8, false) \
    CUDA_ON_CPU_HOOK(kind, read, 16, false) \
    CUDA_ON_CPU_HOOK(kind, write, 1, true) \
    CUDA_ON_CPU_HOOK(kind, write, 2, true) \
    CUDA_ON_CPU_HOOK(kind, write, 4, true) \
    CUDA_ON_CPU_HOOK(kind, write, 8, true) \
    CUDA_ON_CPU_HOOK(kind, write, 16, true)
// clang-format on
CUDA_ON_CPU_HOOKS()
CUDA_ON_CPU_HOOKS(unaligned_)
CUDA_ON_CPU_HOOKS(volatile_)
CUDA_ON_CPU_HOOKS(unaligned_volatile_)

#define CUDA_ON_CPU_PLAIN extern "C" CUDA_ON_CPU_UNWATCHED __attribute__((used, weak))
CUDA_ON_CPU_PLAIN void __tsan_read_range(void* p, size_t bytes) {
    if (bytes) cuda_on_cpu::on_access<false>(p, bytes, __builtin_return_address(0));
}
CUDA_ON_CPU_PLAIN void __tsan_write_range(void* p, size_t bytes) {
    if (bytes) cuda_on_cpu::on_access<true>(p, bytes, __builtin_return_address(0));
}
CUDA_ON_CPU_PLAIN void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
    __tsan_read_range(const_cast<void*>(from), bytes), __tsan_write_range(to, bytes);
    return memcpy(to, from, bytes);
}
CUDA_ON_CPU_PLAIN void* __tsan_memmove(void* to, const void* from, size_t bytes) {
    __tsan_read_range(const_cast<void*>(from), bytes), __tsan_write_range(to, bytes);
    return memmove(to, from, bytes);
}
CUDA_ON_CPU_PLAIN void* __tsan_memset(void* to, int value, size_t bytes) {
    __tsan_write_range(to, bytes);
    return memset(to, value, bytes);
}
CUDA_ON_CPU_PLAIN void __tsan_init() {}
CUDA_ON_CPU_PLAIN void __tsan_func_entry(void*) {}
CUDA_ON_CPU_PLAIN void __tsan_func_exit() {}
CUDA_ON_CPU_PLAIN void __tsan_vptr_read(void*) {}
CUDA_ON_CPU_PLAIN void __tsan_vptr_update(void*, void*) {}
CUDA_ON_CPU_PLAIN void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
CUDA_ON_CPU_PLAIN void __tsan_atomic_signal_fence(int) {}

// The host's own atomics, in the strongest order.
#define CUDA_ON_CPU_FETCH(bits, type, name)                                              \
    CUDA_ON_CPU_PLAIN type __tsan_atomic##bits##_##name(volatile type* p, type v, int) { \
        return __atomic_##name(p, v, __ATOMIC_SEQ_CST);                                  \
    }
#define CUDA_ON_CPU_ATOMICS(bits, type)                                                           \
    CUDA_ON_CPU_PLAIN type __tsan_atomic##bits##_load(const volatile type* p, int) {              \
        return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                              \
    }                                                                                             \
    CUDA_ON_CPU_PLAIN void __tsan_atomic##bits##_store(volatile type* p, type v, int) {           \
        __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                                 \
    }                                                                                             \
    CUDA_ON_CPU_PLAIN type __tsan_atomic##bits##_exchange(volatile type* p, type v, int) {        \
        return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                       \
    }                                                                                             \
    CUDA_ON_CPU_PLAIN bool __tsan_atomic##bits##_compare_exchange_strong(volatile type* p,        \
                                                                         type* old, type v, int,  \
                                                                         int) {                   \
        return __atomic_compare_exchange_n(p, old, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
    }                                                                                             \
    CUDA_ON_CPU_PLAIN bool __tsan_atomic##bits##_compare_exchange_weak(volatile type* p,          \
                                                                       type* old, type v, int,    \
                                                                       int) {                     \
        return __atomic_compare_exchange_n(p, old, v, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);  \
    }                                                                                             \
    CUDA_ON_CPU_PLAIN type __tsan_atomic##bits##_compare_exchange_val(volatile type* p, type old, \
                                                                      type v, int, int) {         \
        __atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);       \
        return old;                                                                               \
    }                                                                                             \
    CUDA_ON_CPU_FETCH(bits, type, fetch_add)                                                      \
    CUDA_ON_CPU_FETCH(bits, type, fetch_sub)                                                      \
    CUDA_ON_CPU_FETCH(bits, type, fetch_and)                                                      \
    CUDA_ON_CPU_FETCH(bits, type, fetch_or)                                                       \
    CUDA_ON_CPU_FETCH(bits, type, fetch_xor) CUDA_ON_CPU_FETCH(bits, type, fetch_nand)
CUDA_ON_CPU_ATOMICS(8, char)
CUDA_ON_CPU_ATOMICS(16, short)
CUDA_ON_CPU_ATOMICS(32, int)
CUDA_ON_CPU_ATOMICS(64, long)
