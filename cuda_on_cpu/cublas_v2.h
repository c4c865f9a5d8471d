// cublas_v2.h: only what cublasLt.h shares with it.
#pragma once
#include "cublasLt.h"
