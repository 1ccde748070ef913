"""Manifests that are no sound JSON are refused with a sentence."""

import os
from collections.abc import Callable
from pathlib import Path

import forge
import pytest
from harm import refused


def text_of(path: Path) -> str:
    text = (path / "manifest.json").read_text()
    return text[: text.rindex(",\n")] + "\n}"


TEXTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "deep nesting": (lambda path: (path / "manifest.json").write_text("[" * 10**6), "nested too deeply"),
    "deep nesting of objects": (lambda path: (path / "manifest.json").write_text('{"a":' * 10**5), "nested too deeply"),
    "a key twice": (
        lambda path: forge.manifest_text(path, text_of(path).replace('"rows": {', '"made": 0,\n "rows": {', 1)),
        "the key 'made' stands there twice",
    ),
    "not a number": (lambda path: forge.manifest_text(path, text_of(path).replace('"bucket": 16', '"bucket": NaN')), "NaN is no JSON"),
    "infinity": (
        lambda path: forge.manifest_text(path, text_of(path).replace('"bucket": 16', '"bucket": -Infinity')),
        "Infinity is no JSON",
    ),
    "a number beyond all": (lambda path: forge.manifest_text(path, text_of(path).replace('"bucket": 16', '"bucket": 1e999')), "bucket"),
    "a number of a million digits": (
        lambda path: forge.manifest_text(path, text_of(path).replace('"bucket": 16', f'"bucket": {"9" * 10**6}')),
        "damaged",
    ),
    "a byte order mark": (lambda path: forge.manifest_text(path, "\ufeff" + text_of(path)), "BOM"),
    "another encoding": (lambda path: forge.manifest_text(path, text_of(path), "utf-16"), "damaged"),
    "a third encoding": (lambda path: forge.manifest_text(path, text_of(path), "utf-32-le"), "damaged"),
    "half a letter": (lambda path: forge.manifest_text(path, text_of(path).replace('"bert"', '"\\ud800"', 1)), "expected a pass name"),
    "a terabyte": (lambda path: os.truncate(path / "manifest.json", 1 << 40), "expected at most 67,108,864 bytes"),
    "a wrong checksum": (
        lambda path: (path / "manifest.json").write_text((path / "manifest.json").read_text().replace('"bucket": 16', '"bucket": 32')),
        "fails its checksum",
    ),
    "no checksum": (lambda path: (path / "manifest.json").write_text(text_of(path)), "fails its checksum"),
    "something after its end": (
        lambda path: (path / "manifest.json").write_text((path / "manifest.json").read_text() + " "),
        "fails its checksum",
    ),
    "a number": (lambda path: (path / "manifest.json").write_text("7"), "found none"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_manifest_that_is_no_sound_json_is_refused(path: Path, name: str) -> None:
    harm, said = TEXTS[name]
    harm(path)
    refused(path, said)
