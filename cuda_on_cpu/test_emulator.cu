// test_emulator.cu: is what runs the kernels on a CPU itself right? Every mistake that it promises
// to catch is made here once and must be caught; tensor-core layouts are held against NVIDIA's
// tables, written out again below; the cuBLASLt stand-in is held against triple loops.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <cublasLt.h>
#include <cuda_runtime.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

// PTX wrappers begin
// PTX wrappers end

using cuda_on_cpu::Error;
using cuda_on_cpu::Mistake;
using cuda_on_cpu::Order;

// =================================================================================================
// Helpers
// =================================================================================================

// Device memory that frees itself.
template <typename T>
struct Device {
    T* data = nullptr;
    size_t count;
    explicit Device(size_t count) : count(count) {
        REQUIRE(cudaMalloc(&data, count * sizeof(T)) == cudaSuccess);
    }
    explicit Device(const std::vector<T>& host) : Device(host.size()) {
        REQUIRE(cudaMemcpy(data, host.data(), count * sizeof(T), cudaMemcpyHostToDevice) ==
                cudaSuccess);
    }
    ~Device() { cudaFree(data); }
    Device(const Device&) = delete;
    std::vector<T> host() const {
        std::vector<T> out(count);
        REQUIRE(cudaMemcpy(out.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost) ==
                cudaSuccess);
        return out;
    }
};

// Runs `test` with the threads of a block in each order.
template <typename Test>
void in_every_order(Test test) {
    const std::pair<Order, uint64_t> turns[] = {{Order::ascending, 0}, {Order::descending, 0},
                                                {Order::random, 1},    {Order::random, 2},
                                                {Order::warps, 1},     {Order::warps, 3}};
    for (auto& turn : turns) {
        cuda_on_cpu::set_order(turn.first, turn.second);
        CAPTURE(std::string(cuda_on_cpu::text(turn.first)));
        test();
    }
    cuda_on_cpu::set_order(Order::ascending);
}

// The mistake that `run` makes; fails the test if it makes none.
template <typename Run>
Error mistake_of(Run run) {
    try {
        run();
    } catch (const Error& e) {
        INFO(e.what());
        return e;
    }
    FAIL("no mistake was reported");
    return Error(Mistake::other, "", "", {}, {});
}

// For mistakes that the undefined-behaviour sanitizer would find first, and stop at.
#define PLANTED __attribute__((no_sanitize("undefined")))

bool says(const Error& e, const std::string& part) {
    return std::string(e.what()).find(part) != std::string::npos;
}

// =================================================================================================
// Indices, barriers, shuffles, votes
// =================================================================================================

__global__ void write_indices(uint3* threads, uint3* blocks) {
    unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    unsigned i = block * blockDim.x * blockDim.y * blockDim.z + thread;
    threads[i] = threadIdx;
    blocks[i] = blockIdx;
}

TEST_CASE("emulator: every thread of every block runs once, with its own indices") {
    in_every_order([] {
        dim3 grid(3, 2, 2), block(5, 4, 3);
        Device<uint3> threads(720), blocks(720);
        write_indices<<<grid, block>>>(threads.data, blocks.data);
        auto t = threads.host(), b = blocks.host();
        size_t i = 0;
        bool right = true;
        for (unsigned bz = 0; bz < 2; bz++)
            for (unsigned by = 0; by < 2; by++)
                for (unsigned bx = 0; bx < 3; bx++)
                    for (unsigned z = 0; z < 3; z++)
                        for (unsigned y = 0; y < 4; y++)
                            for (unsigned x = 0; x < 5; x++, i++)
                                right = right && t[i].x == x && t[i].y == y && t[i].z == z &&
                                        b[i].x == bx && b[i].y == by && b[i].z == bz;
        CHECK(right);
    });
}

// Reverses a block's numbers through shared memory, n times.
template <int N>
__global__ void __launch_bounds__(N) reverse(int* x, int times) {
    __shared__ int buffer[N];
    for (int i = 0; i < times; i++) {
        buffer[threadIdx.x] = x[blockIdx.x * N + threadIdx.x];
        __syncthreads();
        x[blockIdx.x * N + threadIdx.x] = buffer[N - 1 - threadIdx.x];
        __syncthreads();
    }
}

TEST_CASE("emulator: a barrier waits for all threads of the block") {
    in_every_order([] {
        std::vector<int> x(3 * 100);
        for (int i = 0; i < 300; i++) x[size_t(i)] = i;
        Device<int> d(x);
        reverse<100><<<3, 100>>>(d.data, 7);
        auto y = d.host();
        for (int b = 0; b < 3; b++)
            for (int i = 0; i < 100; i++) REQUIRE(y[size_t(b * 100 + i)] == b * 100 + 99 - i);
    });
}

__global__ void count_votes(int* out) {
    int i = int(threadIdx.x);
    int count = __syncthreads_count(i % 3 == 0), all = __syncthreads_and(i < 70),
        most = __syncthreads_and(i < 69);
    int any = __syncthreads_or(i == 69), none = __syncthreads_or(i == 70);
    unsigned mask = i < 64 ? 0xffffffffu : 0x3fu;
    unsigned ballot = __ballot_sync(mask, i % 2);
    int any_of_warp = __any_sync(mask, i == 33), all_of_warp = __all_sync(mask, i < 40);
    int result[] = {count, all, most, any, none, int(ballot), any_of_warp, all_of_warp};
    for (int j = 0; j < 8; j++) out[i * 8 + j] = result[j];
}

TEST_CASE("emulator: barriers that count and votes of a warp") {
    in_every_order([] {
        Device<int> out(70 * 8);
        count_votes<<<1, 70>>>(out.data);
        auto x = out.host();
        for (int i = 0; i < 70; i++) {
            const int* r = &x[size_t(i) * 8];
            REQUIRE(r[0] == 24);
            REQUIRE((r[1] == 1 && r[2] == 0 && r[3] == 1 && r[4] == 0));
            REQUIRE(unsigned(r[5]) == (i < 64 ? 0xaaaaaaaau : 0x2au));
            REQUIRE(r[6] == (i / 32 == 1));
            REQUIRE(r[7] == (i / 32 == 0));
        }
    });
}

// Each kind of shuffle, for one width; what comes back is the number of the lane that was read.
template <typename T>
__global__ void shuffle_lanes(T* out, int argument, int width) {
    T lane = T(threadIdx.x % 32);
    T* mine = out + threadIdx.x * 4;
    mine[0] = __shfl_sync(0xffffffffu, lane, argument, width);
    mine[1] = __shfl_xor_sync(0xffffffffu, lane, argument, width);
    mine[2] = __shfl_down_sync(0xffffffffu, lane, unsigned(argument), width);
    mine[3] = __shfl_up_sync(0xffffffffu, lane, unsigned(argument), width);
}

template <typename T>
void check_shuffles(int argument, int width) {
    CAPTURE(argument);
    CAPTURE(width);
    Device<T> out(64 * 4);
    shuffle_lanes<T><<<1, 64>>>(out.data, argument, width);
    auto x = out.host();
    for (int i = 0; i < 64; i++) {
        // Programming Guide, "Warp shuffle functions"
        int lane = i % 32, first = lane / width * width, end = first + width;
        int by_xor = (lane ^ argument) < end ? lane ^ argument : lane;
        int down = lane + argument < end ? lane + argument : lane,
            up = lane - argument >= first ? lane - argument : lane;
        REQUIRE(int(x[size_t(i) * 4]) == first + argument % width);
        REQUIRE(int(x[size_t(i) * 4 + 1]) == by_xor);
        REQUIRE(int(x[size_t(i) * 4 + 2]) == down);
        REQUIRE(int(x[size_t(i) * 4 + 3]) == up);
    }
}

TEST_CASE("emulator: shuffles read the lane that the guide names, for every width and type") {
    in_every_order([] {
        for (int width : {32, 16, 8, 4, 2, 1})
            for (int argument : {0, 1, 2, 5, 16, 31}) check_shuffles<float>(argument, width);
        check_shuffles<int>(3, 32);
        check_shuffles<unsigned>(3, 16);
        check_shuffles<double>(7, 32);
    });
}

// Two halves of a warp work apart, each with its own mask.
__global__ void sum_halves(float* out) {
    bool upper = threadIdx.x >= 16;
    float s = float(threadIdx.x);
    if (upper)
        for (int o = 8; o > 0; o >>= 1) s += __shfl_xor_sync(0xffff0000u, s, o);
    else
        for (int o = 8; o > 0; o >>= 1) s += __shfl_xor_sync(0x0000ffffu, s, o);
    __syncwarp();
    out[threadIdx.x] = s;
}

TEST_CASE("emulator: parts of a warp with their own masks do not disturb each other") {
    in_every_order([] {
        Device<float> out(32);
        sum_halves<<<1, 32>>>(out.data);
        auto x = out.host();
        for (size_t i = 0; i < 32; i++) REQUIRE(x[i] == (i < 16 ? 120.0f : 376.0f));
    });
}

__global__ void count_threads(int* total, unsigned* largest) {
    atomicAdd(total, 1);
    atomicMax(largest, blockIdx.x * blockDim.x + threadIdx.x);
}

TEST_CASE("emulator: atomics on integers add up over all blocks") {
    Device<int> total(std::vector<int>{0});
    Device<unsigned> largest(std::vector<unsigned>{0});
    count_threads<<<50, 33>>>(total.data, largest.data);
    CHECK(total.host()[0] == 50 * 33);
    CHECK(largest.host()[0] == 50 * 33 - 1);
}

// =================================================================================================
// Planted mistakes: each must be caught, with kernel, block and thread
// =================================================================================================

__global__ void barrier_in_branch(float* x) {
    if (threadIdx.x < 20) return;
    __syncthreads();
    x[threadIdx.x] = 0;
}
__global__ void barrier_against_shuffle(float* x) {
    if (threadIdx.x < 32)
        __syncthreads();
    else
        x[threadIdx.x] = __shfl_sync(0xffffffffu, 1.0f, 0);
    if (threadIdx.x >= 32) __shfl_sync(0x3u, 1.0f, 0);
}

TEST_CASE("emulator catches: a barrier that some threads never reach") {
    in_every_order([] {
        Device<float> x(64);
        Error e = mistake_of([&] { barrier_in_branch<<<2, 64>>>(x.data); });
        CHECK(e.mistake == Mistake::barrier);
        CHECK(e.kernel == "barrier_in_branch");
        CHECK(e.thread.x >= 20);
        CHECK(says(e, "44 of 64"));
        CHECK(says(e, "20 have finished"));
        CHECK(says(e, "test_emulator.cu:"));
        e = mistake_of([&] { barrier_against_shuffle<<<1, 64>>>(x.data); });
        CHECK(e.mistake == Mistake::warp);
    });
}

