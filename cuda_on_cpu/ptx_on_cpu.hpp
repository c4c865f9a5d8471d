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
//
// wgmma.mma_async.m64n64k16 ("Asynchronous Warpgroup Level Matrix Instructions", 9.7.15.5.1.1): warp
// w of the group has rows 16w .. 16w + 15 of A and D in the layouts of m16n8k16, D as eight 16 x 8
// side by side. B, 16 x 64, is read from shared memory as its descriptor says (9.7.15.5.1.2).

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

// Shared memory as a descriptor sees it: addresses of 18 bits. The block's dynamic memory begins
// behind 1 KB of the system's and is aligned as declared, and no better.
inline size_t window_start() {
    const size_t alignment = cuda_on_cpu::worker->dynamic_alignment;
    return 1024 / alignment * alignment + alignment;
}
inline unsigned window_address(const void* p) {
    const auto* dynamic = cuda_on_cpu::worker->dynamic;
    if (!dynamic || !dynamic->memory.covers(p))
        cuda_on_cpu::report(Mistake::shared_memory,
                            "shared_address: not in the block's extern __shared__ memory");
    return unsigned(window_start() + size_t(static_cast<const char*>(p) - dynamic->memory.data));
}

// B of wgmma, [16][64], by its descriptor. Major K: element (k, n) lies in row n of 128 bytes,
// 8 rows of which make an atom; `stride` leads from one atom to the next. Major N (columns): in row
// k, and `leading` leads to the next 64 columns. Within an atom bits 4 to 6 of every address are
// taken xor bits 7 to 9.
CUDA_ON_CPU_UNWATCHED inline void read_operand(uint16_t* b, uint64_t descriptor, bool columns) {
    auto bytes_at = [&](int bit) { return size_t(descriptor >> bit & 0x3fff) << 4; };
    const size_t start = bytes_at(0), leading = bytes_at(16), stride = bytes_at(32);
    if (descriptor >> 62 != 1 || (descriptor & 0x3fff'c000'c000'c000ull) != 0)
        cuda_on_cpu::report(Mistake::other,
                            cuda_on_cpu::text("wgmma: the descriptor %016llx has other than the "
                                              "swizzle of 128 bytes with base offset 0",
                                              (unsigned long long)(descriptor)));
    char* data = cuda_on_cpu::worker->dynamic->memory.data;
    for (size_t k = 0; k < 16; k++)
        for (size_t n = 0; n < 64;
             n += columns ? 8 : 1) {  // 16 bytes, or every 16th k with 8 of them
            if (!columns && k % 8 != 0) continue;
            size_t at = columns ? start + k / 8 * stride + k % 8 * 128 + n / 64 * leading + n * 2
                                : start + n / 8 * stride + n % 8 * 128 + k * 2;
            at ^= (at >> 7 & 7) << 4;
            const char* from = data + ptrdiff_t(at) - ptrdiff_t(window_start());
            if (!cuda_on_cpu::worker->dynamic->memory.holds(from, 16))
                cuda_on_cpu::report(Mistake::shared_memory,
                                    cuda_on_cpu::text("wgmma: B lies at byte %ld of extern "
                                                      "__shared__, which has %zu bytes",
                                                      long(from - data),
                                                      cuda_on_cpu::worker->dynamic->memory.bytes));
            cuda_on_cpu::watch_read(from, 16, *cuda_on_cpu::self);
            uint16_t eight[8];
            std::memcpy(eight, from, 16);
            for (size_t i = 0; i < 8; i++)
                b[columns ? k * 64 + n + i : (k + i) * 64 + n] = eight[i];
        }
}

// What a lane brings to wgmma, and gets: `result` holds its accumulators, before and after.
struct GroupLane {
    const unsigned* a;
    uint64_t descriptor;
    bool columns, add;
    float result[32];
    uint16_t b[16 * 64];  // lane 0's: what was read
};

// Reports what must not be while a wgmma is started.
inline void check_group(const GroupLane& mine, unsigned warp) {
    auto& w = *cuda_on_cpu::worker;
    if ((warp / 4 + 1) * 128 > w.threads.size())
        cuda_on_cpu::report(Mistake::warp, "wgmma: a group is four whole warps");
    for (const Thread& t : w.threads)
        if (t.copied != cuda_on_cpu::Copies::published)
            cuda_on_cpu::report(Mistake::race,
                                "wgmma: thread " + cuda_on_cpu::text(t.index) +
                                    " copied to shared memory with no fence.proxy.async between "
                                    "copy_async_wait and the barrier");
    auto& words = w.group_words[warp / 4];
    const cuda_on_cpu::GroupWord word{mine.descriptor, mine.columns, mine.add,
                                      cuda_on_cpu::self->site.line};
    const size_t number = w.warp_words[warp]++;
    if (number == words.size()) words.push_back(word);
    const auto& first = words[number];
    if (first.descriptor != word.descriptor || first.columns != word.columns ||
        first.add != word.add || first.line != word.line)
        cuda_on_cpu::report(Mistake::warp,
                            "wgmma: the four warps of a group must say the same, with the same "
                            "descriptor; an earlier one said another in " +
                                cuda_on_cpu::text("line %d", first.line));
}

inline void multiply_group(void* const* lanes, unsigned) {
    auto lane_data = [&](int lane) { return static_cast<GroupLane*>(lanes[lane]); };
    GroupLane& first = *lane_data(0);
    check_group(first, cuda_on_cpu::self->rank / 32);
    read_operand(first.b, first.descriptor, first.columns);
    float A[16][16], B[16][64], D[16][64] = {};
    for (int lane = 0; lane < 32; lane++) {
        const GroupLane& mine = *lane_data(lane);
        if (mine.descriptor != first.descriptor || mine.add != first.add)
            cuda_on_cpu::report(Mistake::warp, "wgmma: the lanes give different descriptors");
        for (int i = 0; i < 8; i++)
            A[lane / 4 + i / 2 % 2 * 8][lane % 4 * 2 + i % 2 + i / 4 * 8] =
                bf16_half(mine.a[i / 2], i % 2);
    }
    for (int k = 0; k < 16; k++)
        for (int n = 0; n < 64; n++) B[k][n] = bf16_half(first.b[k * 64 + n], 0);
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < 64; n++) D[i][n] += A[i][k] * B[k][n];
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 32; i++) {
            float& d = lane_data(lane)->result[i];
            const float sum = D[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2];
            d = first.add ? d + sum : sum;
        }
}

