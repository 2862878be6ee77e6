"""A study's runs as JSON lines: what is kept when the folders of the runs are not."""

from __future__ import annotations

import json
from pathlib import Path

from metacal.study.plan import Study, cells
from metacal.train._files import replacing
from metacal.train.results import nulled, read_results

RECORDS = "runs.jsonl"


def write_records(study: Study, out: str | Path) -> Path:
    """Writes ``runs.jsonl`` in the study's folder: for every finished run its folder, place, seed, settings and results."""
    out = Path(out)
    lines = []
    for cell in cells(study):
        results = read_results(out / cell.path)
        if results:
            record = {"run": str(cell.path), **cell.names, "seed": cell.seed, "settings": cell.settings, "results": results}
            lines.append(json.dumps(nulled(record), ensure_ascii=False, allow_nan=False))
    with replacing(out / RECORDS) as file:
        file.write("".join(f"{line}\n" for line in lines).encode())
    return out / RECORDS
