// What the ops' files export and small_gemm.cu calls for kept calls: Hopper's products with everything in them, and the passes
// behind a library's product. One declaration for both sides, since C's linkage would not notice two that differ.
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
FXFUSE_API int fxfuse_linear_activation_scale_forward(const void*, const void*, const void*, void*, int64_t, int64_t,
                                                      int64_t, int64_t, int64_t, int, float, float, float, float, int, int,
                                                      int, void*);
FXFUSE_API int fxfuse_linear_scale_batchnorm1d_train(const void*, const void*, void*, void*, void*, void*, void*, void*,
                                                     void*, int64_t, int64_t, int64_t, int64_t, int64_t, const void*, int,
                                                     const void*, int, const void*, int, float, const void*, int,
                                                     const void*, int, float, void*, int, void*, int, float, int, int, int,
                                                     void*);
FXFUSE_API int fxfuse_linear_scale_batchnorm1d_eval(const void*, const void*, void*, int64_t, int64_t, int64_t, int64_t,
                                                    int64_t, const void*, int, const void*, int, const void*, int, float,
                                                    const void*, int, const void*, int, float, const void*, int,
                                                    const void*, int, int, int, int, int, void*);
