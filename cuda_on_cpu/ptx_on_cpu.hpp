// ptx_on_cpu.hpp: the PTX wrappers of train_gpt.cu with their documented meaning, lane by lane.
//
// The translator includes it in place of the section "PTX wrappers", which may lie in a namespace:
// so there is no #include here. Source of every layout: NVIDIA, PTX ISA, section "Warp-level matrix
// instructions" (9.7.14.5: matrix fragments for mma.m16n8k16 with floating point type, for
// mma.m16n8k8, ldmatrix), "Data movement: cp.async" and "cvt". With
//     g = lane / 4   (the table's groupID)   and   t = lane % 4   (threadID_in_group)
// a lane's fragment elements lie, as (row, column):
//
//   m16n8k16, bf16, two elements per register, the lower half first
//     A, 16 x 16:  a0 a1  (g, 2t + 0 1)      a2 a3  (g + 8, 2t + 0 1)
//                  a4 a5  (g, 2t + 8 9)      a6 a7  (g + 8, 2t + 8 9)
//     B, 16 x 8:   b0 b1  (2t + 0 1, g)      b2 b3  (2t + 8 9, g)
//   m16n8k8, tf32, one element per register
//     A, 16 x 8:   a0 (g, t)   a1 (g + 8, t)   a2 (g, t + 4)   a3 (g + 8, t + 4)
//     B, 8 x 8:    b0 (t, g)   b1 (t + 4, g)
//   both, fp32
//     C, D, 16 x 8:  c0 c1  (g, 2t + 0 1)    c2 c3  (g + 8, 2t + 0 1)

namespace cuda_on_cpu_ptx {

using cuda_on_cpu::Mistake;
using cuda_on_cpu::Site;
using cuda_on_cpu::Thread;

inline constexpr unsigned all_lanes = 0xffffffffu;

inline float bits_to_float(unsigned bits) { return __uint_as_float(bits); }
// The bf16 in the lower (half 0) or upper (half 1) part of a register.
inline float bf16_half(unsigned bits, int half) {
    return bits_to_float(half ? bits & 0xffff0000u : bits << 16);
}

// The running thread, which an older GPU would stop here: mma on bf16 and copies that do not wait
// came with 8.0.
inline Thread& thread_of_8_0(const char* what) {
    Thread& t = cuda_on_cpu::running_thread(what);
    if (cuda_on_cpu::settings().major < 8)
        cuda_on_cpu::report(Mistake::other,
                            cuda_on_cpu::text("%s needs compute capability 8.0", what));
    return t;
}

// What a lane brings to a matrix multiplication.
struct MmaLane {
    float* d;
    const unsigned* a;
    const unsigned* b;
};

// D += A B for one 16 x 8 tile, the sum over k in ascending order, then spread over the lanes.
template <int K>
void multiply_tiles(void* const* lanes, const float (&A)[16][K], const float (&B)[K][8]) {
    float D[16][8];
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 8; j++) D[i][j] = 0;
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < K; k++)
            for (int j = 0; j < 8; j++) D[i][j] += A[i][k] * B[k][j];
    for (int lane = 0; lane < 32; lane++) {
        float* d = static_cast<MmaLane*>(lanes[lane])->d;
        int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; i++) d[i] += D[g + i / 2 * 8][2 * t + i % 2];
    }
}

inline void multiply_bf16(void* const* lanes, unsigned) {
    float A[16][16], B[16][8];
    for (int lane = 0; lane < 32; lane++) {
        auto* mine = static_cast<MmaLane*>(lanes[lane]);
        int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 8; i++)
            A[g + i / 2 % 2 * 8][2 * t + i % 2 + i / 4 * 8] = bf16_half(mine->a[i / 2], i % 2);
        for (int i = 0; i < 4; i++)
            B[2 * t + i % 2 + i / 2 * 8][g] = bf16_half(mine->b[i / 2], i % 2);
    }
    multiply_tiles(lanes, A, B);
}

