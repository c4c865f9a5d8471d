// cuda_runtime.h: the part of the CUDA language and runtime that a program translated by
// translate.cpp may use, on a CPU. Names, values and meanings follow NVIDIA's CUDA Runtime API
// reference and CUDA C++ Programming Guide; what is missing here fails to compile.
#pragma once

#include <chrono>
#include <cmath>
#include <ctime>
#include <limits>

#include "emulator.hpp"
#if CUDA_ON_CPU_WATCH
#include "watch.hpp"
#endif

#define CUDA_ON_CPU 1
#define CUDART_VERSION 12000
#define __CUDACC_VER_MAJOR__ 12
#define __CUDACC_VER_MINOR__ 0
#define __CUDACC_VER_BUILD__ 0
#define __global__ __attribute__((noinline))  // so that a debugger shows the kernel as a function
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __restrict__ __restrict

// =================================================================================================
// Vector types
// =================================================================================================

// clang-format off
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
// clang-format on

// =================================================================================================
// Barriers, votes and shuffles. Each tells where it stands by its default arguments.
// =================================================================================================

#define CUDA_ON_CPU_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CUDA_ON_CPU_HERE) {
    cuda_on_cpu::block_barrier(cuda_on_cpu::barrier_plain, 0, {"__syncthreads()", file, line});
}
inline int __syncthreads_count(int predicate, CUDA_ON_CPU_HERE) {
    return cuda_on_cpu::block_barrier(cuda_on_cpu::barrier_count, predicate,
                                      {"__syncthreads_count()", file, line});
}
inline int __syncthreads_and(int predicate, CUDA_ON_CPU_HERE) {
    return cuda_on_cpu::block_barrier(cuda_on_cpu::barrier_and, predicate,
                                      {"__syncthreads_and()", file, line});
}
inline int __syncthreads_or(int predicate, CUDA_ON_CPU_HERE) {
    return cuda_on_cpu::block_barrier(cuda_on_cpu::barrier_or, predicate,
                                      {"__syncthreads_or()", file, line});
}
inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_ON_CPU_HERE) {
    int nothing = 0;
    cuda_on_cpu::warp_operation(mask, &nothing, [](void* const*, unsigned) {}, false,
                                {"__syncwarp()", file, line});
    cuda_on_cpu::watch_syncwarp();
}

namespace cuda_on_cpu {

template <typename T>
struct ShuffleLane {
    T value, result;
    int from;  // the lane whose value this lane wants; -1: its own
};

// Every lane of the mask takes the value of the lane it asks for.
template <typename T>
void shuffle_lanes(void* const* lanes, unsigned mask) {
    for (unsigned m = mask; m; m &= m - 1) {
        int lane = __builtin_ctz(m);
        auto* mine = static_cast<ShuffleLane<T>*>(lanes[lane]);
        if (mine->from < 0) mine->from = lane;
        if (!(mask >> mine->from & 1)) {
            const Thread& t = worker->threads[self->rank / 32 * 32 + unsigned(lane)];
            report(Mistake::warp,
                   text("%s: lane %d reads from lane %d, which is not in the mask 0x%08x",
                        text(t.site).c_str(), lane, mine->from, mask),
                   &t);
        }
        mine->result = static_cast<ShuffleLane<T>*>(lanes[mine->from])->value;
    }
}

template <typename T>
T shuffle(unsigned mask, T value, int from, Site site) {
    ShuffleLane<T> mine{value, value, from};
    warp_operation(mask, &mine, shuffle_lanes<T>, false, site);
    return mine.result;
}

inline int lane_of(const char* what) { return int(running_thread(what).rank % 32); }

inline void check_width(int width, const Site& site) {
    if (width < 1 || width > 32 || (width & (width - 1)))
        report(Mistake::warp,
               text("%s: the width %d is not a power of two up to 32", text(site).c_str(), width));
}

struct VoteLane {
    int predicate;
    unsigned result;
};
inline void vote_lanes(void* const* lanes, unsigned mask) {
    unsigned votes = 0;
    for (unsigned m = mask; m; m &= m - 1) {
        int lane = __builtin_ctz(m);
        votes |= unsigned(static_cast<VoteLane*>(lanes[lane])->predicate != 0) << lane;
    }
    for (unsigned m = mask; m; m &= m - 1)
        static_cast<VoteLane*>(lanes[__builtin_ctz(m)])->result = votes;
}
inline unsigned vote(unsigned mask, int predicate, Site site) {
    VoteLane mine{predicate, 0};
    warp_operation(mask, &mine, vote_lanes, false, site);
    return mine.result;
}

}  // namespace cuda_on_cpu

