/* SPDX-License-Identifier: Apache-2.0 */
/*
 * blas.c - the two entry points of OpenBLAS that the CPU backend calls, so that gpu-check is one
 * file that runs on a GPU machine without OpenBLAS. Plain loops: it is the oracle, not the racer.
 */
#include <cblas.h>

void openblas_set_num_threads(int n)
{
    (void)n;
}

/* Row-major, nothing transposed: the one form that is used. */
void cblas_sgemm(OPENBLAS_CONST enum CBLAS_ORDER order, OPENBLAS_CONST enum CBLAS_TRANSPOSE ta,
                 OPENBLAS_CONST enum CBLAS_TRANSPOSE tb, OPENBLAS_CONST blasint m,
                 OPENBLAS_CONST blasint n, OPENBLAS_CONST blasint k, OPENBLAS_CONST float alpha,
                 OPENBLAS_CONST float *a, OPENBLAS_CONST blasint lda, OPENBLAS_CONST float *b,
                 OPENBLAS_CONST blasint ldb, OPENBLAS_CONST float beta, float *c,
                 OPENBLAS_CONST blasint ldc)
{
    (void)order, (void)ta, (void)tb;
    for (long i = 0; i < m; i++) {
        float *row = c + i * ldc;
        for (long j = 0; j < n; j++)
            row[j] = beta == 0 ? 0 : beta * row[j];
        for (long l = 0; l < k; l++) {
            float x = alpha * a[i * lda + l];
            for (long j = 0; j < n; j++)
                row[j] += x * b[l * ldb + j];
        }
    }
}
