"""A small evaluation bundle with a task of each kind."""

from __future__ import annotations

import json
from pathlib import Path


def write_bundle(folder: Path, broken: bool = True) -> None:
    """Writes the bundle; the task ``broken`` has an item of another kind, unless it is left out."""
    items = {
        "capitals": [{"context": f"{index} is", "continuation": "even" if index % 2 else "odd"} for index in range(5)],
        "sums": [{"query": f"{index}+1 =", "choices": [str(index), str(index + 1)], "gold": 1} for index in range(5)],
        "broken": [{"query": "no choices"}],
    }
    if not broken:
        del items["broken"]
    kinds = {"capitals": "language_modeling", "sums": "multiple_choice", "broken": "schema"}
    (folder / "eval_data").mkdir(parents=True)
    tasks = []
    for name, rows in items.items():
        (folder / "eval_data" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        tasks.append({"label": name, "dataset_uri": f"{name}.jsonl", "num_fewshot": [2], "icl_task_type": kinds[name]})
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": tasks}))
    rows = "".join(f"{name},{50 * (name == 'sums')}\n" for name in items)
    (folder / "eval_meta_data.csv").write_text(f"Eval Task,Random baseline\n{rows}")
