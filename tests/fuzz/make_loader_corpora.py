#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Seeds for the fuzz targets of the loaders: the fixtures' own files, small, and broken relatives.

Reads tests/fixtures/families and tests/golden/plans.json, writes tests/fuzz/corpus/{safetensors,
adapter_config,model_config}. Inputs that a fuzzer found are added by hand and kept.
"""
import glob
import json
import os
import struct

HERE = os.path.dirname(os.path.abspath(__file__))
FAMILIES = os.path.join(HERE, "..", "fixtures", "families")


def write(corpus, name, data):
    folder = os.path.join(HERE, "corpus", corpus)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, name), "wb") as f:
        f.write(data)


def image(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def safetensors():
    good = {"__metadata__": {"format": "pt"}, "a": tensor("F32", [2], 0, 8),
            "b": tensor("BF16", [3, 1], 8, 14), "c": tensor("U8", [1], 14, 15)}
    seeds = {
        "good": image(good, bytes(15)), "misaligned": image(b'{"a":' + json.dumps(
            tensor("F32", [1], 0, 4)).encode() + b"} ", bytes(4)), "empty": image({}),
        "no-file": b"", "short": b"\1\0\0", "huge-header": b"\xff" * 8 + b"{}",
        "cut": image(good, bytes(15))[:-1], "overlap": image(
            {"a": tensor("F32", [1], 0, 4), "b": tensor("F32", [1], 2, 6)}, bytes(6)),
        "hole": image({"a": tensor("F32", [1], 4, 8)}, bytes(8)),
        "overflow": image({"a": tensor("F32", [2**62, 8], 0, 4)}, bytes(4)),
        "negative": image({"a": tensor("F32", [-1], 0, 4)}, bytes(4)),
        "zero": image({"a": tensor("F16", [0, 2**62], 0, 0), "b": tensor("F64", [], 0, 8)},
                      bytes(8)),
        "bits": image({"a": tensor("F4", [3], 0, 1)}, bytes(1)),
        "deep": image(b'{"a":' + b"[" * 3000),
        "twice": image(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
                       b'"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}', bytes(2)),
        "many": image({f"t{i}": tensor("U8", [1], i, i + 1) for i in range(200)}, bytes(200)),
    }
    for name, data in seeds.items():
        write("safetensors", name, data)


def adapter_config():
    for path in glob.glob(os.path.join(FAMILIES, "*", "adapters", "*", "adapter_config.json")):
        parts = path.split(os.sep)
        with open(path, "rb") as f:
            write("adapter_config", f"{parts[-4]}-{parts[-2]}", f.read())
    with open(os.path.join(HERE, "..", "golden", "plans.json")) as f:
        for i, case in enumerate(json.load(f)["cases"]):
            text = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **case["settings"]}
            write("adapter_config", f"plan-{i:02}", json.dumps(text).encode())
    slow = {"peft_type": "LORA", "target_modules": r"(.*.*)+(.*.*)+[^a-z_0-9.]"}
    write("adapter_config", "slow-regex", json.dumps(slow).encode())
    nested = {"peft_type": "LORA", "target_modules": "(" * 300 + ")" * 300}
    write("adapter_config", "nested-regex", json.dumps(nested).encode())


def model_config():
    for path in glob.glob(os.path.join(FAMILIES, "*", "model", "config.json")):
        with open(path, "rb") as f:
            data = f.read()
        generation = os.path.join(os.path.dirname(path), "generation_config.json")
        if os.path.exists(generation):
            with open(generation, "rb") as f:
                data += b"\0" + f.read()
        write("model_config", path.split(os.sep)[-3], data)
    with open(os.path.join(HERE, "..", "golden", "rope.json")) as f:
        for case in json.load(f)["cases"]:
            if "/64/" in case["name"]:
                write("model_config", "rope-" + case["name"].replace("/", "-"),
                      json.dumps(case["config"]).encode())


if __name__ == "__main__":
    safetensors()
    adapter_config()
    model_config()
