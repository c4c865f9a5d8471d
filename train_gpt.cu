// train_gpt.cu: the layers of tinygpt.hpp as CUDA kernels, and the program on a GPU.
//
// `Cuda<Activation>` is one more device for the model and the training loop of tinygpt.hpp, with
// the same functions as the table in its §10. Read a layer there first: the mathematics
// is there. A comment here says how the kernel is laid out on the GPU, how many bytes it moves and
// how many operations it does. A kernel is bound by the longer of the two times (an H100 moves
// about 3.0 TB/s and multiplies about 800 TFLOP/s in bf16).
//
//   1 errors            CUDA_CHECK
//   2 PTX               all inline assembly: tensor cores, asynchronous copies
//   3 helpers           16 bytes at a time, sums over a warp and a block
//   4 kernels           §4.1 to §4.8 of the header, and the update of §7
//   5 streams, matmuls  the stream and its clock; cuBLASLt with a plan for each shape
//   6 struct Cuda       the device: which kernel, on how many blocks
//   7 main
//
// Precision. bf16: activations and the weights that layers read are bf16; master weights, moments,
// parameter gradients, statistics, losses and every sum are fp32 or wider. tf32, fp32: all are
// fp32; with tf32 matmuls round their inputs.
//
// Two runs are equal bit for bit: every sum has a fixed order, and there is no atomic addition.
#include <cublasLt.h>
#include <cuda_runtime.h>
#ifdef TINYGPT_MPI
#include <nccl.h>
#endif

#include <deque>

#define TRAIN_GPT_NO_MAIN
#include "train_gpt.cpp"

namespace tinygpt {

// =================================================================================================
// 1 Errors
// =================================================================================================

// Fails unless the code is success.
inline void check_code(cudaError_t code, const char* call, int line) {
    if (code != cudaSuccess)
        fail("train_gpt.cu:", line, ": ", call, " failed: ", cudaGetErrorName(code), " (",
             cudaGetErrorString(code), ")");
}
inline void check_code(cublasStatus_t code, const char* call, int line) {
    if (code != CUBLAS_STATUS_SUCCESS)
        fail("train_gpt.cu:", line, ": ", call, " failed: ", cublasLtGetStatusName(code), " (",
             cublasLtGetStatusString(code), ")");
}
#define CUDA_CHECK(call) ::tinygpt::check_code(call, #call, __LINE__)

// =================================================================================================
// 2 PTX
// =================================================================================================
// A warp of 32 lanes multiplies small matrices together, d += a b, with the elements of a, b and d
// spread over its lanes (PTX ISA, "Matrix Fragments for mma.m16n8k16"). With g = lane / 4, t = lane
// % 4, in bf16:
//   a, 16 x 16: a[0] holds row g,     columns 2t, 2t+1     a[2] row g,     columns 2t+8, 2t+9
//               a[1]       row g + 8, columns 2t, 2t+1     a[3] row g + 8, columns 2t+8, 2t+9
//   b, 16 x 8:  b[0] holds rows 2t, 2t+1 of column g       b[1] rows 2t+8, 2t+9 of column g
//   d, 16 x 8:  d[0], d[1]: row g, columns 2t, 2t+1        d[2], d[3]: row g + 8, the same columns
// In tf32 a is 16 x 8, b 8 x 8, and for two numbers in a register there is one, column (of b: row)
// t instead of 2t, 2t+1 and t + 4 instead of 2t+8, 2t+9.
// load_matrix reads 8 x 8 matrices from shared memory in that layout: lane i gives the address of
// row i % 8 of matrix i / 8, and gets elements 2t, 2t+1 of row g of each; transposed, of column g.
// A row of 4 floats is one of 8 halves: a lane gets float t.
// On compute capability 9.0 a group of four warps can multiply together, at the tensor cores' full
// speed: d [64, 64] (+)= a [64, 16] b [16, 64] (PTX ISA, "wgmma.mma_async", m64n64k16). Warp w has
// rows 16w.. (16 of them) of a and d in the layouts above, d as 8 matrices [16, 8] side by side. b
// stays in shared memory; its descriptor, a number, says where and how it lies. The product is
// asynchronous: d and a may not be touched until it was waited for.

// PTX wrappers begin
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define TINYGPT_PTX(...) __trap()  // bf16 and tf32 came with 8.0
#define TINYGPT_COPY_PTX(...) (void)0
#else
#define TINYGPT_PTX(...) asm volatile(__VA_ARGS__)
#define TINYGPT_COPY_PTX(...) asm volatile(__VA_ARGS__)
#endif

__device__ inline unsigned shared_address(const void* pointer) {
    return unsigned(__cvta_generic_to_shared(pointer));
}
#define TINYGPT_MMA(shape_and_types)                                     \
    TINYGPT_PTX("mma.sync.aligned." shape_and_types                      \
                " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
                : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])         \
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
#define TINYGPT_LOAD_MATRIX(form)                                                       \
    TINYGPT_PTX("ldmatrix.sync.aligned.m8n8.x4" form ".shared.b16 {%0,%1,%2,%3}, [%4];" \
                : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                        \
                : "r"(shared_address(row))                                              \
                : "memory")
