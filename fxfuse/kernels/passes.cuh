// The passes behind a library's product, as the ops' files export them and small_gemm.cu calls them: one declaration for
// both, since C's linkage would not notice two that differ.
#pragma once

#include "common.cuh"

FXFUSE_API int fxfuse_linear_activation_scale_apply(const void*, void*, int64_t, int, float, float, float, float, int, int,
                                                    void*);
FXFUSE_API int fxfuse_linear_scale_batchnorm1d_eval_apply(const void*, void*, int64_t, int64_t, const void*, int,
                                                          const void*, int, const void*, int, float, const void*, int,
                                                          const void*, int, float, const void*, int, const void*, int, int,
                                                          int, int, void*);
FXFUSE_API int fxfuse_linear_scale_batchnorm1d_statistics(const void*, void*, int64_t, int64_t, int, int, void*);
FXFUSE_API int fxfuse_linear_scale_batchnorm1d_train_apply(const void*, void*, const void*, int64_t, void*, void*, int64_t,
                                                           int64_t, const void*, int, const void*, int, const void*, int,
                                                           float, const void*, int, const void*, int, float, void*, int,
                                                           void*, int, float, int, int, int, void*);
