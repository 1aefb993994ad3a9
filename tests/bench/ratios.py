# SPDX-License-Identifier: Apache-2.0
"""ratios.py PREFIX OURS PEER: joins two files of figures: ours with the peer's value and the ratio."""
import json
import sys

prefix, ours, peer = sys.argv[1:]
theirs = {}
for line in open(peer, encoding="utf-8"):
    if line.startswith("{"):
        f = json.loads(line)
        theirs[f["name"]] = f["value"]
found = [json.loads(line) for line in open(ours, encoding="utf-8") if line.startswith("{")]
mixed = [dict(f, name="decode_adapters_mixed") for f in found if f["name"] == "decode_adapters"]
for f in found + (mixed if "decode_adapters_mixed" in theirs else []):
    p = theirs.get(f["name"])
    print(json.dumps({"name": prefix + "/" + f["name"], "value": round(f["value"], 3),
                      "unit": f["unit"], "peer": p and round(p, 3),
                      "ratio": p and round(f["value"] / p, 3)}))