// d [16, 8] += a [16, 16] b [16, 8], in bf16 with fp32 sums.
__device__ inline void mma_bf16_16x8x16(float (&d)[4], const unsigned (&a)[4],
                                        const unsigned (&b)[2]) {
    TINYGPT_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
}
// d [16, 8] += a [16, 8] b [8, 8], in tf32.
__device__ inline void mma_tf32_16x8x8(float (&d)[4], const unsigned (&a)[4],
                                       const unsigned (&b)[2]) {
    TINYGPT_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
}
// A float rounded to tf32.
__device__ inline unsigned to_tf32(float x) {
    unsigned rounded = 0;
    TINYGPT_PTX("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(x));
    return rounded;
}
__device__ inline void load_matrix_x4(unsigned (&r)[4], const void* row) {
    TINYGPT_LOAD_MATRIX("");
}
__device__ inline void load_matrix_x4_transposed(unsigned (&r)[4], const void* row) {
    TINYGPT_LOAD_MATRIX(".trans");
}
// Starts to copy 16 bytes from global to shared memory; zeros instead where not valid. On 7.x they
// are there at once.
__device__ inline void copy_async_16(void* shared, const void* global, bool valid) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    *static_cast<uint4*>(shared) = valid ? *static_cast<const uint4*>(global) : uint4{};
#endif
    TINYGPT_COPY_PTX("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                     "l"(global), "r"(valid ? 16 : 0)
                     : "memory");
}
// The copies started since the last commit become one group.
__device__ inline void copy_async_commit() {
    TINYGPT_COPY_PTX("cp.async.commit_group;" ::: "memory");
}
// Waits until at most N of this thread's groups are pending.
template <int N>
__device__ inline void copy_async_wait() {
    TINYGPT_COPY_PTX("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
// Instructions of a group; all four warps execute each. Other GPUs, even later ones, lack them:
// there d stays as it was, which a comparison finds.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define TINYGPT_GROUP_PTX(...) asm volatile(__VA_ARGS__)
#else
#define TINYGPT_GROUP_PTX(...) (void)0
#endif
#define TINYGPT_MATRIX(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define TINYGPT_MATRICES                                                                           \
    TINYGPT_MATRIX(0), TINYGPT_MATRIX(1), TINYGPT_MATRIX(2), TINYGPT_MATRIX(3), TINYGPT_MATRIX(4), \
        TINYGPT_MATRIX(5), TINYGPT_MATRIX(6), TINYGPT_MATRIX(7)

// Before the products of a batch: earlier writes to d and a come first.
__device__ inline void group_begin(float (&d)[8][4]) {
    TINYGPT_GROUP_PTX("wgmma.fence.sync.aligned;" : TINYGPT_MATRICES::"memory");
}
// Starts d = a b, or with `add` d += a b. b: its descriptor. kColumns: b is row-major, so
// neighbours in memory are columns of b; else they are rows.
template <bool kColumns>
__device__ inline void group_mma(float (&d)[8][4], const unsigned (&a)[4], uint64_t b, bool add) {
    TINYGPT_GROUP_PTX(
        "{.reg .pred add; setp.ne.s32 add, %37, 0; "
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"
        "%24,%25,%26,%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, add, 1, 1, %38;}"
        : TINYGPT_MATRICES
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(kColumns)));
}
// The products started since the last end become one batch.
__device__ inline void group_end() {
    TINYGPT_GROUP_PTX("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most N batches are pending; then d, of an earlier one, may be touched.
template <int N>
__device__ inline void group_wait(float (&d)[8][4]) {
    TINYGPT_GROUP_PTX("wgmma.wait_group.sync.aligned %32;" : TINYGPT_MATRICES : "n"(N) : "memory");
}
// Makes this thread's copies to shared memory visible to products, after the next barrier.
__device__ inline void group_publish() {
    TINYGPT_GROUP_PTX("fence.proxy.async.shared::cta;" ::: "memory");
}
// 2^x with a relative error of about 2^-22; 0 for -infinity.
__device__ inline float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// Two floats rounded to bf16: lo in the lower half.
__device__ inline unsigned pack_bf16(float lo, float hi) {
    unsigned both = 0;
    TINYGPT_PTX("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(hi), "f"(lo));
    return both;
}
// PTX wrappers end

// =================================================================================================
// 3 Helpers
// =================================================================================================

constexpr int kWarp = 32;
constexpr float kLog2E = 1.4426950408889634f;

// Blocks of so many elements each that cover count elements.
__host__ __device__ inline unsigned blocks_for(size_t count, size_t per_block) {
    return unsigned((count + per_block - 1) / per_block);
}

// A pack is 16 bytes of A, the widest load: 4 floats or 8 bf16, worked on as floats. Every row
// length read this way is a multiple of 8 (Cuda checks n_embd).
template <class A>
constexpr int kPack = 16 / int(sizeof(A));
template <class A>
constexpr int kWarpColumns = kWarp*(16 / int(sizeof(A)));  // that a warp reads at once

__device__ inline void unpack(float (&x)[4], const uint4& raw) {
    x[0] = __uint_as_float(raw.x), x[1] = __uint_as_float(raw.y);
    x[2] = __uint_as_float(raw.z), x[3] = __uint_as_float(raw.w);
}
__device__ inline void unpack(float (&x)[8], const uint4& raw) {
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
    for (int i = 0; i < 4; ++i) {
        x[2 * i] = __uint_as_float(words[i] << 16);  // a bf16 is the upper half of a float
        x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}
template <class A>
__device__ inline void load_pack(float (&x)[kPack<A>], const A* from) {
    unpack(x, *reinterpret_cast<const uint4*>(from));
}
__device__ inline void store_pack(float* to, const float (&x)[4]) {
    *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
}
__device__ inline void store_pack(bf16* to, const float (&x)[8]) {
    *reinterpret_cast<uint4*>(to) = make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]),
                                               pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
}

// Two numbers side by side, rounded.
__device__ inline void store_two(float* to, float x, float y) {
    *reinterpret_cast<float2*>(to) = make_float2(x, y);
}
__device__ inline void store_two(bf16* to, float x, float y) {
    *reinterpret_cast<unsigned*>(to) = pack_bf16(x, y);
}

// Floats that tensor cores multiply.
struct Tf32 {};
template <class E>
using Stored = std::conditional_t<std::is_same_v<E, Tf32>, float, E>;
__device__ inline void round_operand(bf16, unsigned (&)[4]) {}
__device__ inline void round_operand(Tf32, unsigned (&a)[4]) {
    for (unsigned& x : a) x = to_tf32(__uint_as_float(x));
}

// The sum, the maximum of a value over the warp, in every lane. Each step adds the same two numbers
// in two lanes, so all lanes end with the same bits.
template <class T>
__device__ inline T warp_sum(T x) {
    for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}
__device__ inline float warp_max(float x) {
    for (int step = kWarp / 2; step > 0; step /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}
// The same over the block; all threads of a block of whole warps must call it. Warps combine their
// results in shared memory, in a fixed order.
template <class T>
__device__ inline T over_block(T x, T nothing, T (*over_warp)(T)) {
    __shared__ T parts[kWarp];
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
    x = over_warp(x);
    __syncthreads();  // the previous use of parts is over
    if (lane == 0) parts[warp] = x;
    __syncthreads();
    return over_warp(lane < warps ? parts[lane] : nothing);
}
template <class T>
__device__ inline T block_sum(T x) {
    return over_block(x, T(0), warp_sum<T>);
}

// =================================================================================================
// 4 Kernels
// =================================================================================================

// "Moves" counts global memory in rows: in GPT-2's training at B = 64, T = 1024 a row of C for
// every position is 100 MB in bf16, and takes 0.034 ms at 3.0 TB/s; a row of V, 6.6 GB. "Expect 90
// %" is an aim, in percent of the larger of the two floors, bytes over bandwidth and operations
// over the peak. `train_gpt_cu bench` prints what this GPU reaches.

constexpr int kThreads = 256, kOneBlock = 1024;  // of a block, and of one that works alone
constexpr bool kSet = false, kAdd = true;

// to[c] = (add ? to[c] : 0) + the warps' sums of column c, in the order of the warps; for 32 packs
// of columns from `begin` on, up to C. Careful: a second call needs a barrier before it.
template <class A>
__device__ inline void add_up_warps(float* to, const float (&sum)[kPack<A>], int begin, int C,
                                    bool add) {
    constexpr int N = kPack<A>, kWarps = kThreads / kWarp;
    __shared__ float sums[kWarps][kWarpColumns<A>];
    for (int i = 0; i < N; ++i) sums[threadIdx.x / kWarp][threadIdx.x % kWarp * N + i] = sum[i];
    __syncthreads();
    for (int i = threadIdx.x; i < kWarpColumns<A> && begin + i < C; i += kThreads) {
        float total = add ? to[begin + i] : 0;
        for (int w = 0; w < kWarps; ++w) total += sums[w][i];
        to[begin + i] = total;
    }
}

// --- §4.1 Embedding

// out[row] = drop(wte[tokens[row]] + wpe[past + row % T]). One thread makes one pack.
// Moves: gathers 1 and writes 1 row of C; wpe stays in L2. Expect 80 %.
template <class A>
__global__ void embed_forward_kernel(A* out, const int32_t* tokens, const A* wte, const A* wpe,
                                     int rows, int T, int C, int past, Dropout drop) {
    constexpr int N = kPack<A>;
    const size_t at = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * N;
    if (at >= size_t(rows) * C) return;
    const int row = int(at / C), c = int(at % C);
    float token[N], position[N];
    load_pack(token, wte + size_t(tokens[row]) * C + c);
    load_pack(position, wpe + size_t(past + row % T) * C + c);
    for (int i = 0; i < N; ++i) token[i] += position[i];
    if (drop.on())
        for (int i = 0; i < N; ++i) token[i] *= drop.scale(at + i);
    store_pack(out + at, token);
}

// dwte[token] += the rows of drop(dout) with that token. A block takes 32 packs of columns of one
// token at a time: it counts the token's rows, then 8 warps take every eighth of them, and add up
// in order. Why count first: a frequent token has thousands of rows, whose loads must not wait for
// each other. Moves: gathers dout once, reads and writes the rows of dwte that occur, in fp32.
// Expect 60 %: the blocks of frequent tokens end last.
template <class A>
__global__ void embed_backward_tokens_kernel(float* dwte, const A* dout, const int32_t* tokens,
                                             const int32_t* order, int rows, int C, Dropout drop) {
    constexpr int N = kPack<A>, kWarps = kThreads / kWarp;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int parts = blocks_for(C, kWarpColumns<A>);  // of a row
    for (int64_t task = blockIdx.x; task < int64_t(rows) * parts; task += gridDim.x) {
        const int first = int(task / parts), token = tokens[order[first]];
        if (first > 0 && tokens[order[first - 1]] == token) continue;  // its first row does it
        const int begin = int(task % parts) * kWarpColumns<A>, c = begin + lane * N;
        int end = first;
        for (int found = kThreads; found == kThreads; end += found) {
            const int i = end + threadIdx.x;  // and the sums before were read
            found = __syncthreads_count(i < rows && tokens[order[i]] == token);
        }
        float sum[N] = {};
#pragma unroll 4
        for (int i = first + warp; i < end && c < C; i += kWarps) {
            const size_t at = size_t(order[i]) * C + c;
            float d[N];
            load_pack(d, dout + at);
            for (int j = 0; j < N; ++j) sum[j] += drop.on() ? d[j] * drop.scale(at + j) : d[j];
        }
        add_up_warps<A>(dwte + size_t(token) * C, sum, begin, C, kAdd);
    }
}

// --- §4.2 Layernorm

// A warp goes over the same row of kTables tables two or three times. Why not read it again: other
// warps' rows have evicted it from L1. A batch, 4 packs of a lane from each table, is loaded at
// once and stays in registers: 1024 columns of bf16, 512 of fp32. Longer rows take several batches;
// then a pass begins with the batch at which the one before ended.
template <class A, int kTables>
struct RowReader {
    static constexpr int N = kPack<A>, kBatch = 4, kStep = kBatch * kWarpColumns<A>;
    const A* tables[kTables];
    int C, loaded = -1;  // the column at which the batch in `raw` begins; a new row begins with -1
    size_t start = 0;    // of the row
    uint4 raw[kTables][kBatch] = {};

    // Calls work(column, values [kTables][N]) for each of the lane's packs.
    template <class Work>
    __device__ void pass(Work&& work) {
        const int lane = threadIdx.x % kWarp, last = (C - 1) / kStep * kStep, from = loaded;
        for (int i = 0; i <= last; i += kStep) {
            const int begin = from == last ? last - i : i, first = begin + lane * N;
            for (int t = 0; t < kTables && begin != loaded; ++t)
                for (int j = 0, c = first; j < kBatch; ++j, c += kWarpColumns<A>)
                    if (c < C) raw[t][j] = *reinterpret_cast<const uint4*>(tables[t] + start + c);
            loaded = begin;
#pragma unroll
            for (int j = 0; j < kBatch; ++j) {
                if (first + j * kWarpColumns<A> >= C) break;
                float values[kTables][N];
                for (int t = 0; t < kTables; ++t) unpack(values[t], raw[t][j]);
                work(first + j * kWarpColumns<A>, values);
            }
        }
    }
};

// out = (x - m) r weight + bias. One warp makes one row. Moves: reads 1, writes 1 row of C. Expect
// 90 %.
template <class A>
__global__ void layernorm_forward_kernel(A* out, float* mean, float* rstd, const A* x,
                                         const A* weight, const A* bias, int rows, int C,
                                         float eps) {
    constexpr int N = kPack<A>;
    const int row = (blockIdx.x * blockDim.x + threadIdx.x) / kWarp, lane = threadIdx.x % kWarp;
    if (row >= rows) return;
    RowReader<A, 1> reader{{x + size_t(row) * C}, C};
    float sum = 0, squares = 0;
    reader.pass([&](int, auto& values) {
        for (int i = 0; i < N; ++i) sum += values[0][i];
    });
    const float m = warp_sum(sum) / C;
    reader.pass([&](int, auto& values) {
        for (int i = 0; i < N; ++i) squares += (values[0][i] - m) * (values[0][i] - m);
    });
    const float r = 1 / sqrtf(warp_sum(squares) / C + eps);
    reader.pass([&](int c, auto& values) {
        float w[N], b[N];
        load_pack(w, weight + c), load_pack(b, bias + c);
        for (int i = 0; i < N; ++i) w[i] = (values[0][i] - m) * r * w[i] + b[i];
        store_pack(out + size_t(row) * C + c, w);
    });
    if (lane == 0) mean[row] = m, rstd[row] = r;
}

constexpr int kNormWarps = 4;  // of a block of layernorm's backward

// Where layernorm's backward keeps the sum of column c: neighbours belong to different lanes, so a
// warp's accesses have no bank conflicts.
template <class A>
__host__ __device__ inline int sum_index(int c) {
    constexpr int N = kPack<A>;
    return c / kWarpColumns<A> * kWarpColumns<A> + c % N * kWarp + c / N % kWarp;
}

// dx = dresidual + r (g - mean(g) - n mean(g n)), g = dout weight, n = (x - m) r; dbranch =
// drop(dx). Column sums: dweight of dout n, dbias of dout, dbranch_bias of dbranch. A warp takes
// every so many-th row and keeps its column sums in shared memory. The block adds its warps' sums
// in order into partial[block] [3][C]; sum_partials_kernel adds the blocks'. Moves: reads dout,
// dresidual, x, writes dx (and dbranch): 4 or 5 rows of C. Expect 90 %.
template <class A>
__global__ void __launch_bounds__(128)
    layernorm_backward_kernel(A* dx, A* dbranch, float* partial, const A* dout, const A* dresidual,
                              const A* x, const float* mean, const float* rstd, const A* weight,
                              int rows, int C, Dropout drop) {
    constexpr int N = kPack<A>;
    extern __shared__ float norm_sums[];  // [kNormWarps][3][width]
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int width = blocks_for(C, kWarpColumns<A>) * kWarpColumns<A>;
    float* mine = norm_sums + size_t(warp) * 3 * width + lane;
    for (int i = 0; i < 3 * width; i += kWarp) mine[i] = 0;
    RowReader<A, 3> reader{{x, dout, dresidual ? dresidual : dout}, C};
    for (int row = blockIdx.x * kNormWarps + warp; row < rows; row += gridDim.x * kNormWarps) {
        const size_t start = size_t(row) * C;
        const float m = mean[row], r = rstd[row];
        reader.start = start, reader.loaded = -1;
        float mean_g = 0, mean_gn = 0;
        reader.pass([&](int c, auto& values) {
            auto& [in, d, residual] = values;
            float w[N];
            load_pack(w, weight + c);
            for (int i = 0; i < N; ++i) {
                mean_g += d[i] * w[i];
                mean_gn += d[i] * w[i] * ((in[i] - m) * r);
            }
        });
        mean_g = warp_sum(mean_g) / C, mean_gn = warp_sum(mean_gn) / C;
        reader.pass([&](int c, auto& values) {
            auto& [in, d, joined] = values;
            float w[N], *sums = mine + c / kWarpColumns<A> * kWarpColumns<A>;
            load_pack(w, weight + c);
            for (int i = 0; i < N; ++i) {
                const float n = (in[i] - m) * r;
                joined[i] = (dresidual ? joined[i] : 0) + r * (d[i] * w[i] - mean_g - n * mean_gn);
                sums[i * kWarp] += d[i] * n;
                sums[width + i * kWarp] += d[i];
            }
            store_pack(dx + start + c, joined);
            if (drop.on()) {
                for (int i = 0; i < N; ++i) joined[i] *= drop.scale(start + c + i);
                store_pack(dbranch + start + c, joined);
            }
            for (int i = 0; i < N; ++i) sums[2 * width + i * kWarp] += joined[i];
        });
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 3 * C; i += blockDim.x) {
        const int at = i / C * width + sum_index<A>(i % C);
        float total = 0;
        for (int w = 0; w < kNormWarps; ++w) total += norm_sums[size_t(w) * 3 * width + at];
        partial[size_t(blockIdx.x) * 3 * C + i] = total;
    }
}

// to[c] = (accumulate ? to[c] : 0) + sum over parts of partial[part][c], in a fixed order:
// blockDim.y threads share a column, each takes every blockDim.y-th part, then they add up in
// order. Row y of the grid does the y-th of `width` / C tables side by side in a part; a null
// pointer skips one. Moves: reads the parts, a few MB, mostly from L2.
struct ThreePointers {
    float* to[3];
};
__global__ void sum_partials_kernel(ThreePointers out, const float* partial, int parts, int width,
                                    int C, bool accumulate) {
    __shared__ float sums[kWarp][kWarp + 1];
    const int c = blockIdx.x * kWarp + threadIdx.x;
    float *to = blockIdx.y == 0 ? out.to[0] : blockIdx.y == 1 ? out.to[1] : out.to[2], sum = 0;
    if (!to) return;
    if (c < C)
        for (int part = threadIdx.y; part < parts; part += blockDim.y)
            sum += partial[size_t(part) * width + blockIdx.y * C + c];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || c >= C) return;
    float total = accumulate ? to[c] : 0;
    for (int i = 0; i < int(blockDim.y); ++i) total += sums[i][threadIdx.x];
    to[c] = total;
}

// --- §4.3, §4.4 Linear layers: products are cuBLASLt's (section 5); here are the bias gradients

// GELU with tanh (§4.6), and its derivative: u = k (x + 0.044715 x^3), k = sqrt(2/pi),
//   gelu = x (1 + tanh u) / 2     gelu' = (1 + tanh u) / 2 + x (1 - tanh^2 u) u' / 2
constexpr float kGeluScale = 0.7978845608028654f, kGeluCube = 0.044715f;
__device__ inline float gelu_of(float x) {
    return 0.5f * x * (1 + tanhf(kGeluScale * (x + kGeluCube * x * x * x)));
}
__device__ inline float gelu_slope(float x) {
    const float t = tanhf(kGeluScale * (x + kGeluCube * x * x * x));
    const float slope = kGeluScale * (1 + 3 * kGeluCube * x * x);
    return 0.5f * (1 + t) + 0.5f * x * (1 - t * t) * slope;
}

// Column sums of drop(d) [rows, C]: a block takes 32 packs of columns and every gridDim.y-th group
// of rows; sum_partials_kernel adds the groups. With fc, d is first multiplied by gelu'(fc), and
// kept in `product`, which may be d. Moves: reads d; with fc reads 2 and writes 1. Expect 90 %.
template <class A>
__global__ void column_sums_kernel(float* partial, A* product, const A* d, const A* fc, int rows,
                                   int C, Dropout drop) {
    constexpr int N = kPack<A>, kWarps = kThreads / kWarp;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int c = (blockIdx.x * kWarp + lane) * N;
    float sum[N] = {};
    for (int row = blockIdx.y * kWarps + warp; row < rows && c < C; row += gridDim.y * kWarps) {
        const size_t at = size_t(row) * C + c;
        float x[N], before[N];
        load_pack(x, d + at);
        if (fc) {
            load_pack(before, fc + at);
            for (int i = 0; i < N; ++i) x[i] *= gelu_slope(before[i]);
            store_pack(product + at, x);
        }
        for (int i = 0; i < N; ++i) sum[i] += drop.on() ? x[i] * drop.scale(at + i) : x[i];
    }
    add_up_warps<A>(partial + size_t(blockIdx.y) * C, sum, blockIdx.x * kWarpColumns<A>, C, kSet);
}

// --- §4.5 Attention (Dao 2023, FlashAttention-2)
// A block of 4 warps holds 64 rows of one head, or 128: queries; in backward's second kernel keys.
// Tiles of the other rows stream past them, and while one is used, the next is copied. A warp holds
// 16 rows (or 32), and its scores never leave registers: a product leaves its results in the layout
// in which the next one wants its left operand (section 2), two neighbouring ones side by side.
// E: how numbers are multiplied. bf16: by tensor cores. Tf32: the same, floats rounded to 11 bits.
// float: by fused multiply-adds, each lane those of its own results. HS: 32, 64 or 128; a smaller
// head is padded with zeros.
// kGroup: the block's warps multiply as a group (wgmma), for bf16 and HS = 64. Layouts are the
// same; only the two products, who has which rows, and what must be waited for differ. Tensor cores
// then read the tiles by themselves, and run while the warps work on another product's results.
// A GPU that has wgmma uses it, once it was found to be right there (struct Cuda).
// Floors, for each layer at B = 64, T = 1024, HS = 64: forward is 103 GFLOP, of which mma.sync does
// about 620 a millisecond on an H100 (wgmma 800): 0.17 ms; 403 million exponentials: 0.11 ms; 4
// rows of C: 0.13 ms. They share the issue slots, so expect 230 to 290 TFLOP/s forward. Backward is
// counted as 258 GFLOP and does 361, because both its kernels make the scores: expect 170 to 250 as
// counted. In fp32 expect 50 % of the peak: shared memory is read as often as numbers are added.
// Careful: a lane's arrays must stay in registers, so every loop over one must be unrolled. nvcc
// does that by itself where a loop is short and its length fixed, and has a pragma where the body
// is long; `make cuda_compiles` fails if an array of these kernels ended up in memory.

constexpr int kHeadThreads = 128;  // of a block that works on a head: 4 warps

// Streamed rows of a tile. In fp32 few, so that two tiles of each table fit into small GPUs.
template <class E, int HS>
constexpr int kStreamedRows = std::is_same_v<E, bf16>   ? 64
                              : std::is_same_v<E, Tf32> ? 32
                              : HS <= 64                ? 16
                                                        : 8;

// Backward keeps two numbers for each row of a head, its statistics. Rows are padded to pairs, so
// that each head's table is aligned to 16 bytes.
__host__ __device__ inline int statistics_rows(int T) { return T + T % 2; }

// The head a block works on, which is row y of the grid, and its queries, keys and values.
template <class A>
struct Head {
    int b, h, C, stride;  // stride: from one packed row to the next
    size_t bh_T;          // (b NH + h) T
    const A *q, *k, *v;
    __device__ Head(const A* qkv, int T, int NH, int HS) {
        b = blockIdx.y / NH, h = blockIdx.y % NH, C = NH * HS, stride = 3 * C;
        bh_T = size_t(blockIdx.y) * T;
        q = qkv + size_t(b) * T * stride + h * HS, k = q + C, v = k + C;
    }
    // The head's channels of row t of a table [B * T, C].
    template <class Pointer>
    __device__ Pointer row(Pointer table, int T, int HS, int t) const {
        return table + (size_t(b) * T + t) * C + h * HS;
    }
    // This block's column sums of dqkv, in a table [B * blocks, 3C].
    __device__ float* partial(float* table, int HS) const {
        return table + (size_t(b) * gridDim.x + blockIdx.x) * stride + h * HS;
    }
};

// A row of a tile is HS numbers, in chunks of 16 bytes, of which chunk c of row r is stored at c
// xor r (mod 8). Why: a warp reads one chunk of 8 rows at once, and they must not share banks.
template <int HS, class A>
__device__ inline A* chunk_at(A* tile, int row, int chunk) {
    constexpr bool kLong = HS / kPack<A> >= 8;
    return tile + row * HS + (chunk ^ (kLong ? row & 7 : row >> 1 & 3)) * kPack<A>;
}

// x = a pack of a head's row, of which `left` channels are left; zeros behind them. Packs of a head
// whose size is no whole number of them are not aligned.
template <class A>
__device__ inline void load_channels(float (&x)[kPack<A>], const A* from, int left) {
    if (left % kPack<A> == 0 && left > 0) return load_pack(x, from);
    for (int i = 0; i < kPack<A>; ++i) x[i] = i < left ? float(from[i]) : 0;
}

// Starts copying rows first .. first + kRows - 1 of a head with T rows; rows past the end become 0.
// A thread copies one chunk of every so many-th row. Why: mostly these have the same swizzle, so
// that a copy costs a few instructions. A head whose rows are no multiple of 16 bytes is slower: it
// is read number by number, and waited for.
template <int HS, int kRows, class A>
__device__ inline void copy_tile(A* tile, const A* from, int stride, int first, int T, int size) {
    constexpr int N = kPack<A>, kChunks = HS / N, kStep = kHeadThreads / kChunks;
    static_assert(kRows % kStep == 0);
    const int row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
    from += unsigned(first + row) * unsigned(stride) + chunk * N;  // check_sizes: below 2^32
    for (int i = 0; i < kRows; i += kStep) {
        A* to = chunk_at<HS>(tile, row + i, chunk);
        const bool valid = first + row + i < T;
        if (size % N == 0) {
            copy_async_16(to, from + i * stride, valid && chunk * N < size);
        } else {
            float x[N];
            load_channels(x, from + i * stride, valid ? size - chunk * N : 0);
            store_pack(to, x);
        }
    }
}

// The left operand of a warp's products: 16 rows of a tile. Tensor cores have it in registers, the
// others read it again for every product.
template <class E, int HS>
struct Left {
    static constexpr int kSteps = HS / kPack<Stored<E>> / 2;
    // Careful: initialised; else nvcc 13.0 reused the registers of a group's left operands after
    // their first product.
    unsigned a[kSteps][4] = {};
    __device__ void load(Stored<E>* tile, int row) {
        const int lane = threadIdx.x % kWarp;
        for (int k = 0; k < kSteps; ++k) {
            load_matrix_x4(a[k], chunk_at<HS>(tile, row + lane % 16, 2 * k + lane / 16));
            round_operand(E(), a[k]);
        }
    }
};
template <int HS>
struct Left<float, HS> {
    float* rows = nullptr;
    __device__ void load(float* tile, int row) { rows = tile + row * HS; }
};

// Row and column of element e of result n in the fragments that start at (0, 0).
__device__ inline int result_row(int e) { return threadIdx.x % kWarp / 4 + (e >> 1) * 8; }
__device__ inline int result_column(int n, int e) { return n * 8 + threadIdx.x % 4 * 2 + (e & 1); }

// Left operand [16, 16] from two neighbouring results [16, 8].
__device__ inline void result_operand(unsigned (&a)[4], const float (&left)[4],
                                      const float (&right)[4]) {
    a[0] = pack_bf16(left[0], left[1]), a[1] = pack_bf16(left[2], left[3]);
    a[2] = pack_bf16(right[0], right[1]), a[3] = pack_bf16(right[2], right[3]);
}
// Two mma side by side: d [16, 16] += a b.
template <class E>
__device__ inline void mma_pair(float (&left)[4], float (&right)[4], const unsigned (&a)[4],
                                const unsigned (&b)[4]) {
    const unsigned b_left[2] = {b[0], b[1]}, b_right[2] = {b[2], b[3]};
    if constexpr (std::is_same_v<E, bf16>)
        mma_bf16_16x8x16(left, a, b_left), mma_bf16_16x8x16(right, a, b_right);
    else
        mma_tf32_16x8x8(left, a, b_left), mma_tf32_16x8x8(right, a, b_right);
}

// The descriptor of a tile [rows, 64], for wgmma (PTX ISA, "Matrix Descriptor Format"). A row is
// 128 bytes, so chunk_at is the hardware's 128-byte swizzle (1 in bits 62 and 63): bits 4 to 6 of
// an address xor bits 7 to 9. Careful: so tiles are aligned to 1,024 bytes; a kernel stops if its
// own are not, which would only give wrong numbers. Start and strides lack their lowest 4 bits;
// both strides are the distance from 8 rows to the next 8 (one of them is for tiles side by side,
// and not used).
__device__ inline uint64_t tile_descriptor(const bf16* tile) {
    return (shared_address(tile) & 0x3ffff) >> 4 | uint64_t(64) << 16 | uint64_t(64) << 32 |
           uint64_t(1) << 62;
}
// Starts, as a group: d [64, 64] = a tile^T of a tile [64, 64]; 16 of its columns are 32 bytes.
__device__ inline void group_rows_product(float (&d)[8][4], const unsigned (&a)[4][4],
                                          const bf16* tile) {
    group_begin(d);
    for (int k = 0; k < 4; ++k) group_mma<false>(d, a[k], tile_descriptor(tile + k * 16), k > 0);
    group_end();
}
// Starts, as a group: d [64, 64] += s tile, s rounded to bf16.
__device__ inline void group_columns_product(float (&d)[8][4], const float (&s)[8][4],
                                             const bf16* tile) {
    unsigned a[4][4];
    for (int k = 0; k < 4; ++k) result_operand(a[k], s[2 * k], s[2 * k + 1]);
    group_begin(d);
    for (int k = 0; k < 4; ++k) group_mma<true>(d, a[k], tile_descriptor(tile + k * 16 * 64), true);
    group_end();
}
// Waits for all products of the group; then d may be touched.
template <bool kGroup, int kM, int kN>
__device__ inline void wait_for(float (&d)[kM][kN][4]) {
    if constexpr (kGroup)
        for (int i = 0; i < kM; ++i) group_wait<0>(d[i]);
}

// The two products without tensor cores: d [16, N] += a tile^T, and d [16, HS] += s tile.
template <int HS, int N>
__device__ inline void plain_rows_product(float (&d)[N][4], float* rows, float* tile) {
#pragma unroll 4
    for (int chunk = 0; chunk < HS / 4; ++chunk) {
        float a[2][4];
        for (int i = 0; i < 2; ++i) load_pack(a[i], chunk_at<HS>(rows, result_row(2 * i), chunk));
        for (int n = 0; n < N; ++n)
            for (int j = 0; j < 2; ++j) {
                float b[4];
                load_pack(b, chunk_at<HS>(tile, result_column(n, j), chunk));
                for (int i = 0; i < 2; ++i)
                    for (int c = 0; c < 4; ++c) d[n][2 * i + j] += a[i][c] * b[c];
            }
    }
}
template <int HS, int N>
__device__ inline void plain_columns_product(float (&d)[HS / 8][4], const float (&s)[N][4],
                                             const float* tile) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < 8 * N; ++j) {
        float a[2];  // column j of s is in one of 4 neighbouring lanes
        for (int i = 0; i < 2; ++i)
            a[i] = __shfl_sync(0xffffffffu, s[j / 8][2 * i + j % 2],
                               threadIdx.x % kWarp - t + j % 8 / 2);
        // chunk_at(tile, j, 2 n + t / 2), with what depends on the lane apart. Why: else each of
        // these addresses takes a register.
        const float* row = tile + j * HS + (t / 2 ^ j % 2) * 4 + t % 2 * 2;
        for (int n = 0; n < HS / 8; ++n) {
            const float2 b = *reinterpret_cast<const float2*>(row + (2 * n ^ (j & 6)) * 4);
            for (int i = 0; i < 2; ++i) d[n][2 * i] += a[i] * b.x, d[n][2 * i + 1] += a[i] * b.y;
        }
    }
}

// d [kM * 16, kN] = a tile^T: every column of d is a row of the tile [kN, HS].
template <class E, int HS, bool kGroup, int kM, int kN>
__device__ inline void rows_product(float (&d)[kM][kN][4], const Left<E, HS> (&left)[kM],
                                    Stored<E>* tile) {
    static_assert(!kGroup || kM == 1);
    if constexpr (kGroup) return group_rows_product(d[0], left[0].a, tile);
    const int lane = threadIdx.x % kWarp, row = lane / 16 * 8 + lane % 8, side = lane / 8 % 2;
    for (auto& row : d)
        for (auto& x : row) x[0] = x[1] = x[2] = x[3] = 0;
    if constexpr (std::is_same_v<E, float>)
        plain_rows_product<HS>(d[0], left[0].rows, tile);
    else
        for (int k = 0; k < Left<E, HS>::kSteps; ++k)
            for (int n = 0; n < kN / 2; ++n) {
                unsigned b[4];
                load_matrix_x4(b, chunk_at<HS>(tile, n * 16 + row, 2 * k + side));
                round_operand(E(), b);
                for (int i = 0; i < kM; ++i)
                    mma_pair<E>(d[i][2 * n], d[i][2 * n + 1], left[i].a[k], b);
            }
}
// d [kM * 16, HS] += s tile, s [kM * 16, 8 kN] rounded to E: every column of d is a column of the
// tile.
template <class E, int HS, bool kGroup, int kM, int kN>
__device__ inline void add_columns_product(float (&d)[kM][HS / 8][4], const float (&s)[kM][kN][4],
                                           Stored<E>* tile) {
    const int lane = threadIdx.x % kWarp;
    if constexpr (kGroup) {
        group_columns_product(d[0], s[0], tile);
    } else if constexpr (std::is_same_v<E, float>) {
        plain_columns_product<HS>(d[0], s[0], tile);
    } else if constexpr (std::is_same_v<E, Tf32>) {
        // A lane has columns 2t, 2t+1 of s, and mma wants t, t+4: so it takes the tile's rows in
        // that order, too.
        for (int k = 0; k < kN; ++k) {
            unsigned a[4], b[2];
            for (int e = 0; e < 4; ++e) a[e] = to_tf32(s[0][k][e % 2 * 2 + e / 2]);
            for (int n = 0; n < HS / 8; ++n) {
                const int c = n * 8 + lane / 4;
                for (int e = 0; e < 2; ++e)
                    b[e] = to_tf32(chunk_at<HS>(tile, result_column(k, e), c / 4)[c % 4]);
                mma_tf32_16x8x8(d[0][n], a, b);
            }
        }
    } else {
        for (int k = 0; k < kN / 2; ++k) {
            unsigned a[kM][4], b[4];
            for (int i = 0; i < kM; ++i) result_operand(a[i], s[i][2 * k], s[i][2 * k + 1]);
            for (int n = 0; n < HS / 16; ++n) {
                load_matrix_x4_transposed(b, chunk_at<HS>(tile, k * 16 + lane % 16,
                                                          2 * n + lane / 16));
                for (int i = 0; i < kM; ++i) mma_pair<E>(d[i][2 * n], d[i][2 * n + 1], a[i], b);
            }
        }
    }
}

// Waits until the copied tiles are there for all threads of the block (kGroup: and for their
// products), and all are done with the tiles before.
template <bool kGroup>
__device__ inline void wait_for_tiles() {
    copy_async_wait<0>();
    if constexpr (kGroup) group_publish();
    __syncthreads();
}

// Stores factors[row half] * d, a warp's results [16, HS], to rows mine.. of a head with T rows.
template <int HS, class A>
__device__ inline void store_rows(A* to, int stride, int mine, int T, int size,
                                  const float (&d)[HS / 8][4], const float (&factors)[2]) {
    for (int half = 0; half < 2; ++half) {
        const int row = mine + result_row(2 * half);
        const float factor = factors[half];
        A* out = to + int64_t(row) * stride;
        if (row >= T) continue;
        for (int n = 0; n < HS / 8; ++n) {
            const float x = factor * d[n][2 * half], y = factor * d[n][2 * half + 1];
            const int c = result_column(n, 0);
            if (size == HS) {
                store_two(out + c, x, y);
            } else {
                if (c < size) out[c] = A(x);
                if (c + 1 < size) out[c + 1] = A(y);
            }
        }
    }
}

// The running softmax of a warp's 16 rows when a new tile of scores arrives: updates each row's
// maximum and sum, scales o to the new maximum, and s becomes p = 2^(scale2 (s - highest)). A row's
// scores are in 4 neighbouring lanes.
template <int kScores, int kOut>
__device__ inline void softmax_step(float (&s)[kScores][4], float (&o)[kOut][4],
                                    float (&highest)[2], float (&total)[2], float scale2) {
    for (int half = 0; half < 2; ++half) {
        float top = highest[half];
        for (int n = 0; n < kScores; ++n)
            top = fmaxf(top, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        const float shrink = exp2_approx((highest[half] - top) * scale2), offset = top * scale2;
        float sum = 0;
        for (int n = 0; n < kScores; ++n)
            for (int e = 2 * half; e < 2 * half + 2; ++e)
                sum += s[n][e] = exp2_approx(s[n][e] * scale2 - offset);
        highest[half] = top, total[half] = total[half] * shrink + sum;
        for (int n = 0; n < kOut; ++n) o[n][2 * half] *= shrink, o[n][2 * half + 1] *= shrink;
    }
}

// Sets scores of keys after their query to -infinity, in a warp's [16 queries, keys] or, kForKeys,
// [16 keys, queries].
template <bool kForKeys = false, int kScores>
__device__ inline void mask_scores(float (&s)[kScores][4], int query, int key) {
#pragma unroll
    for (int i = 0; i < kScores * 4; ++i) {
        const int down = result_row(i % 4), across = result_column(i / 4, i % 4);
        if (key + (kForKeys ? down : across) > query + (kForKeys ? across : down))
            s[i / 4][i % 4] = -INFINITY;
    }
}
// Multiplies a warp's p [16 queries, keys] by dropout's mask.
template <int kScores>
__device__ inline void drop_scores(float (&s)[kScores][4], Dropout drop, uint64_t bh_T, int query,
                                   int key, int T) {
    for (int n = 0; n < kScores; ++n)
        for (int e = 0; e < 4; ++e)
            s[n][e] *= drop.scale((bh_T + query + result_row(e)) * T + key + result_column(n, e));
}

// Only blocks of 64 rows without wgmma are for any head size, a cache, and dropout.
template <int kM, bool kGroup>
constexpr bool kAnyHead = kM == 1 && !kGroup;

// For queries past .. past + n - 1 of sequences of past + n rows: training has past = 0 and n = T.
// out [B * n, C]; lse [B * NH, n], or null. One block: 4 warps, kM times 16 queries each, of one
// head. kM = 2 makes twice as many products of a tile once read, and needs all registers.
// Operations: 4 HS and an exponential for each pair of T^2 / 2. Moves: reads 3, writes 1 row of C.
template <class E, int HS, int kM, bool kGroup>
__global__ void __launch_bounds__(kHeadThreads, 2)
    attention_forward_kernel(Stored<E>* out, float* lse, const Stored<E>* qkv, int cached, int n,
                             int NH, int head_size, Dropout drop) {
    using A = Stored<E>;
    constexpr int kQueries = 64 * kM, kKeys = kStreamedRows<E, HS>, kApart = kGroup ? 64 : 16;
    extern __shared__ __align__(1024) uint4 attention_tiles[];
    if (kGroup && shared_address(attention_tiles) % 1024 != 0) __trap();
    A *q_tile = reinterpret_cast<A*>(attention_tiles), *k_tiles = q_tile + kQueries * HS,
      *v_tiles = k_tiles + 2 * kKeys * HS;
    const int size = kAnyHead<kM, kGroup> ? head_size : HS;
    const int past = kAnyHead<kM, kGroup> ? cached : 0, T = past + n;
    const Head<A> head(qkv, T, NH, size);
    // Blocks with most work start first.
    const int first = past + (gridDim.x - 1 - blockIdx.x) * kQueries;
    // This warp's first query. As a group, whose product has 64 rows, 16 more come 64 later.
    const int mine = first + threadIdx.x / kWarp * (kGroup ? 16 : 16 * kM);
    const int tiles = (min(first + kQueries, T) + kKeys - 1) / kKeys;
    auto copy_keys = [&](int tile) {  // over the tile before the last one
        const int at = tile % 2 * kKeys * HS;
        copy_tile<HS, kKeys>(k_tiles + at, head.k, head.stride, tile * kKeys, T, size);
        copy_tile<HS, kKeys>(v_tiles + at, head.v, head.stride, tile * kKeys, T, size);
        copy_async_commit();
    };
    copy_tile<HS, kQueries>(q_tile, head.q, head.stride, first, T, size);
    copy_keys(0);
    const float scale = 1 / sqrtf(float(size)), scale2 = scale * kLog2E;
    float o[kM][HS / 8][4] = {}, highest[kM][2], total[kM][2] = {};
    Left<E, HS> queries[kM];
    for (int i = 0; i < kM; ++i) highest[i][0] = highest[i][1] = -INFINITY;
    for (int tile = 0; tile < tiles; ++tile) {
        wait_for_tiles<kGroup>();
        if (tile + 1 < tiles) copy_keys(tile + 1);
        if (tile == 0)
            for (int i = 0; i < kM; ++i) queries[i].load(q_tile, mine - first + kApart * i);
        const int key = tile * kKeys, at = tile % 2 * kKeys * HS;
        if (!kGroup && key >= mine + 16 * kM) continue;  // no query of this warp sees these keys
        auto work = [&]<int kFrom>(std::integral_constant<int, kFrom>) {
            float s[kM][kKeys / 8][4];
            if constexpr (kGroup)
                for (int i = kFrom; i < kM; ++i)
                    group_rows_product(s[i], queries[i].a, k_tiles + at);
            else
                rows_product<E, HS, kGroup>(s, queries, k_tiles + at);
            if (!kGroup && key + kKeys - 1 > mine)
                for (int i = 0; i < kM; ++i) mask_scores(s[i], mine + 16 * i, key);
#pragma unroll
            for (int i = kFrom; i < kM; ++i) {
                const int query = mine + kApart * i;
                if constexpr (kGroup) group_wait<kM - 1 - kFrom>(s[i]);  // the next goes on
                if (kGroup && key + kKeys - 1 > query) mask_scores(s[i], query, key);
                softmax_step(s[i], o[i], highest[i], total[i], scale2);
                if (kAnyHead<kM, kGroup> && drop.on())
                    drop_scores(s[i], drop, head.bh_T, query, key, T);
                if constexpr (kGroup) group_columns_product(o[i], s[i], v_tiles + at);
            }
            if constexpr (!kGroup) add_columns_product<E, HS, kGroup>(o, s, v_tiles + at);
            wait_for<kGroup>(o);
        };
        // Careful: no branch around a pending product, or the compiler waits for each at once.
        if (kGroup && kM == 2 && key >= first + 64)  // the first 64 queries see none of the keys
            work(std::integral_constant<int, kM - 1>());
        else
            work(std::integral_constant<int, 0>());
    }
#pragma unroll
    for (int i = 0; i < kM; ++i) {
        for (int half = 0; half < 2; ++half) {
            total[i][half] += __shfl_xor_sync(0xffffffffu, total[i][half], 1);
            total[i][half] += __shfl_xor_sync(0xffffffffu, total[i][half], 2);
            const int query = mine + kApart * i + result_row(2 * half);
            if (lse && threadIdx.x % 4 == 0 && query < T)
                lse[size_t(blockIdx.y) * n + query - past] =
                    highest[i][half] * scale + logf(total[i][half]);
        }
        store_rows<HS>(head.row(out, n, size, 0), head.C, mine + kApart * i - past, n, size, o[i],
                       {1 / total[i][0], 1 / total[i][1]});
    }
}

// An element of a warp's s and dp in both backward kernels: s becomes p w, dp becomes ds without
// its factor 1 / sqrt(HS).
//   p = 2^(scale2 s - lse2), so 0 where s is masked    ds = p (w dp - delta)
// lse2, delta: of the element's query; index: in dropout's mask.
template <bool kMayDrop>
__device__ inline void backward_element(float& s, float& dp, float lse2, float delta, float scale2,
                                        Dropout drop, uint64_t index) {
    const float p = exp2_approx(s * scale2 - lse2);
    const float w = kMayDrop && drop.on() ? drop.scale(index) : 1;
    dp = p * (w * dp - delta);
    s = p * w;
}

// partial[column] = column sums of the block's results factor * d [16 kM, HS]: its share of a bias
// gradient. All threads of the block take part; sums [4, HS] is shared memory that they have used.
template <int HS, int kM>
__device__ inline void block_column_sums(float* partial, float* sums, int size,
                                         const float (&d)[kM][HS / 8][4], float factor) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    __syncthreads();  // what was there was read
    for (int n = 0; n < HS / 8; ++n)
        for (int e = 0; e < 2; ++e) {
            float sum = 0;
            for (int i = 0; i < kM; ++i) sum += d[i][n][e] + d[i][n][e + 2];
            for (int step = 4; step < kWarp; step *= 2)  // the lanes that hold other rows
                sum += __shfl_xor_sync(0xffffffffu, sum, step);
            if (lane < 4) sums[warp * HS + result_column(n, e)] = sum;
        }
    __syncthreads();
    for (int d = threadIdx.x; d < size; d += kHeadThreads) {
        float total = 0;
        for (int w = 0; w < kHeadThreads / kWarp; ++w) total += sums[w * HS + d];
        partial[d] = factor * total;
    }
}

// delta = out . dout of a warp's 16 rows, for results' rows g and g + 8 in subtract[0] and [1].
// statistics[i] of row `mine` + i becomes (lse in base 2, delta), and 0 where a pair's second row
// is past the end. Two lanes share a row; its dout is in a tile.
template <int HS, class A>
__device__ inline void warp_delta(float (&subtract)[2], float2* statistics, const float* lse,
                                  const A* out, int stride, A* d_tile, int tile_row, int mine,
                                  int T, int size) {
    constexpr int N = kPack<A>, kHalf = HS / N / 2;
    const int lane = threadIdx.x % kWarp, row = lane / 2;
    float sum = 0;
    if (mine + row < T)
        for (int i = 0; i < kHalf; ++i) {
            const int chunk = lane % 2 * kHalf + i;
            float x[N], y[N];
            load_channels(x, out + row * stride + chunk * N, size - chunk * N);
            load_pack(y, chunk_at<HS>(d_tile, tile_row + row, chunk));
            for (int j = 0; j < N; ++j) sum += x[j] * y[j];
        }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    if (lane % 2 == 0 && mine + row < statistics_rows(T))
        statistics[row] = make_float2(mine + row < T ? lse[row] * kLog2E : 0, sum);
    for (int half = 0; half < 2; ++half)
        subtract[half] = __shfl_sync(0xffffffffu, sum, 2 * result_row(2 * half));
}

// Two launches. Without kForKeys queries are held (q and dout) and keys streamed (k and v), which
// makes dq, and statistics [B * NH, statistics_rows(T)] for the second. With it keys are held and
// queries streamed, which makes dk and dv; scores are transposed then, s^T = k q^T, so that p^T and
// ds^T are left operands as they are. Either way s is the first held table times the first streamed
// one, and dp the second times the second. A tile is used kSlice rows at a time.
// Operations, for each pair of T^2 / 2: 6 HS and an exponential; with kForKeys 8 HS and one.
// Moves: reads 5, writes 1 row of C; reads 4, writes 2.
template <class E, int HS, int kM, bool kGroup, bool kForKeys>
__global__ void __launch_bounds__(kHeadThreads, 2)
    attention_backward_kernel(Stored<E>* dqkv, float* partial, float2* statistics,
                              const Stored<E>* dout, const Stored<E>* out, const float* lse,
                              const Stored<E>* qkv, int T, int NH, int head_size, Dropout drop) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
    if (kM == 2) return __trap();  // it would spill; attend() does not use it there
#endif
    using A = Stored<E>;
    constexpr int kHeld = 64 * kM, kTile = kStreamedRows<E, HS>;
    constexpr int kFew = std::is_same_v<E, bf16> && !kForKeys ? 32 : 16;  // registers allow no more
    constexpr int kSlice = kGroup || kTile < kFew ? kTile : kFew;
    extern __shared__ __align__(1024) uint4 attention_tiles[];
    if (kGroup && shared_address(attention_tiles) % 1024 != 0) __trap();
    A *held_0 = reinterpret_cast<A*>(attention_tiles), *held_1 = held_0 + kHeld * HS;
    A *streamed_0 = held_1 + kHeld * HS, *streamed_1 = streamed_0 + 2 * kTile * HS;
    // [kTile], statistics of two tiles of queries.
    float4* pairs = reinterpret_cast<float4*>(streamed_1 + 2 * kTile * HS);
    const int size = kAnyHead<kM, kGroup> ? head_size : HS;
    const Head<A> head(qkv, T, NH, size);
    const A* d_head = head.row(dout, T, size, 0);
    const int first = (kForKeys ? blockIdx.x : gridDim.x - 1 - blockIdx.x) * kHeld;
    const int mine = first + threadIdx.x / kWarp * 16 * kM;
    const int first_tile = kForKeys ? first / kTile : 0;
    const int tiles = ((kForKeys ? T : min(first + kHeld, T)) + kTile - 1) / kTile;
    statistics += size_t(blockIdx.y) * statistics_rows(T);
    auto copy_streamed = [&](int tile) {
        const int begin = tile * kTile, at = tile % 2 * kTile * HS, query = begin + 2 * threadIdx.x;
        copy_tile<HS, kTile>(streamed_0 + at, kForKeys ? head.q : head.k, head.stride, begin, T,
                             size);
        copy_tile<HS, kTile>(streamed_1 + at, kForKeys ? d_head : head.v,
                             kForKeys ? head.C : head.stride, begin, T, size);
        // Past the end all is 0: then p = 1, but it is multiplied by 0.
        if (kForKeys && threadIdx.x < kTile / 2)
            copy_async_16(pairs + tile % 2 * kTile / 2 + threadIdx.x, statistics + query,
                          query < T);
        copy_async_commit();
    };
    copy_tile<HS, kHeld>(held_0, kForKeys ? head.k : head.q, head.stride, first, T, size);
    copy_tile<HS, kHeld>(held_1, kForKeys ? head.v : d_head, kForKeys ? head.stride : head.C, first,
                         T, size);
    copy_streamed(first_tile);
    const float scale = 1 / sqrtf(float(size)), scale2 = scale * kLog2E;
    float d0[kM][HS / 8][4] = {}, d1[kM][HS / 8][4] = {}, lse2[kM][2], subtract[kM][2];
    Left<E, HS> left_0[kM], left_1[kM];
    for (int i = 0; i < 2 * kM && !kForKeys; ++i) {
        const int query = mine + i / 2 * 16 + result_row(i % 2 * 2);
        lse2[i / 2][i % 2] = query < T ? lse[head.bh_T + query] * kLog2E : INFINITY;  // p = 0
    }
    for (int tile = first_tile; tile < tiles; ++tile) {
        wait_for_tiles<kGroup>();
        if (tile + 1 < tiles) copy_streamed(tile + 1);
        if (tile == first_tile)
#pragma unroll
            for (int i = 0; i < kM; ++i) {
                const int row = mine + 16 * i;
                left_0[i].load(held_0, row - first), left_1[i].load(held_1, row - first);
                if constexpr (!kForKeys)
                    warp_delta<HS>(subtract[i], statistics + row, lse + head.bh_T + row,
                                   head.row(out, T, size, row), head.C, held_1, row - first, row, T,
                                   size);
            }
        for (int slice = 0; slice < kTile; slice += kSlice) {
            const int begin = tile * kTile + slice, at = (tile % 2 * kTile + slice) * HS;
            const int query = kForKeys ? begin : mine, key = kForKeys ? mine : begin;
            // None of the slice's and this warp's rows see each other.
            if (!kGroup && query + (kForKeys ? kSlice : 16 * kM) <= key) continue;
            float s[kM][kSlice / 8][4], dp[kM][kSlice / 8][4];
            rows_product<E, HS, kGroup>(s, left_0, streamed_0 + at);
            rows_product<E, HS, kGroup>(dp, left_1, streamed_1 + at);
            wait_for<kGroup>(s), wait_for<kGroup>(dp);
            if (key + (kForKeys ? 16 * kM : kSlice) - 1 > query)
                for (int i = 0; i < kM; ++i)
                    mask_scores<kForKeys>(s[i], kForKeys ? query : query + 16 * i,
                                          kForKeys ? key + 16 * i : key);
#pragma unroll
            for (int i = 0; i < kM; ++i)
                for (int n = 0; n < kSlice / 8; ++n) {
                    float4 two = {};
                    if (kForKeys) two = pairs[(at / HS + result_column(n, 0)) / 2];
                    for (int e = 0; e < 4; ++e) {
                        const int down = 16 * i + result_row(e), across = result_column(n, e);
                        const int q = query + (kForKeys ? across : down);
                        const float of_pair[2] = {e % 2 ? two.z : two.x, e % 2 ? two.w : two.y};
                        backward_element<kAnyHead<kM, kGroup>>(s[i][n][e], dp[i][n][e],
                                                               kForKeys ? of_pair[0]
                                                                        : lse2[i][e / 2],
                                                               kForKeys ? of_pair[1]
                                                                        : subtract[i][e / 2],
                                                               scale2, drop,
                                                               (head.bh_T + q) * T + key +
                                                                   (kForKeys ? down : across));
                    }
                }
            if constexpr (kForKeys) add_columns_product<E, HS, kGroup>(d1, s, streamed_1 + at);
            add_columns_product<E, HS, kGroup>(d0, dp, streamed_0 + at);
            if constexpr (kForKeys) wait_for<kGroup>(d1);
            wait_for<kGroup>(d0);
        }
    }
    const int at = kForKeys ? head.C : 0;
    A* to = dqkv + (head.q - qkv) + at;
    for (int i = 0; i < kM; ++i) {
        const int row = mine + 16 * i;
        store_rows<HS>(to, head.stride, row, T, size, d0[i], {scale, scale});
        if (kForKeys) store_rows<HS>(to + head.C, head.stride, row, T, size, d1[i], {1, 1});
    }
    float *sums = reinterpret_cast<float*>(held_0), *columns = head.partial(partial, size) + at;
    block_column_sums<HS, kM>(columns, sums, size, d0, scale);
    if (kForKeys) block_column_sums<HS, kM>(columns + at, sums, size, d1, 1);
}