// The running thread, for wgmma. It came with 9.0 and went with it.
inline Thread& thread_of_9_0(const char* what) {
    Thread& t = cuda_on_cpu::running_thread(what);
    if (cuda_on_cpu::settings().major != 9)
        cuda_on_cpu::report(Mistake::other,
                            cuda_on_cpu::text("%s needs compute capability 9.0", what));
    return t;
}

// Accumulators of a wgmma under way hold poison; whoever changed them is told.
inline void check_untouched(const float* d) {
    for (size_t i = 0; i < 32 * sizeof(float); i++)
        if (reinterpret_cast<const unsigned char*>(d)[i] != cuda_on_cpu::poison_byte)
            cuda_on_cpu::report(Mistake::race,
                                "the accumulators of a wgmma were changed before group_wait");
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
    cuda_on_cpu_ptx::thread_of_8_0("mma_tf32_16x8x8()");
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
    auto& t = cuda_on_cpu::running_thread("copy_async_16()");
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
    auto& t = cuda_on_cpu::running_thread("copy_async_commit()");
    t.group_ends.push_back(t.copies.size());
}
// cp.async.wait_group N: all but the N latest groups have arrived.
template <int N>
CUDA_ON_CPU_UNWATCHED __device__ inline void copy_async_wait() {
    auto& t = cuda_on_cpu::running_thread("copy_async_wait()");
    if (t.group_ends.size() <= size_t(N)) return;
    size_t groups = t.group_ends.size() - size_t(N), done = t.group_ends[groups - 1];
    for (size_t i = 0; i < done; i++) {
        std::memcpy(t.copies[i].to, t.copies[i].bytes, 16);
        cuda_on_cpu::watch_copy_done(t.copies[i].to);
    }
    if (done) t.copied = cuda_on_cpu::Copies::arrived;
    t.copies.erase(t.copies.begin(), t.copies.begin() + long(done));
    t.group_ends.erase(t.group_ends.begin(), t.group_ends.begin() + long(groups));
    for (size_t& end : t.group_ends) end -= done;
}