__global__ void shuffle_from_finished_lane(float* x) {
    if (threadIdx.x % 32 == 7) return;
    x[threadIdx.x] = __shfl_down_sync(0xffffffffu, 1.0f, 1);
}
__global__ void shuffle_from_outside_of_mask(float* x) {
    if (threadIdx.x < 16) x[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, 1.0f, 16);
}
__global__ void shuffle_while_not_in_mask(float* x) {
    x[threadIdx.x] = __shfl_sync(0x0000ffffu, 1.0f, 0);
}
__global__ void shuffle_with_different_masks(float* x) {
    x[threadIdx.x] =
        __shfl_sync(threadIdx.x < 16 ? 0xffffffffu : 0xfffffff0u | (1u << threadIdx.x), 1.0f, 20);
}

TEST_CASE("emulator catches: a shuffle from an inactive lane") {
    in_every_order([] {
        Device<float> x(64);
        Error e = mistake_of([&] { shuffle_from_finished_lane<<<1, 64>>>(x.data); });
        CHECK(e.mistake == Mistake::warp);
        CHECK(says(e, "has finished"));
        CHECK(says(e, "lane 7"));
        e = mistake_of([&] { shuffle_from_finished_lane<<<1, 40>>>(x.data); });
        CHECK(e.mistake == Mistake::warp);
        e = mistake_of([&] { shuffle_from_outside_of_mask<<<1, 32>>>(x.data); });
        CHECK(says(e, "lane 0 reads from lane 16"));
        e = mistake_of([&] { shuffle_while_not_in_mask<<<1, 32>>>(x.data); });
        CHECK(says(e, "is not in the mask"));
        e = mistake_of([&] { shuffle_with_different_masks<<<1, 32>>>(x.data); });
        CHECK(e.mistake == Mistake::warp);
    });
}

PLANTED __global__ void write_shared(float* x, int at, int dynamic_at) {
    __shared__ float array[24];
    extern __shared__ float dynamic[];
    array[threadIdx.x] = 1;
    __syncthreads();
    if (threadIdx.x == 5 && at != 0) array[at] = 2;
    if (threadIdx.x == 6 && dynamic_at != 0) dynamic[dynamic_at] = 2;
    __syncthreads();
    x[blockIdx.x * 24 + threadIdx.x] = array[threadIdx.x];
}

TEST_CASE("emulator catches: an access past a shared array") {
    Device<float> x(72);
    auto run = [&](int at, int dynamic_at) {
        write_shared<<<3, 24, 100>>>(x.data, at, dynamic_at);
    };
    run(23, 24);
    in_every_order([&] {
        Error e = mistake_of([&] { run(24, 0); });
        CHECK(e.mistake == Mistake::shared_memory);
        CHECK(e.thread.x == 5);
        CHECK(says(e, "write 0 bytes past the end of shared array 'array' of 96 bytes"));
        CHECK(says(e, "addr2line"));
        e = mistake_of([&] { run(1000, 0); });
        CHECK(e.mistake == Mistake::shared_memory);
        e = mistake_of([&] { run(-1, 0); });  // inside the page: seen when the block is done
        CHECK(e.mistake == Mistake::shared_memory);
        CHECK(says(e, "'array'"));
        e = mistake_of([&] { run(0, 28); });
        CHECK(e.mistake == Mistake::shared_memory);
        CHECK(e.thread.x == 6);
        e = mistake_of([&] { run(0, 25); });  // 100 bytes end 12 before the page does
        CHECK(e.mistake == Mistake::shared_memory);
    });
    run(23, 24);  // and it works on
    CHECK(x.host()[3] == 1);
}

PLANTED __global__ void read_global(float* x, long at) {
    if (blockIdx.x == 1 && threadIdx.x == 3) x[0] = x[at];
}
PLANTED __global__ void write_global(float* x, long at) {
    if (blockIdx.x == 1 && threadIdx.x == 3) x[at] = 1;
}
template <typename... P>
void launch_by_pointer(const char* name, void (*kernel)(P...),
                       std::type_identity_t<P>... arguments) {
    kernel<<<2, 4>>>(arguments...);
}
struct Holder {
    float* p;
};
PLANTED __global__ void read_through_struct(Holder h, float* out) { *out = *h.p; }

TEST_CASE("emulator catches: an access past a global buffer, and after cudaFree") {
    in_every_order([] {
        Device<float> x(std::vector<float>(64)), small(std::vector<float>(5)), out(4);
        read_global<<<2, 4>>>(x.data, 63);
        Error e = mistake_of([&] { read_global<<<2, 4>>>(x.data, 64); });
        CHECK(e.mistake == Mistake::global_memory);
        CHECK(e.kernel == "read_global");
        CHECK((e.block.x == 1 && e.thread.x == 3));
        CHECK(says(e, "read 0 bytes past the end of global buffer"));
        e = mistake_of([&] { launch_by_pointer("read_global", read_global, x.data, 64); });
        CHECK(e.kernel == "read_global");
        CHECK(says(e, "read 0 bytes past the end of global buffer"));
        e = mistake_of([&] { write_global<<<2, 4>>>(x.data, -1030); });
        CHECK(says(e, "write 4120 bytes before global buffer"));
        e = mistake_of([&] {
            write_global<<<2, 4>>>(small.data, 5);
        });  // the end of 20 bytes is not at the page's
        CHECK(e.mistake == Mistake::global_memory);
        float* gone = nullptr;
        REQUIRE(cudaMalloc(&gone, 64) == cudaSuccess);
        REQUIRE(cudaFree(gone) == cudaSuccess);
        e = mistake_of([&] { read_global<<<2, 4>>>(gone, 0); });
        CHECK(says(e, "already freed"));
        e = mistake_of([&] { read_through_struct<<<1, 1>>>(Holder{gone}, out.data); });
        CHECK(says(e, "already freed"));
        e = mistake_of([&] { read_through_struct<<<1, 1>>>(Holder{nullptr}, out.data); });
        CHECK(says(e, "no valid address"));
        float on_host = 1;
        e = mistake_of([&] { read_global<<<2, 4>>>(&on_host, 0); });
        CHECK(says(e, "argument 1 is a pointer to host memory"));
    });
}

__global__ void read_unwritten(float* x) {
    __shared__ float array[32];
    if (threadIdx.x < 31) array[threadIdx.x] = 1;
    __syncthreads();
    x[threadIdx.x] = array[threadIdx.x];
}

TEST_CASE("emulator catches: shared and global memory that is read before it was written") {
    Device<float> x(32), never_written(8);
#if CUDA_ON_CPU_WATCH
    Error e = mistake_of([&] { read_unwritten<<<1, 32>>>(x.data); });
    CHECK(e.mistake == Mistake::uninitialised);
    CHECK(e.thread.x == 31);
    e = mistake_of([&] { read_global<<<2, 4>>>(never_written.data, 2); });
    CHECK(e.mistake == Mistake::uninitialised);
#else
    for (float v : never_written.host()) CHECK(std::isnan(v));
    in_every_order([&] {
        reverse<32><<<1, 32>>>(reinterpret_cast<int*>(x.data),
                               1);  // leaves numbers in another shared array
        read_unwritten<<<4, 32>>>(x.data);
        auto y = x.host();
        for (size_t i = 0; i < 31; i++) CHECK(y[i] == 1);
        CHECK(std::isnan(y[31]));
    });
#endif
}

// Sums a block's numbers; with Bug the last barrier is missing.
template <bool Bug>
__global__ void sum_block(float* out, const float* in) {
    __shared__ float part[4];
    float s = in[threadIdx.x];
    for (int o = 16; o > 0; o >>= 1) s += __shfl_xor_sync(0xffffffffu, s, o);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = s;
    if (!Bug) __syncthreads();
    out[threadIdx.x] = part[0] + part[1] + part[2] + part[3];
}
// Sums a block's numbers twice; with Bug a warp that is ahead writes over what others have not read.
// Where all threads take turns it is never ahead: shuffles hold it up.
template <bool Bug>
__global__ void sum_block_twice(float* out, const float* in) {
    __shared__ float part[4];
    float s = in[threadIdx.x];
    for (int time = 0; time < 2; time++) {
        for (int o = 16; o > 0; o >>= 1) s += __shfl_xor_sync(0xffffffffu, s, o);
        if (!Bug) __syncthreads();
        if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = s;
        __syncthreads();
        s = part[0] + part[1] + part[2] + part[3];
    }
    out[threadIdx.x] = s;
}
// Moves numbers by one place within shared memory; with Bug nobody waits before writing.
template <bool Bug>
__global__ void shift_block(float* x) {
    __shared__ float buffer[128];
    buffer[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    float next = buffer[(threadIdx.x + 1) % 128];
    if (!Bug) __syncthreads();
    buffer[threadIdx.x] = next;
    __syncthreads();
    x[threadIdx.x] = buffer[threadIdx.x];
}

TEST_CASE("emulator catches: a missing barrier") {
    std::vector<float> numbers(128);
    for (size_t i = 0; i < 128; i++) numbers[i] = std::sin(float(i));
    Device<float> in(numbers), out(128), twice(128), x(128);
    auto restore = [&] {
        REQUIRE(cudaMemcpy(x.data, numbers.data(), 512, cudaMemcpyHostToDevice) == cudaSuccess);
    };
    std::vector<cuda_on_cpu::Output> outputs{{out.data, 512}, {x.data, 512}, {twice.data, 512}};
    cuda_on_cpu::check_orders(
        [&] {
            restore();
            sum_block<false><<<1, 128>>>(out.data, in.data);
            sum_block_twice<false><<<1, 128>>>(twice.data, in.data);
            shift_block<false><<<1, 128>>>(x.data);
        },
        outputs);
    Mistake expected = CUDA_ON_CPU_WATCH ? Mistake::race : Mistake::order;
    Error e = mistake_of([&] {
        cuda_on_cpu::check_orders([&] { sum_block<true><<<1, 128>>>(out.data, in.data); },
                                  {outputs[0]});
    });
    CHECK((e.mistake == expected || e.mistake == Mistake::uninitialised));
    e = mistake_of([&] {
        cuda_on_cpu::check_orders([&] { sum_block_twice<true><<<1, 128>>>(twice.data, in.data); },
                                  {outputs[2]});
    });
    CHECK(e.mistake == expected);
    e = mistake_of([&] {
        cuda_on_cpu::check_orders(
            [&] {
                restore();
                shift_block<true><<<1, 128>>>(x.data);
            },
            {outputs[1]});
    });
    CHECK(e.mistake == expected);
}

// A little static memory, and all the dynamic memory that is asked for.
__global__ void small_static_part(int* out) {
    __shared__ int little[32];
    extern __shared__ __align__(1024) int tiles[];
    little[threadIdx.x % 32] = 1, tiles[threadIdx.x] = 2;
    __syncthreads();
    if (threadIdx.x == 0) *out = little[0] + tiles[0];
}
TEST_CASE("emulator catches: static shared memory is rounded up to the dynamic part's alignment") {
    const auto kept = cuda_on_cpu::settings();
    Device<int> out(1);
    auto sum = [&](size_t dynamic) {
        REQUIRE(cudaFuncSetAttribute(small_static_part, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     int(dynamic)) == cudaSuccess);
        small_static_part<<<1, 32, dynamic>>>(out.data);
        return out.host()[0];
    };
    for (const char* card :
         {"v100", "t4", "a100", "rtx3060", "rtx4090", "h100", "b200", "rtx5090"}) {
        cuda_on_cpu::play_card(cuda_on_cpu::settings(), card);
        cudaDeviceProp gpu;
        REQUIRE(cudaGetDeviceProperties(&gpu, 0) == cudaSuccess);
        CHECK(std::string(gpu.name) == card);
        CHECK(sum(gpu.sharedMemPerBlockOptin - 1024) == 3);
        const Error e = mistake_of([&] { sum(gpu.sharedMemPerBlockOptin - 1024 + 16); });
        CHECK(says(e, "static and dynamic shared memory together take " +
                          std::to_string(gpu.sharedMemPerBlockOptin + 16)));
    }
    CHECK_THROWS(cuda_on_cpu::play_card(cuda_on_cpu::settings(), "rtx9999"));
    cuda_on_cpu::settings() = kept;
}

// What the Programming Guide's table of compute capabilities says, in KB and by multiprocessor.
TEST_CASE("emulator: a card has its shared memory, threads and blocks") {
    const auto kept = cuda_on_cpu::settings();
    struct Row {
        const char* card;
        size_t optin, shared;
        int threads, of_32, of_1024;  // blocks that fit: small ones, and such of 1,024 threads
    };
    for (const Row& row :
         {Row{"v100", 96, 96, 2048, 32, 2}, Row{"t4", 64, 64, 1024, 16, 1},
          Row{"a100", 163, 164, 2048, 32, 2}, Row{"rtx3060", 99, 100, 1536, 16, 1},
          Row{"rtx4090", 99, 100, 1536, 24, 1}, Row{"h100", 227, 228, 2048, 32, 2},
          Row{"b200", 227, 228, 2048, 32, 2}, Row{"rtx5090", 99, 100, 1536, 24, 1}}) {
        CAPTURE(row.card);
        cuda_on_cpu::play_card(cuda_on_cpu::settings(), row.card);
        cudaDeviceProp gpu;
        REQUIRE(cudaGetDeviceProperties(&gpu, 0) == cudaSuccess);
        CHECK(gpu.sharedMemPerBlockOptin == row.optin << 10);
        CHECK(gpu.sharedMemPerMultiprocessor == row.shared << 10);
        CHECK(gpu.reservedSharedMemPerBlock == (row.shared - row.optin) << 10);
        CHECK(gpu.maxThreadsPerMultiProcessor == row.threads);
        auto blocks = [](int threads, size_t shared) {
            int found = 0;
            REQUIRE(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&found, small_static_part,
                                                                  threads, shared) == cudaSuccess);
            return found;
        };
        CHECK(blocks(32, 0) == row.of_32);
        CHECK(blocks(1024, 0) == row.of_1024);
        CHECK(blocks(32, gpu.sharedMemPerBlockOptin) == 1);
        CHECK(blocks(32, gpu.sharedMemPerMultiprocessor / 2 - gpu.reservedSharedMemPerBlock) == 2);
        CHECK(blocks(32, gpu.sharedMemPerMultiprocessor / 2 - gpu.reservedSharedMemPerBlock + 1) ==
              1);
    }
    cuda_on_cpu::settings() = kept;
}