// The tensor core looks at the upper 19 bits of a tf32 operand.
inline float tf32_operand(unsigned bits) { return bits_to_float(bits & 0xffffe000u); }

inline void multiply_tf32(void* const* lanes, unsigned) {
    float A[16][8], B[8][8];
    for (int lane = 0; lane < 32; lane++) {
        auto* mine = static_cast<MmaLane*>(lanes[lane]);
        int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; i++) A[g + i % 2 * 8][t + i / 2 * 4] = tf32_operand(mine->a[i]);
        for (int i = 0; i < 2; i++) B[t + i * 4][g] = tf32_operand(mine->b[i]);
    }
    multiply_tiles(lanes, A, B);
}

// What a lane brings to ldmatrix: the address of one row of 8 elements of 2 bytes.
struct LoadLane {
    const void* row;
    unsigned* result;
};

// Matrix m has the rows that lanes 8m to 8m + 7 point at, and fills register m: lane l receives the
// elements (l / 4, 2 (l % 4) + 0 1), or with `transposed` those of the transposed matrix.
template <int Matrices, bool Transposed>
CUDA_ON_CPU_UNWATCHED void load_matrices(void* const* lanes, unsigned) {
    for (int m = 0; m < Matrices; m++) {
        uint16_t rows[8][8];
        for (int r = 0; r < 8; r++) {
            const void* row = static_cast<LoadLane*>(lanes[8 * m + r])->row;
            const Thread& t =
                cuda_on_cpu::worker
                    ->threads[cuda_on_cpu::self->rank / 32 * 32 + unsigned(8 * m + r)];
            cuda_on_cpu::check_shared_access(row, 16, "ldmatrix", t);
            cuda_on_cpu::watch_read(row, 16, t);
            std::memcpy(rows[r], row, 16);
        }
        for (int lane = 0; lane < 32; lane++) {
            int i = lane / 4, j = lane % 4 * 2;
            unsigned low = Transposed ? rows[j][i] : rows[i][j],
                     high = Transposed ? rows[j + 1][i] : rows[i][j + 1];
            static_cast<LoadLane*>(lanes[lane])->result[m] = low | high << 16;
        }
    }
}

template <int Matrices, bool Transposed>
void load(unsigned* result, const void* row, Site site) {
    LoadLane mine{row, result};
    cuda_on_cpu::warp_operation(all_lanes, &mine, load_matrices<Matrices, Transposed>, true, site);
}

}  // namespace cuda_on_cpu_ptx

// mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32: d += a b
__device__ inline void mma_bf16_16x8x16(float (&d)[4], const unsigned (&a)[4],
                                        const unsigned (&b)[2], CUDA_ON_CPU_HERE) {
    cuda_on_cpu_ptx::thread_of_8_0("mma_bf16_16x8x16()");
    cuda_on_cpu_ptx::MmaLane mine{d, a, b};
    cuda_on_cpu::warp_operation(cuda_on_cpu_ptx::all_lanes, &mine, cuda_on_cpu_ptx::multiply_bf16,
                                true, {"mma_bf16_16x8x16()", file, line});
}

// mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32: d += a b
__device__ inline void mma_tf32_16x8x8(float (&d)[4], const unsigned (&a)[4],
                                       const unsigned (&b)[2], CUDA_ON_CPU_HERE) {
    cuda_on_cpu_ptx::MmaLane mine{d, a, b};
    cuda_on_cpu::warp_operation(cuda_on_cpu_ptx::all_lanes, &mine, cuda_on_cpu_ptx::multiply_tf32,
                                true, {"mma_tf32_16x8x8()", file, line});
}

// cvt.rna.tf32.f32: 10 bits of fraction, to nearest, ties away from zero; infinities and NaN stay.
__device__ inline unsigned to_tf32(float x) {
    unsigned bits = __float_as_uint(x);
    return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
}

