/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cache.c - the disk cache of adapters; see cache.h for its layout and invariants.
 *
 * SHA256SUMS is what `sha256sum -c` reads, so that a person can check an entry by hand. It is
 * written when an entry is installed and compared when the entry is used again, possibly weeks
 * later by another process: a disk that rots or a hand that edits gives a fresh download instead of
 * an adapter that says strange things.
 */
#include "worker/store/cache.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <limits.h>
#include <openssl/evp.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#define ENTRY_MAX 200           /* bytes of an id that become a file name as they are */
#define ENTRY_HEAD 120          /* kept of longer ones */
#define HEX_CHARS 64
#define SUMS_MAX 512

struct cache {
    char *dir;                  /* DIR */
    char *source;               /* DIR/SOURCE */
    char *own;                  /* DIR/tmp/PID.RANDOM */
    int own_fd;                 /* its lock */
    pthread_mutex_t again;      /* one thread makes it anew */
    int claims_fd;
    atomic_uint next;           /* N */
};

static const char *const files[] = { CACHE_CONFIG, CACHE_WEIGHTS };

/* ---- hashes ----------------------------------------------------------------------------- */

static lm_status hash_text(const char *text, char out[HEX_CHARS + 1])
{
    unsigned char digest[EVP_MAX_MD_SIZE];
    if (!EVP_Digest(text, strlen(text), digest, NULL, EVP_sha256(), NULL))
        return LM_NOMEM;
    lm_hex(digest, HEX_CHARS / 2, out);
    return LM_OK;
}

static lm_status hash_fd(int fd, const char *path, char out[HEX_CHARS + 1], struct lm_err *err)
{
    enum { CHUNK = 1 << 18 };
    unsigned char digest[EVP_MAX_MD_SIZE];
    unsigned char *chunk = lm_malloc(CHUNK);
    EVP_MD_CTX *ctx = EVP_MD_CTX_new();
    ssize_t n = -1;
    bool ok = chunk && ctx && EVP_DigestInit_ex(ctx, EVP_sha256(), NULL);
    while (ok && (n = read(fd, chunk, CHUNK)) > 0)
        ok = EVP_DigestUpdate(ctx, chunk, (size_t)n);
    lm_status st = LM_OK;
    if (ok && n < 0)
        st = lm_err_set(err, LM_IO, "%s: %s", path, strerror(errno));
    else if (!ok || !EVP_DigestFinal_ex(ctx, digest, NULL))
        st = lm_err_set(err, LM_NOMEM, "%s: no memory to hash it", path);
    else
        lm_hex(digest, HEX_CHARS / 2, out);
    EVP_MD_CTX_free(ctx);
    free(chunk);
    return st;
}

/* ---- folders ---------------------------------------------------------------------------- */

static char *LM_PRINTF(1, 2) format(const char *fmt, ...)
{
    char *s;
    va_list ap;
    va_start(ap, fmt);
    if (vasprintf(&s, fmt, ap) < 0)
        s = NULL;
    va_end(ap);
    return s;
}

static lm_status make_folder(const char *path, struct lm_err *err)
{
    if (mkdir(path, 0777) != 0 && errno != EEXIST)
        return lm_err_set(err, LM_IO, "adapter cache %s: %s; adapters.cache_dir chooses another "
                          "place", path, strerror(errno));
    return LM_OK;
}

static lm_status make_folders(const char *path, struct lm_err *err)
{
    char *copy = lm_strdup(path);
    lm_status st = copy ? LM_OK : lm_err_set(err, LM_NOMEM, "adapter cache: no memory");
    for (char *s = copy ? strchr(copy + 1, '/') : NULL; st == LM_OK && s; s = strchr(s + 1, '/')) {
        *s = '\0';
        st = make_folder(copy, err);
        *s = '/';
    }
    if (st == LM_OK)
        st = make_folder(copy, err);
    free(copy);
    return st;
}

static int remove_one(const char *path, const struct stat *sb, int type, struct FTW *ftw)
{
    (void)sb;
    (void)type;
    (void)ftw;
    (void)remove(path);         /* another sweeper may have been here */
    return 0;
}

static void remove_tree(const char *path)
{
    nftw(path, remove_one, 8, FTW_DEPTH | FTW_PHYS | FTW_MOUNT);
}