TEST_CASE("emulator catches: more than ptxas said that a kernel has") {
    const auto kept = cuda_on_cpu::settings();
    cuda_on_cpu::play_card(cuda_on_cpu::settings(), "rtx4090");
    const std::string path = "/tmp/kernel_sizes." + std::to_string(::getpid());
    auto say = [&](const std::string& text) {
        cuda_on_cpu::kernel_sizes().clear();
        if (FILE* file = std::fopen(path.c_str(), "w")) {
            std::fputs(text.c_str(), file);
            std::fclose(file);
        }
        REQUIRE(cuda_on_cpu::load_kernel_sizes(path.c_str()));
    };
    Device<int> out(1);
    auto allow = [](size_t bytes) {
        return cudaFuncSetAttribute(small_static_part, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    int(bytes));
    };
    say("2048 40 small_static_part\n");
    CHECK(allow((99 << 10) - 2048) == cudaSuccess);
    CHECK(allow((99 << 10) - 2048 + 16) == cudaErrorInvalidValue);
    CHECK_NOTHROW((small_static_part<<<1, 32, 40 << 10>>>(out.data)));
    int blocks = 0;
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, small_static_part, 256, 0);
    CHECK(blocks == 6);  // of 40 x 256 registers; threads would allow as many
    say("2048 80 small_static_part\n");
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, small_static_part, 256, 0);
    CHECK(blocks == 3);
    Error e = mistake_of([&] { small_static_part<<<1, 1024, 4096>>>(out.data); });
    CHECK(says(e, "1024 threads of 80 registers are more than 65536"));
    say("0 40 small_static_part\n");
    e = mistake_of([&] { small_static_part<<<1, 32, 4096>>>(out.data); });
    CHECK(says(e, "its __shared__ arrays take 1024 bytes, and ptxas said 0"));
    cuda_on_cpu::settings().has_code = false;
    cuda_on_cpu::kernel_sizes().clear();
    e = mistake_of([&] { small_static_part<<<1, 32, 4096>>>(out.data); });
    CHECK(says(e, "the program holds no code for this device"));
    CHECK(allow(48 << 10) == cudaSuccess);  // as it was
    std::remove(path.c_str());
    cuda_on_cpu::settings() = kept;
}

__global__ void add_floats(float* x) { atomicAdd(x, 1.0f); }
PLANTED __global__ void divide(int* x) { x[1] = 7 / x[0]; }
__device__ inline float dig(volatile float* above, int depth) {
    volatile float here[1024];
    here[depth % 1024] = above[0];
    return depth == 0 ? here[0] : dig(here, depth - 1) + here[1];
}
__global__ void dig_deep(float* x) { x[0] = dig(x, int(x[0])); }

TEST_CASE("emulator catches: floating-point atomics, division by zero, a stack too deep") {
    Device<float> x(std::vector<float>{1000, 1});
    Device<int> zero(std::vector<int>{0, 0});
    Error e = mistake_of([&] { add_floats<<<1, 1>>>(x.data); });
    CHECK(e.mistake == Mistake::forbidden);
#ifdef __x86_64__
    e = mistake_of([&] { divide<<<1, 1>>>(zero.data); });
    CHECK(says(e, "division by zero"));
#endif
    e = mistake_of([&] { dig_deep<<<1, 1>>>(x.data); });
    CHECK(says(e, "past the stack"));
}

template <int Bytes>
__global__ void use_shared(float* x) {
    __shared__ char fixed[Bytes];
    extern __shared__ float dynamic[];
    fixed[threadIdx.x] = 1;
    dynamic[threadIdx.x] = fixed[threadIdx.x];
    x[threadIdx.x] = dynamic[threadIdx.x];
}

TEST_CASE("emulator catches: launches that no GPU accepts") {
    Device<float> x(1024);
    auto run = [&](auto grid, auto block, size_t shared) {
        use_shared<1024><<<grid, block, shared>>>(x.data);
    };
    run(1, 1024, 47 << 10);
    CHECK(mistake_of([&] { run(1, 1025, 4100); }).mistake == Mistake::launch);
    CHECK(mistake_of([&] { run(1, 0, 4096); }).mistake == Mistake::launch);
    CHECK(mistake_of([&] { run(0, 1, 4096); }).mistake == Mistake::launch);
    CHECK(mistake_of([&] { run(dim3(1, 70000), 1, 4096); }).mistake == Mistake::launch);
    CHECK(mistake_of([&] { run(1, 1, 0); }).mistake == Mistake::launch);
    Error e = mistake_of([&] { run(1, 32, 60 << 10); });
    CHECK(says(e, "cudaFuncSetAttribute"));
    CHECK(says(mistake_of([&] { run(1, 32, 48 << 10); }), "static and dynamic"));
    CHECK(cudaFuncSetAttribute(use_shared<1024>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               228 << 10) == cudaErrorInvalidValue);
    CHECK(cudaFuncSetAttribute(use_shared<1024>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               226 << 10) == cudaSuccess);
    run(1, 32, 60 << 10);
    CHECK(cudaFuncSetAttribute(use_shared<1024>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               48 << 10) == cudaSuccess);
    run(1, 32, 48 << 10);  // 49 KB together
    CHECK(mistake_of([&] { run(1, 32, 60 << 10); }).mistake == Mistake::launch);
    CHECK(mistake_of([&] { run(1, 32, 228 << 10); }).mistake == Mistake::launch);
    CHECK(mistake_of([&] { use_shared<50000><<<1, 32, 16>>>(x.data); }).mistake == Mistake::launch);
    e = mistake_of([&] { reverse<100><<<1, 128>>>(reinterpret_cast<int*>(x.data), 1); });
    CHECK(says(e, "__launch_bounds__"));
}

// Lane i hands its number to lane i + 1 through shared memory; how is told by `Sync`: 0 not at all,
// 1 by a shuffle (which orders no memory), 2 by __syncwarp.
template <int Sync>
__global__ void hand_over(float* out) {
    __shared__ float buffer[32];
    buffer[threadIdx.x] = float(threadIdx.x);
    if (Sync == 1) __shfl_sync(0xffffffffu, 0, 0);
    if (Sync == 2) __syncwarp();
    out[threadIdx.x] = buffer[(threadIdx.x + 1) % 32];
}
template <bool Bug>
__global__ void copy_and_share(float* out, const float* in) {
    __shared__ float4 buffer[32];
    copy_async_16(&buffer[threadIdx.x], in + 4 * threadIdx.x, true);
    copy_async_commit();
    copy_async_wait<0>();
    if (!Bug) __syncthreads();
    out[threadIdx.x] = buffer[31 - threadIdx.x].x;
}
__global__ void write_one_place(float* x, bool all) {
    if (all || blockIdx.x == 0) x[0] = 1;
}
PLANTED __global__ void write_far(float* x) { x[5] = 1; }

TEST_CASE("emulator: barriers that are there are not missed") {
    Device<float> x(32), in(std::vector<float>(128));
    in_every_order([&] {
        hand_over<2><<<1, 32>>>(x.data);
        CHECK(x.host()[30] == 31);
        copy_and_share<false><<<1, 32>>>(x.data, in.data);
        CHECK(x.host()[30] == 0);
        write_one_place<<<5, 1>>>(x.data, false);
        write_far<<<1, 1>>>(x.data);
        CHECK(x.host()[5] == 1);
    });
}

#if CUDA_ON_CPU_WATCH
TEST_CASE("watched build catches: missing barriers of every kind, with both threads") {
    Device<float> x(32), in(std::vector<float>(128));
    in_every_order([&] {
        Mistake mistake = mistake_of([&] { hand_over<0><<<1, 32>>>(x.data); }).mistake;
        CHECK((mistake == Mistake::race || mistake == Mistake::uninitialised));
        Error e = mistake_of([&] { hand_over<1><<<1, 32>>>(x.data); });
        CHECK(e.mistake == Mistake::race);
        CHECK(says(e, "shared array 'buffer', which thread"));
        mistake = mistake_of([&] { copy_and_share<true><<<1, 32>>>(x.data, in.data); }).mistake;
        CHECK((mistake == Mistake::race || mistake == Mistake::uninitialised));
        e = mistake_of([&] { write_one_place<<<5, 1>>>(x.data, true); });
        CHECK(says(e, "another block of this kernel writes, too"));
    });
}