// --- §4.6 GELU

// gelu [count] = GELU(fc). Moves: reads 1, writes 1 number each. Expect 90 %.
template <class A>
__global__ void gelu_kernel(A* gelu, const A* fc, size_t count) {
    constexpr int N = kPack<A>;
    const size_t at = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * N;
    if (at >= count) return;
    float x[N];
    load_pack(x, fc + at);
    for (int i = 0; i < N; ++i) x[i] = gelu_of(x[i]);
    store_pack(gelu + at, x);
}

// --- §4.7 The residual stream, where the matmul does not add it: with dropout, or where slower

// out = residual + drop(out). Moves: reads 2, writes 1 number each. Operations: with dropout about
// 20 on integers for each number's mask. Expect 80 %.
template <class A>
__global__ void residual_kernel(A* out, const A* residual, size_t count, Dropout drop) {
    constexpr int N = kPack<A>;
    const size_t at = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * N;
    if (at >= count) return;
    float branch[N], stream[N];
    load_pack(branch, out + at), load_pack(stream, residual + at);
    for (int i = 0; i < N; ++i) stream[i] += drop.on() ? branch[i] * drop.scale(at + i) : branch[i];
    store_pack(out + at, stream);
}

// --- §4.8 The head: softmax, cross-entropy and the gradient, in place on the logits

