/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_cancel.c - `loramill cancel`: orders to cancel prompts, to topics.control. Done when the
 * broker has them; the prompts then end as completions with finish reason "cancelled", unless they
 * are answered already.
 */
#include <getopt.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "worker/codec/json_prompt.h"
#include "worker/tools/cli.h"
#include "worker/tools/commands.h"

enum { FLUSH_MS = 60000, BROKER_TIMEOUT_MS = 15000 };

struct cancel {
    struct cli_settings settings;
    struct config config;
    struct cli_kafka kafka;
    int delivered, failed;
};

static const char help[] =
    "usage: loramill cancel -c FILE [--set KEY=VALUE]... ID...\n"
    "\n"
    "Cancels prompts by their ids, wherever they are: in the topic, waiting, or being generated.\n"
    "Each ends with finish reason `cancelled` and the text that there was. A prompt that is\n"
    "answered already stays answered. Needs topics.control, which the workers read.\n"
    "\n"
    "Exit status: 0 the broker has all orders, 1 it has not, 2 usage.\n";

static void on_delivered(void *user, const rd_kafka_message_t *m)
{
    struct cancel *c = user;
    if (m->err)
        fprintf(stderr, "loramill cancel: not delivered: %s\n", rd_kafka_err2str(m->err));
    *(m->err ? &c->failed : &c->delivered) += 1;
}

static void order(struct cancel *c, const char *id)
{
    json_t *o = json_pack("{s:s}", "cancel", id);
    char *text = o ? json_dumps(o, JSON_COMPACT) : NULL;
    json_decref(o);
    rd_kafka_resp_err_t e = !text ? RD_KAFKA_RESP_ERR_INVALID_MSG :
        rd_kafka_producev(c->kafka.rk, RD_KAFKA_V_TOPIC(c->config.topics_control),
                          RD_KAFKA_V_MSGFLAGS(RD_KAFKA_MSG_F_COPY),
                          RD_KAFKA_V_KEY(id, strlen(id)),
                          RD_KAFKA_V_VALUE(text, strlen(text)), RD_KAFKA_V_END);
    if (e) {
        fprintf(stderr, "loramill cancel: %s: %s\n", id,
                text ? rd_kafka_err2str(e) : "is not UTF-8");
        c->failed++;
    }
    free(text);
    rd_kafka_poll(c->kafka.rk, 0);
}

static int run(struct cancel *c, char **ids, int n)
{
    struct lm_err err;
    int partitions;
    c->kafka.delivered = on_delivered;
    c->kafka.user = c;
    lm_status st = cli_kafka_open(&c->kafka, &c->config, RD_KAFKA_PRODUCER, &err);
    if (st == LM_OK)
        st = cli_kafka_partitions(&c->kafka, c->config.topics_control, BROKER_TIMEOUT_MS,
                                  &partitions, &err);
    if (st != LM_OK) {
        fprintf(stderr, "loramill cancel: %s\n", err.msg);
        return CLI_FAILED;
    }
    for (int i = 0; i < n; i++)
        order(c, ids[i]);
    rd_kafka_flush(c->kafka.rk, FLUSH_MS);
    fprintf(stderr, "cancel: %d of %d orders delivered\n", c->delivered, n);
    return c->delivered == n ? CLI_OK : CLI_FAILED;
}

static lm_status parse(struct cancel *c, int argc, char **argv, struct lm_err *err)
{
    enum { SET = 256 };
    static const struct option options[] = {
        { "config", required_argument, NULL, 'c' }, { "set", required_argument, NULL, SET },
        { "help", no_argument, NULL, 'h' },         { NULL, 0, NULL, 0 },
    };
    int opt;
    optind = 0;
    while ((opt = getopt_long(argc, argv, "c:h", options, NULL)) != -1) {
        switch (opt) {
        case 'c':
            if (cli_settings_file(&c->settings, optarg, err) != LM_OK)
                return err->code;
            break;
        case SET:
            if (cli_settings_add(&c->settings, optarg, err) != LM_OK)
                return err->code;
            break;
        case 'h': fputs(help, stdout); return LM_CANCELLED;
        default: return lm_err_set(err, LM_INVALID, "try `loramill cancel --help`");
        }
    }
    if (optind == argc)
        return lm_err_set(err, LM_INVALID, "say which prompts: loramill cancel -c FILE ID...");
    for (int i = optind; i < argc; i++)
        if (!*argv[i] || strlen(argv[i]) > PROMPT_MAX_ID)
            return lm_err_set(err, LM_INVALID, "id number %d has %zu bytes; an id has 1 to %d",
                              i - optind + 1, strlen(argv[i]), PROMPT_MAX_ID);
    lm_status st = cli_settings_load(&c->settings, &c->config, err);
    if (st == LM_OK && !*c->config.topics_control)
        return lm_err_set(err, LM_INVALID, "topics.control is not set: workers read no orders");
    return st;
}

int cmd_cancel(int argc, char **argv)
{
    struct lm_err err;
    struct cancel c = { 0 };
    int status = CLI_OK;
    lm_status st = parse(&c, argc, argv, &err);
    if (st == LM_OK) {
        status = run(&c, argv + optind, argc - optind);
    } else if (st != LM_CANCELLED) {
        fprintf(stderr, "loramill cancel: %s\n", err.msg);
        status = CLI_USAGE;
    }
    cli_kafka_close(&c.kafka);
    config_release(&c.config);
    return status;
}