TEST_CASE(
    "watched build catches: device memory touched on the host, and the byte beside a buffer") {
    Device<float> x(std::vector<float>(8)), small(std::vector<float>(5));
    x.data[2] = 1;
    Error e = mistake_of([&] { write_one_place<<<1, 1>>>(x.data, true); });
    CHECK(says(e, "host code touches device memory"));
    write_one_place<<<1, 1>>>(x.data, true);
    e = mistake_of([&] { write_far<<<1, 1>>>(small.data); });
    CHECK(says(e, "thread (0,0,0): write 0 bytes past the end of global buffer"));
}
#endif

// =================================================================================================
// Tensor cores. The tables are NVIDIA's: PTX ISA, "Matrix fragments for mma.m16n8k16 with floating
// point type" and "Matrix fragments for mma.m16n8k8", row and column of element i for %laneid,
// spelled as they stand there. The expected product is a plain triple loop.
// =================================================================================================

struct Place {
    int row, col;
};

Place a_bf16_m16n8k16(int laneid, int i) {
    int groupID = laneid >> 2, threadID_in_group = laneid % 4;
    int row = (0 <= i && i < 2) || (4 <= i && i < 6) ? groupID : groupID + 8;
    int col = i < 4 ? threadID_in_group * 2 + (i & 0x1) : threadID_in_group * 2 + (i & 0x1) + 8;
    return {row, col};
}
Place b_bf16_m16n8k16(int laneid, int i) {
    int groupID = laneid >> 2, threadID_in_group = laneid % 4;
    int row = i < 2 ? threadID_in_group * 2 + (i & 0x1) : threadID_in_group * 2 + (i & 0x1) + 8;
    return {row, groupID};
}
Place a_tf32_m16n8k8(int laneid, int i) {
    int groupID = laneid >> 2, threadID_in_group = laneid % 4;
    int row = i == 0 || i == 2 ? groupID : groupID + 8;
    int col = i == 0 || i == 1 ? threadID_in_group : threadID_in_group + 4;
    return {row, col};
}
Place b_tf32_m16n8k8(int laneid, int i) {
    int groupID = laneid >> 2, threadID_in_group = laneid % 4;
    return {i == 0 ? threadID_in_group : threadID_in_group + 4, groupID};
}
Place c_f32_m16n8(int laneid, int i) {
    int groupID = laneid >> 2, threadID_in_group = laneid % 4;
    return {i < 2 ? groupID : groupID + 8, threadID_in_group * 2 + (i & 0x1)};
}

// Multiplies with the fragments that the host laid out; 4 + 2 registers and 4 accumulators a lane.
template <bool Tf32>
__global__ void multiply_fragments(float* d, const unsigned* a, const unsigned* b) {
    unsigned fa[4], fb[2];
    float fd[4];
    for (int i = 0; i < 4; i++) fa[i] = a[threadIdx.x * 4 + i];
    for (int i = 0; i < 2; i++) fb[i] = b[threadIdx.x * 2 + i];
    for (int i = 0; i < 4; i++) fd[i] = d[threadIdx.x * 4 + i];
    if (Tf32)
        mma_tf32_16x8x8(fd, fa, fb);
    else
        mma_bf16_16x8x16(fd, fa, fb);
    for (int i = 0; i < 4; i++) d[threadIdx.x * 4 + i] = fd[i];
}

// Small whole numbers, all different enough that an exchanged element shows; exact in every type
// here.
float number_at(int row, int col, int salt) {
    return float((row * 37 + col * 101 + salt * 53) % 41 - 20);
}
unsigned upper_bits(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, 4);
    return bits >> 16;
}

template <bool Tf32>
void check_mma() {
    constexpr int K = Tf32 ? 8 : 16;
    std::vector<unsigned> a(32 * 4), b(32 * 2);
    std::vector<float> d(32 * 4);
    for (int lane = 0; lane < 32; lane++) {
        for (int i = 0; i < (Tf32 ? 4 : 8); i++) {
            Place p = Tf32 ? a_tf32_m16n8k8(lane, i) : a_bf16_m16n8k16(lane, i);
            unsigned bits = upper_bits(number_at(p.row, p.col, 1));
            if (Tf32)
                a[size_t(lane * 4 + i)] = bits << 16;
            else
                a[size_t(lane * 4 + i / 2)] |= bits << (i % 2 * 16);
        }
        for (int i = 0; i < (Tf32 ? 2 : 4); i++) {
            Place p = Tf32 ? b_tf32_m16n8k8(lane, i) : b_bf16_m16n8k16(lane, i);
            unsigned bits = upper_bits(number_at(p.row, p.col, 2));
            if (Tf32)
                b[size_t(lane * 2 + i)] = bits << 16;
            else
                b[size_t(lane * 2 + i / 2)] |= bits << (i % 2 * 16);
        }
        for (int i = 0; i < 4; i++) {
            Place p = c_f32_m16n8(lane, i);
            d[size_t(lane * 4 + i)] = number_at(p.row, p.col, 3);
        }
    }
    Device<unsigned> da(a), db(b);
    Device<float> dd(d);
    multiply_fragments<Tf32><<<1, 32>>>(dd.data, da.data, db.data);
    d = dd.host();
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++) {
            Place p = c_f32_m16n8(lane, i);
            float sum = number_at(p.row, p.col, 3);
            for (int k = 0; k < K; k++) sum += number_at(p.row, k, 1) * number_at(k, p.col, 2);
            REQUIRE(d[size_t(lane * 4 + i)] == sum);
        }
}

TEST_CASE("emulator: mma.sync has the fragment layouts of NVIDIA's tables, for bf16 and tf32") {
    in_every_order([] {
        check_mma<false>();
        check_mma<true>();
    });
}

TEST_CASE("emulator: every element of the tables is held by exactly one lane") {
    auto covers = [](Place (*table)(int, int), int elements, int rows, int cols) {
        std::vector<int> seen(size_t(rows * cols));
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < elements; i++) {
                Place p = table(lane, i);
                REQUIRE((p.row >= 0 && p.row < rows && p.col >= 0 && p.col < cols));
                seen[size_t(p.row * cols + p.col)]++;
            }
        for (int count : seen) REQUIRE(count == 1);
    };
    covers(a_bf16_m16n8k16, 8, 16, 16);
    covers(b_bf16_m16n8k16, 4, 16, 8);
    covers(a_tf32_m16n8k8, 4, 16, 8);
    covers(b_tf32_m16n8k8, 2, 8, 8);
    covers(c_f32_m16n8, 4, 16, 8);
}

// Loads four (two) 8 x 8 matrices, whose rows lie 24 elements apart, and writes down the registers.
template <bool Transposed, int Matrices>
__global__ void load_fragments(unsigned* out, int skip) {
    __shared__ alignas(16) uint16_t tile[32 * 24];
    for (int i = int(threadIdx.x); i < 32 * 24; i += 32) tile[i] = uint16_t(i);
    __syncthreads();
    const uint16_t* row = tile + threadIdx.x % (8 * Matrices) * 24 + skip;
    unsigned r4[4], r2[2];
    if (Matrices == 4 && Transposed) load_matrix_x4_transposed(r4, row);
    if (Matrices == 4 && !Transposed) load_matrix_x4(r4, row);
    if (Matrices == 2 && Transposed) load_matrix_x2_transposed(r2, row);
    if (Matrices == 2 && !Transposed) load_matrix_x2(r2, row);
    for (int i = 0; i < Matrices; i++)
        out[int(threadIdx.x) * Matrices + i] = Matrices == 4 ? r4[i] : r2[i];
}

// PTX ISA, ldmatrix: "addr0-addr7" of threads 0-7 are the rows of the first matrix, and so on;
// thread l receives, of each matrix, row l / 4, elements 2 (l % 4) and the next; .trans loads it
// transposed.
template <bool Transposed, int Matrices>
void check_ldmatrix() {
    Device<unsigned> out(32 * Matrices);
    load_fragments<Transposed, Matrices><<<1, 32>>>(out.data, 8);
    auto r = out.host();
    for (unsigned lane = 0; lane < 32; lane++)
        for (unsigned m = 0; m < Matrices; m++)
            for (unsigned half = 0; half < 2; half++) {
                unsigned i = lane / 4, j = 2 * (lane % 4) + half;
                unsigned row = 8 * m + (Transposed ? j : i), col = Transposed ? i : j;
                REQUIRE((r[lane * Matrices + m] >> (16 * half) & 0xffff) == row * 24 + 8 + col);
            }
}

TEST_CASE("emulator: ldmatrix gives each lane what NVIDIA's table says, plain and transposed") {
    in_every_order([] {
        check_ldmatrix<false, 4>();
        check_ldmatrix<true, 4>();
        check_ldmatrix<false, 2>();
        check_ldmatrix<true, 2>();
    });
    Device<unsigned> out(128);
    Error e = mistake_of([&] { load_fragments<false, 4><<<1, 32>>>(out.data, 4); });
    CHECK(e.mistake == Mistake::alignment);
    e = mistake_of([&] { load_fragments<false, 4><<<1, 32>>>(out.data, 24); });
    CHECK(e.mistake == Mistake::shared_memory);
    CHECK(e.thread.x == 31);
}

__global__ void multiply_apart(float* x) {
    float d[4] = {};
    unsigned a[4] = {}, b[2] = {};
    if (threadIdx.x < 16)
        mma_bf16_16x8x16(d, a, b);
    else
        mma_bf16_16x8x16(d, a, b);
    x[threadIdx.x] = d[0];
}

TEST_CASE("emulator catches: lanes of a warp at different tensor-core instructions") {
    Device<float> x(32);
    CHECK(says(mistake_of([&] { multiply_apart<<<1, 32>>>(x.data); }),
               "the same instruction together"));
}

__global__ void copy_in_steps(float* out, const float* in, int valid) {
    __shared__ float4 buffer[3][32];
    const float* mine = in + threadIdx.x * 4;
    buffer[0][threadIdx.x] = make_float4(5, 5, 5, 5);
    copy_async_16(&buffer[0][threadIdx.x], mine, true);
    copy_async_commit();
    copy_async_16(&buffer[1][threadIdx.x], mine + 128, int(threadIdx.x) < valid);
    copy_async_commit();
    copy_async_16(&buffer[2][threadIdx.x], mine, true);
    copy_async_commit();
    out[threadIdx.x] = buffer[0][threadIdx.x].x;  // too early
    copy_async_wait<1>();
    out[32 + threadIdx.x] = buffer[0][threadIdx.x].y;
    out[64 + threadIdx.x] = buffer[1][threadIdx.x].z;
    out[96 + threadIdx.x] = buffer[2][threadIdx.x].w;  // too early
    copy_async_wait<0>();
    out[128 + threadIdx.x] = buffer[2][threadIdx.x].w;
}
__global__ void copy_unaligned(const float* in, int shared_skip, int global_skip) {
    __shared__ alignas(16) float buffer[8];
    copy_async_16(buffer + shared_skip, in + global_skip, true);
}

