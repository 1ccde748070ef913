"""MultiRC and ReCoRD as SuperGLUE ships them (nested JSON lines) -> Parquet with a line for each answer or entity, as the recipes read it.

python recipes/tasks/superglue/flatten.py multirc train.jsonl data/tasks/multirc_train.parquet
python recipes/tasks/superglue/flatten.py record val.jsonl data/tasks/record_dev.parquet
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Line = dict[str, str | int]


def multirc(passage: dict[str, Any]) -> Iterator[Line]:
    """An answer with its question and paragraph."""
    for question in passage["passage"]["questions"]:
        for answer in question["answers"]:
            yield {
                "paragraph": passage["passage"]["text"],
                "question": question["question"],
                "answer": answer["text"],
                "label": answer["label"],
            }


def record(article: dict[str, Any]) -> Iterator[Line]:
    """An entity of the passage in the gap of a query; each wording of an entity once. Both ends of an entity's characters count."""
    text = article["passage"]["text"]
    entities = dict.fromkeys(text[place["start"] : place["end"] + 1] for place in article["passage"]["entities"])
    for query in article["qas"]:
        right = {answer["text"] for answer in query["answers"]}
        for entity in entities:
            statement = query["query"].replace("@placeholder", entity)
            yield {"passage": text, "statement": statement, "entity": entity, "question": query["id"], "label": int(entity in right)}


def flatten(task: str, source: Path, target: Path) -> int:
    """Write ``target``; returns how many lines it has."""
    of_task = {"multirc": multirc, "record": record}[task]
    with source.open(encoding="utf-8") as texts:
        lines = [line for text in texts for line in of_task(json.loads(text))]
    target.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(lines), target, compression="zstd")
    return len(lines)


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in ("multirc", "record"):
        sys.exit("expected: flatten.py multirc|record SOURCE.jsonl TARGET.parquet")
    print(f"{flatten(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])):,} lines")