constexpr int kHeadRowThreads = 512;  // of a block that makes a row of logits

// loss = log(sum of e^l) - l[target], 0 where the target is kIgnore. One block makes one row of
// logits [V], rows `pitch` apart: first its maximum and sum of e^(l - max) in one pass, then, if
// scale > 0, the logits become scale (softmax - onehot), and what is behind V in a last pack 0. The
// first `kept` of a row (all, if they fit) are copied to shared memory at once, for both passes:
// 100 KB in GPT-2 on an H100. Two blocks share a multiprocessor, which loads one row while it works
// on another. The rest is read twice.
// Moves: reads 1, writes 1 row of V: 4.4 ms. Operations: 2 exponentials for each number, 1.8 ms.
// Expect 90 %.
template <class A>
__global__ void __launch_bounds__(kHeadRowThreads, 2)
    softmax_cross_entropy_kernel(float* losses, A* logits, const int32_t* targets, int V, int pitch,
                                 int kept, float scale) {
    constexpr int N = kPack<A>;
    extern __shared__ __align__(16) uint4 kept_packs[];
    const int row = blockIdx.x, target = targets[row], step = blockDim.x * N;
    A* l = logits + size_t(row) * pitch;
    // No barrier follows: a thread reads only what it copied itself.
    for (int v = threadIdx.x * N; v < kept; v += step)
        copy_async_16(kept_packs + v / N, l + v, true);
    copy_async_commit();
    const bool scored = target >= 0;
    const float at_target = scored ? float(l[target]) : 0;
    float highest = -INFINITY, sum = 0, x[N];
    auto load = [&](int v) {
        v < kept ? unpack(x, kept_packs[v / N]) : load_pack(x, l + v);
        for (int i = 0; i < N; ++i) x[i] = v + i < V ? x[i] : -INFINITY;
    };
    copy_async_wait<0>();
    for (int v = threadIdx.x * N; v < V; v += step) {
        load(v);
        float top = highest;
        for (int i = 0; i < N; ++i) top = fmaxf(top, x[i]);
        if (top == -INFINITY) continue;
        sum *= exp2_approx((highest - top) * kLog2E), highest = top;  // e^v = 2^(v log2 e)
        for (int i = 0; i < N; ++i) sum += exp2_approx(x[i] * kLog2E - top * kLog2E);
    }
    const float top = over_block(highest, -INFINITY, warp_max), offset = top * kLog2E;
    sum = block_sum(highest == -INFINITY ? 0 : sum * exp2_approx((highest - top) * kLog2E));
    if (threadIdx.x == 0) losses[row] = scored ? logf(sum) + top - at_target : 0;
    if (scale <= 0) return;
    const float factor = scored ? scale / sum : 0;  // else no v is the target
    for (int v = threadIdx.x * N; v < V; v += step) {
        load(v);
        for (int i = 0; i < N; ++i) x[i] = factor * exp2_approx(x[i] * kLog2E - offset);
        for (int i = 0; i < N && target / N == v / N; ++i) x[i] -= v + i == target ? scale : 0;
        store_pack(l + v, x);
    }
}

