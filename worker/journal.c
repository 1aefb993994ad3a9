/* SPDX-License-Identifier: Apache-2.0 */
/*
 * journal.c - see journal.h. The mapped file has a header and SLOTS slots of one word: a key, or
 * 0; whether the prompt is alone lies in the header, for then there is only one.
 */
#include "worker/journal.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

enum { SLOTS = 1 << 15, REFRESH_US = 1000000, FORGET_S = 86400, DEAD_MAX = 1 << 16,
       KEY_BYTES = 240 };

/* A format of this machine's: never moved to another. With another formula for keys it changes too:
 * what a worker of another format left behind is removed unread. */
#define MAGIC 0x324a4d4c4c4dULL

struct file {
    uint64_t magic;
    atomic_int cause;           /* 0: none given */
    atomic_int alone;           /* the one in the slots is alone */
    atomic_ullong decoding;
    atomic_ullong slot[SLOTS];
};

/* One death of one prompt, as .dead files hold it. */
struct death { uint64_t key; uint32_t evidence, unused; };

struct journal {
    char dir[PATH_MAX - 256], path[PATH_MAX];
    uint64_t seed;              /* of keys: the group */
    int fd;
    struct file *file;
    atomic_bool any_deaths;     /* are known; mostly none are, and nobody need take the lock */
    pthread_mutex_t lock;       /* everything below */
    int *free_slots, n_free;
    char **read;                /* names of .dead files whose deaths are known */
    size_t n_read;
    struct death *deaths;       /* sorted by key */
    size_t n_deaths;
    int64_t refresh_us;
    bool said_full;
};

/* ---- the dead --------------------------------------------------------------------------- */

static bool ends_with(const char *s, const char *end)
{
    size_t n = strlen(s), m = strlen(end);
    return n > m && !strcmp(s + n - m, end);
}

/* What a dead process held. Returns the count, at most DEAD_MAX. */
static size_t collect(const struct file *f, struct death *out)
{
    size_t n = 0;
    uint32_t alone = atomic_load(&f->cause) ? 2 : 1;
    uint64_t decoding = atomic_load(&f->decoding);
    if (decoding)
        out[n++] = (struct death){ decoding, alone, 0 };
    for (size_t i = 0; i < SLOTS && n < DEAD_MAX; i++) {
        uint64_t key = atomic_load_explicit(&f->slot[i], memory_order_relaxed);
        if (key)
            out[n++] = (struct death){ key, atomic_load(&f->alone) ? alone : 0, 0 };
    }
    return n;
}

static bool write_dead(const char *path, const struct death *d, size_t n)
{
    char tmp[PATH_MAX + 16];
    snprintf(tmp, sizeof tmp, "%s.tmp", path);
    FILE *f = fopen(tmp, "we");
    if (!f)
        return false;
    bool ok = fwrite(d, sizeof *d, n, f) == n;
    ok &= fclose(f) == 0;
    return ok && rename(tmp, path) == 0;
}

static const char *cause_name(int cause)
{
    return cause == JOURNAL_HUNG ? "hung" : cause == JOURNAL_DEVICE ? "device failure" :
           cause ? strsignal(cause) : "killed";
}

/* A journal whose lock can be had: its entries go into a .dead file, and it goes. */
static void bury(const char *path, int fd)
{
    char dead[PATH_MAX + 8];
    struct stat sb;
    snprintf(dead, sizeof dead, "%.*s.dead", (int)(strlen(path) - strlen(".journal")), path);
    struct death *d = lm_calloc(DEAD_MAX, sizeof *d);
    struct file *f = d && fstat(fd, &sb) == 0 && sb.st_size == sizeof *f ?
        mmap(NULL, sizeof *f, PROT_READ, MAP_SHARED, fd, 0) : MAP_FAILED;
    bool done = d && f == MAP_FAILED;           /* not a whole journal: died at birth */
    if (f != MAP_FAILED) {
        size_t n = f->magic == MAGIC ? collect(f, d) : 0;
        int cause = atomic_load(&f->cause);
        if (n)
            lm_log(LM_WARN, "journal", "a worker died with %zu prompts in the engine (%s)", n,
                   cause_name(cause));
        done = !n || write_dead(dead, d, n);
        munmap(f, sizeof *f);
    }
    if (done)
        unlink(path);
    free(d);
}

static void look_at(journal *j, const char *name)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/%s", j->dir, name);
    if (!strcmp(path, j->path))
        return;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return;
    struct stat a, b;           /* another one may have buried it meanwhile */
    if (flock(fd, LOCK_EX | LOCK_NB) == 0 && fstat(fd, &a) == 0 && stat(path, &b) == 0 &&
        a.st_ino == b.st_ino)
        bury(path, fd);
    close(fd);
}

static int by_key(const void *a, const void *b)
{
    uint64_t x = ((const struct death *)a)->key, y = ((const struct death *)b)->key;
    return x < y ? -1 : x > y;
}

