/* SPDX-License-Identifier: Apache-2.0 */
/*
 * main.c - one binary with subcommands, as git has. Only their table lives here, and what a process
 * tells its allocator, which is linked to this program alone (MALLOC in the Makefile).
 */
#include <stdio.h>
#include <string.h>
#ifdef LORAMILL_MIMALLOC
#include <mimalloc.h>
#endif

#include "worker/tools/commands.h"

static const struct command {
    const char *name;
    int (*run)(int argc, char **argv);
    const char *help;
} commands[] = {
    { "worker", cmd_worker, "consume prompts from Kafka, publish completions" },
    { "batch", cmd_batch, "answer a file of OpenAI Batch requests, without Kafka" },
    { "submit", cmd_submit, "send prompts from a JSONL file to the prompt topic" },
    { "collect", cmd_collect, "gather the replies of a job into a JSONL file" },
    { "cancel", cmd_cancel, "cancel prompts by their ids, wherever they are" },
    { "status", cmd_status, "show a group: lag, oldest unfinished prompt, its workers" },
    { "dlq", cmd_dlq, "list, show and send back dead letters" },
    { "reset", cmd_reset, "move a group's offsets" },
    { "dev", cmd_dev, "an embedded broker and adapter store for trying things out" },
    { "bench", cmd_bench, "measure the engine on this machine" },
};

static int usage(FILE *f, int status)
{
    fprintf(f, "usage: loramill COMMAND [OPTION]...\n\n");
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
        fprintf(f, "  %-10s %s\n", commands[i].name, commands[i].help);
    fprintf(f, "\n`loramill COMMAND --help` explains one. `loramill --version` prints %s.\n",
            LORAMILL_VERSION);
    return status;
}

/* The client library takes and frees buffers of up to a megabyte, hundreds a second. Given back
 * to the system after 25 ms, as mimalloc does, each would be of fresh pages, zeroed one fault at
 * a time: a tenth of a worker's CPU time. MIMALLOC_DECOMMIT_DELAY, or MIMALLOC_PURGE_DELAY from
 * mimalloc 2.1 on, overrides it. */
static void keep_free_memory(void)
{
#ifdef LORAMILL_MIMALLOC
    enum { KEEP_MS = 100 };
#if MI_MALLOC_VERSION < 210
    mi_option_set_default(mi_option_decommit_delay, KEEP_MS);
#else
    mi_option_set_default(mi_option_purge_delay, KEEP_MS);
#endif
#endif
}

int main(int argc, char **argv)
{
    keep_free_memory();
    if (argc < 2)
        return usage(stderr, 2);
    if (!strcmp(argv[1], "--version")) {
        printf("loramill %s\n", LORAMILL_VERSION);
        return 0;
    }
    if (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h") || !strcmp(argv[1], "help"))
        return usage(stdout, 0);
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
        if (!strcmp(argv[1], commands[i].name))
            return commands[i].run(argc - 1, argv + 1);
    fprintf(stderr, "loramill: no command '%s'\n", argv[1]);
    return usage(stderr, 2);
}