// --- §7 The update

// The step's numbers live on the GPU: one thread.
__global__ void begin_step_kernel(StepState* state, double lr) { state->lr = lr, state->loss = 0; }

// total += scale * sum of values [count]; with `root` it becomes the root of the sum. One block.
// Moves: 4 bytes each, of losses; 8, of square_sums_kernel's.
template <class T>
__global__ void sum_kernel(double* total, const T* values, int count, double scale, bool root) {
    double sum = 0;
    for (int i = threadIdx.x; i < count; i += blockDim.x) sum += double(values[i]);
    sum = block_sum(sum);
    if (threadIdx.x == 0) *total = root ? sqrt(sum) : *total + scale * sum;
}

// sums[block] = the sum of squares of its chunk of grads [count], count a multiple of 4. Moves: 4
// bytes each, 0.17 ms for GPT-2's 124M. Expect 90 %.
__global__ void square_sums_kernel(double* sums, const float* grads, size_t count) {
    double sum = 0;
    const size_t begin = blockIdx.x * kNormChunk, end = min(begin + kNormChunk, count);
    for (size_t i = begin + threadIdx.x * 4; i < end; i += blockDim.x * 4) {
        float g[4];
        load_pack(g, grads + i);
        for (int j = 0; j < 4; ++j) sum += double(g[j]) * double(g[j]);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// to [count] += from. Moves: 12 bytes each, of floats. Expect 90 %.
template <class T>
__global__ void add_kernel(T* to, const T* from, size_t count) {
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < count) to[i] += from[i];
}

__global__ void judge_step_kernel(StepState* state, Guards guards) { judge_step(state, guards); }

__device__ inline void store_weights(float*, const float (&)[4]) {}  // the masters are the weights
__device__ inline void store_weights(bf16* to, const float (&w)[4]) {
    *reinterpret_cast<uint2*>(to) = make_uint2(pack_bf16(w[0], w[1]), pack_bf16(w[2], w[3]));
}

// One step of AdamW (adamw_element) on all parameters, count and decayed multiples of 4, unless
// state.skip. Moves: reads gradient, master, m, v; writes master, m, v and, in bf16, the weight: 28
// or 30 bytes each, 1.2 ms for GPT-2's 124M. Expect 90 %.
template <class Weight>
__global__ void adamw_kernel(Weight* weights, float* masters, float* m, float* v,
                             const float* grads, size_t count, size_t decayed,
                             const StepState* state, AdamW hyper) {
    if (state->skip) return;
    __shared__ float scales[2];  // 1 / (1 - beta^t)
    if (threadIdx.x == 0) {
        const double t = double(state->updates);
        scales[0] = float(1 / (1 - pow(hyper.beta1, t))),
        scales[1] = float(1 / (1 - pow(hyper.beta2, t)));
    }
    __syncthreads();
    const float m_scale = scales[0], v_scale = scales[1];
    const float lr = float(state->lr), clip = float(state->clip_scale);
    const float beta1 = float(hyper.beta1), beta2 = float(hyper.beta2), eps = float(hyper.eps);
    const size_t step = size_t(gridDim.x) * blockDim.x * 4;
    for (size_t i = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * 4; i < count; i += step) {
        float w4[4], m4[4], v4[4], g4[4];
        load_pack(w4, masters + i), load_pack(g4, grads + i);
        load_pack(m4, m + i), load_pack(v4, v + i);
        const float decay = i < decayed ? float(hyper.weight_decay) : 0;
        for (int j = 0; j < 4; ++j)
            adamw_element(w4[j], m4[j], v4[j], g4[j] * clip, lr, m_scale, v_scale, beta1, beta2,
                          eps, decay);
        store_pack(masters + i, w4), store_pack(m + i, m4), store_pack(v + i, v4);
        store_weights(weights + i, w4);
    }
}

// weights [count] = masters, rounded. Moves: reads 4, writes 2 bytes each. Expect 90 %.
__global__ void round_weights_kernel(bf16* weights, const float* masters, size_t count) {
    const size_t i = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
    if (i >= count) return;
    float w[4];
    load_pack(w, masters + i);
    store_weights(weights + i, w);
}

// =================================================================================================
// 5 Streams and matmuls
// =================================================================================================

// A point in the stream, and when the GPU reached it.
struct Event {
    cudaEvent_t event = nullptr;
    explicit Event(unsigned flags = cudaEventDefault) {
        CUDA_CHECK(cudaEventCreateWithFlags(&event, flags));
    }
    Event(const Event&) = delete;
    ~Event() { cudaEventDestroy(event); }
    void wait() const { CUDA_CHECK(cudaEventSynchronize(event)); }
    // Seconds from an earlier one to this; waits for it.
    double since(const Event& earlier) const {
        float milliseconds = 0;
        wait();
        CUDA_CHECK(cudaEventElapsedTime(&milliseconds, earlier.event, event));
        return double(milliseconds) / 1e3;
    }
};

// The GPU's work, done in order while the host goes on.
class Stream {
public:
    Stream() { CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
    Stream(const Stream&) = delete;
    ~Stream() { cudaStreamDestroy(stream_); }
    operator cudaStream_t() const { return stream_; }
    void mark(const Event& event) { CUDA_CHECK(cudaEventRecord(event.event, stream_)); }
    void synchronize() { CUDA_CHECK(cudaStreamSynchronize(stream_)); }
    // Between host and GPU, either way, or within the GPU.
    void copy(void* to, const void* from, size_t bytes) {
        CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_));
        lap("copy");
    }

    // Seconds that the work takes on the GPU: the best of 5, after a warm-up.
    double best_seconds(auto&& work) {
        const Event begin, end;
        double best = INFINITY;
        work();
        for (int i = 0; i < 5; ++i) {
            mark(begin), work(), mark(end);
            best = std::min(best, end.since(begin));
        }
        return std::max(1e-9, best);
    }

    // The time of each kernel that the work launches, in order: from the event before it to the one
    // after. Careful: that is the host's time where launching is slower than running. Not for work
    // that is captured into a graph, or may fail.
    std::vector<KernelTime> kernel_times(auto&& work) {
        laps_.emplace();
        lap("begin");
        work();
        std::vector<KernelTime> times;
        for (size_t i = 1; i < laps_->size(); ++i) {
            times.push_back((*laps_)[i].kernel);
            times.back().seconds = (*laps_)[i].end.since((*laps_)[i - 1].end);
        }
        laps_.reset();
        return times;
    }
    // Call it after each launch, for kernel_times. flops: of a product.
    void lap(std::string_view name, double flops = 0) {
        if (!laps_) return;
        Lap& lap = laps_->emplace_back();
        lap.kernel = {std::string(name.substr(0, name.find("_kernel"))), flops, 0, 1, lap_row};
        mark(lap.end);
    }
    int lap_row = -1;  // KernelTime::row of the next kernels

private:
    struct Lap {
        KernelTime kernel;
        Event end;
    };
    cudaStream_t stream_ = nullptr;
    std::optional<std::deque<Lap>> laps_;
};

// --- Matmuls
// cuBLASLt chooses a kernel by a product's shape; the choice, a plan, is kept. It is the library's
// first suggestion, so every run has the same. With --tune-matmul it is the fastest of many, found
// by timing them, and written to a file, from which later runs take it: they have the same numbers.

// A row-major matrix.
struct Matrix {
    const void* data;
    int rows, columns;
    bool transposed = false;  // a product takes its transpose
};
inline Matrix transpose(const Matrix& x) { return {x.data, x.rows, x.columns, !x.transposed}; }

// What is done to a product before it is stored.
struct Epilogue {
    bool in_fp32 = false;       // the result's type, whatever that of the operands
    const void* add = nullptr;  // a matrix to add; may be the result itself
    cublasLtEpilogue_t kind = CUBLASLT_EPILOGUE_DEFAULT;
    const void* bias = nullptr;  // added to every row; BGRADA sets it: right's column sums
    const void* aux = nullptr;   // GELU's input: written in forward, read in backward
    // The same work without this epilogue, for tuning to compare. It may be done again and again.
    std::function<void()> by_hand = nullptr;
};

// NVIDIA recommends 32 MB for Hopper; 7 parts of a [3072, 768] sum in fp32 are 66.
constexpr size_t kMatmulWorkspace = size_t(72) << 20;

// A product as cuBLASLt describes it, D [m, n] = epilogue(op(A) [m, k] op(B) [k, n] (+ C)), and the
// kernel chosen. Careful: its matrices are column-major, so our row-major [r, c] is its [c, r]. It
// sees out = x w, [rows, OC] = [rows, C] [C, OC], as out^T = w^T x^T: its A is w, its B is x.
struct Plan {
    int64_t m, n, k;
    std::string name;  // for bench: which of left and right is transposed (t), and the sizes
    cublasLtMatmulDesc_t operation = nullptr;
    cublasLtMatrixLayout_t a = nullptr, b = nullptr, d = nullptr;
    cublasLtMatmulAlgo_t algorithm = {};
    bool possible = false;
    // How the parts of a sum over k may be added: stored in fp32, in order; never by atomics.
    uint32_t split_sums = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    Plan(int64_t m, int64_t n, int64_t k) : m(m), n(n), k(k) {}
    double flops() const { return 2.0 * double(m) * double(n) * double(k); }
};

inline void set(Plan& plan, cublasLtMatmulDescAttributes_t name, auto value) {
    CUDA_CHECK(cublasLtMatmulDescSetAttribute(plan.operation, name, &value, sizeof value));
}

// The file of tuned plans. A line is a plan: what it was made for; the work; the choice; its time
// and that of another. A product's choice is the library's description of the kernel, valid for the
// same version. Lines of other GPUs and versions stay as they are. All ranks have the first one's.
class PlanFile {
public:
    PlanFile(const std::string& path, const std::string& machine) : path_(path), machine_(machine) {
        const std::string text = file_exists(path) ? read_file(path) : "";
        lines_ = split_at(text_from_first(*world, text), '\n');
        if (lines_.back().empty()) lines_.pop_back();
    }
    // The choice for some work, and the line with it. If there is none, tune returns the rest of
    // the line, and the file is written again. But not with several ranks: each would choose
    // another plan, and then there is no choice.
    struct Found {
        std::string choice, where;
        void check(bool good) const {
            if (!good) fail(where, " is damaged, or no plan that cuBLASLt knows: remove the line");
        }
    };
    Found find(const std::string& work, const std::function<std::string()>& tune) {
        const std::string key = machine_ + " | " + work + " | ";
        auto line = std::find_if(lines_.begin(), lines_.end(),
                                 [&](const std::string& l) { return l.starts_with(key); });
        if (line == lines_.end()) {
            if (world->count > 1) return {};
            const std::string rest = tune();  // may add lines of its own
            line = lines_.insert(lines_.end(), key + rest);
            std::string text;
            for (const std::string& l : lines_) text += l + "\n";
            make_folders(parent_folder(path_));
            write_file(path_, text);
        }
        return {line->substr(key.size(), line->find(" | ", key.size()) - key.size()),
                path_ + ":" + std::to_string(line - lines_.begin() + 1)};
    }

private:
    std::string path_, machine_;
    std::vector<std::string> lines_;
};

// The library's description of a kernel. Why not its own type: it has no name, and nvcc 13.0 fails
// at a vector of it.
struct Algorithm : cublasLtMatmulAlgo_t {
    Algorithm(const cublasLtMatmulAlgo_t& same = {}) : cublasLtMatmulAlgo_t(same) {}
};

// All products so far, each with its plan.
class Matmuls {
public:
    double tune_from = 1e9;  // operations; smaller products are not worth timing
    std::string refused;     // the latest product that the library has no kernel for
    const bool tf32;

    // type: of the operands.
    Matmuls(bool tf32, cudaDataType_t type, Stream& stream)
        : tf32(tf32), compute_(tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F),
          type_(type), stream_(stream) {
        CUDA_CHECK(cublasLtCreate(&library_));
    }
    Matmuls(const Matmuls&) = delete;
    ~Matmuls() {
        for (auto& [key, plan] : plans_) {
            cublasLtMatmulDescDestroy(plan.operation);
            for (auto layout : {plan.a, plan.b, plan.d}) cublasLtMatrixLayoutDestroy(layout);
        }
        cublasLtDestroy(library_);
        cudaFree(workspace_);
    }

    // From now on plans are tuned, and kept in this file.
    void tune_into(const std::string& path, const char* gpu) { file_.emplace(path, made_for(gpu)); }
    // What a plan is valid for.
    static std::string made_for(const char* gpu) {
        return format("%s, cuBLASLt %zu", gpu, cublasLtGetVersion());
    }

    // out = epilogue(left right); false if the library has no kernel for it, or by_hand was faster
    // when the plan was tuned.
    bool multiply(const Matrix& out, const Matrix& left, const Matrix& right,
                  const Epilogue& epilogue = {}) {
        if (!workspace_) CUDA_CHECK(cudaMalloc(&workspace_, kMatmulWorkspace));
        const int64_t k = left.transposed ? left.rows : left.columns;
        // What is added: a matrix of its own. Adding to the result takes the plan of setting it.
        const bool another = epilogue.add && epilogue.add != out.data;
        const Key key{out.columns, out.rows,      k,     right.transposed,      left.transposed,
                      another,     epilogue.kind, type_, result_type(epilogue), compute_};
        auto [found, fresh] = plans_.try_emplace(key, out.columns, out.rows, k);
        Plan& plan = found->second;
        if (fresh) describe(plan, left, right, epilogue);
        if (epilogue.bias) set(plan, CUBLASLT_MATMUL_DESC_BIAS_POINTER, epilogue.bias);
        if (epilogue.aux) set(plan, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, epilogue.aux);
        if (fresh) choose(plan, key, out, left, right, epilogue);
        if (plan.possible) {
            const cublasStatus_t code = run(plan, plan.algorithm, out, left, right, epilogue.add);
            plan.possible = code != CUBLAS_STATUS_NOT_SUPPORTED;  // a suggestion is no promise
            if (plan.possible) CUDA_CHECK(code), stream_.lap(plan.name, plan.flops());
        }
        if (!plan.possible)
            refused = format("%s, epilogue %d, beta %d, types %d to %d", plan.name.c_str(),
                             int(epilogue.kind), epilogue.add != nullptr, int(type_),
                             int(result_type(epilogue)));
        return plan.possible;
    }

private:
    // What a plan depends on: m, n, k, transposes, whether something is added, epilogue, types.
    using Key = std::array<int64_t, 10>;

    cudaDataType_t result_type(const Epilogue& epilogue) const {
        return epilogue.in_fp32 ? CUDA_R_32F : type_;
    }
    // out = left right, and add, if not null.
    cublasStatus_t run(const Plan& plan, const cublasLtMatmulAlgo_t& algorithm, const Matrix& out,
                       const Matrix& left, const Matrix& right, const void* add) {
        const float one = 1, beta = add ? 1 : 0;
        return cublasLtMatmul(library_, plan.operation, &one, right.data, plan.a, left.data, plan.b,
                              &beta, add ? add : out.data, plan.d, const_cast<void*>(out.data),
                              plan.d, &algorithm, workspace_, kMatmulWorkspace, stream_);
    }

