"""Manifests that lie are refused with a sentence, at once, and without gigabytes."""

from collections.abc import Callable
from pathlib import Path

import forge
import pytest
from forge import Tree
from harm import array, nested, refused, rows

from store import Store, layout
from store.manifest import MOST_BYTES, Filled, Part, manifest_bytes, read_manifest


def feature(number: int = 0, **change: object) -> Callable[[Tree], object]:
    return lambda tree: tree["passes"]["bert"]["features"][number].update(change)


def static(**change: object) -> Callable[[Tree], object]:
    return lambda tree: tree["passes"]["bert"]["statics"][0].update(change)


def shape(**change: object) -> Callable[[Tree], object]:
    return lambda tree: tree["passes"]["bert"]["shape"].update(change)


def twice(items: Callable[[Tree], list]) -> Callable[[Tree], object]:
    return lambda tree: items(tree).append(items(tree)[0])


def huge_topk(tree: Tree) -> None:
    tree["passes"]["bert"]["features"][3]["key"] = f"lm_logits@labels:top{10**12}"
    for each in tree["passes"]["bert"]["features"][3]["arrays"][:2]:
        each["width"] = 10**12


MANIFESTS: dict[str, tuple[Callable[[Tree], object], str]] = {
    "a pass that climbs out": (lambda tree: tree["passes"].update({"../../x": tree["passes"].pop("bert")}), "expected a pass name"),
    "a pass named like a folder of the store": (lambda tree: tree["passes"].update({"commits": tree["passes"]["bert"]}), "a pass name"),
    "a pass with a long name": (lambda tree: tree["passes"].update({"x" * 10**6: tree["passes"]["bert"]}), "expected a pass name"),
    "a key that climbs out": (feature(key="../hidden.1@all"), "expected a feature"),
    "a key that is an absolute path": (feature(key="/etc/passwd"), "expected a feature"),
    "a key written in another way": (feature(key="hidden.01@all"), r"expected a key .* such as hidden.1@all, found hidden.01@all"),
    "a long key": (feature(key="hidden.1@" + "a" * 10**6), "200 characters"),
    "a layer that the teacher lacks": (feature(key="hidden.99@all"), "of no block of a teacher of 1"),
    "an array that climbs out": (array(3, name="../../ids"), "has no arrays"),
    "a weight that climbs out": (static(name="../../x"), "expected a name"),
    "a weight that is an absolute path": (static(name="/etc/passwd"), "expected a name"),
    "a token array that climbs out": (lambda tree: tree["rows"]["token_arrays"][0].update(name="../x"), "expected a name"),
    "a token array of another type": (lambda tree: tree["rows"]["token_arrays"][0].update(dtype="float64"), "needs its type"),
    "a row part that climbs out": (lambda tree: tree["rows"]["parts"][0].update(file="../../etc/passwd"), "expected row parts part-00000"),
    "a billion slots": (rows(slots=10**9), "contradict"),
    "slots below nothing": (rows(slots=-1), "greater than or equal to 1"),
    "more rows than slots hold": (rows(rows=10**15), "contradict"),
    "a row part of more rows than there are": (lambda tree: tree["rows"]["parts"][0].update(rows=10**15), "contradict"),
    "row parts that cancel out": (
        lambda tree: tree["rows"].update(parts=[{**tree["rows"]["parts"][0], "rows": n} for n in (-9, 9 + tree["rows"]["rows"])]),
        "greater than or equal to 1",
    ),
    "slots of a petabyte": (rows(slot_tokens=2**50), "less than or equal to"),
    "slots that no chunk divides": (rows(slot_tokens=300), "multiple of 128"),
    "chunks larger than slots": (rows(chunk_tokens=2**40), "is not cut into chunks"),
    "slots with fewer tokens than rows": (lambda tree: tree["rows"]["filled"]["tokens"].__setitem__(0, -1), "contradict"),
    "slots that are overfull": (
        lambda tree: tree["rows"]["filled"].update(tokens=[10**6, *tree["rows"]["filled"]["tokens"][1:]]) or rows(tokens=10**6)(tree),
        "contradict|expected slots",
    ),
    "a bucket of a terabyte": (rows(bucket=2**40), "bucket: Input should be less"),
    "a bucket of nothing": (rows(bucket=0), "bucket: Input should be greater"),
    "a padding id of thirty digits": (rows(pad_id=10**30), "pad_id"),
    "more copies than numbers": (rows(copies=10**30), "copies"),
    "a width of a billion billions": (array(width=10**18), "width: Input should be less"),
    "a width below nothing": (array(width=-8), "width: Input should be greater"),
    "a trillion likeliest words": (huge_topk, "width: Input should be less"),
    "a compressed chunk of gigabytes": (array(2, width=2**24), "a compressed chunk of 8589934592 bytes"),
    "a weight of 10^15 numbers": (static(shape=[10**15]), "larger than any"),
    "a weight whose size is 2^64": (static(shape=[2**32, 2**32]), "larger than any"),
    "a weight of a thousand axes": (static(shape=[1] * 1000), "at most 8 items"),
    "a weight with an axis below nothing": (static(shape=[-8]), "greater than or equal to 1"),
    "a billion blocks": (shape(layers=10**9), "layers: Input should be less"),
    "fewer windows than blocks": (shape(windows=[]), "a window for each of 1 blocks"),
    "a vocabulary below nothing": (shape(vocab=-1), "vocab: Input should be greater"),
    "a checksum of 100 bits": (static(crc32c=2**100), "crc32c"),
    "a slot without a checksum": (lambda tree: tree["rows"]["slot_crcs"]["numbers"].pop(), "a checksum for each of"),
    "labels without numbers": (lambda tree: tree["rows"]["slot_crcs"].pop("numbers"), "a checksum for each of"),
    "checksums of an array that is none": (lambda tree: tree["rows"]["slot_crcs"].update(x=[]), "a checksum for each of"),
    "origins that overlap": (twice(lambda tree: tree["rows"]["origins"]), "contradict"),
    "no origin": (rows(origins=[]), "at least 1 item"),
    "a row part twice": (twice(lambda tree: tree["rows"]["parts"]), "contradict"),
    "a token array twice": (twice(lambda tree: tree["rows"]["token_arrays"]), "rows has 'input_ids' twice"),
    "a feature twice": (twice(lambda tree: tree["passes"]["bert"]["features"]), "pass bert has 'hidden.1@all' twice"),
    "a weight twice": (twice(lambda tree: tree["passes"]["bert"]["statics"]), "pass bert has .* twice"),
    "an array twice": (twice(lambda tree: tree["passes"]["bert"]["features"][0]["arrays"]), "has no arrays"),
    "a codec that is none": (feature(codec="pickle"), "codec"),
    "a type that is none": (array(dtype="object"), "dtype"),
    "a number as text": (rows(slots="many"), "slots"),
    "a list in place of an object": (lambda tree: tree.update(rows=[1, 2]), "rows"),
    "a million items of the wrong type": (lambda tree: tree["rows"]["filled"].update(rows=["x"] * 10**6), "filled.rows.0"),
    "a hundred thousand unknown keys": (lambda tree: tree.update({f"x{n}": 0 for n in range(10**5)}), "problems more"),
    "a million keys": (lambda tree: tree["rows"]["origins"][0]["options"].update({f"x{n}": 0 for n in range(530_000)}), "524,288 keys"),
    "options as deep as a well": (lambda tree: tree["rows"]["origins"][0].update(options={"a": nested(400)}), "options"),
    "schema 0": (lambda tree: tree.update(schema_version=0), "expected schema version 1 to 6, found 0; read it with a newer release"),
    "no tokens in a batch": (lambda tree: tree["passes"]["bert"].update(batch_tokens=0), "greater than or equal to 1"),
    "schema 7": (lambda tree: tree.update(schema_version=7), "found 7; read it with a newer release"),
    "schema as text": (lambda tree: tree.update(schema_version="2"), "found '2'"),
    "schema as a truth": (lambda tree: tree.update(schema_version=True), "found True"),
    "schema as a fraction": (lambda tree: tree.update(schema_version=2.0), "found 2.0"),
    "schema as a list": (lambda tree: tree.update(schema_version=[2]), r"found \[2\]"),
    "no schema": (lambda tree: tree.pop("schema_version"), "found none"),
    "a store of today that calls itself one of schema 1": (lambda tree: tree.update(schema_version=1), "not one of schema 1"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_lies_is_refused(path: Path, name: str) -> None:
    change, said = MANIFESTS[name]
    forge.manifest(path, change)
    refused(path, said)


def test_the_limits_leave_room_for_a_hundred_thousand_slots(path: Path) -> None:
    slots, manifest = 10**5, Store.open(path).manifest
    many = {
        "rows": 100 * slots,
        "tokens": 256 * slots,
        "slots": slots,
        "splits": {"train": 100 * slots},
        "filled": Filled(rows=(100,) * slots, tokens=(256,) * slots, labelled=(0,) * slots),
        "parts": tuple(Part(file=layout.rows_part_name(number), rows=50_000, crc32c=2**32 - 1) for number in range(slots // 500)),
        "slot_crcs": {name: (2**32 - 1,) * slots for name in manifest.rows.slot_crcs},
        "origins": (manifest.rows.origins[0].model_copy(update={"slots": slots}),),
    }
    large = manifest.model_copy(update={"rows": manifest.rows.model_copy(update=many)})
    layout.manifest(path).write_bytes(data := manifest_bytes(large))
    assert len(data) < MOST_BYTES // 3
    assert read_manifest(path) == large
