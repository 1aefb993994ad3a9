/* SPDX-License-Identifier: Apache-2.0 */
/*
 * files.c - gpu-check files ...: a checkpoint to load, and what reading its bytes alone takes.
 *
 *     make CONFIG DIR     config.json and safetensors shards of about 1 GiB with its index, for a
 *                         Llama as CONFIG describes it, in bf16; a thread a shard. Values repeat
 *                         64 MiB of random numbers in (-0.02, 0.02)
 *     read DIR THREADS    reads every shard, 8 MiB at a time into a buffer of each thread; prints
 *                         the seconds
 *     drop DIR            writes dirty pages and lets the page cache forget them
 */
#include "check.h"

#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <jansson.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/stat.h>
#include <unistd.h>

#define RANDOM_BYTES ((size_t)64 << 20)
#define SHARD_BYTES ((size_t)1 << 30)
#define PIECE_BYTES ((size_t)8 << 20)
#define MAX_SHARDS 64
#define MAX_THREADS 64

struct shard {
    json_t *header;
    size_t bytes;               /* of data */
};

struct making {
    const char *dir;
    const char *random;
    struct shard shard[MAX_SHARDS];
    int n;
    size_t total;
    json_t *map;                /* tensor to file */
    pthread_t thread[MAX_SHARDS];
    atomic_int next;
    atomic_bool failed;
};

static void shard_path(char *out, size_t n, const char *dir, int i, int of)
{
    snprintf(out, n, "%s%smodel-%05d-of-%05d.safetensors", dir, *dir ? "/" : "", i + 1, of);
}

/* ---- what is in it --------------------------------------------------------------------- */

/* `cols` 0: a vector. A shard is closed when it is full; names get their files at the end. */
static void add(struct making *m, const char *name, int rows, int cols)
{
    size_t bytes = (size_t)rows * (size_t)(cols ? cols : 1) * 2;
    if (m->shard[m->n - 1].bytes > SHARD_BYTES && m->n < MAX_SHARDS)
        m->shard[m->n++].header = json_object();
    struct shard *s = &m->shard[m->n - 1];
    json_t *shape = cols ? json_pack("[i, i]", rows, cols) : json_pack("[i]", rows);
    json_object_set_new(s->header, name,
                        json_pack("{s:s, s:o, s:[I, I]}", "dtype", "BF16", "shape", shape,
                                  "data_offsets", (json_int_t)s->bytes,
                                  (json_int_t)(s->bytes + bytes)));
    json_object_set_new(m->map, name, json_integer(m->n - 1));
    s->bytes += bytes;
    m->total += bytes;
}

static int number(const json_t *config, const char *key)
{
    return (int)json_integer_value(json_object_get(config, key));
}

static void add_layer(struct making *m, const json_t *config, int layer)
{
    const int hidden = number(config, "hidden_size"), ffn = number(config, "intermediate_size");
    const int heads = number(config, "num_attention_heads");
    const int kv = hidden / heads * number(config, "num_key_value_heads");
    const struct { const char *name; int rows, cols; } all[] = {
        { "self_attn.q_proj", hidden, hidden }, { "self_attn.k_proj", kv, hidden },
        { "self_attn.v_proj", kv, hidden }, { "self_attn.o_proj", hidden, hidden },
        { "mlp.gate_proj", ffn, hidden }, { "mlp.up_proj", ffn, hidden },
        { "mlp.down_proj", hidden, ffn }, { "input_layernorm", hidden, 0 },
        { "post_attention_layernorm", hidden, 0 },
    };
    for (size_t i = 0; i < LM_COUNT(all); i++) {
        char name[96];
        snprintf(name, sizeof name, "model.layers.%d.%s.weight", layer, all[i].name);
        add(m, name, all[i].rows, all[i].cols);
    }
}