    void describe(Plan& plan, const Matrix& x, const Matrix& w, const Epilogue& epilogue) {
        plan.name = format("product %c%c %ldx%ld, k %ld", x.transposed ? 't' : 'n',
                           w.transposed ? 't' : 'n', long(plan.n), long(plan.m), long(plan.k));
        CUDA_CHECK(cublasLtMatmulDescCreate(&plan.operation, compute_, CUDA_R_32F));
        set(plan, CUBLASLT_MATMUL_DESC_TRANSA, w.transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
        set(plan, CUBLASLT_MATMUL_DESC_TRANSB, x.transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
        set(plan, CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue.kind);
        if (epilogue.aux) set(plan, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, plan.m);
        if (result_type(epilogue) == CUDA_R_32F)
            plan.split_sums |= CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE;
        CUDA_CHECK(cublasLtMatrixLayoutCreate(&plan.a, type_, w.columns, w.rows, w.columns));
        CUDA_CHECK(cublasLtMatrixLayoutCreate(&plan.b, type_, x.columns, x.rows, x.columns));
        CUDA_CHECK(
            cublasLtMatrixLayoutCreate(&plan.d, result_type(epilogue), plan.m, plan.n, plan.m));
    }

    // Without tuning the library's first suggestion, with it the file's plan. A product that adds
    // to its result cannot be done again and again: it is tuned where it is first set.
    void choose(Plan& plan, const Key& key, const Matrix& out, const Matrix& left,
                const Matrix& right, const Epilogue& epilogue) {
        const bool tune = file_ && plan.flops() >= tune_from && epilogue.add != out.data;
        const auto suggested = suggestions(plan, tune ? 16 : 1);
        plan.possible = !suggested.empty();
        if (plan.possible) plan.algorithm = suggested[0];
        if (!plan.possible || !tune) return;
        std::string work;
        for (int64_t number : key) work += (work.empty() ? "" : " ") + std::to_string(number);
        const auto found =
            file_->find(work, [&] { return fastest(plan, out, left, right, epilogue, suggested); });
        if (found.choice.empty()) return;
        const char* word = found.choice.c_str();
        for (uint64_t& bits : plan.algorithm.data) {
            char* end = nullptr;
            bits = std::strtoull(word, &end, 16);
            found.check(end == word + 16 && (*end == '-' || *end == '\0'));
            word = end + (*end == '-');
        }
        plan.possible = std::count(plan.algorithm.data, std::end(plan.algorithm.data), 0u) < 8;
        found.check(!plan.possible || fits(plan, plan.algorithm));
    }

    // The library's suggestions, best first; none if it cannot do the product.
    std::vector<Algorithm> suggestions(const Plan& plan, int most) {
        cublasLtMatmulHeuristicResult_t results[16] = {};  // most <= 16
        std::vector<Algorithm> list;
        cublasLtMatmulPreference_t wish;
        CUDA_CHECK(cublasLtMatmulPreferenceCreate(&wish));
        auto prefer = [&](cublasLtMatmulPreferenceAttributes_t name, auto value) {
            CUDA_CHECK(cublasLtMatmulPreferenceSetAttribute(wish, name, &value, sizeof value));
        };
        prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kMatmulWorkspace);
        prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, plan.split_sums);
        for (auto alignment : {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                               CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                               CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                               CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
            prefer(alignment, uint32_t(16));  // the default is 256
        int found = 0;
        const cublasStatus_t code =
            cublasLtMatmulAlgoGetHeuristic(library_, plan.operation, plan.a, plan.b, plan.d, plan.d,
                                           wish, most, results, &found);
        cublasLtMatmulPreferenceDestroy(wish);
        // Either of the two means: no such epilogue for these types.
        if (code == CUBLAS_STATUS_NOT_SUPPORTED || code == CUBLAS_STATUS_INVALID_VALUE) return list;
        CUDA_CHECK(code);
        for (const auto& result : results)
            if (found-- > 0 && result.state == CUBLAS_STATUS_SUCCESS) list.push_back(result.algo);
        return list;
    }

    bool fits(const Plan& plan, const cublasLtMatmulAlgo_t& algorithm) {
        cublasLtMatmulHeuristicResult_t result = {};
        return cublasLtMatmulAlgoCheck(library_, plan.operation, plan.a, plan.b, plan.d, plan.d,
                                       &algorithm, &result) == CUBLAS_STATUS_SUCCESS &&
               result.workspaceSize <= kMatmulWorkspace;
    }

    // Adds variants of a few suggestions that split the sum over k. Why: a weight gradient is a
    // small matrix with a sum over all rows; its tiles alone are too few to fill the GPU.
    void add_split_sums(std::vector<Algorithm>& list, const Plan& plan) {
        auto set = [](Algorithm& algorithm, cublasLtMatmulAlgoConfigAttributes_t name, auto value) {
            return cublasLtMatmulAlgoConfigSetAttribute(&algorithm, name, &value, sizeof value) ==
                   CUBLAS_STATUS_SUCCESS;
        };
        const size_t few = std::min<size_t>(4, list.size());
        for (size_t i = 0; i < few; ++i)
            for (int32_t parts : {2, 3, 4, 5, 6, 7, 8, 12, 16})
                for (uint32_t scheme : {CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE,
                                        CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE}) {
                    Algorithm split = list[i];
                    if ((plan.split_sums & scheme) &&
                        set(split, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, parts) &&
                        set(split, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, scheme) &&
                        fits(plan, split))
                        list.push_back(split);
                }
    }

    // Times all candidates on the real operands, and returns the rest of a line: the fastest, in
    // words, and its time. The words are zeros, no plan, if by_hand was faster.
    std::string fastest(const Plan& plan, const Matrix& out, const Matrix& left,
                        const Matrix& right, const Epilogue& epilogue,
                        std::vector<Algorithm> candidates) {
        if (plan.k >= 4 * std::max(plan.m, plan.n)) add_split_sums(candidates, plan);
        double first = 0, best = INFINITY;
        Algorithm choice;
        for (const Algorithm& candidate : candidates) {
            auto multiply = [&] { return run(plan, candidate, out, left, right, epilogue.add); };
            if (multiply() != CUBLAS_STATUS_SUCCESS) continue;
            const double seconds = stream_.best_seconds([&] { CUDA_CHECK(multiply()); });
            if (first == 0) first = seconds;
            if (seconds < best) best = seconds, choice = candidate;
        }
        cudaGetLastError();  // clears the error that a refusal may have left
        const double otherwise =
            epilogue.by_hand ? stream_.best_seconds(epilogue.by_hand) : INFINITY;
        if (otherwise < best) best = otherwise, choice = {};
        return in_words(choice) + format(" | %.1f us, first %.1f us", best * 1e6, first * 1e6);
    }
    static std::string in_words(const Algorithm& algorithm) {
        std::string words;
        for (uint64_t word : algorithm.data)
            words += format(words.empty() ? "%016llx" : "-%016llx", (unsigned long long)(word));
        return words;
    }

    cublasLtHandle_t library_ = nullptr;
    cublasComputeType_t compute_;
    cudaDataType_t type_;
    Stream& stream_;
    void* workspace_ = nullptr;
    std::map<Key, Plan> plans_;
    std::optional<PlanFile> file_;
};

// =================================================================================================
// 6 The device
// =================================================================================================

// What launch takes first: a kernel's name, and the kernel.
#define KERNEL(...) #__VA_ARGS__, __VA_ARGS__

// Pinned host memory, for asynchronous copies, and the event after its last copy.
struct Pinned {
    void* data = nullptr;
    Event done{cudaEventDisableTiming};
    // Waits for the last copy. Allocates the first time.
    void* take(size_t bytes) {
        if (!data) CUDA_CHECK(cudaMallocHost(&data, bytes));
        done.wait();
        return data;
    }
    ~Pinned() { cudaFreeHost(data); }
};

// --- Between GPUs: NCCL, one GPU a rank

#ifdef TINYGPT_MPI
inline void check_code(ncclResult_t code, const char* call, int line) {
    if (code != ncclSuccess)
        fail("train_gpt.cu:", line, ": ", call, " failed: ", ncclGetErrorString(code), " (",
             ncclGetLastError(nullptr), ")");
}

// What Ranks does, on the GPUs' memory, in the order of the stream. Why no ncclAllReduce: its sums
// depend on the number of ranks.
class GpuRanks {
public:
    GpuRanks(Ranks& ranks, cudaStream_t stream) : ranks_(ranks), stream_(stream) {
        if (ranks.count == 1) return;
        const ncclUniqueId id = from_first(ranks, [] {
            ncclUniqueId id;
            CUDA_CHECK(ncclGetUniqueId(&id));
            return id;
        });
        CUDA_CHECK(ncclCommInitRank(&comm_, ranks.count, id, ranks.rank));
    }
    GpuRanks(const GpuRanks&) = delete;
    ~GpuRanks() {
        if (comm_) ncclCommDestroy(comm_);
    }
    void exchange(void* to, const void* from, size_t bytes) {
        CUDA_CHECK(ncclGroupStart());
        for (int r = 0; r < ranks_.count; ++r) {
            const size_t at = size_t(r) * bytes;
            CUDA_CHECK(
                ncclSend(static_cast<const char*>(from) + at, bytes, ncclChar, r, comm_, stream_));
            CUDA_CHECK(ncclRecv(static_cast<char*>(to) + at, bytes, ncclChar, r, comm_, stream_));
        }
        CUDA_CHECK(ncclGroupEnd());
    }
    void gather(void* array, size_t bytes, size_t rounds) {
        if (ranks_.count == 1) return;
        CUDA_CHECK(ncclGroupStart());
        for (size_t t = 0; t < rounds; ++t) {
            char* round = static_cast<char*>(array) + t * bytes * size_t(ranks_.count);
            CUDA_CHECK(ncclAllGather(round + size_t(ranks_.rank) * bytes, round, bytes, ncclChar,
                                     comm_, stream_));
        }
        CUDA_CHECK(ncclGroupEnd());
    }

private:
    Ranks& ranks_;
    cudaStream_t stream_;
    ncclComm_t comm_ = nullptr;
};
#else
struct GpuRanks {
    GpuRanks(Ranks&, cudaStream_t) {}
    void exchange(void*, const void*, size_t) {}
    void gather(void*, size_t, size_t) {}
};
#endif

// Which work a CUDA graph is of: device (copies of one share a context), pass and options.
using GraphKey = std::tuple<const void*, Pass, StepOptions>;

// What the device keeps between calls: plans of products, scratch memory, CUDA graphs. A graph is
// all kernels of some work with their arguments, launched with one call. Why: a step is about 300
// kernels, and the host takes longer to launch one than a small one runs. Addresses are arguments,
// so releasing memory drops the graphs.
class CudaContext {
public:
    cudaDeviceProp gpu;
    Stream stream;
    GpuRanks ranks{*world, stream};
    std::optional<Matmuls> matmuls;
    const char* way = "";       // of the latest function, where there are several
    double agreement = 0x1p-8;  // how near to each other results of two ways must be
    std::map<std::string, bool> groups_are_right;  // of attention's kernels with wgmma
    // A gradient whose column sums the product that reads it next makes, and where they go.
    std::pair<const void*, float*> unsummed;

    CudaContext(bool tf32, cudaDataType_t type) {
        CUDA_CHECK(cudaGetDeviceProperties(&gpu, world->rank_here));
        matmuls.emplace(tf32, type, stream);
    }
    CudaContext(const CudaContext&) = delete;
    ~CudaContext() {
        cudaStreamSynchronize(stream);
        drop_graphs();
        matmuls.reset();
        cudaFree(scratch_);
    }

    // Scratch memory for one function of the device: valid until the next call. It grows on demand,
    // so never while the same work is repeated.
    template <class T>
    T* scratch(size_t count) {
        if (count * sizeof(T) > scratch_bytes_) {
            stream.synchronize();
            drop_graphs();
            CUDA_CHECK(cudaFree(scratch_));
            scratch_ = nullptr, scratch_bytes_ = 0;
            CUDA_CHECK(cudaMalloc(&scratch_, count * sizeof(T)));
            scratch_bytes_ = count * sizeof(T);
        }
        return static_cast<T*>(scratch_);
    }

    // Copies to the GPU through pinned buffers, in parts. Returns when the host's bytes were read,
    // not when the GPU has them.
    void upload(void* to, const void* from_host, size_t bytes) {
        for (size_t at = 0; at < bytes; at += kStagingBytes) {
            Pinned& buffer = staging_[next_staging_++ % kStagingBuffers];
            const size_t n = std::min(kStagingBytes, bytes - at);
            std::memcpy(buffer.take(kStagingBytes), static_cast<const char*>(from_host) + at, n);
            stream.copy(static_cast<char*>(to) + at, buffer.data, n);
            stream.mark(buffer.done);
        }
    }
    // Starts to copy the state to the host; up to two copies are pending. fetch waits for the
    // older.
    void post(const StepState* state) {
        Pinned& copy = states_[posted_++ % 2];
        stream.copy(copy.take(sizeof *state), state, sizeof *state);
        stream.mark(copy.done);
    }
    StepState fetch() {
        return *static_cast<const StepState*>(states_[fetched_++ % 2].take(sizeof(StepState)));
    }

    // Does the work. The second time it is captured into a graph, which is launched from then on.
    // Why not the first time: then matmuls make their plans, and memory grows, with calls that
    // cannot be captured.
    void replay(const GraphKey& key, auto&& work) {
        const auto found = graphs_.find(key);
        if (found == graphs_.end()) {
            // A shard's last, shorter text makes a key of its own: rare, but often in a long run.
            if (graphs_.size() >= kMostGraphs) drop_graphs();
            work();
            graphs_.emplace(key, nullptr);
            return;
        }
        if (!found->second) {
            cudaGraph_t graph = nullptr;
            CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
            work();
            CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
            CUDA_CHECK(cudaGraphInstantiate(&found->second, graph, 0));
            CUDA_CHECK(cudaGraphDestroy(graph));
        }
        CUDA_CHECK(cudaGraphLaunch(found->second, stream));
        ++replays;
    }
    void drop_graphs() {
        for (auto& [key, graph] : graphs_)
            if (graph) cudaGraphExecDestroy(graph);
        graphs_.clear();
    }
    int64_t replays = 0;  // graphs launched so far

private:
    void* scratch_ = nullptr;
    size_t scratch_bytes_ = 0;
    std::map<GraphKey, cudaGraphExec_t> graphs_;  // null: done once, not captured yet
    static constexpr size_t kMostGraphs = 16;
    // 64 x 1024 tokens fill one buffer; a batch has three such arrays.
    static constexpr size_t kStagingBytes = size_t(256) << 10, kStagingBuffers = 64;
    Pinned staging_[kStagingBuffers], states_[2];
    size_t next_staging_ = 0, posted_ = 0, fetched_ = 0;
};

// The template arguments of an attention kernel: how it multiplies, head size, how many times 16
// rows a warp has, whether warps multiply as a group.
template <class E, int HS, int kM, bool kGroup>
struct Tiles {};

// Activation: float (fp32 and tf32) or bf16.
template <class A>
struct Cuda {
    using Real = float;
    using Weight = A;
    // Why fp32: sums over a batch, and over micro-batches, want more than 8 bits.
    using Gradient = float;
    using Activation = A;
    static constexpr bool kSeparateMasters = !std::is_same_v<A, float>;
    static constexpr bool kHostMemory = false;
    static constexpr const char* kProgram = "train_gpt_cu";
    // The largest array of logits; GPT-2 at B = 64 takes 6.6 GB.
    static constexpr size_t kHeadBytes = size_t(8) << 30;

    std::shared_ptr<CudaContext> context;  // copies of a device are the same device
    bool fuse;                             // let cuBLASLt do the GELU with the matmul
    bool use_groups = true;                // multiply by wgmma in attention, where the GPU has it
    bool use_graphs = true;                // launch a step as a CUDA graph, not kernel by kernel
    size_t head_bytes = kHeadBytes;
    Ranks* ranks = world;

    Cuda(bool tf32 = false)
        : context(
              std::make_shared<CudaContext>(tf32, kSeparateMasters ? CUDA_R_16BF : CUDA_R_32F)) {
        // cuBLASLt has such kernels for 16 bits only, and elsewhere runs them as two (llm.c, pull
        // request 653), or slowly.
        fuse = kSeparateMasters && (context->gpu.major == 9 || context->gpu.major == 10);
    }

    // --- the machine

    std::string describe() const {
        const cudaDeviceProp& gpu = context->gpu;
        const char* single = context->matmuls->tf32 ? "tf32" : "fp32";
        return format("%s, %d multiprocessors, %.1f GB, %s", gpu.name, gpu.multiProcessorCount,
                      double(gpu.totalGlobalMem) / 1e9, kSeparateMasters ? "bf16" : single);
    }
    // What a model may take: some is left for matmuls, kernels' code and graphs.
    size_t free_memory() const {
        size_t free = 0, total = 0;
        CUDA_CHECK(cudaMemGetInfo(&free, &total));
        return free - std::min(free, size_t(256) << 20);
    }
    // Operations a second, measured: a product of square matrices of random numbers, in the
    // precision of this device, as large as memory allows or until it takes a millisecond.
    double peak_flops() {
        for (int n = 256;; n *= 2) {
            const size_t count = size_t(n) * n;
            A* x = allocate<A>(3 * count);
            fill_with_noise(x, 2 * count);
            const double seconds = stream().best_seconds([&] {
                multiply({x + 2 * count, n, n}, {x, n, n}, {x + count, n, n});
            });
            release(x);
            if (seconds > 1e-3 || n >= 8192 || 12 * count * sizeof(A) > free_memory())
                return 2.0 * n * n * n / seconds;
        }
    }
    double bf16_peak_flops() { return 0; }  // peak_flops is that of this device's precision
    bool bf16_products() const { return false; }
    // Bytes a second, read and written, measured by a copy within the GPU.
    double peak_bandwidth() {
        const size_t bytes = std::min(size_t(1) << 29, free_memory() / 2) / 2;
        char *from = allocate<char>(bytes), *to = allocate<char>(bytes);
        zero(from, bytes);
        const double seconds = stream().best_seconds([&] { stream().copy(to, from, bytes); });
        release(from), release(to);
        return 2 * double(bytes) / seconds;
    }
    void synchronize() { stream().synchronize(); }
    // The time of each kernel that the work launches, which is not done as a graph.
    std::vector<KernelTime> kernel_times(auto&& work) {
        const bool kept = std::exchange(use_graphs, false);
        const std::vector<KernelTime> times = stream().kernel_times(work);
        use_graphs = kept;
        return times;
    }
    // The next kernels are for that row of a table; then way() says how they were made.
    void kernels_are_for(int row) { stream().lap_row = row, context->way = ""; }
    const char* way() const { return context->way; }
    // Fails for sizes that the kernels cannot do, before any memory is taken.
    void check_sizes(const Config& config, int B) const {
        const int C = config.n_embd, NH = config.n_head, most = 65535;
        const size_t shared = context->gpu.sharedMemPerBlockOptin;
        const int widest = int(shared / norm_shared(1)) * kWarpColumns<A>;
        const int head_size = backward_shared<A, 128>(64) <= shared ? 128 : 64;
        int channels = C, heads = NH;  // the next that would do
        while (channels % 8 || channels % NH) ++channels;
        while (C / heads > head_size || C % heads) ++heads;
        if (C % 8 != 0)
            fail("on a GPU n_embd must be a multiple of 8; it is ", C, ": use --n-embd ", channels);
        if (C > widest) fail("on this GPU n_embd is at most ", widest, "; it is ", C);
        if (config.head_size() > head_size)
            fail("on a GPU a head has at most ", head_size, " channels, and n_embd / n_head is ",
                 config.head_size(), ": use --n-head ", heads);
        if (int64_t(config.n_positions) * 3 * C >= int64_t(1) << 32)
            fail("on a GPU n_positions times 3 n_embd must be below 2^32; it is ",
                 config.n_positions, " times ", 3 * C);
        if (int64_t(B) * NH > most)
            fail("on a GPU a batch has at most ", most, " heads, and this one has ", B, " times ",
                 NH, ": use --batch-size ", most / NH, " or less");
    }

    // --- a step as a CUDA graph, and its numbers

    static constexpr int kStepsBehind = 1;
    void replay(const Pass& pass, const StepOptions& options, auto&& work) {
        if (!use_graphs || pass.dropout.on()) return work();  // masks are new in every step
        context->replay({this, pass, options}, work);
    }
    void post(const StepState* state) { context->post(state); }
    StepState fetch(const StepState*) { return context->fetch(); }

    // --- memory

    template <class T>
    T* allocate(size_t count) {
        void* pointer = nullptr;
        const cudaError_t code = cudaMalloc(&pointer, std::max<size_t>(count, 1) * sizeof(T));
        if (code != cudaSuccess) cudaGetLastError();  // clears the error: the caller may go on
        if (code == cudaErrorMemoryAllocation)
            fail("out of GPU memory: ", format("%.2f", double(count * sizeof(T)) / 1e9),
                 " GB more were needed");
        CUDA_CHECK(code);
        return static_cast<T*>(pointer);
    }
    void release(auto* pointer) {
        if (pointer) context->drop_graphs();
        cudaFree(pointer);
    }
    void zero(auto* to, size_t count) {
        CUDA_CHECK(cudaMemsetAsync(to, 0, count * sizeof *to, stream()));
        stream().lap("zero");
    }
    template <class T>
    void upload(T* to, const T* from_host, size_t count) {
        context->upload(to, from_host, count * sizeof(T));
    }
    template <class T>
    void download(T* to_host, const T* from, size_t count) {
        stream().copy(to_host, from, count * sizeof(T));
        synchronize();
    }
    void weights_from_masters(Weight* weights, const Real* masters, size_t count) {
        if constexpr (kSeparateMasters)
            launch(KERNEL(round_weights_kernel), blocks_for(count, 4 * kThreads), kThreads, 0,
                   weights, masters, count);
    }

    // --- token and position embeddings

    void embed_forward(A* out, const int32_t* tokens, const A* wte, const A* wpe, int B, int T,
                       int C, int past, Dropout drop) {
        launch(KERNEL(embed_forward_kernel<A>), packs(size_t(B) * T * C), kThreads, 0, out, tokens,
               wte, wpe, B * T, T, C, past, drop);
    }
    void embed_backward(float* dwte, float* dwpe, const A* dout, const int32_t* tokens,
                        const int32_t* order, int B, int T, int C, Dropout drop) {
        const int rows = B * T, parts = blocks_for(C, kWarpColumns<A>);
        const int blocks =
            resident_blocks(embed_backward_tokens_kernel<A>, kThreads, 0, size_t(rows) * parts);
        launch(KERNEL(embed_backward_tokens_kernel<A>), blocks, kThreads, 0, dwte, dout, tokens,
               order, rows, C, drop);
        column_sums(dwpe, nullptr, dout, nullptr, B, T * C, kAdd, drop);  // of [B, T C]
    }

    // --- layernorm

    void layernorm_forward(A* out, float* mean, float* rstd, const A* x, const A* weight,
                           const A* bias, int rows, int C, double eps) {
        launch(KERNEL(layernorm_forward_kernel<A>), blocks_for(rows, kThreads / kWarp), kThreads, 0,
               out, mean, rstd, x, weight, bias, rows, C, float(eps));
    }
    void layernorm_backward(A* dx, float* dweight, float* dbias, A* dbranch, float* dbranch_bias,
                            const A* dout, const A* dresidual, const A* x, const float* mean,
                            const float* rstd, const A* weight, int rows, int C, Dropout drop,
                            bool accumulate) {
        const size_t shared = norm_shared(C);
        const int blocks = resident_blocks(layernorm_backward_kernel<A>, kNormWarps * kWarp, shared,
                                           blocks_for(rows, kNormWarps));
        float* partial = context->scratch<float>(size_t(blocks) * 3 * C);
        launch(KERNEL(layernorm_backward_kernel<A>), blocks, kNormWarps * kWarp, shared, dx,
               dbranch, partial, dout, dresidual, x, mean, rstd, weight, rows, C, drop);
        sum_partials({{dweight, dbias, dbranch_bias}}, 3, partial, blocks, C, accumulate);
    }

    // --- linear layers

    void linear_forward(A* out, const A* x, const A* w, const A* b, int rows, int C, int OC) {
        multiply({out, rows, OC}, {x, rows, C}, {w, C, OC},
                 {.kind = CUBLASLT_EPILOGUE_BIAS, .bias = b});
    }
    void linear_backward(A* dx, float* dw, const A* dout, const A* x, const A* w, int rows, int C,
                         int OC, bool accumulate) {
        multiply({dx, rows, C}, {dout, rows, OC}, transpose({w, C, OC}));
        auto& [d, dbias] = context->unsummed;
        float* sums = d == dout ? dbias : nullptr;
        weight_gradient(dw, sums, dout, x, rows, C, OC, accumulate);
        if (sums) context->unsummed = {};
    }
    void linear_gelu_forward(A* gelu, A* fc, const A* x, const A* w, const A* b, int rows, int C,
                             int OC) {
        auto by_hand = [=, this] {
            linear_forward(fc, x, w, b, rows, C, OC);
            gelu_forward(gelu, fc, size_t(rows) * OC);
        };
        const Epilogue fused{.kind = CUBLASLT_EPILOGUE_GELU_AUX_BIAS,
                             .bias = b,
                             .aux = fc,
                             .by_hand = by_hand};
        if (!fuse || !context->matmuls->multiply({gelu, rows, OC}, {x, rows, C}, {w, C, OC}, fused))
            by_hand();
    }
    void gelu_forward(A* gelu, const A* fc, size_t count) {
        launch(KERNEL(gelu_kernel<A>), packs(count), kThreads, 0, gelu, fc, count);
    }
    // Careful: with the fused GELU dfc_bias is set by the linear_backward that dfc is handed to.
    void linear_gelu_backward(A* dfc, float* dw, float* dfc_bias, const A* dout, const A* gelu,
                              const A* fc, const A* w, int rows, int C, int OC, bool accumulate) {
        const Matrix dx{dfc, rows, C}, dy{dout, rows, OC}, turned = transpose({w, C, OC});
        auto by_hand = [=, this] {
            multiply(dx, dy, turned);
            column_sums(dfc_bias, dfc, dfc, fc, rows, C, accumulate);
        };
        // Why not the epilogue that also makes the bias gradient: it would round it to bf16.
        Epilogue fused{.kind = CUBLASLT_EPILOGUE_DGELU, .aux = fc};
        if (!accumulate) fused.by_hand = by_hand;
        if (fuse && context->matmuls->multiply(dx, dy, turned, fused))
            context->unsummed = {dfc, dfc_bias};
        else
            by_hand();
        weight_gradient(dw, nullptr, dout, gelu, rows, C, OC, accumulate);
    }
    void linear_residual_forward(A* out, const A* residual, const A* x, const A* w, const A* b,
                                 int rows, int C, int OC, Dropout drop) {
        const size_t count = size_t(rows) * OC;
        auto by_hand = [=, this] {
            linear_forward(out, x, w, b, rows, C, OC);
            launch(KERNEL(residual_kernel<A>), packs(count), kThreads, 0, out, residual, count,
                   drop);
        };
        const Epilogue fused{.add = residual,
                             .kind = CUBLASLT_EPILOGUE_BIAS,
                             .bias = b,
                             .by_hand = by_hand};
        if (drop.on() ||
            !context->matmuls->multiply({out, rows, OC}, {x, rows, C}, {w, C, OC}, fused))
            by_hand();
    }

    // --- attention

    void attention_forward(A* out, float* lse, const A* qkv, int B, int T, int NH, int HS,
                           Dropout drop) {
        auto start = [&](auto tiles) {
            launch_forward(tiles, out, lse, qkv, B, 0, T, NH, HS, drop);
        };
        attend<2>("forward", out, 1, B, T, NH, HS, drop, start);
    }
    void attention_backward(A* dqkv, float* dqkv_bias, const A* dout, const A* out,
                            const float* lse, const A* qkv, int B, int T, int NH, int HS,
                            Dropout drop, bool accumulate) {
        const size_t heads = size_t(B) * NH * statistics_rows(T);
        const int width = 3 * NH * HS;
        float* partial = nullptr;
        int parts = 0;
        auto start = [&]<class E, int kHS, int kM, bool kGroup>(Tiles<E, kHS, kM, kGroup>) {
            const dim3 grid(blocks_for(T, 64 * kM), unsigned(B * NH));
            const size_t shared = backward_shared<E, kHS>(64 * kM);
            parts = B * int(grid.x);
            float2* statistics = context->scratch<float2>(heads + size_t(parts) * width / 2);
            partial = reinterpret_cast<float*>(statistics + heads);
            launch(KERNEL(attention_backward_kernel<E, kHS, kM, kGroup, false>), grid, kHeadThreads,
                   shared, dqkv, partial, statistics, dout, out, lse, qkv, T, NH, HS, drop);
            launch(KERNEL(attention_backward_kernel<E, kHS, kM, kGroup, true>), grid, kHeadThreads,
                   shared, dqkv, partial, statistics, dout, out, lse, qkv, T, NH, HS, drop);
        };
        attend<1>("backward", dqkv, 3, B, T, NH, HS, drop, start);
        sum_partials({{dqkv_bias}}, 1, partial, parts, width, accumulate);
    }
    void attention_cached(A* out, const A* qkv, int past, int n, int NH, int HS) {
        in_64_rows(HS, [&](auto tiles) {
            launch_forward(tiles, out, nullptr, qkv, 1, past, n, NH, HS, {});
        });
    }

    // --- head. Its products take all table_rows(V) rows of w and dw. Why: for an odd length, such
    // as GPT-2's 50257, cuBLASLt may lack fast kernels. The rows behind V are 0 in w, so their
    // logits are 0; the softmax leaves them alone, so they add nothing to dx and dw.

    // Rows of logits at a time.
    static int head_rows(int rows, int V, size_t bytes) {
        return int(blocks_for(rows, blocks_for(size_t(rows) * table_rows(V) * sizeof(A), bytes)));
    }
    static size_t head_workspace(int rows, int V) {
        return size_t(head_rows(rows, V, kHeadBytes)) * table_rows(V);
    }

    void head_forward(float* losses, A* logits, const A* x, const A* w, const int32_t* targets,
                      int rows, int C, int V) {
        head_forward_backward(losses, nullptr, nullptr, logits, x, w, targets, rows, C, V, 0, kSet);
    }
    // For as many rows at a time as there are logits. With scale 0: losses only.
    void head_forward_backward(float* losses, A* dx, float* dw, A* logits, const A* x, const A* w,
                               const int32_t* targets, int rows, int C, int V, float scale,
                               bool accumulate) {
        const int step = head_rows(rows, V, head_bytes), width = table_rows(V);
        const Matrix table{w, width, C};
        for (int first = 0; first < rows; first += step) {
            const int n = std::min(step, rows - first);
            const Matrix x_rows{x + size_t(first) * C, n, C}, scores{logits, n, width};
            multiply(scores, x_rows, transpose(table));
            softmax_cross_entropy(losses + first, logits, targets + first, n, V, scale);
            if (scale <= 0) continue;
            multiply({dx + size_t(first) * C, n, C}, scores, table);  // the scores are dlogits now
            multiply({dw, width, C}, transpose(scores), x_rows,
                     {.in_fp32 = true, .add = accumulate || first > 0 ? dw : nullptr});
        }
    }
    void head_logits(float* logits, const A* x, const A* w, int rows, int C, int V) {
        multiply({logits, rows, V}, {x, rows, C}, transpose({w, V, C}), {.in_fp32 = true});
    }

    // --- the update

    void begin_step(StepState* state, double lr) {
        launch(KERNEL(begin_step_kernel), 1, 1, 0, state, lr);
    }
    void add_loss(StepState* state, const float* losses, int rows, double scale, int into = 0) {
        launch(KERNEL(sum_kernel<float>), 1, kOneBlock, 0, state->loss_of(into), losses, rows,
               scale, false);
    }
    void square_sums(double* sums, const float* grads, size_t count) {
        launch(KERNEL(square_sums_kernel), blocks_for(count, kNormChunk), kThreads, 0, sums, grads,
               count);
    }
    void norm_of_sums(StepState* state, const double* sums, size_t chunks) {
        launch(KERNEL(sum_kernel<double>), 1, kOneBlock, 0, &state->grad_norm, sums, int(chunks), 1,
               true);
    }
    template <class T>
    void add(T* to, const T* from, size_t count) {
        launch(KERNEL(add_kernel<T>), blocks_for(count, kThreads), kThreads, 0, to, from, count);
    }
    void copy(auto* to, const auto* from, size_t count) {
        stream().copy(to, from, count * sizeof *to);
    }
    void exchange(auto* to, const auto* from, size_t count) {
        context->ranks.exchange(to, from, count * sizeof *to);
        stream().lap("exchange");
    }
    void begin_gather(auto* array, size_t count) { gather(array, count, 1); }
    bool arrived(bool) { return true; }  // in the order of the stream
    void gather(auto* array, size_t count, size_t rounds) {
        context->ranks.gather(array, count * sizeof *array, rounds);
    }
    void judge_step(StepState* state, Guards guards) {
        launch(KERNEL(judge_step_kernel), 1, 1, 0, state, guards);
    }
    void adamw(Weight* weights, float* masters, float* m, float* v, const float* grads,
               size_t count, size_t decayed, const StepState* state, AdamW hyper) {
        const int blocks =
            resident_blocks(adamw_kernel<Weight>, kThreads, 0, blocks_for(count, 4 * kThreads));
        launch(KERNEL(adamw_kernel<Weight>), blocks, kThreads, 0, weights, masters, m, v, grads,
               count, decayed, state, hyper);
    }

private:
    Stream& stream() const { return context->stream; }
    // kernel<<<grid, block, shared, stream>>>(arguments...). shared: bytes for each block, beside
    // the kernel's own arrays. KERNEL(kernel) is the first two; the name is for errors and for
    // bench.
    template <class... P>
    void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared,
                std::type_identity_t<P>... arguments) {
        allow_shared(kernel, shared);
        kernel<<<grid, block, shared, stream()>>>(arguments...);
        check_code(cudaGetLastError(), name, __LINE__);
        stream().lap(name);
    }
    // Lets a kernel use more than 48 KB of shared memory in a block, its own arrays included.
    static void allow_shared(auto* kernel, size_t bytes) {
        if (bytes > 40 * 1024)
            CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            int(bytes)));
    }
    // Random numbers, a few copied over and over. Why: the numbers decide how much power a product
    // takes, and so how fast it is.
    void fill_with_noise(A* to, size_t count) {
        std::vector<A> noise(std::min<size_t>(count, 1 << 14));
        for (size_t i = 0; i < noise.size(); ++i) noise[i] = A(float(random_normal(1, i)));
        upload(to, noise.data(), noise.size());
        for (size_t done = noise.size(); done < count; done *= 2)
            stream().copy(to + done, to, std::min(done, count - done) * sizeof(A));
    }
    static unsigned packs(size_t count) { return blocks_for(count, size_t(kThreads) * kPack<A>); }
    // As many blocks as the GPU can hold at once, at most `enough`, for kernels whose blocks share
    // all work: one more would run alone.
    int resident_blocks(auto* kernel, int threads, size_t shared, size_t enough) const {
        int each = 0;
        allow_shared(kernel, shared);
        CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared));
        return int(std::clamp<size_t>(size_t(context->gpu.multiProcessorCount) * each, 1,
                                      std::max<size_t>(1, enough)));
    }
    void multiply(const Matrix& out, const Matrix& left, const Matrix& right,
                  const Epilogue& epilogue = {}) const {
        if (!context->matmuls->multiply(out, left, right, epilogue))
            fail("cuBLASLt has no kernel for ", context->matmuls->refused, " on ",
                 context->gpu.name,
                 ": CUBLASLT_LOG_LEVEL=5 makes it say why; a newer CUDA Toolkit may have one");
    }
    // dw [C, OC] (+)= x^T dout; dbias [OC], if not null, (+)= column sums of dout. The library may
    // make the sums while it multiplies, but only sets them.
    void weight_gradient(float* dw, float* dbias, const A* dout, const A* x, int rows, int C,
                         int OC, bool accumulate) {
        const Matrix out{dw, C, OC}, left = transpose({x, rows, C}), right{dout, rows, OC};
        Epilogue epilogue{.in_fp32 = true, .add = accumulate ? dw : nullptr};
        auto by_hand = [=, this] {
            multiply(out, left, right, epilogue);
            if (dbias) column_sums(dbias, nullptr, dout, nullptr, rows, OC, accumulate);
        };
        if (!dbias) return by_hand();
        float* sums = accumulate ? context->scratch<float>(size_t(OC)) : dbias;
        Epilogue fused = epilogue;
        fused.kind = CUBLASLT_EPILOGUE_BGRADA, fused.bias = sums;
        if (!accumulate) fused.by_hand = by_hand;
        if (!context->matmuls->multiply(out, left, right, fused))
            by_hand();
        else if (accumulate)
            add(dbias, sums, size_t(OC));
    }
    // sums [C] (+)= column sums of drop(d) [rows, C]; with fc, of product = d gelu'(fc).
    void column_sums(float* sums, A* product, const A* d, const A* fc, int rows, int C,
                     bool accumulate, Dropout drop = {}) {
        const dim3 grid(blocks_for(C, kWarpColumns<A>),
                        std::min<unsigned>(256, blocks_for(rows, kThreads / kWarp)));
        float* partial = context->scratch<float>(size_t(grid.y) * C);
        launch(KERNEL(column_sums_kernel<A>), grid, kThreads, 0, partial, product, d, fc, rows, C,
               drop);
        sum_partials({{sums}}, 1, partial, int(grid.y), C, accumulate);
    }
    void sum_partials(ThreePointers to, unsigned tables, const float* partial, int parts, int C,
                      bool accumulate) {
        const dim3 grid(blocks_for(C, kWarp), tables), block(kWarp, std::min(kWarp, parts));
        launch(KERNEL(sum_partials_kernel), grid, block, 0, to, partial, parts, int(tables) * C, C,
               accumulate);
    }
    void softmax_cross_entropy(float* losses, A* logits, const int32_t* targets, int rows, int V,
                               float scale) {
        const cudaDeviceProp& gpu = context->gpu;
        // For two blocks. 1 KB is the system's, and 1 KB for the static part: ptxas rounds it up to
        // the largest alignment of any kernel.
        const size_t most = gpu.sharedMemPerMultiprocessor / 2 - 2048 - 16;
        const size_t kept = std::min<size_t>(blocks_for(V, kPack<A>), most / 16),
                     shared = kept * 16 + 16;
        launch(KERNEL(softmax_cross_entropy_kernel<A>), rows, kHeadRowThreads, shared, losses,
               logits, targets, V, table_rows(V), int(kept) * kPack<A>, scale);
    }

    static size_t norm_shared(int C) {
        return sizeof(float) * kNormWarps * 3 * blocks_for(C, kWarpColumns<A>) * kWarpColumns<A>;
    }
    // Shared memory of attention's kernels: the rows that a block holds, and two tiles of two
    // tables; backward holds rows of two tables, and, at most 1 KB, statistics.
    template <class E, int HS>
    static constexpr size_t forward_shared(int held) {
        return size_t(held + 4 * kStreamedRows<E, HS>) * HS * sizeof(A);
    }
    template <class E, int HS>
    static constexpr size_t backward_shared(int held) {
        return forward_shared<E, HS>(2 * held) + 1024;
    }
    template <class E, int HS, int kM, bool kGroup>
    void launch_forward(Tiles<E, HS, kM, kGroup>, A* out, float* lse, const A* qkv, int B, int past,
                        int n, int NH, int head_size, Dropout drop) {
        const dim3 grid(blocks_for(n, 64 * kM), unsigned(B * NH));
        launch(KERNEL(attention_forward_kernel<E, HS, kM, kGroup>), grid, kHeadThreads,
               forward_shared<E, HS>(64 * kM), out, lse, qkv, past, n, NH, head_size, drop);
    }
    // Calls start(Tiles) for a block of 64 rows, whatever the head size.
    void in_64_rows(int HS, auto&& start) {
        auto padded = [&](auto element) {
            using E = decltype(element);
            context->way = std::is_same_v<E, float> ? "" : " (mma.sync)";
            if (HS <= 32) return start(Tiles<E, 32, 1, false>());
            if (HS <= 64) return start(Tiles<E, 64, 1, false>());
            if constexpr (!std::is_same_v<E, Tf32>) start(Tiles<E, 128, 1, false>());
        };
        if constexpr (kSeparateMasters)
            padded(bf16());
        else if (context->matmuls->tf32 && HS <= 64)
            padded(Tf32());
        else
            padded(float());
    }
    // Calls start(Tiles). In bf16 and with HS = 64 a block takes 128 rows of a head, not 64, if
    // that leaves two blocks for each multiprocessor, if two have room there (not backward's on 8.6
    // and 8.9; from 10.0 on it would spill), and without dropout, whose arithmetic needs the
    // registers. A group takes at most kMost times 64: more do not save reads of shared memory.
    // start's result is in `result` [B * T, tables, NH, HS].
    template <int kMost>
    void attend(const char* what, const A* result, int tables, int B, int T, int NH, int HS,
                Dropout drop, auto&& start) {
        if constexpr (kSeparateMasters)
            if (HS == 64 && !drop.on()) {
                const cudaDeviceProp& gpu = context->gpu;
                const size_t blocks = size_t(B) * NH * blocks_for(T, 128);
                const size_t shared =  // with the 1 KB that the driver takes of each block
                    (tables == 1 ? forward_shared<bf16, 64>(128) : backward_shared<bf16, 64>(128)) +
                    1024;
                const bool many = (tables == 1 || gpu.major < 10) &&
                                  blocks >= 2 * size_t(gpu.multiProcessorCount) &&
                                  2 * shared <= gpu.sharedMemPerMultiprocessor;
                auto run = [&](bool group) {
                    context->way = group ? " (wgmma)" : " (mma.sync)";
                    if (group && many) return start(Tiles<bf16, 64, kMost, true>());
                    if (group) return start(Tiles<bf16, 64, 1, true>());
                    if (many) return start(Tiles<bf16, 64, 2, false>());
                    in_64_rows(HS, start);
                };
                const std::string kernel = std::string(what) + (many ? ", 128 rows" : "");
                return run(use_groups && gpu.major == 9 &&
                           groups_are_right(kernel, result, tables, B, T, NH, HS, run));
            }
        in_64_rows(HS, start);
    }
    // Proves a kernel with wgmma once: both ways must leave the same in the first rows of `result`,
    // up to rounding. Both round the same numbers to bf16, but add in other orders, so that a few
    // round the other way, by 2^-8 at most: together far below 2^-8 of the whole, which every head
    // of every table must keep to. A real fault errs by about 1.
    bool groups_are_right(const std::string& kernel, const A* result, int tables, int B, int T,
                          int NH, int HS, const std::function<void(bool)>& run) {
        const auto [found, fresh] = context->groups_are_right.try_emplace(kernel, true);
        if (!fresh) return found->second;
        const size_t heads = size_t(tables) * NH, rows = std::min<size_t>(size_t(B) * T, 4096);
        std::vector<A> wanted(rows * heads * HS), got(wanted.size());
        run(false), download(wanted.data(), result, wanted.size());
        run(true), download(got.data(), result, got.size());
        std::vector<double> sizes(heads), errors(heads);
        for (size_t i = 0; i < got.size(); ++i) {
            const double x = float(wanted[i]), error = x - float(got[i]);
            sizes[i / HS % heads] += x * x, errors[i / HS % heads] += error * error;
        }
        for (size_t h = 0; h < heads; ++h)
            if (!(std::sqrt(errors[h]) <= context->agreement * std::sqrt(sizes[h])))
                found->second = false;
        if (!found->second)
            std::fprintf(stderr,
                         "warning: attention %s: results by wgmma differ, so mma.sync is used\n",
                         kernel.c_str());
        return found->second;
    }
};