static lm_status sync_path(const char *path, int flags, struct lm_err *err)
{
    int fd = open(path, flags | O_CLOEXEC);
    bool bad = fd < 0 || fsync(fd) != 0;
    int e = errno;
    if (fd >= 0)
        close(fd);
    return bad ? lm_err_set(err, LM_IO, "%s: %s", path, strerror(e)) : LM_OK;
}

/* ---- tmp/ ------------------------------------------------------------------------------- */

static int lock_cache(const cache *c)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/lock", c->dir);
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    while (fd >= 0 && flock(fd, LOCK_EX) != 0 && errno == EINTR)
        ;
    return fd;
}

/* Under the cache's lock: a folder without a lock of its own has no owner. */
static void sweep_one(const char *tmp, const char *name)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/%s", tmp, name);
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0) {
        unlink(path);
        return;
    }
    if (flock(fd, LOCK_EX | LOCK_NB) == 0) {
        lm_log(LM_INFO, "cache", "removing %s, left by a process that ended", path);
        remove_tree(path);
    }
    close(fd);
}

static void sweep(const char *tmp)
{
    DIR *d = opendir(tmp);
    if (!d)
        return;
    for (struct dirent *e; (e = readdir(d)) != NULL;)
        if (strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0)
            sweep_one(tmp, e->d_name);
    closedir(d);
}

static lm_status make_own(cache *c, const char *tmp, struct lm_err *err)
{
    uint32_t random = 0;
    if (getrandom(&random, sizeof random, 0) != sizeof random)
        random = (uint32_t)lm_now_us();
    c->own = format("%s/%d.%08x", tmp, (int)getpid(), random);
    if (!c->own)
        return lm_err_set(err, LM_NOMEM, "adapter cache: no memory");
    if (mkdir(c->own, 0777) != 0 ||
        (c->own_fd = open(c->own, O_RDONLY | O_DIRECTORY | O_CLOEXEC)) < 0 ||
        flock(c->own_fd, LOCK_EX | LOCK_NB) != 0)
        return lm_err_set(err, LM_IO, "adapter cache %s: %s", c->own, strerror(errno));
    return LM_OK;
}

static lm_status open_tmp(cache *c, struct lm_err *err)
{
    char *tmp = format("%s/tmp", c->dir);
    if (!tmp)
        return lm_err_set(err, LM_NOMEM, "adapter cache: no memory");
    lm_status st = make_folder(tmp, err);
    int lock = st == LM_OK ? lock_cache(c) : -1;
    if (st == LM_OK && lock < 0)
        st = lm_err_set(err, LM_IO, "adapter cache %s/lock: %s", c->dir, strerror(errno));
    if (st == LM_OK) {
        sweep(tmp);
        st = make_own(c, tmp, err);
    }
    if (lock >= 0)
        close(lock);
    free(tmp);
    return st;
}

/* ---- claims ----------------------------------------------------------------------------- */

static lm_status open_claims(cache *c, struct lm_err *err)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/claims", c->dir);
    c->claims_fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (c->claims_fd < 0)
        return lm_err_set(err, LM_IO, "adapter cache %s: %s", path, strerror(errno));
    return LM_OK;
}

/* Locks of the open file, not of the process (F_OFD): they work between threads' caches too. Two
 * entries on one byte, once in 2^60, would wait for each other needlessly. */
static bool set_claim(cache *c, const char *id, short type)
{
    uint64_t h = 0;
    char hex[HEX_CHARS + 1];
    char *path = cache_path(c, id);
    if (!path || hash_text(path + strlen(c->dir), hex) != LM_OK) {
        free(path);
        return true;
    }
    free(path);
    for (int i = 0; i < 15; i++)
        h = h << 4 | (uint64_t)(hex[i] <= '9' ? hex[i] - '0' : hex[i] - 'a' + 10);
    struct flock l = { .l_type = type, .l_whence = SEEK_SET, .l_start = (off_t)h, .l_len = 1 };
    /* Any other failure, such as a file system without locks, must not stop the fetching. */
    return fcntl(c->claims_fd, F_OFD_SETLK, &l) == 0 || (errno != EAGAIN && errno != EACCES);
}

bool cache_claim(cache *c, const char *id)
{
    return set_claim(c, id, F_WRLCK);
}

void cache_unclaim(cache *c, const char *id)
{
    set_claim(c, id, F_UNLCK);
}

/* ---- opening a folder to fill ----------------------------------------------------------- */

/* Somebody has emptied the cache, a cleaner of temporary files perhaps: makes its folders anew. The
 * claims stay with the file that is gone: other processes that start now may fetch what we do. */
