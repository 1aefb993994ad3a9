# SPDX-License-Identifier: Apache-2.0
#
# table.awk - "voice TAB text" lines in, a table of three columns a row out, 99 characters wide.
# Run it with LC_ALL=C: it counts characters itself, as some awks know bytes only.

BEGIN { FS = "\t"; columns = 3; cell = 29 }

{ voice[NR] = $1; text[NR] = $2 }

# Characters of a UTF-8 string: bytes that do not continue one.
function chars(s) {
    gsub(/[\200-\277]/, "", s)
    return length(s)
}

function padded(s,    n) {
    for (n = chars(s); n < cell; n++)
        s = s " "
    return s
}

# Breaks s at spaces into lines of at most `cell` characters: line[c, 1..]. Returns how many.
function wrap(c, s,    n, words, i, count, at) {
    count = split(s, words, " ")
    n = 1
    at = ""
    for (i = 1; i <= count; i++) {
        if (at != "" && chars(at) + 1 + chars(words[i]) > cell) {
            line[c, n++] = at
            at = ""
        }
        while (length(words[i]) > cell) {
            line[c, n++] = substr(words[i], 1, cell)
            words[i] = substr(words[i], cell + 1)
        }
        at = at == "" ? words[i] : at " " words[i]
    }
    line[c, n] = at
    return n
}

function rule(    c, i, s) {
    s = "+"
    for (c = 1; c <= columns; c++) {
        for (i = 0; i < cell + 2; i++)
            s = s "-"
        s = s "+"
    }
    print "  " s
}

function row(n,    c, s) {
    s = "|"
    for (c = 1; c <= columns; c++)
        s = s " " padded(n ? line[c, n] : title[c]) " |"
    print "  " s
}

END {
    for (first = 1; first <= NR; first += columns) {
        split("", line)
        height = 0
        for (c = 1; c <= columns; c++) {
            title[c] = toupper(substr(voice[first + c - 1], 1, cell))
            h = wrap(c, text[first + c - 1])
            if (h > height)
                height = h
        }
        rule()
        row(0)
        rule()
        for (n = 1; n <= height; n++)
            row(n)
    }
    if (NR > 0)
        rule()
}
