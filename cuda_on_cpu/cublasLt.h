// cublasLt.h: a stand-in for the part of cuBLASLt that train_gpt.cu uses. Names, values and rules
// follow NVIDIA's cuBLAS documentation (chapter "Using the cuBLASLt API"); what that does not allow
// is refused with the status it would have, and cuda_on_cpu::last_message() says why.
//
// D = epilogue(alpha op(A) op(B) + beta C), fp32 sums in a fixed order for any number of threads.
#pragma once

#include "cuda_runtime.h"

// =================================================================================================
// Names
// =================================================================================================

typedef enum cudaDataType_t {
    CUDA_R_32F = 0,
    CUDA_R_64F = 1,
    CUDA_R_16F = 2,
    CUDA_R_16BF = 14
} cudaDataType;

typedef enum {
    CUBLAS_STATUS_SUCCESS = 0,
    CUBLAS_STATUS_NOT_INITIALIZED = 1,
    CUBLAS_STATUS_ALLOC_FAILED = 3,
    CUBLAS_STATUS_INVALID_VALUE = 7,
    CUBLAS_STATUS_ARCH_MISMATCH = 8,
    CUBLAS_STATUS_MAPPING_ERROR = 11,
    CUBLAS_STATUS_EXECUTION_FAILED = 13,
    CUBLAS_STATUS_INTERNAL_ERROR = 14,
    CUBLAS_STATUS_NOT_SUPPORTED = 15,
    CUBLAS_STATUS_LICENSE_ERROR = 16,
} cublasStatus_t;

typedef enum { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1, CUBLAS_OP_C = 2 } cublasOperation_t;

typedef enum {
    CUBLAS_COMPUTE_32F = 68,
    CUBLAS_COMPUTE_32F_PEDANTIC = 69,
    CUBLAS_COMPUTE_32F_FAST_TF32 = 77,
} cublasComputeType_t;

typedef enum { CUBLASLT_ORDER_COL = 0, CUBLASLT_ORDER_ROW = 1 } cublasLtOrder_t;
typedef enum {
    CUBLASLT_POINTER_MODE_HOST = 0,
    CUBLASLT_POINTER_MODE_DEVICE = 1
} cublasLtPointerMode_t;

typedef enum {
    CUBLASLT_EPILOGUE_DEFAULT = 1,
    CUBLASLT_EPILOGUE_BIAS = 4,
    CUBLASLT_EPILOGUE_GELU = 32,
    CUBLASLT_EPILOGUE_GELU_BIAS = CUBLASLT_EPILOGUE_GELU | CUBLASLT_EPILOGUE_BIAS,
    CUBLASLT_EPILOGUE_GELU_AUX = CUBLASLT_EPILOGUE_GELU | 128,
    CUBLASLT_EPILOGUE_GELU_AUX_BIAS = CUBLASLT_EPILOGUE_GELU_AUX | CUBLASLT_EPILOGUE_BIAS,
    CUBLASLT_EPILOGUE_DGELU = 64 | 128,
    CUBLASLT_EPILOGUE_DGELU_BGRAD = CUBLASLT_EPILOGUE_DGELU | 16,
    CUBLASLT_EPILOGUE_BGRADA = 256,
    CUBLASLT_EPILOGUE_BGRADB = 512,
} cublasLtEpilogue_t;

typedef enum {
    CUBLASLT_MATRIX_LAYOUT_TYPE = 0,
    CUBLASLT_MATRIX_LAYOUT_ORDER = 1,
    CUBLASLT_MATRIX_LAYOUT_ROWS = 2,
    CUBLASLT_MATRIX_LAYOUT_COLS = 3,
    CUBLASLT_MATRIX_LAYOUT_LD = 4,
    CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT = 5,
    CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET = 6,
} cublasLtMatrixLayoutAttribute_t;

typedef enum {
    CUBLASLT_MATMUL_DESC_COMPUTE_TYPE = 0,
    CUBLASLT_MATMUL_DESC_SCALE_TYPE = 1,
    CUBLASLT_MATMUL_DESC_POINTER_MODE = 2,
    CUBLASLT_MATMUL_DESC_TRANSA = 3,
    CUBLASLT_MATMUL_DESC_TRANSB = 4,
    CUBLASLT_MATMUL_DESC_TRANSC = 5,
    CUBLASLT_MATMUL_DESC_EPILOGUE = 7,
    CUBLASLT_MATMUL_DESC_BIAS_POINTER = 8,
    CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE = 10,
    CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER = 11,
    CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD = 12,
    CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_BATCH_STRIDE = 13,
    CUBLASLT_MATMUL_DESC_SM_COUNT_TARGET = 15,
    CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE = 22,
    CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE = 26,
} cublasLtMatmulDescAttributes_t;

typedef enum {
    CUBLASLT_MATMUL_PREF_SEARCH_MODE = 0,
    CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1,
    CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK = 3,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES = 5,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES = 6,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES = 7,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES = 8,
    CUBLASLT_MATMUL_PREF_MAX_WAVES_COUNT = 9,
    CUBLASLT_MATMUL_PREF_IMPL_MASK = 12,
} cublasLtMatmulPreferenceAttributes_t;

typedef enum {
    CUBLASLT_REDUCTION_SCHEME_NONE = 0,
    CUBLASLT_REDUCTION_SCHEME_INPLACE = 1,
    CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2,
    CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE = 4,
    CUBLASLT_REDUCTION_SCHEME_MASK = 7,
} cublasLtReductionScheme_t;

