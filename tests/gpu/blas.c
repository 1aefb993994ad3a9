/* SPDX-License-Identifier: Apache-2.0 */
/*
 * blas.c - the two entry points of OpenBLAS that the CPU backend calls, so that gpu-check is one
 * file that runs on a GPU machine without OpenBLAS. Plain loops: it is the oracle, not the racer.
 *
 * What C held is added to a finished sum, as the kernels of a BLAS add it. Products that were added
 * onto it one by one would round k times by its size, which may be far beyond theirs: more than the
 * tolerance that tests/twin/twin_gemm.c derives.
 */
#include <cblas.h>
#include <string.h>

#define COLUMNS 256             /* of C at once: sums that stay in L1 */

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
    float sum[COLUMNS];
    (void)order, (void)ta, (void)tb;
    for (long i = 0; i < m; i++)
        for (long j0 = 0; j0 < n; j0 += COLUMNS) {
            const long cols = n - j0 < COLUMNS ? n - j0 : COLUMNS;
            float *row = c + i * ldc + j0;
            memset(sum, 0, sizeof sum);
            for (long l = 0; l < k; l++) {
                const float x = alpha * a[i * lda + l];
                for (long j = 0; j < cols; j++)
                    sum[j] += x * b[l * ldb + j0 + j];
            }
            for (long j = 0; j < cols; j++)
                row[j] = beta == 0 ? sum[j] : beta * row[j] + sum[j];
        }
}
