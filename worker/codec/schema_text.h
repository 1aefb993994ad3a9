/* SPDX-License-Identifier: Apache-2.0 */
/*
 * schema_text.h - the text of schemas/prompt.avsc and schemas/completion.avsc, inside the program.
 *
 * The registry gets this very text (Avro C's own schema writer loses docs and defaults). Generated
 * by schemas/embed; a unit test compares it with the files, byte by byte.
 */
#ifndef LORAMILL_WORKER_CODEC_SCHEMA_TEXT_H
#define LORAMILL_WORKER_CODEC_SCHEMA_TEXT_H

extern const char schema_prompt_text[];
extern const char schema_completion_text[];

#endif