// =================================================================================================
// 7 main
// =================================================================================================

// The first GPU, if this program can run there.
inline cudaDeviceProp usable_gpu() {
    int count = 0, driver = 0;
    const cudaError_t code = cudaGetDeviceCount(&count);
    if (code == cudaErrorInsufficientDriver && cudaDriverGetVersion(&driver) == cudaSuccess &&
        driver)
        fail(format(
            "this program was built with CUDA Toolkit %d.%d, and the GPU's driver is for %d.%d "
            "at most: install a newer driver, or build with an older Toolkit (make "
            "train_gpt_cu NVCC=...)",
            CUDART_VERSION / 1000, CUDART_VERSION / 10 % 100, driver / 1000, driver / 10 % 100));
    if (code != cudaSuccess || count == 0)
        fail("there is no GPU here to train on (",
             cudaGetErrorString(code != cudaSuccess ? code : cudaErrorNoDevice),
             "): type make train_gpt && ./train_gpt to train on the CPU");
    const int here = world->rank_here;  // a GPU for each rank of this machine
    if (here >= count)
        fail("there are ", world->here, " ranks on this machine and ", count,
             " GPUs: start no more ranks here than GPUs (mpirun --map-by ppr:", count, ":node)");
    CUDA_CHECK(cudaSetDevice(here));
    cudaDeviceProp gpu;
    cudaFuncAttributes code_of_it;
    CUDA_CHECK(cudaGetDeviceProperties(&gpu, here));
    if (cudaFuncGetAttributes(&code_of_it, begin_step_kernel) == cudaErrorNoKernelImageForDevice)
        fail("this program holds no code for ", gpu.name, ", of compute capability ", gpu.major,
             ".", gpu.minor, ": type make train_gpt_cu CUDA_ARCHS=", gpu.major, gpu.minor,
             gpu.major == 9 ? "a" : "",
             gpu.major * 10 + gpu.minor < 75 ? " with CUDA Toolkit 12, as later ones begin at 7.5"
                                             : "");
    return gpu;
}