static bool is_read(const journal *j, const char *name)
{
    for (size_t i = 0; i < j->n_read; i++)
        if (!strcmp(j->read[i], name))
            return true;
    return false;
}

static void learn(journal *j, const char *name)
{
    char path[PATH_MAX];
    struct stat sb;
    snprintf(path, sizeof path, "%s/%s", j->dir, name);
    if (stat(path, &sb))
        return;
    if (time(NULL) - sb.st_mtime > FORGET_S) {
        unlink(path);
        return;
    }
    size_t n = LM_MIN((size_t)sb.st_size / sizeof *j->deaths, DEAD_MAX);
    char **names = lm_reallocarray(j->read, j->n_read + 1, sizeof(*names));
    j->read = names ? names : j->read;
    struct death *grown = lm_reallocarray(j->deaths, j->n_deaths + n + 1, sizeof *grown);
    j->deaths = grown ? grown : j->deaths;
    char *copy = lm_strdup(name);
    FILE *f = names && grown && copy ? fopen(path, "re") : NULL;
    if (!f) {
        free(copy);
        return;
    }
    j->n_deaths += fread(j->deaths + j->n_deaths, sizeof *j->deaths, n, f);
    fclose(f);
    j->read[j->n_read++] = copy;
}

/* Under the lock. */
static void scan(journal *j)
{
    size_t before = j->n_deaths;
    DIR *d = opendir(j->dir);
    for (struct dirent *e; d && (e = readdir(d));)
        if (ends_with(e->d_name, ".journal"))
            look_at(j, e->d_name);
    if (d)
        rewinddir(d);
    for (struct dirent *e; d && (e = readdir(d));)
        if (ends_with(e->d_name, ".dead") && !is_read(j, e->d_name))
            learn(j, e->d_name);
    if (d)
        closedir(d);
    if (j->n_deaths > before)
        qsort(j->deaths, j->n_deaths, sizeof *j->deaths, by_key);
    atomic_store(&j->any_deaths, j->n_deaths > 0);
}

void journal_refresh(journal *j, int64_t now_us)
{
    pthread_mutex_lock(&j->lock);
    if (now_us >= j->refresh_us) {
        j->refresh_us = now_us + REFRESH_US;
        scan(j);
    }
    pthread_mutex_unlock(&j->lock);
}

/* ---- the living ------------------------------------------------------------------------- */

/* Its place says which prompt it is, unless the topic was made again: then its time does, its
 * length and how it begins. */
uint64_t journal_key(const journal *j, const struct job *job)
{
    const struct record *r = &job->record;
    const int64_t place[] = { job->lease->partition, r->offset, r->timestamp_ms,
                              (int64_t)r->value_len };
    uint64_t h = XXH3_64bits_withSeed(job->lease->topic, strlen(job->lease->topic), j->seed);
    h = XXH3_64bits_withSeed(place, sizeof place, h);
    h = XXH3_64bits_withSeed(r->value, LM_MIN(r->value_len, (size_t)KEY_BYTES), h);
    return h ? h : 1;
}

struct journal_count journal_counts(journal *j, uint64_t key)
{
    struct journal_count n = { 0 };
    if (!atomic_load(&j->any_deaths))
        return n;
    pthread_mutex_lock(&j->lock);
    size_t lo = 0, hi = j->n_deaths;
    while (lo < hi) {
        size_t mid = lo + (hi - lo) / 2;
        if (j->deaths[mid].key < key)
            lo = mid + 1;
        else
            hi = mid;
    }
    for (; lo < j->n_deaths && j->deaths[lo].key == key; lo++) {
        n.deaths++;
        n.evidence += (int)j->deaths[lo].evidence;
    }
    pthread_mutex_unlock(&j->lock);
    return n;
}

enum journal_verdict journal_verdict(struct journal_count n, int max_attempts)
{
    if (n.deaths >= max_attempts && n.evidence >= 2)
        return JOURNAL_POISON;
    return n.deaths > 0 && n.deaths >= max_attempts - 1 ? JOURNAL_ALONE : JOURNAL_FINE;
}

int journal_enter(journal *j, uint64_t key, bool alone)
{
    pthread_mutex_lock(&j->lock);
    int slot = j->n_free ? j->free_slots[--j->n_free] : -1;
    if (slot < 0 && !j->said_full) {
        j->said_full = true;
        lm_log(LM_WARN, "journal", "more than %d prompts in the engine: some are not journaled",
               SLOTS);
    }
    pthread_mutex_unlock(&j->lock);
    if (slot >= 0) {
        atomic_store(&j->file->alone, alone);
        atomic_store(&j->file->slot[slot], key);
    }
    return slot;
}

void journal_leave(journal *j, int slot)
{
    if (slot < 0)
        return;
    atomic_store(&j->file->slot[slot], 0);
    pthread_mutex_lock(&j->lock);
    j->free_slots[j->n_free++] = slot;
    pthread_mutex_unlock(&j->lock);
}

void journal_decoding(journal *j, uint64_t key)
{
    atomic_store(&j->file->decoding, key);
}