// The lane to read from, by the rules of the Programming Guide (warp shuffle functions): sub-warps
// of `width` lanes; where the source falls outside of the sub-warp a lane keeps its own value.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_ON_CPU_HERE) {
    cuda_on_cpu::Site site{"__shfl_sync()", file, line};
    cuda_on_cpu::check_width(width, site);
    int lane = cuda_on_cpu::lane_of(site.what);
    return cuda_on_cpu::shuffle(mask, value, lane / width * width + (source & (width - 1)), site);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, CUDA_ON_CPU_HERE) {
    cuda_on_cpu::Site site{"__shfl_xor_sync()", file, line};
    cuda_on_cpu::check_width(width, site);
    int lane = cuda_on_cpu::lane_of(site.what), from = lane ^ lane_mask;
    return cuda_on_cpu::shuffle(mask, value,
                                from >= (lane / width + 1) * width || from > 31 ? -1 : from, site);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_HERE) {
    cuda_on_cpu::Site site{"__shfl_down_sync()", file, line};
    cuda_on_cpu::check_width(width, site);
    int lane = cuda_on_cpu::lane_of(site.what);
    bool inside = delta < unsigned(width) && lane % width + int(delta) < width;
    return cuda_on_cpu::shuffle(mask, value, inside ? lane + int(delta) : -1, site);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_HERE) {
    cuda_on_cpu::Site site{"__shfl_up_sync()", file, line};
    cuda_on_cpu::check_width(width, site);
    int lane = cuda_on_cpu::lane_of(site.what);
    bool inside = delta < unsigned(width) && lane % width - int(delta) >= 0;
    return cuda_on_cpu::shuffle(mask, value, inside ? lane - int(delta) : -1, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_ON_CPU_HERE) {
    return cuda_on_cpu::vote(mask, predicate, {"__ballot_sync()", file, line});
}
inline int __any_sync(unsigned mask, int predicate, CUDA_ON_CPU_HERE) {
    return cuda_on_cpu::vote(mask, predicate, {"__any_sync()", file, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_ON_CPU_HERE) {
    return cuda_on_cpu::vote(mask, predicate, {"__all_sync()", file, line}) == mask;
}

// =================================================================================================
// Loads, stores and atomics
// =================================================================================================

// clang-format off
inline size_t __cvta_generic_to_shared(const void* p) { return size_t(p); }
// clang-format on

namespace cuda_on_cpu {
template <typename T>
concept AtomicInteger = std::is_integral_v<T> &&(sizeof(T) == 4 || sizeof(T) == 8);

// Reads *p, writes f(*p) and returns what was read, in one step.
template <typename T, typename F>
CUDA_ON_CPU_UNWATCHED T change_atomically(T* p, F f) {
    running_thread("an atomic operation");
    watch_atomic(p, sizeof(T));
    T old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(p, &old, T(f(old)), false, __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED)) {}
    return old;
}
[[noreturn]] inline void refuse_float_atomic(const char* what, const char* file, int line) {
    report(Mistake::forbidden, text("%s on floating-point numbers (%s:%d): the order of the "
                                    "additions, and so the result, would change "
                                    "from run to run. Sum in a fixed order: partial sums first, "
                                    "then one thread or warp adds them",
                                    what, file, line));
}
}  // namespace cuda_on_cpu

template <cuda_on_cpu::AtomicInteger T>
T atomicAdd(T* p, std::type_identity_t<T> v) {
    return cuda_on_cpu::change_atomically(p, [=](T old) { return old + v; });
}
template <cuda_on_cpu::AtomicInteger T>
T atomicMax(T* p, std::type_identity_t<T> v) {
    return cuda_on_cpu::change_atomically(p, [=](T old) { return std::max(old, v); });
}
inline float atomicAdd(float*, float, CUDA_ON_CPU_HERE) {
    cuda_on_cpu::refuse_float_atomic("atomicAdd", file, line);
}
inline double atomicAdd(double*, double, CUDA_ON_CPU_HERE) {
    cuda_on_cpu::refuse_float_atomic("atomicAdd", file, line);
}
inline float2 atomicAdd(float2*, float2, CUDA_ON_CPU_HERE) {
    cuda_on_cpu::refuse_float_atomic("atomicAdd", file, line);
}
inline float4 atomicAdd(float4*, float4, CUDA_ON_CPU_HERE) {
    cuda_on_cpu::refuse_float_atomic("atomicAdd", file, line);
}

// =================================================================================================
// Arithmetic
// =================================================================================================

#if !defined(__GLIBC__) || !__GLIBC_PREREQ(2, 42)
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
#endif

template <typename To, typename From>
To cuda_on_cpu_same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
inline unsigned __float_as_uint(float x) { return cuda_on_cpu_same_bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return cuda_on_cpu_same_bits<float>(x); }

// CUDA's min and max take any two numbers of one kind, and mix int with unsigned.
// clang-format off
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline long min(long a, long b) { return a < b ? a : b; }
inline long max(long a, long b) { return a > b ? a : b; }
inline unsigned long min(unsigned long a, unsigned long b) { return a < b ? a : b; }
inline unsigned long max(unsigned long a, unsigned long b) { return a > b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }
// clang-format on

[[noreturn]] inline void __trap(CUDA_ON_CPU_HERE) {
    cuda_on_cpu::report(cuda_on_cpu::Mistake::other,
                        cuda_on_cpu::text("__trap() (%s:%d)", file, line));
}

// =================================================================================================
// Errors
// =================================================================================================

enum cudaError {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInitializationError = 3,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInvalidMemcpyDirection = 21,
    cudaErrorInsufficientDriver = 35,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101,
    cudaErrorNoKernelImageForDevice = 209,
    cudaErrorInvalidResourceHandle = 400,
    cudaErrorNotReady = 600,
    cudaErrorIllegalAddress = 700,
    cudaErrorLaunchFailure = 719,
    cudaErrorNotSupported = 801,
    cudaErrorStreamCaptureUnsupported = 900,
    cudaErrorStreamCaptureUnmatched = 903,
    cudaErrorStreamCaptureImplicit = 906,
    cudaErrorUnknown = 999,
};
typedef enum cudaError cudaError_t;

namespace cuda_on_cpu {
struct ErrorName {
    cudaError_t code;
    const char* name;
    const char* meaning;
};
inline const ErrorName* error_names(size_t& count) {
    static const ErrorName names[] = {
        {cudaSuccess, "cudaSuccess", "no error"},
        {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
        {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
        {cudaErrorInitializationError, "cudaErrorInitializationError", "initialization error"},
        {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration",
         "invalid configuration argument"},
        {cudaErrorInvalidMemcpyDirection, "cudaErrorInvalidMemcpyDirection",
         "invalid copy direction for memcpy"},
        {cudaErrorInsufficientDriver, "cudaErrorInsufficientDriver",
         "the driver is too old for this program"},
        {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
        {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
        {cudaErrorNoKernelImageForDevice, "cudaErrorNoKernelImageForDevice",
         "the program holds no code for this device"},
        {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle",
         "invalid resource handle"},
        {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
        {cudaErrorIllegalAddress, "cudaErrorIllegalAddress",
         "an illegal memory access was encountered"},
        {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "a launch failed"},
        {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
        {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
         "not permitted while a stream is capturing"},
        {cudaErrorStreamCaptureUnmatched, "cudaErrorStreamCaptureUnmatched",
         "capture ended on another stream than it began on"},
        {cudaErrorStreamCaptureImplicit, "cudaErrorStreamCaptureImplicit",
         "would make a capturing stream depend on the default stream"},
    };
    count = sizeof names / sizeof *names;
    return names;
}
inline const ErrorName* find_error_name(cudaError_t code) {
    size_t count;
    const ErrorName* names = error_names(count);
    for (size_t i = 0; i < count; i++)
        if (names[i].code == code) return &names[i];
    return nullptr;
}
struct LastError {
    cudaError_t code = cudaSuccess;
    std::string message;
};
inline LastError& last_error() {
    static LastError e;
    return e;
}
// What the last failing call of the runtime found wrong, in words.
inline std::string last_message() { return last_error().message; }
inline cudaError_t fail_with(cudaError_t code, const std::string& message) {
    last_error() = {code, message};
    mistake_found(message.c_str());
    return code;
}
}  // namespace cuda_on_cpu

inline const char* cudaGetErrorName(cudaError_t code) {
    auto* e = cuda_on_cpu::find_error_name(code);
    return e ? e->name : "unrecognized error code";
}
inline const char* cudaGetErrorString(cudaError_t code) {
    auto* e = cuda_on_cpu::find_error_name(code);
    return e ? e->meaning : "unrecognized error code";
}
inline cudaError_t cudaGetLastError() {
    return std::exchange(cuda_on_cpu::last_error().code, cudaSuccess);
}

// =================================================================================================
// The device
// =================================================================================================

struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin, sharedMemPerMultiprocessor,
        reservedSharedMemPerBlock;
    int regsPerBlock, regsPerMultiprocessor, warpSize, maxThreadsPerBlock,
        maxThreadsPerMultiProcessor;
    int maxThreadsDim[3], maxGridSize[3];
    int major, minor, multiProcessorCount, memoryBusWidth, l2CacheSize, ECCEnabled, integrated;
    int concurrentKernels, asyncEngineCount, unifiedAddressing, managedMemory, canMapHostMemory;
};
inline cudaError_t cudaGetDeviceCount(int* count) {
    *count = cuda_on_cpu::settings().device_count;
    if (cuda_on_cpu::settings().old_driver)
        return cuda_on_cpu::fail_with(cudaErrorInsufficientDriver, "the driver is for 11.8");
    return *count > 0
               ? cudaSuccess
               : cuda_on_cpu::fail_with(cudaErrorNoDevice, "no device: CUDA_ON_CPU_DEVICES is 0");
}
inline cudaError_t cudaDriverGetVersion(int* version) {
    *version = cuda_on_cpu::settings().old_driver ? 11080 : CUDART_VERSION;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
    bool known = device >= 0 && device < cuda_on_cpu::settings().device_count;
    return known ? cudaSuccess
                 : cuda_on_cpu::fail_with(cudaErrorInvalidDevice,
                                          cuda_on_cpu::text("there is no device %d", device));
}
inline cudaError_t cudaDeviceSynchronize();
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
    if (cudaError_t e = cudaSetDevice(device)) return e;
    const auto& s = cuda_on_cpu::settings();
    *p = cudaDeviceProp{};
    std::snprintf(p->name, sizeof p->name, "%s", s.card.c_str());
    p->totalGlobalMem = s.memory_bytes;
    p->sharedMemPerBlock = cuda_on_cpu::shared_limit_plain;
    p->sharedMemPerBlockOptin = cuda_on_cpu::shared_limit_opted();
    p->sharedMemPerMultiprocessor = cuda_on_cpu::limits().shared << 10;
    p->reservedSharedMemPerBlock = cuda_on_cpu::limits().reserved << 10;
    p->regsPerBlock = p->regsPerMultiprocessor = int(cuda_on_cpu::registers_of_multiprocessor);
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsPerMultiProcessor = cuda_on_cpu::limits().threads;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->major = s.major;
    p->minor = s.minor;
    p->multiProcessorCount = s.multiprocessors;
    p->memoryBusWidth = 64;
    p->l2CacheSize = 1 << 20;
    p->concurrentKernels = p->asyncEngineCount = p->unifiedAddressing = p->canMapHostMemory = 1;
    return cudaSuccess;
}

// =================================================================================================
// Memory
// =================================================================================================

namespace cuda_on_cpu {

inline bool any_stream_captures(bool change = false, int by = 0) {
    static std::atomic<int> count{0};
    if (change) count += by;
    return count > 0;
}
inline cudaError_t refuse_while_capturing(const char* what) {
    return fail_with(cudaErrorStreamCaptureUnsupported,
                     text("%s is not permitted while a stream is being captured", what));
}

// A buffer that ends at a guard page. Aligned to 256 bytes as cudaMalloc's are when its size is a
// multiple of that, else to 16, so that the guard stays near.
inline cudaError_t allocate(void** p, size_t bytes, bool on_host) {
    *p = nullptr;
    if (!p) return fail_with(cudaErrorInvalidValue, "cudaMalloc: null pointer");
    if (any_stream_captures()) return refuse_while_capturing("cudaMalloc");
    if (bytes == 0) return cudaSuccess;
    Buffers& all = buffers();
    std::lock_guard lock(all.mutex);
    if (!on_host &&
        bytes > settings().memory_bytes - std::min(settings().memory_bytes, all.bytes_in_use))
        return fail_with(cudaErrorMemoryAllocation,
                         text("cudaMalloc of %zu bytes: %zu of %zu are in use", bytes,
                              all.bytes_in_use, settings().memory_bytes));
    Buffer b;
    try {
        b.memory.allocate(bytes, bytes % 256 == 0 ? 256 : 16, on_host);
    } catch (const std::bad_alloc&) {
        return fail_with(cudaErrorMemoryAllocation,
                         text("cudaMalloc of %zu bytes: this machine has no more memory", bytes));
    }
    b.number = ++all.count;
    b.on_host = on_host;
    if (!on_host) all.bytes_in_use += bytes, watch_new_buffer(b.memory);
    *p = b.memory.data;
    all.by_address[uintptr_t(b.memory.map)] = b;
    return cudaSuccess;
}
inline cudaError_t release(void* p, bool on_host) {
    const char* what = on_host ? "cudaFreeHost" : "cudaFree";
    if (!p) return cudaSuccess;
    if (any_stream_captures()) return refuse_while_capturing(what);
    run_all_streams();
    Buffers& all = buffers();
    std::lock_guard lock(all.mutex);
    Buffer* b = all.find(p);
    if (!b || b->on_host != on_host || p != b->memory.data || !b->live)
        return fail_with(cudaErrorInvalidValue,
                         text("%s(%p): %s", what, p,
                              !b                    ? "was never allocated"
                              : !b->live            ? "is already freed"
                              : p != b->memory.data ? "is not the start of a buffer"
                                                    : "is of the other kind"));
    if (!on_host) all.bytes_in_use -= b->memory.bytes;
    b->live = false;
    b->memory.retire();
    return cudaSuccess;
}

// Where [p, p + bytes) lies: false with a message if it crosses the end of a buffer, or is freed.
inline bool check_range(uintptr_t address, size_t bytes, const char* what, bool& on_device,
                        std::string& message) {
    const void* p = reinterpret_cast<const void*>(address);
    std::lock_guard lock(buffers().mutex);
    Buffer* b = buffers().find(p);
    on_device = b && !b->on_host;
    if (!b || (b->live && b->memory.holds(p, bytes))) return true;
    message = text("%s: %zu bytes starting %s", what, bytes, describe_address(*b, p).c_str());
    return false;
}

}  // namespace cuda_on_cpu

template <typename T>
cudaError_t cudaMalloc(T** p, size_t bytes) {
    return cuda_on_cpu::allocate(reinterpret_cast<void**>(p), bytes, false);
}
template <typename T>
cudaError_t cudaMallocHost(T** p, size_t bytes, unsigned = 0) {
    return cuda_on_cpu::allocate(reinterpret_cast<void**>(p), bytes, true);
}
inline cudaError_t cudaFree(void* p) { return cuda_on_cpu::release(p, false); }
inline cudaError_t cudaFreeHost(void* p) { return cuda_on_cpu::release(p, true); }
inline cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
    std::lock_guard lock(cuda_on_cpu::buffers().mutex);
    *total = cuda_on_cpu::settings().memory_bytes;
    *free_bytes = *total - std::min(*total, cuda_on_cpu::buffers().bytes_in_use);
    return cudaSuccess;
}

// =================================================================================================
// Streams, events, graphs. Every operation is done when its call returns, unless the stream is
// being captured: then it is recorded.
// =================================================================================================

typedef cuda_on_cpu::Stream* cudaStream_t;

struct cuda_on_cpu_event {
    std::shared_ptr<cuda_on_cpu::Graph> captured_in;  // the capture it was recorded in
    cuda_on_cpu::Stream* stream = nullptr;            // the late stream it was recorded on,
    uint64_t number = 0;                              // after this many operations
    std::chrono::steady_clock::time_point time{};
    bool recorded = false;
};
typedef cuda_on_cpu_event* cudaEvent_t;
struct cuda_on_cpu_graph_handle {
    std::shared_ptr<cuda_on_cpu::Graph> graph;
};
typedef cuda_on_cpu_graph_handle* cudaGraph_t;
struct cuda_on_cpu_graph_exec {
    cuda_on_cpu::Graph graph;
};
typedef cuda_on_cpu_graph_exec* cudaGraphExec_t;

enum { cudaStreamDefault = 0, cudaStreamNonBlocking = 1 };
enum { cudaEventDefault = 0, cudaEventBlockingSync = 1, cudaEventDisableTiming = 2 };
enum cudaMemcpyKind {
    cudaMemcpyHostToHost,
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault
};
enum cudaStreamCaptureMode {
    cudaStreamCaptureModeGlobal,
    cudaStreamCaptureModeThreadLocal,
    cudaStreamCaptureModeRelaxed
};
namespace cuda_on_cpu {

inline bool captures(cudaStream_t s) { return s && s->capturing; }
inline bool is_buffer(const void* p) {
    std::lock_guard lock(buffers().mutex);
    return buffers().find(p) != nullptr;
}
inline cudaError_t wait_for_stream(cudaStream_t stream, const char* what) {
    if (captures(stream)) return refuse_while_capturing(what);
    if (stream) stream->run(stream->given);
    return cudaSuccess;
}
inline bool is_done(cudaEvent_t e) {
    return !e->stream || !streams().count(e->stream) || e->stream->done >= e->number;
}

inline cudaError_t check_copy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    std::string message;
    bool to_device = false, from_device = false;
    if (!check_range(uintptr_t(to), bytes, "cudaMemcpy to", to_device, message) ||
        !check_range(uintptr_t(from), bytes, "cudaMemcpy from", from_device, message))
        return fail_with(cudaErrorInvalidValue, message);
    bool says_to = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    bool says_from = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    if (kind != cudaMemcpyDefault && (says_to != to_device || says_from != from_device))
        return fail_with(cudaErrorInvalidValue,
                         text("cudaMemcpy: the kind says %s to %s, but the pointers are %s to %s",
                              says_from ? "device" : "host", says_to ? "device" : "host",
                              from_device ? "device" : "host", to_device ? "device" : "host"));
    return cudaSuccess;
}
CUDA_ON_CPU_UNWATCHED inline void copy_bytes(void* to, const void* from, size_t bytes) {
    std::memmove(to, from, bytes);
    watch_host_write(to, bytes);
}
CUDA_ON_CPU_UNWATCHED inline void set_bytes(void* to, int value, size_t bytes) {
    std::memset(to, value, bytes);
    watch_host_write(to, bytes);
}
inline cudaError_t check_set(void* to, size_t bytes) {
    std::string message;
    bool on_device;
    if (!check_range(uintptr_t(to), bytes, "cudaMemset", on_device, message))
        return fail_with(cudaErrorInvalidValue, message);
    if (!on_device)
        return fail_with(cudaErrorInvalidValue, "cudaMemset: the pointer is not device memory");
    return cudaSuccess;
}

}  // namespace cuda_on_cpu

// Memory that cudaMallocHost did not give out cannot be read or written behind the host's back: a
// copy from it is staged by the call, a copy to it waits. In a recording it would be read when it
// may be gone.
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                                   cudaStream_t stream = nullptr) {
    if (bytes == 0) return cudaSuccess;
    if (cudaError_t e = cuda_on_cpu::check_copy(to, from, bytes, kind)) return e;
    const bool from_pageable = !cuda_on_cpu::is_buffer(from),
               to_pageable = !cuda_on_cpu::is_buffer(to);
    if (cuda_on_cpu::captures(stream) && (from_pageable || to_pageable))
        return cuda_on_cpu::refuse_while_capturing("cudaMemcpyAsync of pageable host memory");
    if (from_pageable && stream && cuda_on_cpu::settings().late_streams) {
        const auto* first = static_cast<const char*>(from);
        cuda_on_cpu::submit(stream, [to, bytes, kept = std::vector<char>(first, first + bytes)] {
            cuda_on_cpu::copy_bytes(to, kept.data(), bytes);
        });
        return cudaSuccess;
    }
    cuda_on_cpu::submit(stream, [=] { cuda_on_cpu::copy_bytes(to, from, bytes); });
    if (to_pageable && stream) stream->run(stream->given);
    return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes,
                                   cudaStream_t stream = nullptr) {
    if (bytes == 0) return cudaSuccess;
    if (cudaError_t e = cuda_on_cpu::check_set(to, bytes)) return e;
    cuda_on_cpu::submit(stream, [=] { cuda_on_cpu::set_bytes(to, value, bytes); });
    return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    if (cuda_on_cpu::any_stream_captures())
        return cuda_on_cpu::fail_with(cudaErrorStreamCaptureImplicit,
                                      "cudaMemcpy while a stream is being captured: use "
                                      "cudaMemcpyAsync on that stream");
    return cudaMemcpyAsync(to, from, bytes, kind);
}
inline cudaError_t cudaMemset(void* to, int value, size_t bytes) {
    if (cuda_on_cpu::any_stream_captures())
        return cuda_on_cpu::fail_with(cudaErrorStreamCaptureImplicit,
                                      "cudaMemset while a stream is being captured: use "
                                      "cudaMemsetAsync on that stream");
    return cudaMemsetAsync(to, value, bytes);
}

inline cudaError_t cudaDeviceSynchronize() {
    if (cuda_on_cpu::any_stream_captures())
        return cuda_on_cpu::refuse_while_capturing("cudaDeviceSynchronize");
    cuda_on_cpu::run_all_streams();
    return cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
    *stream = new cuda_on_cpu::Stream;
    (*stream)->non_blocking = flags & cudaStreamNonBlocking;
    cuda_on_cpu::streams().insert(*stream);
    return cudaSuccess;
}
inline cudaError_t cudaStreamCreate(cudaStream_t* stream) {
    return cudaStreamCreateWithFlags(stream, cudaStreamDefault);
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    if (cuda_on_cpu::captures(stream))
        return cuda_on_cpu::refuse_while_capturing("cudaStreamDestroy");
    if (stream) stream->run(stream->given);
    cuda_on_cpu::streams().erase(stream);
    delete stream;
    return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    return cuda_on_cpu::wait_for_stream(stream, "cudaStreamSynchronize");
}
// A late stream gets on by one operation each time it is asked.
inline cudaError_t cudaStreamQuery(cudaStream_t stream) {
    if (cuda_on_cpu::captures(stream))
        return cuda_on_cpu::refuse_while_capturing("cudaStreamQuery");
    if (!stream || stream->done == stream->given) return cudaSuccess;
    stream->run(stream->done + 1);
    return cudaErrorNotReady;
}

inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    *event = new cuda_on_cpu_event;
    return cudaSuccess;
}
inline cudaError_t cudaEventCreate(cudaEvent_t* event, unsigned flags = 0) {
    return cudaEventCreateWithFlags(event, flags);
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
    if (!cuda_on_cpu::is_done(event)) event->stream->run(event->number);
    delete event;
    return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = nullptr) {
    event->captured_in = stream ? stream->capturing : nullptr;
    event->recorded = true;
    event->stream = nullptr;
    if (event->captured_in) return cudaSuccess;
    cuda_on_cpu::submit(stream, [event] { event->time = std::chrono::steady_clock::now(); });
    if (stream) event->stream = stream, event->number = stream->given;
    return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    if (event->captured_in) return cuda_on_cpu::refuse_while_capturing("cudaEventSynchronize");
    if (!cuda_on_cpu::is_done(event)) event->stream->run(event->number);
    return cudaSuccess;
}
inline cudaError_t cudaEventQuery(cudaEvent_t event) {
    if (event->captured_in) return cuda_on_cpu::refuse_while_capturing("cudaEventQuery");
    if (cuda_on_cpu::is_done(event)) return cudaSuccess;
    event->stream->run(event->stream->done + 1);
    return cudaErrorNotReady;
}
inline cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t stop) {
    if (!cuda_on_cpu::is_done(start) || !cuda_on_cpu::is_done(stop)) return cudaErrorNotReady;
    if (!start->recorded || !stop->recorded || start->captured_in || stop->captured_in)
        return cuda_on_cpu::fail_with(cudaErrorInvalidResourceHandle,
                                      "cudaEventElapsedTime: an event was not recorded");
    *ms = std::chrono::duration<float, std::milli>(stop->time - start->time).count();
    return cudaSuccess;
}
// Waiting for an event of a capture makes the stream a part of that capture.
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned = 0) {
    if (event->captured_in && stream && !stream->capturing) {
        stream->capturing = event->captured_in;
        stream->capturing->streams.push_back(stream);
    } else if (!cuda_on_cpu::is_done(event) && event->stream != stream) {
        cuda_on_cpu::submit(stream, [from = event->stream, number = event->number] {
            if (cuda_on_cpu::streams().count(from)) from->run(number);
        });
    }
    return cudaSuccess;
}

