"""One HTML page from everything that evaluations and benchmarks have written into a folder.

    python -m hf_fastattn.eval.report_page eval/results --output report.html

Accuracy and speed stand side by side for each device, then what no record covers, then every report with its picture.
The file needs nothing beside itself. Exits with 1 if a record says that something was red.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hf_fastattn.eval.arguments import parser
from hf_fastattn.eval.reporting.environment import source_hash
from hf_fastattn.eval.reporting.page import page
from hf_fastattn.eval.reporting.records import read


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page; 1 if something in it is red, else 0."""
    made = parser("report")
    options = made.parse_args(list(sys.argv[1:] if argv is None else argv))
    try:
        records = read(options.results)
        options.output.write_text(page(records, source_hash()), encoding="utf-8")
    except (ValueError, OSError) as error:
        made.error(str(error))
    red = [record.name for record in records if record.wrong]
    print(f"written: {options.output}, {len(records)} records{', red: ' + ', '.join(red) if red else ', nothing red'}")
    return 1 if red else 0


if __name__ == "__main__":
    raise SystemExit(main())