typedef enum {
    CUBLASLT_ALGO_CONFIG_ID = 0,
    CUBLASLT_ALGO_CONFIG_TILE_ID = 1,
    CUBLASLT_ALGO_CONFIG_SPLITK_NUM = 2,
    CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME = 3,
    CUBLASLT_ALGO_CONFIG_CTA_SWIZZLING = 4,
    CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION = 5,
    CUBLASLT_ALGO_CONFIG_STAGES_ID = 6,
    CUBLASLT_ALGO_CONFIG_INNER_SHAPE_ID = 7,
    CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID = 8,
} cublasLtMatmulAlgoConfigAttributes_t;

struct cublasLtContext {
    bool alive = true;
};
typedef cublasLtContext* cublasLtHandle_t;

typedef struct {
    uint64_t data[8];
} cublasLtMatmulAlgo_t;

struct cublasLtMatrixLayoutOpaque_t {
    int32_t type = CUDA_R_32F, order = CUBLASLT_ORDER_COL, batch_count = 1;
    uint64_t rows = 0, cols = 0;
    int64_t ld = 0, batch_stride = 0;
};
typedef cublasLtMatrixLayoutOpaque_t* cublasLtMatrixLayout_t;

struct cublasLtMatmulDescOpaque_t {
    int32_t compute_type = CUBLAS_COMPUTE_32F, scale_type = CUDA_R_32F,
            pointer_mode = CUBLASLT_POINTER_MODE_HOST;
    int32_t trans_a = CUBLAS_OP_N, trans_b = CUBLAS_OP_N, trans_c = CUBLAS_OP_N;
    uint32_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    void* bias = nullptr;
    int64_t bias_batch_stride = 0;
    void* aux = nullptr;
    int64_t aux_ld = 0, aux_batch_stride = 0;
    int32_t aux_type = -1, bias_type = -1, sm_count_target = 0;
};
typedef cublasLtMatmulDescOpaque_t* cublasLtMatmulDesc_t;

struct cublasLtMatmulPreferenceOpaque_t {
    uint64_t max_workspace = 0;
};
typedef cublasLtMatmulPreferenceOpaque_t* cublasLtMatmulPreference_t;

typedef struct {
    cublasLtMatmulAlgo_t algo;
    size_t workspaceSize;
    cublasStatus_t state;
    float wavesCount;
    int reserved[4];
} cublasLtMatmulHeuristicResult_t;

inline const char* cublasLtGetStatusName(cublasStatus_t status) {
    switch (status) {
        case CUBLAS_STATUS_SUCCESS: return "CUBLAS_STATUS_SUCCESS";
        case CUBLAS_STATUS_NOT_INITIALIZED: return "CUBLAS_STATUS_NOT_INITIALIZED";
        case CUBLAS_STATUS_ALLOC_FAILED: return "CUBLAS_STATUS_ALLOC_FAILED";
        case CUBLAS_STATUS_INVALID_VALUE: return "CUBLAS_STATUS_INVALID_VALUE";
        case CUBLAS_STATUS_ARCH_MISMATCH: return "CUBLAS_STATUS_ARCH_MISMATCH";
        case CUBLAS_STATUS_MAPPING_ERROR: return "CUBLAS_STATUS_MAPPING_ERROR";
        case CUBLAS_STATUS_EXECUTION_FAILED: return "CUBLAS_STATUS_EXECUTION_FAILED";
        case CUBLAS_STATUS_INTERNAL_ERROR: return "CUBLAS_STATUS_INTERNAL_ERROR";
        case CUBLAS_STATUS_NOT_SUPPORTED: return "CUBLAS_STATUS_NOT_SUPPORTED";
        case CUBLAS_STATUS_LICENSE_ERROR: return "CUBLAS_STATUS_LICENSE_ERROR";
    }
    return "CUBLAS_STATUS_UNKNOWN";
}
inline const char* cublasLtGetStatusString(cublasStatus_t status) {
    return cublasLtGetStatusName(status);
}
inline const char* cublasGetStatusName(cublasStatus_t status) {
    return cublasLtGetStatusName(status);
}
inline const char* cublasGetStatusString(cublasStatus_t status) {
    return cublasLtGetStatusName(status);
}
inline size_t cublasLtGetVersion() { return 120000; }

// An algorithm here: data[0] names it; a tag in data[1] shows that it was made by this library.
namespace cuda_on_cpu {
constexpr uint64_t kAlgorithms = 3, kAlgorithmTag = 0x6f6e2d637075;  // "on-cpu"
inline uint64_t split_of(const cublasLtMatmulAlgo_t& algo) { return algo.data[2]; }
// In how many parts sums were ever wanted, for tests.
inline std::set<uint32_t>& splits_wanted() {
    static std::set<uint32_t> all;
    return all;
}
inline cublasLtMatmulAlgo_t algorithm(uint64_t number) {
    return {{number, kAlgorithmTag, 1, CUBLASLT_REDUCTION_SCHEME_NONE, 0, 0, 0, 0}};
}
}  // namespace cuda_on_cpu

// =================================================================================================
// Handles, layouts, descriptors, preferences
// =================================================================================================

inline cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
    *handle = new cublasLtContext;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
    delete handle;
    return CUBLAS_STATUS_SUCCESS;
}

namespace cuda_on_cpu {

inline cublasStatus_t refuse(cublasStatus_t status, const std::string& why) {
    last_error().message =
        text("cuBLASLt stand-in: %s: %s", cublasLtGetStatusName(status), why.c_str());
    mistake_found(last_error().message.c_str());
    return status;
}

// Copies between an attribute and the caller's buffer, whose size must be exactly right.
template <typename T>
cublasStatus_t set_attribute(T& attribute, const void* buffer, size_t size) {
    if (!buffer || size != sizeof(T))
        return refuse(CUBLAS_STATUS_INVALID_VALUE,
                      text("this attribute has %zu bytes, not %zu", sizeof(T), size));
    std::memcpy(&attribute, buffer, size);
    return CUBLAS_STATUS_SUCCESS;
}

}  // namespace cuda_on_cpu

