/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sys.c - what this machine is: instruction sets, cores and memory that this process may use.
 *
 * Containers lie through /proc, so the cgroup (v2, or v1's memory controller) has the last word on
 * memory, and its CPU quota on cores. Files that are missing mean "no limit".
 */
#include "kernels/cpu/cpu_int.h"

#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* ---- instruction sets ------------------------------------------------------------------ */

static atomic_int isa_limit = CPU_ISA_COUNT;

void kn_cpu_force_isa(enum cpu_isa isa)
{
    atomic_store(&isa_limit, (int)isa);
}

bool cpu_isa_runs(enum cpu_isa isa)
{
#if defined(__x86_64__)
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                __builtin_cpu_supports("f16c");
    if (isa == CPU_ISA_AVX512)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (isa == CPU_ISA_AVX2)
        return avx2;
#endif
    return isa == CPU_ISA_GENERIC;
}

const struct cpu_vec *cpu_vec_pick(void)
{
    int limit = atomic_load(&isa_limit);
#if defined(__x86_64__)
    if (limit >= CPU_ISA_AVX512 && cpu_isa_runs(CPU_ISA_AVX512))
        return &cpu_vec_avx512;
    if (limit >= CPU_ISA_AVX2 && cpu_isa_runs(CPU_ISA_AVX2))
        return &cpu_vec_avx2;
#endif
    (void)limit;
    return &cpu_vec_generic;
}

/* ---- memory ---------------------------------------------------------------------------- */

#define HUGE_PAGE ((size_t)2 << 20)

void *cpu_aligned_alloc(size_t bytes)
{
    void *p;
    size_t align = bytes >= 2 * HUGE_PAGE ? HUGE_PAGE : CPU_ALIGN;
    if (posix_memalign(&p, align, bytes ? bytes : 1))
        return NULL;
    if (align == HUGE_PAGE)
        madvise(p, bytes, MADV_HUGEPAGE);   /* weights are streamed: fewer TLB misses */
    return p;
}

/* First number in a file that begins with `key` (or at all, when key is NULL); -1 if none. */
static int64_t read_number(const char *path, const char *key)
{
    FILE *f = fopen(path, "re");
    if (!f)
        return -1;
    char line[256];
    int64_t v = -1;
    size_t n = key ? strlen(key) : 0;
    while (v < 0 && fgets(line, sizeof line, f))
        if (!n || !strncmp(line, key, n))
            if (sscanf(line + n, "%ld", &v) != 1)
                v = -1;
    fclose(f);
    return v;
}

/* The path of this process in the unified hierarchy; "" when there is none. */
static void own_cgroup(char path[static 512])
{
    char line[512];
    path[0] = '\0';
    FILE *f = fopen("/proc/self/cgroup", "re");
    if (!f)
        return;
    while (fgets(line, sizeof line, f))
        if (!strncmp(line, "0::/", 4)) {
            line[strcspn(line, "\n")] = '\0';
            snprintf(path, 512, "%s", line + 3);
        }
    fclose(f);
    if (!strcmp(path, "/"))
        path[0] = '\0';
}

static void limit_by_group(const char *dir, size_t *total, size_t *avail)
{
    char name[640];
    snprintf(name, sizeof name, "%s/memory.max", dir);
    int64_t max = read_number(name, NULL);
    if (max <= 0)
        return;
    snprintf(name, sizeof name, "%s/memory.current", dir);
    int64_t used = read_number(name, NULL);
    snprintf(name, sizeof name, "%s/memory.stat", dir);
    int64_t cache = read_number(name, "inactive_file ");
    used = LM_MAX(0, LM_MAX(used, 0) - LM_MAX(cache, 0));
    *total = LM_MIN(*total, (size_t)max);
    *avail = LM_MIN(*avail, (size_t)LM_MAX(max - used, 0));
}

/* Every group from our own up to the root may set a limit. */
static void limit_by_groups(size_t *total, size_t *avail)
{
    char path[512], dir[600];
    own_cgroup(path);
    for (;;) {
        snprintf(dir, sizeof dir, "/sys/fs/cgroup%s", path);
        limit_by_group(dir, total, avail);
        char *slash = strrchr(path, '/');
        if (!slash)
            break;
        *slash = '\0';
    }
    int64_t max = read_number("/sys/fs/cgroup/memory/memory.limit_in_bytes", NULL);
    int64_t used = read_number("/sys/fs/cgroup/memory/memory.usage_in_bytes", NULL);
    if (max > 0 && (size_t)max < *total) {
        *total = (size_t)max;
        *avail = LM_MIN(*avail, (size_t)LM_MAX(max - LM_MAX(used, 0), 0));
    }
}

void cpu_sys_memory(size_t *total, size_t *avail)
{
    int64_t t = read_number("/proc/meminfo", "MemTotal:");
    int64_t a = read_number("/proc/meminfo", "MemAvailable:");
    *total = (size_t)LM_MAX(t, 0) * 1024;
    *avail = (size_t)LM_MAX(a, 0) * 1024;
    limit_by_groups(total, avail);
}

/* ---- cores ----------------------------------------------------------------------------- */

static int quota_cores(void)
{
    char path[512], name[640];
    own_cgroup(path);
    snprintf(name, sizeof name, "/sys/fs/cgroup%s/cpu.max", path);
    FILE *f = fopen(name, "re");
    if (!f)
        return CPU_MAX_THREADS;
    long quota = 0, period = 0;
    int n = fscanf(f, "%ld %ld", &quota, &period);
    fclose(f);
    return n == 2 && quota > 0 && period > 0 ? (int)LM_MAX(1, LM_DIV_UP(quota, period))
                                             : CPU_MAX_THREADS;
}

int cpu_sys_threads(void)
{
    cpu_set_t set;
    int n = sched_getaffinity(0, sizeof set, &set) ? 1 : CPU_COUNT(&set);
    n = LM_MIN(n, quota_cores());
    return LM_MAX(1, LM_MIN(n, CPU_MAX_THREADS));
}