__device__ inline unsigned shared_address(const void* place) {
    cuda_on_cpu_ptx::thread_of_8_0("shared_address()");
    return cuda_on_cpu_ptx::window_address(place);
}

// fence.proxy.async.shared::cta: this thread's copies that have arrived may be read by wgmma, after
// a barrier.
__device__ inline void group_publish() {
    using cuda_on_cpu::Copies;
    auto& t = cuda_on_cpu_ptx::thread_of_9_0("group_publish()");
    t.copied = t.copied == Copies::arrived || t.copied == Copies::published ? Copies::published
                                                                            : Copies::fenced_late;
}
// wgmma.fence.sync.aligned. Stricter than PTX: every batch begins with one.
__device__ inline void group_begin(float (&)[8][4]) {
    cuda_on_cpu_ptx::thread_of_9_0("group_begin()").group_begun = true;
}
// wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16: computed at once and kept back.
template <bool kColumns>
__device__ inline void group_mma(float (&d)[8][4], const unsigned (&a)[4], uint64_t b, bool add,
                                 CUDA_ON_CPU_HERE) {
    auto& t = cuda_on_cpu_ptx::thread_of_9_0("group_mma()");
    if (!t.group_begun)
        cuda_on_cpu::report(cuda_on_cpu::Mistake::race,
                            "group_mma(): no group_begin() since the last batch: what was done to "
                            "its registers before has no order");
    cuda_on_cpu_ptx::GroupLane mine{a, b, kColumns, add, {}, {}};
    const float* before = d[0];
    for (const auto& product : t.products)
        if (product.d == d[0]) cuda_on_cpu_ptx::check_untouched(d[0]), before = product.result;
    std::memcpy(mine.result, before, sizeof mine.result);
    cuda_on_cpu::warp_operation(cuda_on_cpu_ptx::all_lanes, &mine, cuda_on_cpu_ptx::multiply_group,
                                true, {"group_mma()", file, line});
    t.products.push_back({d[0], {}, b, kColumns, {}});
    if (t.rank % 32 == 0) t.products.back().b.assign(std::begin(mine.b), std::end(mine.b));
    std::memcpy(t.products.back().result, mine.result, sizeof mine.result);
    std::memset(static_cast<void*>(d[0]), cuda_on_cpu::poison_byte, sizeof mine.result);
}
// wgmma.commit_group.sync.aligned
__device__ inline void group_end() {
    auto& t = cuda_on_cpu_ptx::thread_of_9_0("group_end()");
    t.product_ends.push_back(t.products.size());
    t.group_begun = false;
}
// wgmma.wait_group.sync.aligned N: all but the N latest batches are done.
template <int N>
__device__ inline void group_wait(float (&)[8][4]) {
    auto& t = cuda_on_cpu_ptx::thread_of_9_0("group_wait()");
    t.group_begun = false;
    if (t.products.size() > (t.product_ends.empty() ? 0 : t.product_ends.back()))
        cuda_on_cpu::report(cuda_on_cpu::Mistake::other,
                            "group_wait(): a wgmma was not ended by group_end(), and is not waited "
                            "for");
    if (t.product_ends.size() <= size_t(N)) return;
    const size_t batches = t.product_ends.size() - size_t(N), done = t.product_ends[batches - 1];
    for (size_t i = 0; i < done; i++) {
        const auto& product = t.products[i];
        if (!product.b.empty()) {
            uint16_t now[16 * 64];
            cuda_on_cpu_ptx::read_operand(now, product.descriptor, product.columns);
            if (!std::equal(product.b.begin(), product.b.end(), now))
                cuda_on_cpu::report(cuda_on_cpu::Mistake::race,
                                    "shared memory that a wgmma reads was changed before "
                                    "group_wait()");
        }
        bool latest = true;
        for (size_t j = i + 1; j < t.products.size(); j++) latest &= t.products[j].d != product.d;
        if (!latest) continue;
        cuda_on_cpu_ptx::check_untouched(product.d);
        std::memcpy(product.d, product.result, sizeof product.result);
    }
    t.products.erase(t.products.begin(), t.products.begin() + long(done));
    t.product_ends.erase(t.product_ends.begin(), t.product_ends.begin() + long(batches));
    for (size_t& end : t.product_ends) end -= done;
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