inline cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType type,
                                                 uint64_t rows, uint64_t cols, int64_t ld) {
    *layout = new cublasLtMatrixLayoutOpaque_t;
    (*layout)->type = type;
    (*layout)->rows = rows;
    (*layout)->cols = cols;
    (*layout)->ld = ld;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
    delete layout;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t l,
                                                       cublasLtMatrixLayoutAttribute_t attribute,
                                                       const void* buffer, size_t size) {
    using cuda_on_cpu::set_attribute;
    switch (attribute) {
        case CUBLASLT_MATRIX_LAYOUT_TYPE: return set_attribute(l->type, buffer, size);
        case CUBLASLT_MATRIX_LAYOUT_ORDER: return set_attribute(l->order, buffer, size);
        case CUBLASLT_MATRIX_LAYOUT_ROWS: return set_attribute(l->rows, buffer, size);
        case CUBLASLT_MATRIX_LAYOUT_COLS: return set_attribute(l->cols, buffer, size);
        case CUBLASLT_MATRIX_LAYOUT_LD: return set_attribute(l->ld, buffer, size);
        case CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT: return set_attribute(l->batch_count, buffer, size);
        case CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET:
            return set_attribute(l->batch_stride, buffer, size);
    }
    return cuda_on_cpu::refuse(CUBLAS_STATUS_INVALID_VALUE, "unknown layout attribute");
}

inline cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* desc,
                                               cublasComputeType_t compute_type,
                                               cudaDataType scale_type) {
    *desc = new cublasLtMatmulDescOpaque_t;
    (*desc)->compute_type = compute_type;
    (*desc)->scale_type = scale_type;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc) {
    delete desc;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d,
                                                     cublasLtMatmulDescAttributes_t attribute,
                                                     const void* buffer, size_t size) {
    using cuda_on_cpu::set_attribute;
    switch (attribute) {
        case CUBLASLT_MATMUL_DESC_COMPUTE_TYPE: return set_attribute(d->compute_type, buffer, size);
        case CUBLASLT_MATMUL_DESC_SCALE_TYPE: return set_attribute(d->scale_type, buffer, size);
        case CUBLASLT_MATMUL_DESC_POINTER_MODE: return set_attribute(d->pointer_mode, buffer, size);
        case CUBLASLT_MATMUL_DESC_TRANSA: return set_attribute(d->trans_a, buffer, size);
        case CUBLASLT_MATMUL_DESC_TRANSB: return set_attribute(d->trans_b, buffer, size);
        case CUBLASLT_MATMUL_DESC_TRANSC: return set_attribute(d->trans_c, buffer, size);
        case CUBLASLT_MATMUL_DESC_EPILOGUE: return set_attribute(d->epilogue, buffer, size);
        case CUBLASLT_MATMUL_DESC_BIAS_POINTER: return set_attribute(d->bias, buffer, size);
        case CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE:
            return set_attribute(d->bias_batch_stride, buffer, size);
        case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER: return set_attribute(d->aux, buffer, size);
        case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD: return set_attribute(d->aux_ld, buffer, size);
        case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_BATCH_STRIDE:
            return set_attribute(d->aux_batch_stride, buffer, size);
        case CUBLASLT_MATMUL_DESC_SM_COUNT_TARGET:
            return set_attribute(d->sm_count_target, buffer, size);
        case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE:
            return set_attribute(d->aux_type, buffer, size);
        case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE: return set_attribute(d->bias_type, buffer, size);
    }
    return cuda_on_cpu::refuse(CUBLAS_STATUS_INVALID_VALUE, "unknown descriptor attribute");
}

inline cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
    *preference = new cublasLtMatmulPreferenceOpaque_t;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
    delete preference;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(
    cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t attribute,
    const void* buffer, size_t size) {
    if (attribute == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES)
        return cuda_on_cpu::set_attribute(preference->max_workspace, buffer, size);
    return CUBLAS_STATUS_SUCCESS;  // the others choose among algorithms; there is one here
}

// =================================================================================================
// What is allowed
// =================================================================================================