static void add_all(struct making *m, const json_t *config)
{
    const int hidden = number(config, "hidden_size"), vocab = number(config, "vocab_size");
    m->map = json_object();
    m->shard[m->n++].header = json_object();
    add(m, "model.embed_tokens.weight", vocab, hidden);
    for (int i = 0; i < number(config, "num_hidden_layers"); i++)
        add_layer(m, config, i);
    add(m, "model.norm.weight", hidden, 0);
    add(m, "lm_head.weight", vocab, hidden);
}

/* ---- writing --------------------------------------------------------------------------- */

static bool write_all(int fd, const void *p, size_t n)
{
    for (size_t done = 0; done < n;) {
        ssize_t k = write(fd, (const char *)p + done, n - done);
        if (k < 0 && errno == EINTR)
            continue;
        if (k <= 0)
            return false;
        done += (size_t)k;
    }
    return true;
}

static bool write_shard(const struct making *m, int i)
{
    const struct shard *s = &m->shard[i];
    char path[512], *header = json_dumps(s->header, JSON_COMPACT);
    shard_path(path, sizeof path, m->dir, i, m->n);
    uint64_t n = header ? strlen(header) : 0, padded = LM_DIV_UP(n, 8) * 8;
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    bool ok = fd >= 0 && header && write_all(fd, &padded, 8) && write_all(fd, header, n) &&
              write_all(fd, "        ", padded - n);
    for (size_t at = 0; ok && at < s->bytes; at += RANDOM_BYTES)
        ok = write_all(fd, m->random, LM_MIN(RANDOM_BYTES, s->bytes - at));
    if (fd >= 0)
        ok = close(fd) == 0 && ok;
    if (!ok)
        fprintf(stderr, "gpu-check files: %s: %s\n", path, strerror(errno));
    free(header);
    return ok;
}

static void *write_shards(void *arg)
{
    struct making *m = arg;
    for (int i; (i = atomic_fetch_add(&m->next, 1)) < m->n && !m->failed;)
        if (!write_shard(m, i))
            m->failed = true;
    return NULL;
}

static bool write_index(const struct making *m)
{
    char path[512], name[64];
    json_t *map = json_object(), *index = json_pack("{s:o}", "weight_map", map);
    const char *tensor;
    json_t *v;
    json_object_foreach(m->map, tensor, v) {
        shard_path(name, sizeof name, "", (int)json_integer_value(v), m->n);
        json_object_set_new(map, tensor, json_string(name));
    }
    snprintf(path, sizeof path, "%s/model.safetensors.index.json", m->dir);
    bool ok = json_dump_file(index, path, JSON_COMPACT) == 0;
    json_decref(index);
    return ok;
}

static char *make_random(void)
{
    uint16_t *p = malloc(RANDOM_BYTES);
    for (size_t i = 0; p && i < RANDOM_BYTES / 2; i += 4) {
        uint64_t r = rnd();
        for (int k = 0; k < 4; k++, r >>= 16)   /* exponents of 2^-14 to 2^-7 */
            p[i + (size_t)k] = (uint16_t)((r & 0x8000) | (0x3880 + (r & 0x3ff)));
    }
    return (char *)p;
}

static int make_files(const char *config_path, const char *dir)
{
    struct making *m = calloc(1, sizeof *m);
    char path[512];
    json_error_t e;
    json_t *config = json_load_file(config_path, 0, &e);
    char *random = make_random();
    if (!m || !config || !random) {
        fprintf(stderr, "gpu-check files: %s: %s\n", config_path, config ? "no memory" : e.text);
        return 1;
    }
    m->dir = dir;
    m->random = random;
    add_all(m, config);
    json_object_set_new(config, "torch_dtype", json_string("bfloat16"));
    snprintf(path, sizeof path, "%s/config.json", dir);
    bool ok = json_dump_file(config, path, 0) == 0 && write_index(m);
    int n = 0;
    while (n < m->n && pthread_create(&m->thread[n], NULL, write_shards, m) == 0)
        n++;
    if (n == 0)
        write_shards(m);
    for (int i = 0; i < n; i++)
        pthread_join(m->thread[i], NULL);
    ok = ok && !m->failed;
    if (ok)
        printf("%zu bytes in %d shards\n", m->total, m->n);
    for (int i = 0; i < m->n; i++)
        json_decref(m->shard[i].header);
    json_decref(m->map);
    json_decref(config);
    free(random);
    free(m);
    return ok ? 0 : 1;
}