// ldmatrix.sync.aligned.m8n8.x4{.trans}.shared.b16 and its .x2
__device__ inline void load_matrix_x4(unsigned (&r)[4], const void* row_address, CUDA_ON_CPU_HERE) {
    cuda_on_cpu_ptx::load<4, false>(r, row_address, {"load_matrix_x4()", file, line});
}
__device__ inline void load_matrix_x4_transposed(unsigned (&r)[4], const void* row_address,
                                                 CUDA_ON_CPU_HERE) {
    cuda_on_cpu_ptx::load<4, true>(r, row_address, {"load_matrix_x4_transposed()", file, line});
}
__device__ inline void load_matrix_x2(unsigned (&r)[2], const void* row_address, CUDA_ON_CPU_HERE) {
    cuda_on_cpu_ptx::load<2, false>(r, row_address, {"load_matrix_x2()", file, line});
}
__device__ inline void load_matrix_x2_transposed(unsigned (&r)[2], const void* row_address,
                                                 CUDA_ON_CPU_HERE) {
    cuda_on_cpu_ptx::load<2, true>(r, row_address, {"load_matrix_x2_transposed()", file, line});
}

// cp.async.cg.shared.global, 16 bytes, zeros when not valid. The bytes arrive when they are waited
// for; until then the place holds poison, so that nobody can use it too early, nor what was there
// before.
CUDA_ON_CPU_UNWATCHED __device__ inline void copy_async_16(void* shared, const void* global,
                                                           bool valid, CUDA_ON_CPU_HERE) {
    auto& t = cuda_on_cpu_ptx::thread_of_8_0("copy_async_16()");
    t.site = {"copy_async_16()", file, line};
    cuda_on_cpu::check_shared_access(shared, 16, "copy_async_16", t);
    if (valid && reinterpret_cast<uintptr_t>(global) % 16 != 0)
        cuda_on_cpu::report(cuda_on_cpu::Mistake::alignment,
                            text(t.site) + ": the global address is not a multiple of 16 bytes");
    cuda_on_cpu::AsyncCopy copy{};
    copy.to = shared;
    if (valid) cuda_on_cpu::watch_read(global, 16, t);
    if (valid) std::memcpy(copy.bytes, global, 16);
    cuda_on_cpu::watch_copy_started(shared);
    std::memset(shared, cuda_on_cpu::poison_byte, 16);
    t.copies.push_back(copy);
}
__device__ inline void copy_async_commit() {
    auto& t = cuda_on_cpu_ptx::thread_of_8_0("copy_async_commit()");
    t.group_ends.push_back(t.copies.size());
}
// cp.async.wait_group N: all but the N latest groups have arrived.
template <int N>
CUDA_ON_CPU_UNWATCHED __device__ inline void copy_async_wait() {
    auto& t = cuda_on_cpu_ptx::thread_of_8_0("copy_async_wait()");
    if (t.group_ends.size() <= size_t(N)) return;
    size_t groups = t.group_ends.size() - size_t(N), done = t.group_ends[groups - 1];
    for (size_t i = 0; i < done; i++) {
        std::memcpy(t.copies[i].to, t.copies[i].bytes, 16);
        cuda_on_cpu::watch_copy_done(t.copies[i].to);
    }
    t.copies.erase(t.copies.begin(), t.copies.begin() + long(done));
    t.group_ends.erase(t.group_ends.begin(), t.group_ends.begin() + long(groups));
    for (size_t& end : t.group_ends) end -= done;
}

// ex2.approx.ftz.f32
__device__ inline float exp2_approx(float x) {
    float y = exp2f(x);
    return y < 0x1p-126f ? 0.0f : y;
}

// cvt.rn.bf16x2.f32: to nearest, ties to even; a NaN becomes the NaN 0x7fff.
__device__ inline unsigned pack_bf16(float lo, float hi) {
    auto round = [](float x) {
        unsigned bits = __float_as_uint(x);
        return x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
    };
    return round(lo) | round(hi) << 16;
}
