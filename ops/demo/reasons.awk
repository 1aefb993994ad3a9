# SPDX-License-Identifier: Apache-2.0
#
# reasons.awk - "id TAB code TAB reason" lines in; reasons wrapped in a column, 100 characters wide.

BEGIN { FS = "\t"; width = 68 }

{
    head = sprintf("  %-16s %-11s ", $1, $2)
    n = split($3, words, " ")
    at = ""
    for (i = 1; i <= n; i++) {
        if (at != "" && length(at) + 1 + length(words[i]) > width) {
            print head at
            head = sprintf("%31s", "")
            at = ""
        }
        at = at == "" ? words[i] : at " " words[i]
    }
    print head at
}