/* ---- reading --------------------------------------------------------------------------- */

struct reading {
    struct { int fd; size_t from; } piece[1 << 16];
    int n;
    size_t bytes;
    atomic_int next;
    atomic_bool failed;
};

static void *read_pieces(void *arg)
{
    struct reading *r = arg;
    char *buffer = malloc(PIECE_BYTES);
    if (!buffer)
        r->failed = true;
    for (int i; !r->failed && (i = atomic_fetch_add(&r->next, 1)) < r->n;)
        for (size_t done = 0; done < PIECE_BYTES;) {
            ssize_t k = pread(r->piece[i].fd, buffer + done, PIECE_BYTES - done,
                              (off_t)(r->piece[i].from + done));
            if (k < 0)
                r->failed = true;
            if (k <= 0)
                break;
            done += (size_t)k;
        }
    free(buffer);
    return NULL;
}

/* Calls `each` with every shard, open for reading; the descriptors stay open. */
static int each_shard(const char *dir, void (*each)(void *ctx, int fd, size_t bytes), void *ctx)
{
    char pattern[512];
    glob_t g;
    int n = 0;
    snprintf(pattern, sizeof pattern, "%s/*.safetensors", dir);
    if (glob(pattern, 0, NULL, &g) != 0)
        return 0;
    for (size_t i = 0; i < g.gl_pathc; i++) {
        struct stat sb;
        int fd = open(g.gl_pathv[i], O_RDONLY | O_CLOEXEC);
        if (fd >= 0 && fstat(fd, &sb) == 0) {
            each(ctx, fd, (size_t)sb.st_size);
            n++;
        }
    }
    globfree(&g);
    return n;
}

static void add_pieces(void *ctx, int fd, size_t bytes)
{
    struct reading *r = ctx;
    for (size_t at = 0; at < bytes && r->n < (int)LM_COUNT(r->piece); at += PIECE_BYTES, r->n++) {
        r->piece[r->n].fd = fd;
        r->piece[r->n].from = at;
    }
    r->bytes += bytes;
}

static int read_files(const char *dir, int threads)
{
    struct reading *r = calloc(1, sizeof *r);
    pthread_t thread[MAX_THREADS];
    int n = 0;
    if (!r || each_shard(dir, add_pieces, r) == 0)
        return 1;
    int64_t t0 = lm_now_us();
    while (n < LM_MIN(threads, MAX_THREADS) &&
           pthread_create(&thread[n], NULL, read_pieces, r) == 0)
        n++;
    for (int i = 0; i < n; i++)
        pthread_join(thread[i], NULL);
    double s = (double)(lm_now_us() - t0) / 1e6;
    if (!r->failed)
        printf("%.4f %zu\n", s, r->bytes);
    int status = r->failed ? 1 : 0;
    free(r);
    return status;
}

static void drop_one(void *ctx, int fd, size_t bytes)
{
    (void)ctx;
    (void)bytes;
    fsync(fd);
    posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
}

int files_main(int argc, char **argv)
{
    if (argc == 4 && !strcmp(argv[1], "make"))
        return make_files(argv[2], argv[3]);
    if (argc == 4 && !strcmp(argv[1], "read"))
        return read_files(argv[2], atoi(argv[3]));
    if (argc == 3 && !strcmp(argv[1], "drop"))
        return each_shard(argv[2], drop_one, NULL) ? 0 : 1;
    fprintf(stderr, "usage: gpu-check files make CONFIG DIR | read DIR THREADS | drop DIR\n");
    return 2;
}