static lm_status make_again(cache *c, struct lm_err *err)
{
    pthread_mutex_lock(&c->again);
    lm_status st = make_folders(c->dir, err);
    int lock = st == LM_OK ? lock_cache(c) : -1;
    if (st == LM_OK)
        st = make_folders(c->own, err);
    if (st == LM_OK)
        st = make_folder(c->source, err);
    int fd = st == LM_OK ? open(c->own, O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;
    if (fd >= 0 && flock(fd, LOCK_EX | LOCK_NB) == 0) {
        close(c->own_fd);
        c->own_fd = fd;
    } else if (fd >= 0) {
        close(fd);              /* another thread was here first, and holds it */
    }
    if (lock >= 0)
        close(lock);
    pthread_mutex_unlock(&c->again);
    return st;
}

lm_status cache_tmp(cache *c, char **path, struct lm_err *err)
{
    *path = format("%s/%u", c->own, c->next++);
    if (!*path)
        return lm_err_set(err, LM_NOMEM, "adapter cache: no memory");
    if (mkdir(*path, 0777) == 0 ||
        (errno == ENOENT && make_again(c, err) == LM_OK && mkdir(*path, 0777) == 0))
        return LM_OK;
    lm_err_set(err, LM_IO, "adapter cache %s: %s", *path, strerror(errno));
    free(*path);
    *path = NULL;
    return LM_IO;
}

void cache_discard(const char *tmp)
{
    if (tmp)
        remove_tree(tmp);
}

/* ---- opening ---------------------------------------------------------------------------- */

static lm_status open_source(cache *c, const char *source, struct lm_err *err)
{
    char hex[HEX_CHARS + 1];
    if (hash_text(source, hex) != LM_OK || !(c->source = format("%s/%.16s", c->dir, hex)))
        return lm_err_set(err, LM_NOMEM, "adapter cache: no memory");
    return make_folder(c->source, err);
}

lm_status cache_open(const char *dir, const char *source, cache **out, struct lm_err *err)
{
    cache *c = lm_calloc(1, sizeof *c);
    *out = NULL;
    if (c) {
        c->own_fd = c->claims_fd = -1;
        pthread_mutex_init(&c->again, NULL);
        c->dir = lm_strdup(dir ? dir : "");
    }
    if (!c || !c->dir) {
        cache_close(c);
        return lm_err_set(err, LM_NOMEM, "adapter cache: no memory");
    }
    lm_status st = LM_OK;
    if (!*c->dir)
        st = lm_err_set(err, LM_INVALID, "adapters.cache_dir: adapters from a URL need a folder");
    else if (strlen(c->dir) > PATH_MAX - 512)
        st = lm_err_set(err, LM_INVALID, "adapters.cache_dir: the path is too long");
    if (st == LM_OK)
        st = make_folders(c->dir, err);
    if (st == LM_OK)
        st = open_source(c, source, err);
    if (st == LM_OK)
        st = open_tmp(c, err);
    if (st == LM_OK)
        st = open_claims(c, err);
    if (st != LM_OK) {
        cache_close(c);
        return st;
    }
    *out = c;
    return LM_OK;
}

void cache_close(cache *c)
{
    if (!c)
        return;
    if (c->own)
        remove_tree(c->own);
    if (c->own_fd >= 0)
        close(c->own_fd);
    if (c->claims_fd >= 0)
        close(c->claims_fd);
    pthread_mutex_destroy(&c->again);
    free(c->own);
    free(c->source);
    free(c->dir);
    free(c);
}

/* ---- entries ---------------------------------------------------------------------------- */

char *cache_path(const cache *c, const char *id)
{
    char entry[ENTRY_MAX + 1], hex[HEX_CHARS + 1];
    size_t n = strlen(id);
    if (n > ENTRY_MAX && hash_text(id, hex) != LM_OK)
        return NULL;
    if (n > ENTRY_MAX)
        snprintf(entry, sizeof entry, "%.*s=%s", ENTRY_HEAD, id, hex);
    else
        memcpy(entry, id, n + 1);
    for (char *s = entry; *s; s++)
        if (*s == '/')
            *s = '+';
    return format("%s/%s", c->source, entry);
}

bool cache_has(const cache *c, const char *id)
{
    struct stat sb;
    char *path = cache_path(c, id);
    bool has = path && lstat(path, &sb) == 0 && S_ISDIR(sb.st_mode);
    free(path);
    return has;
}

/* Hashes and syncs one file of the folder; appends its line to `sums`. */
static lm_status seal_file(const char *folder, const char *name, char *sums, size_t size,
                           struct lm_err *err)
{
    char path[PATH_MAX], hex[HEX_CHARS + 1];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0)
        return lm_err_set(err, LM_IO, "%s: %s", path, strerror(errno));
    lm_status st = hash_fd(fd, path, hex, err);
    if (st == LM_OK && fsync(fd) != 0)
        st = lm_err_set(err, LM_IO, "%s: %s", path, strerror(errno));
    close(fd);
    size_t used = strlen(sums);
    if (st == LM_OK)
        snprintf(sums + used, size - used, "%s  %s\n", hex, name);
    return st;
}

