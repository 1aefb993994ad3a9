/* SPDX-License-Identifier: Apache-2.0 */
/*
 * main.c - one binary with subcommands, as git has. Only the table lives here.
 */
#include <stdio.h>
#include <string.h>

#include "worker/commands.h"

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

int main(int argc, char **argv)
{
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