namespace cuda_on_cpu {

struct Matmul {
    cublasLtMatmulDescOpaque_t desc;
    cublasLtMatrixLayoutOpaque_t A, B, C, D;
    const void *a, *b, *c;
    void* d;
    float alpha, beta;
    cublasLtMatmulAlgo_t algo = algorithm(0);
    uint64_t m() const { return D.rows; }
    uint64_t n() const { return D.cols; }
    uint64_t k() const { return desc.trans_a == CUBLAS_OP_N ? A.cols : A.rows; }
};

inline size_t type_bytes(int32_t type) { return type == CUDA_R_32F ? 4 : 2; }
inline bool known_type(int32_t type) { return type == CUDA_R_32F || type == CUDA_R_16BF; }

inline bool has_bias(uint32_t e) {
    return e == CUBLASLT_EPILOGUE_BIAS || e == CUBLASLT_EPILOGUE_GELU_BIAS ||
           e == CUBLASLT_EPILOGUE_GELU_AUX_BIAS;
}
inline bool has_gelu(uint32_t e) { return (e & CUBLASLT_EPILOGUE_GELU) != 0; }
inline bool is_dgelu(uint32_t e) {
    return e == CUBLASLT_EPILOGUE_DGELU || e == CUBLASLT_EPILOGUE_DGELU_BGRAD;
}
inline bool has_aux(uint32_t e) { return (e & 128) != 0; }
inline bool has_bias_gradient(uint32_t e) {
    return e == CUBLASLT_EPILOGUE_DGELU_BGRAD || e == CUBLASLT_EPILOGUE_BGRADA ||
           e == CUBLASLT_EPILOGUE_BGRADB;
}

// Elements from the start of a matrix to behind its last one, all batches.
inline uint64_t extent(const cublasLtMatrixLayoutOpaque_t& l) {
    bool by_row = l.order == CUBLASLT_ORDER_ROW;
    uint64_t lines = by_row ? l.rows : l.cols, length = by_row ? l.cols : l.rows;
    return uint64_t(l.batch_count - 1) * uint64_t(l.batch_stride) + (lines - 1) * uint64_t(l.ld) +
           length;
}

inline std::string check_layout(const char* name, const cublasLtMatrixLayoutOpaque_t& l) {
    if (!known_type(l.type))
        return text("the type %d of %s is not known here (CUDA_R_32F and CUDA_R_16BF are)", l.type,
                    name);
    if (l.order != CUBLASLT_ORDER_COL && l.order != CUBLASLT_ORDER_ROW)
        return text("the order of %s is not known here", name);
    if (l.rows == 0 || l.cols == 0) return text("%s is empty", name);
    uint64_t least = l.order == CUBLASLT_ORDER_ROW ? l.cols : l.rows;
    if (l.ld < 0 || uint64_t(l.ld) < least)
        return text("the leading dimension %ld of %s is below %lu", long(l.ld), name,
                    static_cast<unsigned long>(least));
    if (l.batch_count < 1) return text("the batch count of %s is %d", name, l.batch_count);
    return "";
}

// The shapes must fit each other. Empty if they do.
inline std::string check_shapes(const Matmul& p) {
    for (auto& [name, layout] :
         {std::pair<const char*, const cublasLtMatrixLayoutOpaque_t&>{"A", p.A},
          {"B", p.B},
          {"C", p.C},
          {"D", p.D}})
        if (std::string why = check_layout(name, layout); !why.empty()) return why;
    bool ta = p.desc.trans_a != CUBLAS_OP_N, tb = p.desc.trans_b != CUBLAS_OP_N;
    uint64_t m = ta ? p.A.cols : p.A.rows, k = p.k(), kb = tb ? p.B.cols : p.B.rows,
             n = tb ? p.B.rows : p.B.cols;
    auto number = [](uint64_t v) { return static_cast<unsigned long>(v); };
    if (m != p.m() || n != p.n() || k != kb)
        return text("op(A) is %lu x %lu, op(B) is %lu x %lu, but D is %lu x %lu", number(m),
                    number(k), number(kb), number(n), number(p.m()), number(p.n()));
    if (p.C.rows != p.D.rows || p.C.cols != p.D.cols || p.C.order != p.D.order)
        return "C and D differ in shape or order";
    if (p.B.batch_count != p.A.batch_count || p.C.batch_count != p.A.batch_count ||
        p.D.batch_count != p.A.batch_count)
        return "the batch counts differ";
    return "";
}

// The rows of the documentation's table for cublasLtMatmul with a scale in fp32 that there are here:
// what is summed how, the types of A and B, of C and D, and of a bias. Tensor cores for tf32 and
// bf16 came with compute capability 8.0.
struct TypeRow {
    int32_t compute, ab, cd, bias;
};
inline constexpr TypeRow type_rows[] =
    {{CUBLAS_COMPUTE_32F, CUDA_R_16BF, CUDA_R_16BF, CUDA_R_16BF},
     {CUBLAS_COMPUTE_32F, CUDA_R_16BF, CUDA_R_32F, CUDA_R_32F},
     {CUBLAS_COMPUTE_32F, CUDA_R_32F, CUDA_R_32F, CUDA_R_32F},
     {CUBLAS_COMPUTE_32F_PEDANTIC, CUDA_R_16BF, CUDA_R_16BF, CUDA_R_16BF},
     {CUBLAS_COMPUTE_32F_PEDANTIC, CUDA_R_16BF, CUDA_R_32F, CUDA_R_32F},
     {CUBLAS_COMPUTE_32F_PEDANTIC, CUDA_R_32F, CUDA_R_32F, CUDA_R_32F},
     {CUBLAS_COMPUTE_32F_FAST_TF32, CUDA_R_32F, CUDA_R_32F, CUDA_R_32F}};
inline std::string check_types(const Matmul& p) {
    const auto& d = p.desc;
    if (d.scale_type != CUDA_R_32F) return "the scale type must be CUDA_R_32F";
    if (d.pointer_mode != CUBLASLT_POINTER_MODE_HOST)
        return "only CUBLASLT_POINTER_MODE_HOST is known here";
    if (d.trans_c != CUBLAS_OP_N) return "C cannot be transposed";
    if (settings().major < 8 &&
        (p.A.type == CUDA_R_16BF || d.compute_type == CUBLAS_COMPUTE_32F_FAST_TF32))
        return "bf16 and tf32 need compute capability 8.0";
    const bool bias = has_bias(d.epilogue) || has_bias_gradient(d.epilogue);
    for (const TypeRow& row : type_rows)
        if (row.compute == d.compute_type && row.ab == p.A.type && row.ab == p.B.type &&
            row.cd == p.C.type && row.cd == p.D.type &&
            (!bias || d.bias_type == -1 || d.bias_type == row.bias))
            return "";
    return text(
        "the table of types has no row with compute type %d, A %d, B %d, C %d, D %d, bias "
        "%d",
        d.compute_type, p.A.type, p.B.type, p.C.type, p.D.type, d.bias_type);
}

inline std::string check_epilogue(const Matmul& p, cublasStatus_t& status) {
    const auto& d = p.desc;
    const uint32_t known[] = {1, 4, 32, 36, 160, 164, 192, 208, 256, 512};
    status = CUBLAS_STATUS_NOT_SUPPORTED;
    if (std::find(std::begin(known), std::end(known), d.epilogue) == std::end(known))
        return text("epilogue %u is not known here", d.epilogue);
    if (d.epilogue == CUBLASLT_EPILOGUE_DEFAULT) return "";
    if (p.D.order != CUBLASLT_ORDER_COL) return "epilogues want D in CUBLASLT_ORDER_COL";
    if (p.D.batch_count > 1 && has_bias_gradient(d.epilogue))
        return "bias gradients are not known here for batches";
    status = CUBLAS_STATUS_INVALID_VALUE;
    if ((has_bias(d.epilogue) || has_bias_gradient(d.epilogue)) && !d.bias)
        return "the epilogue needs CUBLASLT_MATMUL_DESC_BIAS_POINTER";
    if (has_aux(d.epilogue) && !d.aux)
        return "the epilogue needs CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER";
    if (has_aux(d.epilogue) &&
        (d.aux_ld % 8 != 0 || uint64_t(std::max<int64_t>(d.aux_ld, 0)) < p.m()))
        return text(
            "CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD is %ld; it must be a multiple of 8 and at least "
            "the %lu rows of D",
            long(d.aux_ld), static_cast<unsigned long>(p.m()));
    if (has_aux(d.epilogue) && p.D.batch_count > 1 && d.aux_batch_stride % 8 != 0)
        return "the auxiliary batch stride must be a multiple of 8";
    return "";
}

// Why: fused epilogues run on tensor-core kernels, which move 16 bytes at a time.
inline std::string check_alignment(const Matmul& p) {
    if (p.desc.epilogue == CUBLASLT_EPILOGUE_DEFAULT) return "";
    auto aligned = [](const void* q) { return uintptr_t(q) % 16 == 0; };
    if ((has_aux(p.desc.epilogue) && !aligned(p.desc.aux)) ||
        (p.desc.bias && !aligned(p.desc.bias)))
        return "bias and auxiliary pointers must be multiples of 16 bytes";
    return "";
}

// Algorithms differ in how they cut a sum; where parts are written down, they need memory for it.
inline size_t workspace_of(const Matmul& p) {
    return split_of(p.algo) > 1 ? split_of(p.algo) * p.m() * p.n() * sizeof(float) : 0;
}
inline std::string check_algorithm(const Matmul& p) {
    const auto* data = p.algo.data;
    if (data[0] >= kAlgorithms || data[1] != kAlgorithmTag || data[4] || data[5] || data[6] ||
        data[7])
        return "this is no algorithm of this library";
    if (split_of(p.algo) < 1 || split_of(p.algo) > std::max<uint64_t>(1, p.k() / 4))
        return text("k = %lu cannot be split into %lu parts", static_cast<unsigned long>(p.k()),
                    static_cast<unsigned long>(split_of(p.algo)));
    if (split_of(p.algo) > 1 && data[3] != CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE &&
        !(data[3] == CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE && p.D.type == CUDA_R_32F))
        return "a split sum needs CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE here, or OUTPUT_TYPE of "
               "fp32";
    if (split_of(p.algo) > 1 && p.desc.epilogue != CUBLASLT_EPILOGUE_DEFAULT)
        return "a split sum has no epilogue here";
    return "";
}

// What a version of the library may lack for some sizes: GELU in the epilogue, a bias gradient, a
// bias together with a C, split sums. settings().refusals chooses; a program must do without.
inline bool is_optional(const Matmul& p) {
    return has_aux(p.desc.epilogue) || has_gelu(p.desc.epilogue) ||
           has_bias_gradient(p.desc.epilogue) || (has_bias(p.desc.epilogue) && p.beta != 0) ||
           split_of(p.algo) > 1;
}
inline std::string check_optional(const Matmul& p) {
    const uint64_t seed = settings().refusals;
    if (seed == 0 || !is_optional(p)) return "";
    const uint64_t draw = mix(seed + mix(p.m() + mix(p.n() + mix(p.k() + mix(p.desc.epilogue)))));
    return seed == 1 || draw % 2 ? "it refuses what is optional: CUDA_ON_CPU_REFUSALS" : "";
}

inline cublasStatus_t check_matmul(const Matmul& p) {
    if (std::string why = check_shapes(p); !why.empty())
        return refuse(CUBLAS_STATUS_INVALID_VALUE, why);
    if (std::string why = check_types(p); !why.empty())
        return refuse(CUBLAS_STATUS_NOT_SUPPORTED, why);
    cublasStatus_t status;
    if (std::string why = check_epilogue(p, status); !why.empty()) return refuse(status, why);
    if (std::string why = check_alignment(p); !why.empty())
        return refuse(CUBLAS_STATUS_NOT_SUPPORTED, why);
    if (std::string why = check_algorithm(p); !why.empty())
        return refuse(CUBLAS_STATUS_NOT_SUPPORTED, why);
    if (std::string why = check_optional(p); !why.empty())
        return refuse(CUBLAS_STATUS_NOT_SUPPORTED, why);
    return CUBLAS_STATUS_SUCCESS;
}

// Every matrix must lie inside one live device buffer.
inline cublasStatus_t check_memory(const Matmul& p) {
    auto inside = [](const char* name, const void* q, uint64_t bytes) {
        bool on_device = false;
        std::string message;
        if (!q) return refuse(CUBLAS_STATUS_INVALID_VALUE, text("%s is a null pointer", name));
        if (!check_range(uintptr_t(q), bytes, name, on_device, message))
            return refuse(CUBLAS_STATUS_EXECUTION_FAILED, message);
        if (!on_device)
            return refuse(CUBLAS_STATUS_EXECUTION_FAILED, text("%s is not device memory", name));
        if (uintptr_t(q) % 4 != 0 && bytes >= 4)
            return refuse(CUBLAS_STATUS_NOT_SUPPORTED, text("%s is not aligned", name));
        return CUBLAS_STATUS_SUCCESS;
    };
    const auto& d = p.desc;
    size_t out = type_bytes(p.D.type), batches = size_t(p.D.batch_count - 1);
    uint64_t bias_length = d.epilogue == CUBLASLT_EPILOGUE_BGRADB ? p.n() : p.m();
    if (auto s = inside("A", p.a, extent(p.A) * type_bytes(p.A.type))) return s;
    if (auto s = inside("B", p.b, extent(p.B) * type_bytes(p.B.type))) return s;
    if (p.beta != 0)
        if (auto s = inside("C", p.c, extent(p.C) * out)) return s;
    if (auto s = inside("D", p.d, extent(p.D) * out)) return s;
    if (has_bias(d.epilogue) || has_bias_gradient(d.epilogue))
        if (auto s = inside("the bias", d.bias,
                            (batches * size_t(d.bias_batch_stride) + bias_length) * out))
            return s;
    if (has_aux(d.epilogue))
        if (auto s = inside("the auxiliary matrix", d.aux,
                            (batches * size_t(d.aux_batch_stride) + (p.n() - 1) * size_t(d.aux_ld) +
                             p.m()) *
                                out))
            return s;
    return CUBLAS_STATUS_SUCCESS;
}

// =================================================================================================
// The arithmetic
// =================================================================================================

CUDA_ON_CPU_UNWATCHED inline float load_number(const void* p, uint64_t i, int32_t type) {
    if (type == CUDA_R_32F) return static_cast<const float*>(p)[i];
    return __uint_as_float(unsigned(static_cast<const uint16_t*>(p)[i]) << 16);
}
CUDA_ON_CPU_UNWATCHED inline void store_number(void* p, uint64_t i, int32_t type, float v) {
    if (type == CUDA_R_32F) {
        static_cast<float*>(p)[i] = v;
        return;
    }
    unsigned bits = __float_as_uint(v);
    static_cast<uint16_t*>(p)[i] =
        uint16_t(v != v ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint64_t place(const cublasLtMatrixLayoutOpaque_t& l, uint64_t row, uint64_t col,
                      uint64_t batch) {
    uint64_t in_matrix =
        l.order == CUBLASLT_ORDER_ROW ? row * uint64_t(l.ld) + col : col * uint64_t(l.ld) + row;
    return batch * uint64_t(l.batch_stride) + in_matrix;
}
inline float round_to_tf32(float x) {
    unsigned bits = __float_as_uint(x);
    return (bits & 0x7f800000u) == 0x7f800000u ? x
                                               : __uint_as_float((bits + 0x1000u) & 0xffffe000u);
}

// op(X) as plain floats, `lines` x `length`: element (i, j) of op(X), or (j, i) if by_column.
inline std::vector<float> unpack(const Matmul& p, const void* x,
                                 const cublasLtMatrixLayoutOpaque_t& l, bool transposed,
                                 bool by_column, uint64_t lines, uint64_t length, uint64_t batch) {
    std::vector<float> out(lines * length);
    bool tf32 = p.desc.compute_type == CUBLAS_COMPUTE_32F_FAST_TF32;
#pragma omp parallel for if (lines * length > 10000)
    for (long i = 0; i < long(lines); i++)
        for (uint64_t j = 0; j < length; j++) {
            bool swap = transposed != by_column;
            float v =
                load_number(x, place(l, swap ? j : uint64_t(i), swap ? uint64_t(i) : j, batch),
                            l.type);
            out[uint64_t(i) * length + j] = tf32 ? round_to_tf32(v) : v;
        }
    return out;
}

// One column of op(A) op(B): sum over l of a[l][i] b[l], in parts of 64 terms (or 32, or 16, by the
// algorithm) that are then added. Why parts: the error of a sum in fp32 grows with its length; a
// GPU sums in tiles, too.
inline void multiply_part(float* sum, const float* a, const float* b, uint64_t m, uint64_t k,
                          uint64_t terms) {
    constexpr uint64_t width = 64;
    for (uint64_t i0 = 0; i0 < m; i0 += width) {
        uint64_t count = std::min(width, m - i0);
        float total[width] = {};
        for (uint64_t l0 = 0; l0 < k; l0 += terms) {
            float part[width] = {};
            for (uint64_t l = l0; l < std::min(k, l0 + terms); l++) {
                const float* row = a + l * m + i0;
                float factor = b[l];
#pragma omp simd
                for (uint64_t i = 0; i < count; i++) part[i] += row[i] * factor;
            }
            for (uint64_t i = 0; i < count; i++) total[i] += part[i];
        }
        std::memcpy(sum + i0, total, count * sizeof(float));
    }
}

// The whole column; the parts of a split sum are added in order.
inline void multiply_column(float* sum, const float* a, const float* b, uint64_t m, uint64_t k,
                            const cublasLtMatmulAlgo_t& algo) {
    const uint64_t terms = uint64_t(64) >> algo.data[0], parts = split_of(algo);
    if (parts == 1) return multiply_part(sum, a, b, m, k, terms);
    std::vector<float> part(m);
    std::fill(sum, sum + m, 0.0f);
    for (uint64_t i = 0; i < parts; i++) {
        const uint64_t from = k * i / parts, to = k * (i + 1) / parts;
        multiply_part(part.data(), a + from * m, b + from, m, to - from, terms);
        for (uint64_t j = 0; j < m; j++) sum[j] += part[j];
    }
}

// The tanh form of GELU (Hendrycks and Gimpel 2016) and its derivative.
inline float gelu(float x) {
    float u = 0.7978845608f * (x + 0.044715f * x * x * x);
    return 0.5f * x * (1 + std::tanh(u));
}
inline float gelu_derivative(float x) {
    float t = std::tanh(0.7978845608f * (x + 0.044715f * x * x * x));
    return 0.5f * (1 + t) + 0.5f * x * (1 - t * t) * 0.7978845608f * (1 + 3 * 0.044715f * x * x);
}

// Column j of D from the sums of its products; keeps the unrounded values in `sum`.
inline void finish_column(const Matmul& p, float* sum, uint64_t j, uint64_t batch) {
    const auto& d = p.desc;
    for (uint64_t i = 0; i < p.m(); i++) {
        float v = p.alpha * sum[i];
        if (p.beta != 0) v += p.beta * load_number(p.c, place(p.C, i, j, batch), p.C.type);
        if (has_bias(d.epilogue))
            v += load_number(d.bias, batch * uint64_t(d.bias_batch_stride) + i, p.D.type);
        uint64_t aux = batch * uint64_t(d.aux_batch_stride) + j * uint64_t(d.aux_ld) + i;
        if (is_dgelu(d.epilogue))
            v *= gelu_derivative(load_number(d.aux, aux, p.D.type));
        else if (has_aux(d.epilogue))
            store_number(d.aux, aux, p.D.type, v);
        if (has_gelu(d.epilogue)) v = gelu(v);
        store_number(p.d, place(p.D, i, j, batch), p.D.type, v);
        sum[i] = v;
    }
}

// Sums each of `lines` rows of `length` numbers, stored with the given strides, into the bias
// gradient.
inline void store_sums(const Matmul& p, const float* x, uint64_t lines, uint64_t length,
                       uint64_t line_stride, uint64_t stride) {
    for (uint64_t i = 0; i < lines; i++) {
        double total = 0;
        for (uint64_t j = 0; j < length; j++) total += double(x[i * line_stride + j * stride]);
        store_number(p.desc.bias, i, p.D.type, float(total));
    }
}

// Calls note(address, bytes) for each column of a column-major matrix, or row of a row-major one.
template <typename Note>
void for_each_line(const cublasLtMatrixLayoutOpaque_t& l, const void* x, Note note) {
    bool by_row = l.order == CUBLASLT_ORDER_ROW;
    uint64_t lines = by_row ? l.rows : l.cols, length = by_row ? l.cols : l.rows;
    for (uint64_t batch = 0; batch < uint64_t(l.batch_count); batch++)
        for (uint64_t j = 0; j < lines; j++) {
            uint64_t start = batch * uint64_t(l.batch_stride) + j * uint64_t(l.ld);
            note(static_cast<char*>(const_cast<void*>(x)) + start * type_bytes(l.type),
                 length * type_bytes(l.type));
        }
}

// The auxiliary matrix, as a layout.
inline cublasLtMatrixLayoutOpaque_t aux_layout(const Matmul& p) {
    cublasLtMatrixLayoutOpaque_t l = p.D;
    l.ld = p.desc.aux_ld;
    l.batch_stride = p.desc.aux_batch_stride;
    return l;
}

// For the build that watches memory: inputs must have been written, outputs now have.
inline void check_inputs(const Matmul& p) {
    auto check = [&](const char* name, const void* q, size_t bytes) {
        if (watch_first_unwritten(q, bytes) < 0) return;
        std::string message =
            text("cuda_on_cpu: cublasLtMatmul, %lu x %lu x %lu: reads %s before it was written",
                 static_cast<unsigned long>(p.m()), static_cast<unsigned long>(p.n()),
                 static_cast<unsigned long>(p.k()), name);
        mistake_found(message.c_str());
        throw Error(Mistake::uninitialised, message, "cublasLtMatmul", {}, {});
    };
    for_each_line(p.A, p.a, [&](const void* q, size_t bytes) { check("A", q, bytes); });
    for_each_line(p.B, p.b, [&](const void* q, size_t bytes) { check("B", q, bytes); });
    if (p.beta != 0)
        for_each_line(p.C, p.c, [&](const void* q, size_t bytes) { check("C", q, bytes); });
    if (is_dgelu(p.desc.epilogue))
        for_each_line(aux_layout(p), p.desc.aux, [&](const void* q, size_t bytes) {
            check("the auxiliary matrix", q, bytes);
        });
    if (has_bias(p.desc.epilogue)) check("the bias", p.desc.bias, p.m() * type_bytes(p.D.type));
}
inline void note_outputs(const Matmul& p) {
    for_each_line(p.D, p.d, watch_host_write);
    if (has_aux(p.desc.epilogue) && !is_dgelu(p.desc.epilogue))
        for_each_line(aux_layout(p), p.desc.aux, watch_host_write);
    if (has_bias_gradient(p.desc.epilogue))
        watch_host_write(p.desc.bias,
                         (p.desc.epilogue == CUBLASLT_EPILOGUE_BGRADB ? p.n() : p.m()) *
                             type_bytes(p.D.type));
}

inline void run_matmul(const Matmul& p) {
    uint64_t m = p.m(), n = p.n(), k = p.k();
    if (CUDA_ON_CPU_WATCH) check_inputs(p);
    for (uint64_t batch = 0; batch < uint64_t(p.D.batch_count); batch++) {
        auto a = unpack(p, p.a, p.A, p.desc.trans_a != CUBLAS_OP_N, true, k, m, batch);
        auto b = unpack(p, p.b, p.B, p.desc.trans_b != CUBLAS_OP_N, true, n, k, batch);
        std::vector<float> sums(m * n);
#pragma omp parallel for if (m * n * k > 10000)
        for (long j = 0; j < long(n); j++) {
            multiply_column(&sums[uint64_t(j) * m], a.data(), &b[uint64_t(j) * k], m, k, p.algo);
            finish_column(p, &sums[uint64_t(j) * m], uint64_t(j), batch);
        }
        if (p.desc.epilogue == CUBLASLT_EPILOGUE_DGELU_BGRAD)
            store_sums(p, sums.data(), m, n, 1, m);
        if (p.desc.epilogue == CUBLASLT_EPILOGUE_BGRADA) store_sums(p, a.data(), m, k, 1, m);
        if (p.desc.epilogue == CUBLASLT_EPILOGUE_BGRADB) store_sums(p, b.data(), n, k, k, 1);
    }
    if (CUDA_ON_CPU_WATCH) note_outputs(p);
}

}  // namespace cuda_on_cpu

inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t A,
    cublasLtMatrixLayout_t B, cublasLtMatrixLayout_t C, cublasLtMatrixLayout_t D,
    cublasLtMatmulPreference_t preference, int wanted, cublasLtMatmulHeuristicResult_t* results,
    int* found) {
    *found = 0;
    if (!handle || !desc || !A || !B || !C || !D || !preference || wanted < 1)
        return cuda_on_cpu::refuse(CUBLAS_STATUS_INVALID_VALUE, "null argument");
    if (cuda_on_cpu::any_stream_captures())  // fails in 13.3
        return cuda_on_cpu::refuse(CUBLAS_STATUS_INTERNAL_ERROR, "a stream is being captured");
    cuda_on_cpu::Matmul p{*desc, *A, *B, *C, *D, nullptr, nullptr, nullptr, nullptr, 1, 0, {}};
    p.algo = cuda_on_cpu::algorithm(0);
    if (auto status = cuda_on_cpu::check_matmul(p)) return status;
    for (; *found < std::min(wanted, int(cuda_on_cpu::kAlgorithms)); ++*found) {
        results[*found] = cublasLtMatmulHeuristicResult_t{};
        results[*found].algo = cuda_on_cpu::algorithm(uint64_t(*found));
        results[*found].wavesCount = 1;
    }
    return CUBLAS_STATUS_SUCCESS;
}

// Could this algorithm do the product, and with how much memory?
inline cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc,
                                              cublasLtMatrixLayout_t A, cublasLtMatrixLayout_t B,
                                              cublasLtMatrixLayout_t C, cublasLtMatrixLayout_t D,
                                              const cublasLtMatmulAlgo_t* algo,
                                              cublasLtMatmulHeuristicResult_t* result) {
    if (!handle || !desc || !A || !B || !C || !D || !algo || !result)
        return cuda_on_cpu::refuse(CUBLAS_STATUS_INVALID_VALUE, "null argument");
    cuda_on_cpu::Matmul p{*desc, *A, *B, *C, *D, nullptr, nullptr, nullptr, nullptr, 1, 0, *algo};
    if (auto status = cuda_on_cpu::check_matmul(p)) return status;
    result->workspaceSize = cuda_on_cpu::workspace_of(p);
    result->state = CUBLAS_STATUS_SUCCESS;
    result->wavesCount = 1;
    return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc,
                                     const void* alpha, const void* a, cublasLtMatrixLayout_t A,
                                     const void* b, cublasLtMatrixLayout_t B, const void* beta,
                                     const void* c, cublasLtMatrixLayout_t C, void* d,
                                     cublasLtMatrixLayout_t D, const cublasLtMatmulAlgo_t* algo,
                                     void* workspace, size_t workspace_bytes, cudaStream_t stream) {
    if (!handle || !desc || !alpha || !beta || !A || !B || !C || !D)
        return cuda_on_cpu::refuse(CUBLAS_STATUS_INVALID_VALUE, "null argument");
    cuda_on_cpu::Matmul p{*desc,
                          *A,
                          *B,
                          *C,
                          *D,
                          a,
                          b,
                          c,
                          d,
                          *static_cast<const float*>(alpha),
                          *static_cast<const float*>(beta),
                          algo ? *algo : cuda_on_cpu::algorithm(0)};
    if (auto status = cuda_on_cpu::check_matmul(p)) return status;
    if (auto status = cuda_on_cpu::check_memory(p)) return status;
    if (workspace_bytes && (!workspace || uintptr_t(workspace) % 16 != 0))
        return cuda_on_cpu::refuse(CUBLAS_STATUS_INVALID_VALUE,
                                   "the workspace is null or not aligned to 16 bytes");
    if (cuda_on_cpu::workspace_of(p) > workspace_bytes)
        return cuda_on_cpu::refuse(CUBLAS_STATUS_INVALID_VALUE,
                                   "the workspace is too small for this algorithm");
    cuda_on_cpu::submit(stream, [p] { cuda_on_cpu::run_matmul(p); });
    return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasLtMatmulAlgoConfigSetAttribute(
    cublasLtMatmulAlgo_t* algo, cublasLtMatmulAlgoConfigAttributes_t attribute, const void* buffer,
    size_t size) {
    uint32_t value = 0;
    if (auto status = cuda_on_cpu::set_attribute(value, buffer, size)) return status;
    if (attribute == CUBLASLT_ALGO_CONFIG_SPLITK_NUM)
        return cuda_on_cpu::splits_wanted().insert(value), algo->data[2] = value,
                                                           CUBLAS_STATUS_SUCCESS;
    if (attribute == CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME)
        return algo->data[3] = value, CUBLAS_STATUS_SUCCESS;
    return cuda_on_cpu::refuse(CUBLAS_STATUS_INVALID_VALUE,
                               "this attribute of an algorithm is not known here");
}
inline cublasStatus_t cublasLtMatmulAlgoConfigGetAttribute(
    const cublasLtMatmulAlgo_t* algo, cublasLtMatmulAlgoConfigAttributes_t attribute, void* buffer,
    size_t size, size_t* written) {
    const uint32_t value = attribute == CUBLASLT_ALGO_CONFIG_SPLITK_NUM ? uint32_t(algo->data[2])
                           : attribute == CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME
                               ? uint32_t(algo->data[3])
                           : attribute == CUBLASLT_ALGO_CONFIG_ID ? uint32_t(algo->data[0])
                                                                  : 0;
    if (buffer && size >= sizeof value) std::memcpy(buffer, &value, sizeof value);
    if (written) *written = sizeof value;
    return CUBLAS_STATUS_SUCCESS;
}