void journal_cause(journal *j, int cause)
{
    atomic_store(&j->file->cause, cause);
}

/* ---- signals ---------------------------------------------------------------------------- */

static const int fatal[] = { SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT };
static struct sigaction before[LM_COUNT(fatal)];
static journal *_Atomic watched;

static void on_fatal(int sig)
{
    journal *j = atomic_load(&watched);
    if (j)
        journal_cause(j, sig);
    for (size_t i = 0; i < LM_COUNT(fatal); i++)
        if (fatal[i] == sig)
            sigaction(sig, &before[i], NULL);
    raise(sig);                 /* pending until we return: then it is the former handler's */
}

void journal_watch_signals(journal *j)
{
    struct sigaction sa = { .sa_handler = on_fatal, .sa_flags = SA_ONSTACK };
    sigemptyset(&sa.sa_mask);
    atomic_store(&watched, j);
    for (size_t i = 0; i < LM_COUNT(fatal); i++)
        sigaction(fatal[i], &sa, &before[i]);
}

static void unwatch_signals(const journal *j)
{
    if (atomic_load(&watched) != j)
        return;
    for (size_t i = 0; i < LM_COUNT(fatal); i++)
        sigaction(fatal[i], &before[i], NULL);
    atomic_store(&watched, NULL);
}

/* ---- life ------------------------------------------------------------------------------- */

static lm_status make_dirs(const char *dir, struct lm_err *err)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s", dir);
    for (char *s = path + 1; *s; s++) {
        if (*s != '/')
            continue;
        *s = '\0';
        mkdir(path, 0777);
        *s = '/';
    }
    if (mkdir(path, 0777) && errno != EEXIST)
        return lm_err_set(err, LM_IO, "journal.dir=%s: %s", dir, strerror(errno));
    return LM_OK;
}

/* Its blocks are there from the start: on a full disk a store into a hole of the file would be a
 * SIGBUS, by which the worker would die and its prompts be suspects. */
static int make_file(journal *j, const char *tmp)
{
    j->fd = open(tmp, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (j->fd < 0 || flock(j->fd, LOCK_EX | LOCK_NB))
        return errno;
    int e = posix_fallocate(j->fd, 0, sizeof *j->file);
    if (e)
        return e;
    j->file = mmap(NULL, sizeof *j->file, PROT_READ | PROT_WRITE, MAP_SHARED, j->fd, 0);
    if (j->file != MAP_FAILED)
        return 0;
    j->file = NULL;
    return errno;
}

/* The lock comes before the name, so that nobody finds a journal of ours without an owner. */
static lm_status create(journal *j, struct lm_err *err)
{
    char tmp[PATH_MAX + 8];
    snprintf(j->path, sizeof j->path, "%s/%d.%" PRId64 ".%" PRId64 ".journal", j->dir,
             (int)getpid(), lm_wall_ms(), lm_now_us());
    snprintf(tmp, sizeof tmp, "%s.new", j->path);
    int e = make_file(j, tmp);
    if (!e) {
        j->file->magic = MAGIC;
        e = rename(tmp, j->path) ? errno : 0;
    }
    if (!e)
        return LM_OK;
    if (j->fd >= 0)
        unlink(tmp);
    return lm_err_set(err, LM_IO, "%s: %s", tmp, strerror(e));
}

lm_status journal_open(const char *dir, const char *group, journal **out, struct lm_err *err)
{
    journal *j = lm_calloc(1, sizeof *j);
    if (j)
        j->free_slots = lm_calloc(SLOTS, sizeof *j->free_slots);
    if (!j || !j->free_slots) {
        free(j);
        return lm_err_set(err, LM_NOMEM, "out of memory");
    }
    pthread_mutex_init(&j->lock, NULL);
    j->fd = -1;
    j->seed = XXH3_64bits(group, strlen(group));
    for (int i = SLOTS; i-- > 0;)
        j->free_slots[j->n_free++] = i;
    snprintf(j->dir, sizeof j->dir, "%s", dir);
    lm_status st = make_dirs(dir, err);
    if (!st)
        st = create(j, err);
    if (st) {
        journal_close(j);
        return st;
    }
    scan(j);
    *out = j;
    return LM_OK;
}

void journal_abandon(journal *j, int cause)
{
    if (!j)
        return;
    journal_cause(j, cause);
    *j->path = '\0';
    journal_close(j);
}

void journal_discard(const journal *j)
{
    if (j->file && *j->path)
        unlink(j->path);
}

void journal_close(journal *j)
{
    if (!j)
        return;
    unwatch_signals(j);
    journal_discard(j);
    if (j->file)
        munmap(j->file, sizeof *j->file);
    if (j->fd >= 0)
        close(j->fd);
    for (size_t i = 0; i < j->n_read; i++)
        free(j->read[i]);
    free(j->read);
    free(j->deaths);
    free(j->free_slots);
    pthread_mutex_destroy(&j->lock);
    free(j);
}
