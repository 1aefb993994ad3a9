/* SPDX-License-Identifier: Apache-2.0 */
/*
 * commands.h - the subcommands of the one binary. Each returns the process's exit status:
 * 0 done, 1 failed, 2 usage error. argv[0] is the subcommand's name.
 */
#ifndef LORAMILL_WORKER_TOOLS_COMMANDS_H
#define LORAMILL_WORKER_TOOLS_COMMANDS_H

int cmd_worker(int argc, char **argv);
int cmd_batch(int argc, char **argv);
int cmd_submit(int argc, char **argv);
int cmd_collect(int argc, char **argv);
int cmd_cancel(int argc, char **argv);
int cmd_dlq(int argc, char **argv);
int cmd_status(int argc, char **argv);
int cmd_reset(int argc, char **argv);
int cmd_dev(int argc, char **argv);
int cmd_bench(int argc, char **argv);

#endif
