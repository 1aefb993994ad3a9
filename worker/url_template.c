/* SPDX-License-Identifier: Apache-2.0 */
/* url_template.c - see url_template.h. */
#include "worker/url_template.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "worker/url.h"

lm_status url_template_check(const char *name, const char *url, const char *hole, bool files,
                             struct lm_err *err)
{
    char shown[URL_SHOWN];
    url_show(url, shown, sizeof shown);
    if (!url_is_http(url) && !(files && url_has_scheme(url, "file://")))
        return lm_err_set(err, LM_INVALID, "%s=%s: must begin with http://%s", name, shown,
                          files ? ", https:// or file://" : " or https://");
    const char *first = strstr(url, hole);
    if (!first)
        return lm_err_set(err, LM_INVALID, "%s=%s: %s is missing, so all would lie at one place",
                          name, shown, hole);
    if (first < url_path(url))
        return lm_err_set(err, LM_INVALID, "%s=%s: %s may not stand before the path, where it "
                          "chooses the host", name, shown, hole);
    return LM_OK;
}

char *url_template_fill(const char *url, const char *hole, const char *with, const char *file)
{
    char *out = NULL;
    size_t size, n = strlen(hole);
    const char *path_end = url + strcspn(url, "?#");
    FILE *f = open_memstream(&out, &size);
    if (!f)
        return NULL;
    for (const char *at = url; *at || file;) {
        if (file && at >= path_end) {
            fprintf(f, "/%s", file);
            file = NULL;
        } else if (!strncmp(at, hole, n)) {
            fputs(with, f);
            at += n;
        } else {
            fputc(*at++, f);
        }
    }
    if (fclose(f) != 0) {
        free(out);
        out = NULL;
    }
    return out;
}