TEST_CASE(
    "emulator: cp.async arrives when it is waited for, group by group, with zeros where not "
    "valid") {
    std::vector<float> numbers(256);
    for (size_t i = 0; i < 256; i++) numbers[i] = float(i);
    Device<float> in(numbers), out(160);
#if !CUDA_ON_CPU_WATCH
    in_every_order([&] {
        copy_in_steps<<<1, 32>>>(out.data, in.data, 20);
        auto x = out.host();
        for (size_t i = 0; i < 32; i++) {
            REQUIRE(std::isnan(x[i]));
            REQUIRE(x[32 + i] == float(4 * i + 1));
            REQUIRE(x[64 + i] == (i < 20 ? float(128 + 4 * i + 2) : 0.0f));
            REQUIRE(std::isnan(x[96 + i]));
            REQUIRE(x[128 + i] == float(4 * i + 3));
        }
    });
#else
    CHECK(mistake_of([&] { copy_in_steps<<<1, 32>>>(out.data, in.data, 20); }).mistake ==
          Mistake::uninitialised);
#endif
    CHECK(mistake_of([&] { copy_unaligned<<<1, 1>>>(in.data, 1, 0); }).mistake ==
          Mistake::alignment);
    CHECK(mistake_of([&] { copy_unaligned<<<1, 1>>>(in.data, 0, 1); }).mistake ==
          Mistake::alignment);
    CHECK(mistake_of([&] { copy_unaligned<<<1, 1>>>(in.data, 8, 0); }).mistake ==
          Mistake::shared_memory);
    cuda_on_cpu::settings().major = 7;  // there the wrapper copies at once
    CHECK_NOTHROW((copy_unaligned<<<1, 1>>>(in.data, 0, 0)));
    cuda_on_cpu::settings().major = 9;
}

// --- wgmma

enum Plant {
    nothing,
    no_publish,
    late_publish,
    no_begin,
    no_end,
    no_wait,
    early_read,
    touched,
    changed_b,
    three_warps,
    other_descriptor,
    two_products
};
constexpr int group_bytes = 16 << 10;

// d [64, 64] = a [64, 16] b [16, 64], or += where d holds numbers; b are the bytes of `tile`, seen
// through a descriptor.
template <bool Columns, int Planted>
__global__ void multiply_by_group(float* d, const unsigned* a, const uint16_t* tile,
                                  uint64_t descriptor, int add) {
    extern __shared__ alignas(1024) uint16_t group_tile[];
    const int rank = int(threadIdx.x);
    for (int i = rank * 8; i < group_bytes / 2; i += 128 * 8)
        copy_async_16(group_tile + i, tile + i, true);
    copy_async_commit();
    copy_async_wait<0>();
    if (Planted != no_publish && Planted != late_publish) group_publish();
    __syncthreads();
    if (Planted == late_publish) group_publish();
    unsigned fa[4];
    float fd[8][4];
    for (int i = 0; i < 4; i++) fa[i] = a[rank * 4 + i];
    for (int i = 0; i < 32; i++) fd[i / 4][i % 4] = d[rank * 32 + i];
    if (Planted != no_begin) group_begin(fd);
    if (Planted == other_descriptor && rank >= 96) descriptor += 2;
    if (Planted != three_warps || rank < 96) group_mma<Columns>(fd, fa, descriptor, add != 0);
    if (Planted == two_products) group_mma<Columns>(fd, fa, descriptor, true);
    if (Planted == touched) fd[3][1] = 0;
    if (Planted != no_end) group_end();
    if (Planted == changed_b) {
        __syncthreads();
        if (rank == 5) group_tile[0] ^= 1;
        __syncthreads();
    }
    if (Planted == early_read)
        for (int i = 0; i < 32; i++) d[rank * 32 + i] = fd[i / 4][i % 4];
    if (Planted != no_wait) group_wait<0>(fd);
    if (Planted != early_read)
        for (int i = 0; i < 32; i++) d[rank * 32 + i] = fd[i / 4][i % 4];
}
// Its shared memory has the alignment of its type.
__global__ void multiply_unaligned(unsigned* address) {
    extern __shared__ uint16_t loose_tile[];
    *address = shared_address(loose_tile);
}
// Two batches, the second still under way while the first is read.
__global__ void multiply_in_batches(float* d, const unsigned* a, uint64_t descriptor) {
    extern __shared__ alignas(1024) uint16_t ones[];
    for (int i = int(threadIdx.x); i < group_bytes / 2; i += 128) ones[i] = 0x3f80;
    __syncthreads();
    unsigned fa[4];
    float first[8][4], second[8][4];
    for (int i = 0; i < 4; i++) fa[i] = a[int(threadIdx.x) * 4 + i];
    group_begin(first), group_mma<true>(first, fa, descriptor, false), group_end();
    group_begin(second), group_mma<true>(second, fa, descriptor, false), group_end();
    group_wait<1>(first);
    d[threadIdx.x] = first[2][3], d[128 + threadIdx.x] = second[2][3];
    group_wait<0>(second);
    d[256 + threadIdx.x] = second[2][3];
}

struct GroupCase {
    std::vector<unsigned> a;     // by thread
    std::vector<float> d, want;  // by thread, before and after
    std::vector<uint16_t> tile;
};
// Where byte `byte` of row `row` of a tile with rows of 128 bytes lies (PTX ISA, 9.7.15.5.1.2,
// "128B swizzle"): 16 bytes change places within 8 rows, and `stride` leads from 8 rows to the next.
int swizzled(int row, int byte, int stride) {
    return row / 8 * stride + row % 8 * 128 + ((byte / 16) ^ (row % 8)) * 16 + byte % 16;
}
// b [16, 64] begins with k = `step` of a larger one. Its rows of memory are n, or with `columns` k.
GroupCase group_case(bool columns, int step, int stride, bool add) {
    GroupCase c{std::vector<unsigned>(128 * 4), std::vector<float>(128 * 32, NAN),
                std::vector<float>(128 * 32), std::vector<uint16_t>(group_bytes / 2, 0x7fff)};
    for (int k = 0; k < 16; k++)
        for (int n = 0; n < 64; n++)
            c.tile[size_t(columns ? swizzled(step + k, n * 2, stride)
                                  : swizzled(n, (step + k) * 2, stride)) /
                   2] = uint16_t(upper_bits(number_at(k, n, 2)));
    for (int thread = 0; thread < 128; thread++) {
        const int lane = thread % 32, first = thread / 32 * 16;
        for (int i = 0; i < 8; i++) {
            const Place p = a_bf16_m16n8k16(lane, i);
            c.a[size_t(thread * 4 + i / 2)] |= upper_bits(number_at(first + p.row, p.col, 1))
                                               << (i % 2 * 16);
        }
        for (int i = 0; i < 32; i++) {
            const Place p = c_f32_m16n8(lane, i % 4);
            const int row = first + p.row, col = i / 4 * 8 + p.col;
            float sum = add ? number_at(row, col, 3) : 0;
            if (add) c.d[size_t(thread * 32 + i)] = sum;
            for (int k = 0; k < 16; k++) sum += number_at(row, k, 1) * number_at(k, col, 2);
            c.want[size_t(thread * 32 + i)] = sum;
        }
    }
    return c;
}
template <bool Columns, int Planted = nothing>
std::vector<float> run_group(const GroupCase& c, uint64_t descriptor, bool add = false,
                             unsigned threads = 128) {
    Device<unsigned> a(c.a);
    Device<float> d(c.d);
    Device<uint16_t> tile(c.tile);
    multiply_by_group<Columns, Planted>
        <<<1, threads, group_bytes>>>(d.data, a.data, tile.data, descriptor, add);
    return d.host();
}

// The numbers of a descriptor, by hand. Here the tile begins at byte 2048: 0x80 without its 4 lowest
// bits; 16 columns are 32 bytes, 2; 16 rows are 2 strides of 1024 bytes, 0x40 each. 1 in the upper
// two bits is the swizzle.
TEST_CASE(
    "emulator: wgmma reads B as its descriptor says, rows or columns, and has mma's layouts") {
    for (bool add : {false, true})
        in_every_order([&] {
            const GroupCase k0 = group_case(false, 0, 1024, add),
                            k1 = group_case(false, 16, 1024, add),
                            k3 = group_case(false, 48, 2048, add),
                            n0 = group_case(true, 0, 1024, add),
                            n1 = group_case(true, 16, 1024, add),
                            n2 = group_case(true, 0, 2048, add);
            CHECK(run_group<false>(k0, 0x4000004000400080, add) == k0.want);
            CHECK(run_group<false>(k1, 0x4000004000400082, add) == k1.want);
            CHECK(run_group<false>(k3, 0x4000008000010086, add) == k3.want);
            CHECK(run_group<true>(n0, 0x4000004000400080, add) == n0.want);
            CHECK(run_group<true>(n1, 0x4000004000400100, add) == n1.want);
            CHECK(run_group<true>(n2, 0x4000008000010080, add) == n2.want);
            // wrong ones give something else
            CHECK(run_group<false>(k1, 0x4000004000400080, add) != k1.want);
            CHECK(run_group<false>(k3, 0x4000004000010086, add) != k3.want);
            CHECK(run_group<true>(n1, 0x4000004000400088, add) != n1.want);
            CHECK(run_group<true>(k0, 0x4000004000400080, add) != k0.want);
        });
}

TEST_CASE("emulator: wgmma's results come when they are waited for, batch by batch") {
    const GroupCase c = group_case(true, 0, 1024, false);
    const uint64_t descriptor = 0x4000004000400080;
    in_every_order([&] {
        for (float x : run_group<true, early_read>(c, descriptor)) REQUIRE(std::isnan(x));
        Device<float> d(std::vector<float>(384));
        Device<unsigned> a(std::vector<unsigned>(512, 0x3f803f80));
        multiply_in_batches<<<1, 128, group_bytes>>>(d.data, a.data, descriptor);
        const auto got = d.host();
        for (size_t i = 0; i < 128; i++) {
            REQUIRE(got[i] == 16);
            REQUIRE(std::isnan(got[128 + i]));
            REQUIRE(got[256 + i] == 16);
        }
    });
    std::vector<float> twice = c.want;
    for (float& x : twice) x *= 2;
    CHECK(run_group<true, two_products>(c, descriptor) == twice);
}

