#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# `loramill batch` as a person uses it: OpenAI Batch requests for the base model and for adapters from
# a folder and from an HTTP store, scoring, bad lines, and a job that is killed and resumed.
. "$(dirname "$0")/../infra/lib.sh"
infra_begin batch
M=tests/models/storefront A=tests/models/storefront-adapters
IDS=$(adapter_ids $A)
first=$(head -1 <<< "$IDS")
prompt=$(head -1 tests/models/orders.txt)

batch() { "$LORAMILL" batch --backend cpu --model $M "$@" 2> "$RUN/err"; }
# line ID URL BODY
line() { jq -cn --arg id "$1" --arg url "$2" --argjson body "$3" '{custom_id: $id, method: "POST", url: $url, body: $body}'; }
result() {      # CUSTOM-ID CONDITION: true of the one line with that id
    jq -se --arg p "$prompt" "[.[] | select(.custom_id == \"$1\") | $2] == [true]" "$RUN/out" > /dev/null
}

p=$(jq -Rn --arg p "$prompt" '$p')
{
    line base /v1/completions '{"model": "storefront", "prompt": '"$p"', "max_tokens": 8, "temperature": 0}'
    line voice /v1/completions '{"model": "'"$first"'", "prompt": '"$p"', "max_tokens": 8, "temperature": 0, "logprobs": 2}'
    line ids /v1/completions '{"model": "storefront", "prompt": [5, 6, 7, 8], "max_tokens": 4}'
    line chat /v1/chat/completions '{"model": "storefront", "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "max_tokens": 4, "logprobs": true, "top_logprobs": 2}'
    line score /v1/completions '{"model": "'"$first"'", "prompt": '"$p"', "max_tokens": 0, "echo": true, "logprobs": 0}'
    line two /v1/completions '{"model": "storefront", "prompt": '"$p"', "max_tokens": 4, "n": 2, "seed": 1}'
    echo 'not json'
    echo
    line typo /v1/completions '{"model": "storefront", "prompt": "x", "max_token": 8}'
    line nobody /v1/completions '{"model": "no-such-voice", "prompt": "x"}'
    line stream /v1/completions '{"model": "storefront", "prompt": "x", "stream": true}'
    line embed /v1/embeddings '{"model": "storefront", "input": "x"}'
} > "$RUN/in"

batch --adapters $A --input "$RUN/in" --output "$RUN/out"
check "exit status 0 when every line has its output line (got $?)" [ $? -eq 0 ]
check "one output line for each line that is not blank" [ "$(wc -l < "$RUN/out")" -eq 11 ]
check "base model answers" result base '.response.status_code == 200 and .response.body.usage.completion_tokens == 8 and .error == null'
check "adapter answers, with logprobs and its digest" result voice '(.response.body.choices[0].logprobs.token_logprobs | length) == 8 and (.response.body.adapter_digest | startswith("sha256:"))'
check "the adapter changes the answer" [ "$(jq -r 'select(.custom_id == "base").response.body.choices[0].text' "$RUN/out")" != "$(jq -r 'select(.custom_id == "voice").response.body.choices[0].text' "$RUN/out")" ]
check "token ids are used as they are" result ids '.response.body.usage.prompt_tokens == 4'
check "chat answers with chat logprobs" result chat '.response.body.object == "chat.completion" and (.response.body.choices[0].logprobs.content | length) > 0'
check "echo with max_tokens 0 scores the prompt" result score '.response.body.choices[0].text == $p and .response.body.usage.completion_tokens == 0 and (.response.body.choices[0].logprobs.token_logprobs | .[0] == null and .[1] < 0)'
check "n gives n choices" result two '(.response.body.choices | length) == 2'
result_without_id() { jq -se 'any(.custom_id == null and .response.status_code == 400)' "$RUN/out" > /dev/null; }
check "a line that is no JSON yields an error line" result_without_id
check "a typo in a parameter is named" result typo '.error.message | test("max_token")'
check "an unknown adapter is 404, never the base model" result nobody '.response.status_code == 404'
check "streaming is refused by name" result stream '.error.message | test("stream")'
check "another endpoint is refused" result embed '.error.message | test("/v1/embeddings")'

nginx_start $A || die "nginx started"
batch --adapters "$STORE" --cache-dir "$RUN/cache" --input "$RUN/in" --output "$RUN/out2"
texts() { jq -cS '[.custom_id, .response.status_code, [.response.body.choices[]?.text // .response.body.choices[]?.message.content]]' "$1" | grep -vE '"(two|ids|chat)"' | sort; }
check "adapters from an HTTP store give the same answers" diff <(texts "$RUN/out") <(texts "$RUN/out2")

# A job that is killed is resumed: nothing twice, nothing missing.
i=0
while read -r order; do
    i=$((i + 1))
    id=$(sed -n "$((i % 20 + 1))p" <<< "$IDS")
    line "o$i" /v1/completions "$(jq -cn --arg m "$id" --arg p "$order" '{model: $m, prompt: $p, max_tokens: 24, temperature: 0, ignore_eos: true}')"
done < <(head -400 tests/models/orders.txt) > "$RUN/big"
spawn "$RUN/killed.log" "$LORAMILL" batch --backend cpu --model $M --adapters $A --input "$RUN/big" --output "$RUN/big.out"
pid=$!
some() { [ "$(wc -l < "$RUN/big.out")" -ge 40 ]; }
wait_until 60 some
kill -9 "$pid"; wait "$pid" 2> /dev/null
had=$(wc -l < "$RUN/big.out")
check "the job was killed half-way ($had of 400 lines)" [ "$had" -lt 400 ]
printf '{"id": "batch_req_0003' >> "$RUN/big.out"          # a torn line
batch --adapters $A --input "$RUN/big" --output "$RUN/big.out" --resume
check "the resumed job ends with status 0 (got $?)" [ $? -eq 0 ]
check "each request once" [ "$(jq -r .custom_id "$RUN/big.out" | sort -u | wc -l)/$(wc -l < "$RUN/big.out")" = 400/400 ]

batch --input "$RUN/in"
check "a missing option is a usage error, status 2 (got $?)" [ $? -eq 2 ]
batch --adapters $A --input "$RUN/none" --output "$RUN/x"
check "a job that can't start fails with status 1 (got $?)" [ $? -eq 1 ]
batch --backend gpu --input "$RUN/in" --output "$RUN/x"
check "an unknown backend is a usage error, status 2 (got $?)" [ $? -eq 2 ]
batch --adapters "$RUN/none" --input "$RUN/in" --output "$RUN/x"
check "a missing folder of adapters ends the job, status 1 (got $?)" [ $? -eq 1 ]
check "and names it" grep -q -- "--adapters $RUN/none" "$RUN/err"
batch --adapters $A --input <(cat "$RUN/in") --output "$RUN/piped"
check "a pipe is read once (got $?)" [ "$?/$(wc -l < "$RUN/piped")" = 0/11 ]

# The file ends with model.norm.weight, in bf16: its last element becomes NaN.
cp -r $M "$RUN/nan"
printf '\xc0\x7f' | dd of="$RUN/nan/model.safetensors" bs=1 conv=notrunc status=none \
    seek=$(($(stat -c %s $M/model.safetensors) - 2))
batch --model "$RUN/nan" --input "$RUN/in" --output "$RUN/x"
check "a norm that is not finite is named (got $?)" grep -q "model.norm.weight.*not finite" "$RUN/err"
