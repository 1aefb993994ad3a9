/* SPDX-License-Identifier: Apache-2.0 */
/*
 * comm.c - tensor parallelism through NCCL, where it is installed.
 *
 * NCCL is opened at run time: a third of a gigabyte that one GPU never needs is no dependency of
 * the build. The handful of entry points used here have had these signatures since NCCL 2.0.
 */
#include "kernels/cuda/cuda_int.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

typedef struct { char internal[KN_COMM_ID_BYTES]; } nccl_id;
typedef struct ncclComm *nccl_comm;
enum nccl_type { NCCL_F16 = 6, NCCL_F32 = 7, NCCL_BF16 = 9 };
enum { NCCL_SUM = 0 };

static struct {
    int (*get_id)(nccl_id *id);
    int (*init_rank)(nccl_comm *c, int world, nccl_id id, int rank);
    int (*destroy)(nccl_comm c);
    int (*all_reduce)(const void *src, void *dst, size_t n, int type, int op, nccl_comm c,
                      cudaStream_t s);
    int (*all_gather)(const void *src, void *dst, size_t n, int type, nccl_comm c, cudaStream_t s);
    const char *(*error)(int rc);
    bool works;
} nccl;
static pthread_once_t nccl_once = PTHREAD_ONCE_INIT;

struct cuda_comm {
    struct kn_comm base;
    struct cuda_device *dev;
    nccl_comm c;
};

static void nccl_open(void)
{
    void *lib = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
    if (!lib)
        return;
    const struct { const char *name; void *to; } want[] = {
        { "ncclGetUniqueId", &nccl.get_id }, { "ncclCommInitRank", &nccl.init_rank },
        { "ncclCommDestroy", &nccl.destroy }, { "ncclAllReduce", &nccl.all_reduce },
        { "ncclAllGather", &nccl.all_gather }, { "ncclGetErrorString", &nccl.error },
    };
    nccl.works = true;
    for (size_t i = 0; i < LM_COUNT(want); i++) {
        void *f = dlsym(lib, want[i].name);
        memcpy(want[i].to, &f, sizeof f);       /* ISO C has no cast from void * to a function */
        nccl.works &= f != NULL;
    }
}

static lm_status need_nccl(struct lm_err *err)
{
    pthread_once(&nccl_once, nccl_open);
    return nccl.works ? LM_OK
                      : lm_err_set(err, LM_UNSUPPORTED, "tensor parallelism needs NCCL: "
                                   "libnccl.so.2 was not found; install it or use one GPU");
}

static lm_status nccl_result(int rc, const char *what, struct lm_err *err)
{
    return rc == 0 ? LM_OK : lm_err_set(err, LM_DEVICE, "NCCL: %s: %s", what, nccl.error(rc));
}

lm_status cuda_comm_id(kn_device *dev, uint8_t id[KN_COMM_ID_BYTES], struct lm_err *err)
{
    nccl_id made;
    lm_status st = need_nccl(err);
    if (st != LM_OK)
        return st;
    cudaSetDevice(cuda_device_of(dev)->index);
    st = nccl_result(nccl.get_id(&made), "making an id", err);
    if (st == LM_OK)
        memcpy(id, made.internal, KN_COMM_ID_BYTES);
    return st;
}

lm_status cuda_comm_new(kn_device *dev, const uint8_t id[KN_COMM_ID_BYTES], int rank, int world,
                        kn_comm **out, struct lm_err *err)
{
    lm_status st = need_nccl(err);
    if (st != LM_OK)
        return st;
    if (world < 1 || rank < 0 || rank >= world)
        return lm_err_set(err, LM_INVALID, "rank %d of %d: not a group", rank, world);
    struct cuda_comm *c = lm_calloc(1, sizeof *c);
    if (!c)
        return lm_err_set(err, LM_NOMEM, "out of memory for a communicator");
    nccl_id raw;
    memcpy(raw.internal, id, KN_COMM_ID_BYTES);
    c->base.be = &kn_backend_cuda;
    c->dev = cuda_device_of(dev);
    cudaSetDevice(c->dev->index);
    st = nccl_result(nccl.init_rank(&c->c, world, raw, rank), "joining the group", err);
    if (st != LM_OK) {
        free(c);
        return st;
    }
    *out = &c->base;
    return LM_OK;
}

void cuda_comm_free(kn_comm *base)
{
    struct cuda_comm *c = (struct cuda_comm *)base;
    cudaSetDevice(c->dev->index);
    nccl.destroy(c->c);
    free(c);
}

static int type_of(enum kn_dtype t)
{
    return t == KN_F32 ? NCCL_F32 : t == KN_F16 ? NCCL_F16 : NCCL_BF16;
}

static lm_status enqueued(struct cuda_comm *c, const char *op, int rc)
{
    if (rc != 0)
        lm_log(LM_ERROR, "kernels", "%s: NCCL: %s", op, nccl.error(rc));
    return rc == 0 ? cuda_check(c->dev, op, cudaPeekAtLastError()) : LM_DEVICE;
}

lm_status cuda_all_reduce_sum(kn_stream *s, kn_comm *base, void *buf, size_t n, enum kn_dtype t)
{
    struct cuda_comm *c = (struct cuda_comm *)base;
    return enqueued(c, "all_reduce_sum", nccl.all_reduce(buf, buf, n, type_of(t), NCCL_SUM, c->c,
                                                         cuda_stream_of(s)->s));
}

lm_status cuda_all_gather(kn_stream *s, kn_comm *base, void *dst, const void *src, size_t n,
                          enum kn_dtype t)
{
    struct cuda_comm *c = (struct cuda_comm *)base;
    return enqueued(c, "all_gather",
                    nccl.all_gather(src, dst, n, type_of(t), c->c, cuda_stream_of(s)->s));
}