TEST_CASE("emulator catches: what a group of warps may not do") {
    const GroupCase c = group_case(false, 0, 1024, false);
    const uint64_t good = 0x4000004000400080;
    auto mistake = [&](auto planted) {
        return mistake_of([&] { run_group<false, planted.value>(c, good); });
    };
#define MISTAKE(planted) mistake(std::integral_constant<int, planted>())
    CHECK(says(MISTAKE(no_publish), "with no fence.proxy.async between copy_async_wait and"));
    CHECK(says(MISTAKE(late_publish), "with no fence.proxy.async between copy_async_wait and"));
    CHECK(says(MISTAKE(no_begin), "no group_begin() since the last batch"));
    CHECK(says(MISTAKE(no_end), "was not ended by group_end()"));
    CHECK(says(MISTAKE(no_wait), "has finished, but not waited for its wgmma"));
    CHECK(says(MISTAKE(touched), "accumulators of a wgmma were changed before"));
    CHECK(says(MISTAKE(changed_b), "that a wgmma reads was changed before"));
    CHECK(says(MISTAKE(three_warps), "but not by this one: it said 0 of 1"));
    CHECK(says(MISTAKE(other_descriptor), "must say the same, with the same descriptor"));
#undef MISTAKE
    auto refused = [&](uint64_t descriptor, unsigned threads = 128) {
        return mistake_of([&] { run_group<false>(c, descriptor, false, threads); });
    };
    CHECK(says(refused(0x8000004000400080), "other than the swizzle of 128 bytes"));
    CHECK(says(refused(0x4002004000400080), "other than the swizzle of 128 bytes"));  // base offset
    CHECK(refused(0x4000004000400010).mistake == Mistake::shared_memory);
    CHECK(refused(0x4000010000400080).mistake == Mistake::shared_memory);
    CHECK(says(refused(good, 96), "a group is four whole warps"));
    for (int major : {8, 10}) {
        cuda_on_cpu::settings().major = major;
        CHECK(says(refused(good), "needs compute capability 9.0"));
    }
    cuda_on_cpu::settings().major = 9;
    Device<unsigned> address(1);
    multiply_unaligned<<<1, 1, group_bytes>>>(address.data);
    CHECK(address.host()[0] % 1024 != 0);
}

__global__ void convert_numbers(unsigned* out, const float* in, int n) {
    for (int i = 0; i < n; i++) {
        out[3 * i] = to_tf32(in[i]);
        out[3 * i + 1] = pack_bf16(in[i], -in[i]);
        out[3 * i + 2] = __float_as_uint(exp2_approx(in[i]));
    }
}

TEST_CASE("emulator: conversions round as their instructions do") {
    auto from_bits = [](unsigned bits) {
        float x;
        std::memcpy(&x, &bits, 4);
        return x;
    };
    // 1 + half of tf32's last place: away from zero; just below: down; 1 + half of bf16's: to even.
    std::vector<float> in{from_bits(0x3f801000),
                          from_bits(0x3f800fff),
                          from_bits(0x3f808000),
                          from_bits(0x3f818000),
                          INFINITY,
                          NAN,
                          -130.0f};
    Device<float> d(in);
    Device<unsigned> out(in.size() * 3);
    convert_numbers<<<1, 1>>>(out.data, d.data, int(in.size()));
    auto x = out.host();
    CHECK(x[0] == 0x3f802000);
    CHECK(x[3] == 0x3f800000);
    CHECK(x[7] == 0xbf803f80);
    CHECK(x[10] == 0xbf823f82);
    CHECK(x[12] == 0x7f800000);
    CHECK(x[13] == 0xff807f80);
    CHECK(x[16] == 0x7fff7fff);
    CHECK(x[20] == 0);  // 2^-130 is flushed to zero
}

// =================================================================================================
// cuBLASLt stand-in
// =================================================================================================

// A matmul to be set up: D (m x n) = epilogue(alpha op(A) op(B) + beta C).
struct Problem {
    int m = 24, n = 10, k = 17, batches = 1;
    bool trans_a = false, trans_b = false, row_major = false;
    cudaDataType in = CUDA_R_32F, out = CUDA_R_32F;
    cublasComputeType_t compute = CUBLAS_COMPUTE_32F;
    cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    float alpha = 1, beta = 0;
    // Mistakes to plant: a wrong leading dimension, a wrong size, a missing or misplaced pointer.
    int aux_ld_extra = 0, ld_short = 0, k_extra = 0;
    bool no_bias = false, no_aux = false, crooked_aux = false, past_the_end = false;
};

// Numbers of either type on the device, with the values that rounding left of them.
struct Numbers {
    std::vector<double> value;
    cudaDataType type;
    void* data = nullptr;
    Numbers(size_t count, cudaDataType type, int salt) : value(count), type(type) {
        std::vector<float> f(count);
        std::vector<uint16_t> h(count);
        for (size_t i = 0; i < count; i++) {
            f[i] = std::sin(float(i) * 0.7f + float(salt));
            h[i] = uint16_t(upper_bits(f[i]));
            if (type == CUDA_R_16BF) f[i] = to_float(h[i]);
            value[i] = double(f[i]);
        }
        REQUIRE(cudaMalloc(&data, bytes()) == cudaSuccess);
        const void* from = type == CUDA_R_16BF ? static_cast<const void*>(h.data()) : f.data();
        REQUIRE(cudaMemcpy(data, from, bytes(), cudaMemcpyHostToDevice) == cudaSuccess);
    }
    ~Numbers() { cudaFree(data); }
    Numbers(const Numbers&) = delete;
    size_t bytes() const { return value.size() * (type == CUDA_R_16BF ? 2 : 4); }
    static float to_float(uint16_t bits) {
        unsigned u = unsigned(bits) << 16;
        float f;
        std::memcpy(&f, &u, 4);
        return f;
    }
    std::vector<double> now() const {
        std::vector<double> out(value.size());
        std::vector<float> f(out.size());
        std::vector<uint16_t> h(out.size());
        void* to = type == CUDA_R_16BF ? static_cast<void*>(h.data()) : f.data();
        REQUIRE(cudaMemcpy(to, data, bytes(), cudaMemcpyDeviceToHost) == cudaSuccess);
        for (size_t i = 0; i < out.size(); i++)
            out[i] = double(type == CUDA_R_16BF ? to_float(h[i]) : f[i]);
        return out;
    }
};

// The operands of a problem, with leading dimensions larger than they need be, and what comes out.
struct Setup {
    Problem p;
    int rows_a, cols_a, rows_b, cols_b, ld_a, ld_b, ld_d, ld_aux;
    Numbers a, b, c, d, bias, aux;
    cublasStatus_t heuristic, status;

    int lead(int rows, int cols) const { return (p.row_major ? cols : rows) + 3; }
    int lines(int rows, int cols) const { return p.row_major ? rows : cols; }
    size_t stride_a() const { return size_t(ld_a * lines(rows_a, cols_a) + 1); }
    size_t stride_b() const { return size_t(ld_b * lines(rows_b, cols_b) + 2); }
    size_t stride_d() const { return size_t(ld_d * lines(p.m, p.n) + 3); }
    size_t stride_aux() const { return size_t(ld_aux * p.n); }

    explicit Setup(const Problem& problem)
        : p(problem), rows_a(p.trans_a ? p.k : p.m), cols_a(p.trans_a ? p.m : p.k),
          rows_b(p.trans_b ? p.n : p.k), cols_b(p.trans_b ? p.k : p.n), ld_a(lead(rows_a, cols_a)),
          ld_b(lead(rows_b, cols_b)), ld_d(lead(p.m, p.n)), ld_aux((p.m + 15) / 8 * 8),
          a(stride_a() * size_t(p.batches), p.in, 1), b(stride_b() * size_t(p.batches), p.in, 2),
          c(stride_d() * size_t(p.batches), p.out, 3), d(stride_d() * size_t(p.batches), p.out, 4),
          bias(size_t(p.m + p.n), p.out, 5), aux(stride_aux() * size_t(p.batches), p.out, 6) {
        run();
    }
    cublasLtMatrixLayout_t layout(cudaDataType type, int rows, int cols, int ld,
                                  size_t stride) const {
        cublasLtMatrixLayout_t l;
        cublasLtMatrixLayoutCreate(&l, type, uint64_t(rows), uint64_t(cols), ld);
        int32_t order = p.row_major ? CUBLASLT_ORDER_ROW : CUBLASLT_ORDER_COL, count = p.batches;
        int64_t offset = int64_t(stride);
        REQUIRE(cublasLtMatrixLayoutSetAttribute(l, CUBLASLT_MATRIX_LAYOUT_ORDER, &order,
                                                 sizeof order) == CUBLAS_STATUS_SUCCESS);
        REQUIRE(cublasLtMatrixLayoutSetAttribute(l, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count,
                                                 sizeof count) == CUBLAS_STATUS_SUCCESS);
        REQUIRE(cublasLtMatrixLayoutSetAttribute(l, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                                                 &offset, sizeof offset) == CUBLAS_STATUS_SUCCESS);
        return l;
    }
    cublasLtMatmulDesc_t descriptor() {
        cublasLtMatmulDesc_t desc;
        cublasLtMatmulDescCreate(&desc, p.compute, CUDA_R_32F);
        auto set = [&](cublasLtMatmulDescAttributes_t attribute, auto value) {
            REQUIRE(cublasLtMatmulDescSetAttribute(desc, attribute, &value, sizeof value) ==
                    CUBLAS_STATUS_SUCCESS);
        };
        set(CUBLASLT_MATMUL_DESC_TRANSA, int32_t(p.trans_a ? CUBLAS_OP_T : CUBLAS_OP_N));
        set(CUBLASLT_MATMUL_DESC_TRANSB, int32_t(p.trans_b ? CUBLAS_OP_T : CUBLAS_OP_N));
        set(CUBLASLT_MATMUL_DESC_EPILOGUE, uint32_t(p.epilogue));
        if (!p.no_bias) set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias.data);
        set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, int32_t(p.out));
        if (!p.no_aux)
            set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER,
                static_cast<void*>(static_cast<char*>(aux.data) + (p.crooked_aux ? 4 : 0)));
        set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, int64_t(ld_aux + p.aux_ld_extra));
        set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_BATCH_STRIDE, int64_t(stride_aux()));
        return desc;
    }
    void run() {
        cublasLtHandle_t handle;
        cublasLtCreate(&handle);
        auto A = layout(p.in, rows_a, cols_a, ld_a - p.ld_short, stride_a()),
             B = layout(p.in, rows_b + p.k_extra, cols_b, ld_b, stride_b());
        auto C = layout(p.out, p.m, p.n, ld_d, stride_d()),
             D = layout(p.out, p.m, p.n, ld_d, stride_d());
        auto desc = descriptor();
        cublasLtMatmulPreference_t preference;
        cublasLtMatmulPreferenceCreate(&preference);
        cublasLtMatmulHeuristicResult_t result;
        int found = 0;
        heuristic = cublasLtMatmulAlgoGetHeuristic(handle, desc, A, B, C, D, preference, 1, &result,
                                                   &found);
        CHECK(found == (heuristic == CUBLAS_STATUS_SUCCESS));
        char* to = static_cast<char*>(d.data) + (p.past_the_end ? 32 : 0);
        status = cublasLtMatmul(handle, desc, &p.alpha, a.data, A, b.data, B, &p.beta, c.data, C,
                                to, D, &result.algo, nullptr, 0, nullptr);
        for (auto l : {A, B, C, D}) cublasLtMatrixLayoutDestroy(l);
        cublasLtMatmulDescDestroy(desc);
        cublasLtMatmulPreferenceDestroy(preference);
        cublasLtDestroy(handle);
    }
    size_t at(int row, int col, int ld) const {
        return size_t(p.row_major ? row * ld + col : col * ld + row);
    }
    double op_a(int i, int l, int batch) const {
        return a.value[size_t(batch) * stride_a() + (p.trans_a ? at(l, i, ld_a) : at(i, l, ld_a))];
    }
    double op_b(int l, int j, int batch) const {
        return b.value[size_t(batch) * stride_b() + (p.trans_b ? at(j, l, ld_b) : at(l, j, ld_b))];
    }
};