inline cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    if (!stream || stream->capturing)
        return cuda_on_cpu::
            fail_with(cudaErrorStreamCaptureUnsupported,
                      stream ? "this stream is being captured already"
                             : "the default stream cannot be captured: use cudaStreamCreate");
    stream->capturing = std::make_shared<cuda_on_cpu::Graph>();
    stream->capturing->streams = {stream};
    stream->captures_first = true;
    cuda_on_cpu::any_stream_captures(true, 1);
    return cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    *graph = nullptr;
    if (!stream || !stream->capturing || !stream->captures_first)
        return cuda_on_cpu::
            fail_with(cudaErrorStreamCaptureUnmatched,
                      "cudaStreamEndCapture: the capture did not begin on this stream");
    auto captured = stream->capturing;
    for (cudaStream_t member : captured->streams) member->capturing = nullptr;
    captured->streams.clear();
    *graph = new cuda_on_cpu_graph_handle{captured};
    stream->captures_first = false;
    cuda_on_cpu::any_stream_captures(true, -1);
    return cudaSuccess;
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph,
                                        unsigned long long = 0) {
    *exec = new cuda_on_cpu_graph_exec{*graph->graph};
    return cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    for (auto& operation : exec->graph.operations) cuda_on_cpu::submit(stream, operation);
    return cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    return cudaSuccess;
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    delete exec;
    return cudaSuccess;
}