// Runs the command on the first GPU, in the given precision or the best it has.
inline int run_on_gpu(Options options) {
    const cudaDeviceProp gpu = usable_gpu();
    // bf16 and tf32 came with compute capability 8.0.
    const bool new_enough = gpu.major >= 8;
    if (options.precision.empty()) options.precision = new_enough ? "bf16" : "fp32";
    if (options.precision != "fp32" && !new_enough)
        fail("--precision ", options.precision,
             " needs a GPU of compute capability 8.0 or later, and ", gpu.name, " has ", gpu.major,
             ".", gpu.minor, ": use --precision fp32");
    auto run = [&](auto device) {
        if (options.tune_matmul)
            device.context->matmuls->tune_into("data/matmul-plans.txt", gpu.name);
        return run_command(device, options);
    };
    return options.precision == "bf16" ? run(Cuda<bf16>())
                                       : run(Cuda<float>(options.precision == "tf32"));
}

}  // namespace tinygpt

#ifndef TRAIN_GPT_CU_NO_MAIN
int main(int argc, char** argv) {
    tinygpt::use_all_cores();
    tinygpt::flush_tiny_numbers();  // on the host, as ./train_gpt and the tests do
    const auto ranks = tinygpt::start_ranks();
    return tinygpt::program(argc, argv, "train_gpt_cu", tinygpt::run_on_gpu);
}
#endif
