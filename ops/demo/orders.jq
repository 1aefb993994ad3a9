# SPDX-License-Identifier: Apache-2.0
#
# orders.jq - lines of orders.txt in, prompts (JSONL) out, with a few bad ones among them.
# Needs: --slurpfile voices storefront-adapters.json, and jq -nRr.
#
# The last six orders are the same event in six voices, greedily, for the table at the end: those
# named here, as far as they exist, then others.

def favourites:
  [ "captain-sal", "sterling/formal", "globe-theatre", "nordwind-terse", "noir-files", "grumbles" ];

def prompt($n; $event; $voice; $temperature):
  { id: "order-\($n)", adapter: $voice.id, prompt: $event,
    params: { max_tokens: 80, temperature: $temperature, seed: $n } };

# Each of these must come back as a dead letter that says what is wrong.
def bad($event; $voice):
  [ { id: "bad-adapter", adapter: "no-such/voice", prompt: $event },
    { adapter: $voice.id, prompt: $event },
    { id: "bad-key", adaptor: $voice.id, prompt: $event },
    { id: "bad-both", adapter: $voice.id, prompt: $event,
      messages: [ { role: "user", content: $event } ] },
    { id: "bad-max-tokens", adapter: $voice.id, prompt: $event, params: { max_tokens: 0 } } ]
  | map(tojson) + [ "this is not JSON at all" ];

# 24 voices: those to be shown first, and without two that often get dates wrong.
def cast:
  map(select(.id | IN("lone-star", "surf-shack") | not))
  | (map(select(.id | IN(favourites[]))) + map(select(.id | IN(favourites[]) | not)))[:24];

($voices[0] | cast) as $v
| [ inputs | select(length > 0) ] as $orders
| ($v | length) as $nv
| ($orders | length) as $n
| ([ favourites[] as $f | $v[] | select(.id == $f) ]
   + [ $v[] | select(.id | IN(favourites[]) | not) ])[:6] as $six
| ($six | length) as $shown
| [ range($n - $shown) | prompt(. + 1; $orders[.]; $v[. % $nv]; 0.3) | tojson ] as $good
| [ range($shown)
    | prompt($n - $shown + . + 1; $orders[$n - $shown]; $six[.]; 0)
    | .metadata = { shown: "yes" } | tojson ] as $table
| bad($orders[0]; $v[0]) as $bad
| ($good[:100] + $bad + $good[100:] + $table)[]