// =================================================================================================
// Properties of kernels
// =================================================================================================

enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
    cudaFuncAttributePreferredSharedMemoryCarveout = 9
};

struct cudaFuncAttributes {
    size_t sharedSizeBytes;
    int numRegs, maxThreadsPerBlock;
};
template <typename... P>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, void (*kernel)(P...)) {
    if (!cuda_on_cpu::settings().has_code)
        return cuda_on_cpu::fail_with(cudaErrorNoKernelImageForDevice,
                                      "the program holds no code for this device");
    const auto* size = cuda_on_cpu::size_of(reinterpret_cast<const void*>(kernel));
    *a = {size ? size->static_bytes : 0, size ? int(size->registers) : 0, 1024};
    return cudaSuccess;
}

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute,
                                        int value) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    const auto* size = cuda_on_cpu::size_of(kernel);
    const size_t own = size ? size->static_bytes : 0, limit = cuda_on_cpu::shared_limit_opted();
    if (value < 0 || size_t(value) + own > limit)
        return cuda_on_cpu::
            fail_with(cudaErrorInvalidValue,
                      cuda_on_cpu::text("a block can have at most %zu bytes of shared "
                                        "memory, not %d and %zu of the kernel's own",
                                        limit, value, own));
    std::lock_guard lock(cuda_on_cpu::kernel_list().mutex);
    cuda_on_cpu::kernel_list().dynamic_limit[kernel] = size_t(value);
    return cudaSuccess;
}
template <typename... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
    return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
template <typename... P>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*kernel)(P...),
                                                          int threads, size_t shared) {
    const auto* size = cuda_on_cpu::size_of(reinterpret_cast<const void*>(kernel));
    const auto& limits = cuda_on_cpu::limits();
    const size_t own = size ? size->static_bytes : 0, used = shared + own + (limits.reserved << 10);
    *blocks = std::min(limits.blocks, limits.threads / threads);
    if (used > 0) *blocks = std::min(*blocks, int((limits.shared << 10) / used));
    if (size && size->registers > 0)
        *blocks = std::min(*blocks,
                           int(cuda_on_cpu::registers_of_multiprocessor /
                               cuda_on_cpu::registers_of_block(size->registers, size_t(threads))));
    return cudaSuccess;
}