double gelu_of(double x) {
    return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}
double gelu_slope(double x) { return (gelu_of(x + 1e-5) - gelu_of(x - 1e-5)) / 2e-5; }

// Runs the problem and compares every number of D, the auxiliary matrix and the bias gradient.
void check_matmul(const Problem& p) {
    Setup s(p);
    REQUIRE(s.heuristic == CUBLAS_STATUS_SUCCESS);
    REQUIRE(s.status == CUBLAS_STATUS_SUCCESS);
    auto d = s.d.now(), aux = s.aux.now(), bias = s.bias.now();
    // bf16 rounds the result to 8 bits, tf32 the operands to 11; sums of 17 products of at most 1.
    double tolerance = p.out == CUDA_R_16BF                        ? 17 * 0x1p-8
                       : p.compute == CUBLAS_COMPUTE_32F_FAST_TF32 ? 17 * 0x1p-10
                                                                   : 17 * 17 * 0x1p-24;
    auto e = p.epilogue;
    bool gradient = e == CUBLASLT_EPILOGUE_DGELU || e == CUBLASLT_EPILOGUE_DGELU_BGRAD;
    std::vector<double> row_sum(size_t(p.m)), a_sum(size_t(p.m)), b_sum(size_t(p.n));
    double worst = 0;
    for (int batch = 0; batch < p.batches; batch++)
        for (int j = 0; j < p.n; j++)
            for (int i = 0; i < p.m; i++) {
                double sum = 0;
                for (int l = 0; l < p.k; l++) sum += s.op_a(i, l, batch) * s.op_b(l, j, batch);
                size_t at = size_t(batch) * s.stride_d() + s.at(i, j, s.ld_d);
                double v = double(p.alpha) * sum + double(p.beta) * s.c.value[at];
                if (e == CUBLASLT_EPILOGUE_BIAS || e == CUBLASLT_EPILOGUE_GELU_BIAS ||
                    e == CUBLASLT_EPILOGUE_GELU_AUX_BIAS)
                    v += s.bias.value[size_t(i)];
                size_t in_aux = size_t(batch) * s.stride_aux() + size_t(j * s.ld_aux + i);
                if (gradient) v *= gelu_slope(s.aux.value[in_aux]);
                if (e == CUBLASLT_EPILOGUE_GELU_AUX || e == CUBLASLT_EPILOGUE_GELU_AUX_BIAS)
                    worst = std::max(worst, std::fabs(aux[in_aux] - v));
                if (int(e) & int(CUBLASLT_EPILOGUE_GELU)) v = gelu_of(v);
                worst = std::max(worst, std::fabs(d[at] - v));
                row_sum[size_t(i)] += v;
            }
    CHECK(worst <= tolerance);
    for (int l = 0; l < p.k; l++) {
        for (int i = 0; i < p.m; i++) a_sum[size_t(i)] += s.op_a(i, l, 0);
        for (int j = 0; j < p.n; j++) b_sum[size_t(j)] += s.op_b(l, j, 0);
    }
    auto compare = [&](const std::vector<double>& expected) {
        for (size_t i = 0; i < expected.size(); i++)
            CHECK(std::fabs(bias[i] - expected[i]) <= 10 * tolerance);
    };
    if (e == CUBLASLT_EPILOGUE_DGELU_BGRAD) compare(row_sum);
    if (e == CUBLASLT_EPILOGUE_BGRADA) compare(a_sum);
    if (e == CUBLASLT_EPILOGUE_BGRADB) compare(b_sum);
    // What lies between the columns stays as it was.
    if (!p.row_major) CHECK(d[size_t(p.m)] == s.d.value[size_t(p.m)]);
}

const cublasLtEpilogue_t all_epilogues[] =
    {CUBLASLT_EPILOGUE_DEFAULT,   CUBLASLT_EPILOGUE_BIAS,        CUBLASLT_EPILOGUE_GELU,
     CUBLASLT_EPILOGUE_GELU_BIAS, CUBLASLT_EPILOGUE_GELU_AUX,    CUBLASLT_EPILOGUE_GELU_AUX_BIAS,
     CUBLASLT_EPILOGUE_DGELU,     CUBLASLT_EPILOGUE_DGELU_BGRAD, CUBLASLT_EPILOGUE_BGRADA,
     CUBLASLT_EPILOGUE_BGRADB};

TEST_CASE(
    "cuBLASLt stand-in: every epilogue and transpose agrees with a triple loop, in every type") {
    struct Types {
        cudaDataType in, out;
        cublasComputeType_t compute;
    };
    for (Types t : {Types{CUDA_R_32F, CUDA_R_32F, CUBLAS_COMPUTE_32F},
                    Types{CUDA_R_32F, CUDA_R_32F, CUBLAS_COMPUTE_32F_FAST_TF32},
                    Types{CUDA_R_16BF, CUDA_R_16BF, CUBLAS_COMPUTE_32F},
                    Types{CUDA_R_16BF, CUDA_R_32F, CUBLAS_COMPUTE_32F}})
        for (auto epilogue : all_epilogues)
            for (int transposes = 0; transposes < 4; transposes++) {
                Problem p;
                p.in = t.in, p.out = t.out, p.compute = t.compute;
                p.epilogue = epilogue;
                p.trans_a = transposes & 1, p.trans_b = transposes & 2;
                CAPTURE(int(epilogue));
                CAPTURE(transposes);
                CAPTURE(int(t.in));
                check_matmul(p);
                p.alpha = 0.5f, p.beta = -1.5f;
                check_matmul(p);
            }
}

TEST_CASE("cuBLASLt stand-in: batches, row-major order and single rows and columns") {
    Problem p;
    p.batches = 3, p.trans_b = true;
    check_matmul(p);
    p.epilogue = CUBLASLT_EPILOGUE_GELU_AUX_BIAS;
    check_matmul(p);
    for (int transposes = 0; transposes < 4; transposes++) {
        Problem rows;
        rows.row_major = true;
        rows.trans_a = transposes & 1, rows.trans_b = transposes & 2;
        check_matmul(rows);
    }
    for (auto [m, n, k] : {std::array{1, 1, 1}, {1, 9, 17}, {130, 1, 3}, {8, 7, 200}}) {
        Problem q;
        q.m = m, q.n = n, q.k = std::min(k, 17);
        check_matmul(q);
    }
}

TEST_CASE("cuBLASLt stand-in: sums are the same bits for any number of threads") {
    Problem p;
    p.m = 70, p.n = 33, p.k = 130, p.in = CUDA_R_16BF;
    Setup one(p), two(p);
    auto x = one.d.now(), y = two.d.now();
    for (int j = 0; j < p.n; j++)
        for (int i = 0; i < p.m; i++)
            REQUIRE(x[one.at(i, j, one.ld_d)] == y[one.at(i, j, one.ld_d)]);
}

TEST_CASE("cuBLASLt stand-in: refuses what the documentation does not allow") {
    auto status = [](auto change) {
        Problem p;
        change(p);
        Setup s(p);
        CHECK((s.status == s.heuristic || p.past_the_end));
        CHECK(!cuda_on_cpu::last_message().empty());
        return s.status;
    };
    CHECK(status([](Problem& p) { p.k_extra = 1; }) == CUBLAS_STATUS_INVALID_VALUE);
    CHECK(status([](Problem& p) { p.ld_short = 4; }) == CUBLAS_STATUS_INVALID_VALUE);
    CHECK(status([](Problem& p) { p.epilogue = CUBLASLT_EPILOGUE_GELU_AUX, p.aux_ld_extra = 4; }) ==
          CUBLAS_STATUS_INVALID_VALUE);
    CHECK(status([](Problem& p) {
              p.epilogue = CUBLASLT_EPILOGUE_GELU_AUX, p.aux_ld_extra = -16;
          }) == CUBLAS_STATUS_INVALID_VALUE);
    CHECK(status([](Problem& p) { p.epilogue = CUBLASLT_EPILOGUE_DGELU, p.no_aux = true; }) ==
          CUBLAS_STATUS_INVALID_VALUE);
    CHECK(status([](Problem& p) { p.epilogue = CUBLASLT_EPILOGUE_BIAS, p.no_bias = true; }) ==
          CUBLAS_STATUS_INVALID_VALUE);
    CHECK(status([](Problem& p) { p.epilogue = CUBLASLT_EPILOGUE_DGELU, p.crooked_aux = true; }) ==
          CUBLAS_STATUS_NOT_SUPPORTED);
    CHECK(status([](Problem& p) { p.epilogue = CUBLASLT_EPILOGUE_BIAS, p.row_major = true; }) ==
          CUBLAS_STATUS_NOT_SUPPORTED);
    CHECK(status([](Problem& p) { p.epilogue = CUBLASLT_EPILOGUE_BGRADA, p.batches = 2; }) ==
          CUBLAS_STATUS_NOT_SUPPORTED);
    CHECK(status([](Problem& p) { p.epilogue = cublasLtEpilogue_t(3); }) ==
          CUBLAS_STATUS_NOT_SUPPORTED);
    CHECK(status([](Problem& p) { p.in = CUDA_R_32F, p.out = CUDA_R_16BF; }) ==
          CUBLAS_STATUS_NOT_SUPPORTED);
    CHECK(status([](Problem& p) {
              p.in = CUDA_R_16BF, p.compute = CUBLAS_COMPUTE_32F_FAST_TF32;
          }) == CUBLAS_STATUS_NOT_SUPPORTED);
    CHECK(status([](Problem& p) { p.past_the_end = true; }) == CUBLAS_STATUS_EXECUTION_FAILED);
    const auto kept = cuda_on_cpu::settings();
    cuda_on_cpu::settings().major = 7;
    CHECK(status([](Problem& p) { p.in = p.out = CUDA_R_16BF; }) == CUBLAS_STATUS_NOT_SUPPORTED);
    CHECK(status([](Problem& p) { p.compute = CUBLAS_COMPUTE_32F_FAST_TF32; }) ==
          CUBLAS_STATUS_NOT_SUPPORTED);
    cuda_on_cpu::settings() = kept;
}