static lm_status write_sums(const char *folder, const char *sums, struct lm_err *err)
{
    char path[PATH_MAX];
    size_t n = strlen(sums);
    snprintf(path, sizeof path, "%s/%s", folder, CACHE_SUMS);
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    bool bad = fd < 0 || write(fd, sums, n) != (ssize_t)n || fsync(fd) != 0;
    int e = errno;
    if (fd >= 0)
        close(fd);
    return bad ? lm_err_set(err, LM_IO, "%s: %s", path, strerror(e)) : LM_OK;
}

static lm_status seal(const char *folder, struct lm_err *err)
{
    char sums[SUMS_MAX] = "";
    lm_status st = LM_OK;
    for (size_t i = 0; st == LM_OK && i < LM_COUNT(files); i++)
        st = seal_file(folder, files[i], sums, sizeof sums, err);
    if (st == LM_OK)
        st = write_sums(folder, sums, err);
    if (st == LM_OK)
        st = sync_path(folder, O_RDONLY | O_DIRECTORY, err);
    return st;
}

lm_status cache_install(cache *c, const char *id, const char *tmp, bool *won, struct lm_err *err)
{
    char *path = cache_path(c, id);
    *won = false;
    lm_status st = path ? seal(tmp, err) : lm_err_set(err, LM_NOMEM, "adapter cache: no memory");
    if (st == LM_OK && rename(tmp, path) == 0) {
        *won = true;
        st = sync_path(c->source, O_RDONLY | O_DIRECTORY, err);
    } else if (st == LM_OK && errno != EEXIST && errno != ENOTEMPTY) {
        st = lm_err_set(err, LM_IO, "installing %s: %s", path, strerror(errno));
    }
    if (!*won)
        cache_discard(tmp);
    free(path);
    return st;
}

/* ---- damage ----------------------------------------------------------------------------- */

static lm_status read_sums(const char *folder, char out[SUMS_MAX], struct lm_err *err)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/%s", folder, CACHE_SUMS);
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    ssize_t n = fd >= 0 ? read(fd, out, SUMS_MAX - 1) : -1;
    if (fd >= 0)
        close(fd);
    if (n < 0)
        return lm_err_set(err, LM_FORMAT, "%s: %s", path, strerror(errno));
    out[n] = '\0';
    return LM_OK;
}

static lm_status verify_file(const char *folder, const char *name, const char *sums,
                             struct lm_err *err)
{
    char path[PATH_MAX], hex[HEX_CHARS + 1], line[HEX_CHARS + 64];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0)
        return lm_err_set(err, LM_FORMAT, "%s: %s", path, strerror(errno));
    lm_status st = hash_fd(fd, path, hex, err);
    close(fd);
    if (st != LM_OK)
        return st;
    snprintf(line, sizeof line, "%s  %s\n", hex, name);
    if (!strstr(sums, line))
        return lm_err_set(err, LM_FORMAT, "%s: not what was installed (%s differs)", path,
                          CACHE_SUMS);
    return LM_OK;
}

lm_status cache_verify(const cache *c, const char *id, struct lm_err *err)
{
    char sums[SUMS_MAX];
    char *path = cache_path(c, id);
    if (!path)
        return lm_err_set(err, LM_NOMEM, "adapter cache: no memory");
    lm_status st = read_sums(path, sums, err);
    for (size_t i = 0; st == LM_OK && i < LM_COUNT(files); i++)
        st = verify_file(path, files[i], sums, err);
    free(path);
    return st;
}

void cache_remove(cache *c, const char *id)
{
    char *path = cache_path(c, id);
    char *grave = format("%s/%u", c->own, c->next++);
    if (path && grave && rename(path, grave) == 0)
        remove_tree(grave);
    free(grave);
    free(path);
}
