"""A seeded mutator of valid files: of their bytes, and of the structure of JSON, YAML and safetensors headers."""

import copy
import json
import random
from dataclasses import dataclass
from typing import Any

import yaml

MODULE = "hostile_payload"  # a module beside the files, which nothing may import


@dataclass(frozen=True)
class Raw:
    """Text that stands in JSON or YAML as it is, valid or not."""

    text: str


def _bomb(first: str, of: str) -> str:
    """YAML in one line: each anchor holds ten aliases of the one before, a thousand million values in all."""
    parts = [f"&b0 {first}"] + [f"&b{level} {of % (', '.join([f'*b{level - 1}'] * 10))}" for level in range(1, 10)]
    return f"[{', '.join(parts)}]"


CODE = {"class_path": f"{MODULE}.Payload", "init_args": {}}
STRANGE: list[Any] = [
    *(
        None,
        True,
        False,
        [],
        {},
        [[]],
        "",
        "a",
        "\0",
        "\ud800",
        "..",
        "../../x",
        "../x.safetensors",
        "/etc/passwd",
        "C:\\x",
        "a/../../x",
    ),
    *(0, -1, 1, 3, 7, 255, 2**31, 2**63, -(2**63), 10**12, 10**30, 1.5, -0.0, 1e308, "load", "eval", "evil/kernel", "<script>"),
    *(Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1e999"), Raw("9" * 5000), Raw("\ufeff"), Raw("'"), Raw("\\ud800")),
    *(
        Raw("[" * 3000 + "]" * 3000),
        Raw('{"a":' * 3000 + "1" + "}" * 3000),
        "x" * 50_000,
        [0] * 5000,
        {str(n): n for n in range(500)},
    ),
    *(CODE, {"a": CODE}, [CODE], {"auto_map": {"AutoConfig": f"{MODULE}.C", "AutoTokenizer": [f"{MODULE}.T", None]}}),
    *({"_attn_implementation": "evil/kernel"}, {"num_hidden_layers": 10**12}, {"num_labels": 10**9}, {"vocab_size": 10**12}),
]
YAML: list[Any] = [
    *(Raw(f"!!python/object/apply:{MODULE}.run []"), Raw(f"!!python/name:{MODULE}.run"), Raw("!!python/object:os.system {}")),
    *(Raw(f"!!python/module:{MODULE}"), Raw("!!binary aGk="), Raw("!!set {a, b}"), Raw("!x y"), Raw("&a [*a]"), Raw("*none")),
    *(
        Raw(_bomb("[x, x]", "[%s]")),
        Raw("{<<: " + _bomb("{x: 1}", "{<<: [%s]}") + "}"),
        Raw("2001-01-01"),
        Raw("0x_1"),
        Raw("1:2:3"),
    ),
]
TOKENS = [
    *(
        b"\0",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\r",
        b"\n",
        b'"',
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"NaN",
        b"-",
        b"&a",
        b"*a",
        b"!!",
    ),
    *(
        b"\xff" * 8,
        b"\0" * 8,
        b"\xff" * 7 + b"\x7f",
        b"\0\0\0\0\0\0\0\x80",
        b"\xff\xff\xff\x7f",
        b"99999999999999999999",
        b"../../x",
    ),
    *(
        b"\\ud800",
        b"\xed\xa0\x80",
        f"!!python/object/apply:{MODULE}.run []".encode(),
        b"class_path: os.system",
        b"<<: *a",
        b"\x1b[2J",
    ),
]


def mutated_bytes(chance: random.Random, data: bytes) -> bytes:
    """Returns ``data`` after one to four changes that look at no structure."""
    found = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        at, kind = chance.randrange(len(found) + 1), chance.randrange(8)
        end = min(len(found), at + chance.choice((1, 2, 8, 64, 4096)))
        if kind == 0 and found:
            found[min(at, len(found) - 1)] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del found[at:]
        elif kind == 2:
            del found[at:end]
        elif kind == 3:
            found[at:at] = found[at:end] * chance.choice((1, 2, 100))
        elif kind == 4:
            found[at:at] = chance.choice(TOKENS)
        elif kind == 5:
            token = chance.choice(TOKENS)
            found[at : at + len(token)] = token
        elif kind == 6:
            found[at:end] = chance.randbytes(end - at)
        elif kind == 7 and len(found) >= 8:  # where a length stands
            found[:8] = chance.choice((0, 1, 7, len(data), 2**31, 2**40, 2**63, 2**64 - 1)).to_bytes(8, "little")
    return bytes(found)


def mutated_value(chance: random.Random, value: Any, strange: list[Any]) -> Any:
    """Returns a JSON value after one to three changes of its structure. The value must be a new one, as it is changed in place."""
    root = [value]
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        places: list[tuple[Any, Any]] = [(root, 0)]
        for owner, key in places:
            inner = owner[key]
            places += [
                (inner, name)
                for name in (inner if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ())
            ][:200]
        owner, key = chance.choice(places)
        kind = chance.randrange(10)
        if kind < 6:
            owner[key] = copy.deepcopy(chance.choice(strange))  # a later change is made in place
        elif kind == 6 and owner is not root:
            del owner[key]
        elif kind == 7:
            other, name = chance.choice(places)
            owner[key] = json.loads(written(other[name])) if _plain(other[name]) else None
        elif kind == 8 and isinstance(owner, dict):
            owner[_Twice(chance.choice(list(owner)))] = copy.deepcopy(chance.choice(strange))
        else:
            owner[key] = [owner[key]] * chance.choice((1, 2, 2 if isinstance(owner[key], (list, dict)) else 50))
    return root[0]


class _Twice(str):
    """A key that a mapping holds a second time."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def _plain(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def written(value: Any) -> str:
    """Returns a value as JSON, with every :class:`Raw` as it is."""
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {written(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    return json.dumps(value)


def mutated(chance: random.Random, data: bytes, form: str) -> bytes:
    """Returns a mutation of a valid file; ``form`` is json, jsonl, yaml, safetensors or bytes."""
    if form == "bytes" or chance.random() < 0.4:
        return mutated_bytes(chance, data)
    if form == "safetensors":
        length = int.from_bytes(data[:8], "little")
        header = written(mutated_value(chance, json.loads(data[8 : 8 + length]), STRANGE)).encode(errors="replace")
        told = len(header) if chance.random() < 0.9 else length
        found = told.to_bytes(8, "little") + header + data[8 + length :]
    elif form == "jsonl":
        lines = data.splitlines()
        at = chance.randrange(len(lines))
        lines[at] = written(mutated_value(chance, json.loads(lines[at]), STRANGE)).encode(errors="replace")
        found = b"\n".join(lines)
    else:
        loaded = yaml.safe_load(data) if form == "yaml" else json.loads(data)
        strange = [*STRANGE, *YAML, *YAML] if form == "yaml" else STRANGE
        found = written(mutated_value(chance, loaded, strange)).encode(errors="replace")
    return mutated_bytes(chance, found) if chance.random() < 0.05 else found