TEST_CASE("cuBLASLt stand-in: refuses what is optional, all of it or by a seed") {
    const auto kept = cuda_on_cpu::settings();
    auto refused = [](uint64_t seed, cublasLtEpilogue_t epilogue, int m) {
        cuda_on_cpu::settings().refusals = seed;
        Problem p;
        p.epilogue = epilogue, p.m = m;
        return Setup(p).heuristic == CUBLAS_STATUS_NOT_SUPPORTED;
    };
    for (auto optional : {CUBLASLT_EPILOGUE_GELU, CUBLASLT_EPILOGUE_GELU_AUX_BIAS,
                          CUBLASLT_EPILOGUE_DGELU, CUBLASLT_EPILOGUE_BGRADB}) {
        CHECK_FALSE(refused(0, optional, 16));
        CHECK(refused(1, optional, 16));
        int some = 0;
        for (int m = 8; m <= 160; m += 8) some += refused(2, optional, m);
        CHECK((some > 0 && some < 20));
    }
    for (auto needed : {CUBLASLT_EPILOGUE_DEFAULT, CUBLASLT_EPILOGUE_BIAS})
        CHECK_FALSE(refused(1, needed, 16));
    cuda_on_cpu::settings() = kept;
}

// =================================================================================================
// Streams, graphs, memory
// =================================================================================================

__global__ void add_to(int* x, int step) { x[threadIdx.x] += step; }

TEST_CASE("emulator: a captured graph does nothing until it is launched, then the same each time") {
    cudaStream_t stream = nullptr, side = nullptr;
    cudaEvent_t fork = nullptr, join = nullptr;
    REQUIRE(cudaStreamCreate(&stream) == cudaSuccess);
    REQUIRE(cudaStreamCreateWithFlags(&side, cudaStreamNonBlocking) == cudaSuccess);
    REQUIRE((cudaEventCreate(&fork) == cudaSuccess && cudaEventCreate(&join) == cudaSuccess));
    Device<int> x(std::vector<int>(8)), y(std::vector<int>(8));
    int* source = nullptr;
    REQUIRE(cudaMallocHost(&source, 32) == cudaSuccess);
    for (int i = 0; i < 8; i++) source[i] = 100;
    int step = 3;

    REQUIRE(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == cudaSuccess);
    cudaMemcpyAsync(x.data, source, 32, cudaMemcpyHostToDevice, stream);
    add_to<<<1, 8, 0, stream>>>(x.data, step);
    step = 1000;  // the graph holds the value of the moment
    cudaEventRecord(fork, stream);
    cudaStreamWaitEvent(side, fork, 0);
    add_to<<<1, 8, 0, side>>>(y.data, 1);
    cudaEventRecord(join, side);
    cudaStreamWaitEvent(stream, join, 0);
    cudaMemsetAsync(x.data, 0, 4, stream);
    CHECK(cudaMemcpy(source, x.data, 32, cudaMemcpyDeviceToHost) == cudaErrorStreamCaptureImplicit);
    CHECK(cudaStreamSynchronize(stream) == cudaErrorStreamCaptureUnsupported);
    void* p;
    CHECK(cudaMalloc(&p, 16) == cudaErrorStreamCaptureUnsupported);
    cudaGraph_t graph = nullptr;
    REQUIRE(cudaStreamEndCapture(stream, &graph) == cudaSuccess);
    CHECK(x.host()[1] == 0);

    cudaGraphExec_t exec = nullptr;
    REQUIRE(cudaGraphInstantiate(&exec, graph, 0) == cudaSuccess);
    REQUIRE(cudaGraphDestroy(graph) == cudaSuccess);
    for (int time = 1; time <= 3; time++) {
        for (int i = 0; i < 8; i++) source[i] = 100 * time;
        REQUIRE(cudaGraphLaunch(exec, stream) == cudaSuccess);
        REQUIRE(cudaStreamSynchronize(stream) == cudaSuccess);
        CHECK(x.host()[0] == 0);
        CHECK(x.host()[1] == 100 * time + 3);
        CHECK(y.host()[5] == time);
    }
    add_to<<<1, 8, 0, side>>>(y.data, 1);  // the side stream is itself again
    CHECK(y.host()[5] == 4);
    cudaGraphExecDestroy(exec);
    cudaFreeHost(source);
    cudaEventDestroy(fork), cudaEventDestroy(join);
    cudaStreamDestroy(stream), cudaStreamDestroy(side);
}

TEST_CASE("emulator: a recording may not read memory that the host can take away") {
    cudaStream_t stream = nullptr;
    REQUIRE(cudaStreamCreate(&stream) == cudaSuccess);
    Device<int> x(std::vector<int>(8));
    int pageable[8] = {};
    cudaGraph_t graph = nullptr;
    REQUIRE(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess);
    CHECK(cudaMemcpyAsync(x.data, pageable, 32, cudaMemcpyHostToDevice, stream) ==
          cudaErrorStreamCaptureUnsupported);
    CHECK(cudaMemcpyAsync(pageable, x.data, 32, cudaMemcpyDeviceToHost, stream) ==
          cudaErrorStreamCaptureUnsupported);
    CHECK(cudaStreamDestroy(stream) == cudaErrorStreamCaptureUnsupported);
    CHECK(cudaStreamQuery(stream) == cudaErrorStreamCaptureUnsupported);
    REQUIRE(cudaStreamEndCapture(stream, &graph) == cudaSuccess);
    cudaGraphDestroy(graph);
    CHECK(cudaStreamDestroy(stream) == cudaSuccess);
}

TEST_CASE("emulator: late streams do nothing before they are waited for") {
    const auto before = cuda_on_cpu::settings();
    cuda_on_cpu::settings().late_streams = true;
    cudaStream_t stream = nullptr;
    cudaEvent_t copied = nullptr, added = nullptr;
    REQUIRE(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess);
    REQUIRE((cudaEventCreate(&copied) == cudaSuccess && cudaEventCreate(&added) == cudaSuccess));
    CHECK(cudaEventSynchronize(copied) == cudaSuccess);  // never recorded: done
    {
        Device<int> x(std::vector<int>(8));
        int *pinned = nullptr, pageable[8] = {1, 1, 1, 1, 1, 1, 1, 1};
        REQUIRE(cudaMallocHost(&pinned, 32) == cudaSuccess);
        for (int i = 0; i < 8; i++) pinned[i] = 10;
        cudaMemcpyAsync(x.data, pinned, 32, cudaMemcpyHostToDevice, stream);
        cudaEventRecord(copied, stream);
        add_to<<<1, 8, 0, stream>>>(x.data, 3);
        cudaEventRecord(added, stream);
        CHECK(x.host()[0] == 0);
        CHECK(cudaEventQuery(copied) == cudaErrorNotReady);
        CHECK(cudaEventSynchronize(copied) == cudaSuccess);
        CHECK(cudaEventQuery(copied) == cudaSuccess);
        CHECK(x.host()[0] == 10);  // the kernel comes later
        pinned[0] = 99;            // it was copied already
        CHECK(cudaEventSynchronize(added) == cudaSuccess);
        CHECK(x.host()[0] == 13);
        // A copy of pageable memory is staged; pinned memory is read when the copy's turn comes.
        cudaMemcpyAsync(x.data, pageable, 16, cudaMemcpyHostToDevice, stream);
        cudaMemcpyAsync(x.data + 4, pinned, 16, cudaMemcpyHostToDevice, stream);
        pageable[0] = 2, pinned[0] = 77;
        CHECK(cudaStreamSynchronize(stream) == cudaSuccess);
        CHECK(x.host()[0] == 1);
        CHECK(x.host()[4] == 77);
        add_to<<<1, 8, 0, stream>>>(x.data, 1);
        int host[8];
        cudaMemcpyAsync(host, x.data, 32, cudaMemcpyDeviceToHost, stream);  // pageable: it waits
        CHECK(host[0] == 2);
        add_to<<<1, 8, 0, stream>>>(x.data, 1);
        CHECK(cudaFreeHost(pinned) == cudaSuccess);  // waits for everything
        CHECK(x.host()[0] == 3);
    }
    cudaEventDestroy(copied), cudaEventDestroy(added), cudaStreamDestroy(stream);
    cuda_on_cpu::settings() = before;
}

TEST_CASE("emulator: copies are checked for size, direction and life") {
    Device<int> x(4);
    int h[8] = {};
    CHECK(cudaMemcpy(x.data, h, 16, cudaMemcpyHostToDevice) == cudaSuccess);
    CHECK(cudaMemcpy(x.data, h, 20, cudaMemcpyHostToDevice) == cudaErrorInvalidValue);
    CHECK(cuda_on_cpu::last_message().find("(16 bytes)") != std::string::npos);
    CHECK(cudaMemcpy(x.data, h, 16, cudaMemcpyDeviceToHost) == cudaErrorInvalidValue);
    CHECK(cudaMemset(h, 0, 16) == cudaErrorInvalidValue);
    CHECK(cudaMemset(x.data + 1, 0, 16) == cudaErrorInvalidValue);
    CHECK(cudaGetLastError() == cudaErrorInvalidValue);
    CHECK(cudaGetLastError() == cudaSuccess);
    int* gone = nullptr;
    REQUIRE(cudaMalloc(&gone, 16) == cudaSuccess);
    REQUIRE(cudaFree(gone) == cudaSuccess);
    CHECK(cudaFree(gone) == cudaErrorInvalidValue);
    CHECK(cudaMemcpy(h, gone, 16, cudaMemcpyDeviceToHost) == cudaErrorInvalidValue);
    CHECK(std::string(cudaGetErrorName(cudaErrorInvalidValue)) == "cudaErrorInvalidValue");
}

TEST_CASE("emulator: a device can be small, or missing") {
    auto before = cuda_on_cpu::settings();
    size_t free_bytes = 0, total = 0;
    REQUIRE(cudaMemGetInfo(&free_bytes, &total) == cudaSuccess);
    cuda_on_cpu::settings().memory_bytes = total - free_bytes + 1000;
    void* p;
    CHECK(cudaMalloc(&p, 1024) == cudaErrorMemoryAllocation);
    CHECK(cudaMalloc(&p, 512) == cudaSuccess);
    CHECK(cudaMemGetInfo(&free_bytes, &total) == cudaSuccess);
    CHECK(free_bytes == 488);
    CHECK(cudaFree(p) == cudaSuccess);
    cuda_on_cpu::settings().device_count = 0;
    int count = 7;
    CHECK(cudaGetDeviceCount(&count) == cudaErrorNoDevice);
    cuda_on_cpu::settings() = before;
    CHECK(cudaGetDeviceCount(&count) == cudaSuccess);
    cudaDeviceProp properties;
    REQUIRE(cudaGetDeviceProperties(&properties, 0) == cudaSuccess);
    CHECK(properties.sharedMemPerBlockOptin == 227 * 1024);
}

// Runs last: doctest keeps the order of the file.
__global__ void never_launched() {}

TEST_CASE("emulator: the list of kernels tells which were launched") {
    std::string idle;
    for (auto& k : cuda_on_cpu::kernels()) {
        CHECK(k.file.find("test_emulator.cu") != std::string::npos);
        if (k.launches == 0) idle += k.name + " ";
    }
    CHECK(idle == "never_launched ");
    CHECK(cuda_on_cpu::kernels().size() > 30);
}
