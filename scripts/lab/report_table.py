"""A report's cells as a table of Markdown: right answers in percent with 95 % interval.

    python scripts/lab/report_table.py docs/reports/smollm2/cells.csv --column niah_single:1500 \
        --column ruler_multikey:1500 --budgets 0.25,0.12,0.06
"""

import argparse
import csv
import sys
from pathlib import Path


def main() -> int:
    """Print the table, policies by what they answer at the second of the budgets."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("cells", type=Path)
    parser.add_argument("--column", action="append", required=True, metavar="TASK:LENGTH")
    parser.add_argument("--budgets", default="0.25,0.12,0.06")
    parser.add_argument("--protocol", default="visible")
    parser.add_argument("--policies", help="only these, with commas")
    args = parser.parse_args()
    budgets = [float(part) for part in args.budgets.split(",")]
    columns = [column.rpartition(":")[::2] for column in args.column]
    with args.cells.open(encoding="utf-8") as file:
        rows = [
            row
            for row in csv.DictReader(line for line in file if not line.startswith("#"))
            if row["protocol"] == args.protocol
        ]
    found = {(row["policy"], row["task"], row["length"], float(row["budget"])): row for row in rows}
    policies = list(dict.fromkeys(row["policy"] for row in rows if row["policy"] != "none"))
    if args.policies:
        policies = [each for each in args.policies.split(",") if each in policies]

    def score(policy: str) -> float:
        cells = [found.get((policy, *column, budgets[1])) for column in columns]
        return sum(float(cell["mean"]) for cell in cells if cell)

    def cell(policy: str, column: tuple[str, str], budget: float) -> str:
        row = found.get((policy, *column, budget))
        if row is None:
            return ""
        mean, low, high = (f"{100 * float(row[name]):.0f}" for name in ("mean", "low", "high"))
        return f"{mean} ({low}-{high})"

    head = [f"{task} {length}, {b:.0%}" for task, length in columns for b in budgets]
    print("| preset | " + " | ".join(head) + " |")
    print("|---" * (len(head) + 1) + "|")
    whole = [cell("none", column, 1.0) for column in columns for _ in budgets]
    print("| whole cache | " + " | ".join(whole) + " |")
    for policy in sorted(policies, key=score, reverse=True):
        cells = [cell(policy, column, budget) for column in columns for budget in budgets]
        if any(cells):
            print(f"| `{policy}` | " + " | ".join(cells) + " |")
    numbers = sorted({(row["task"], row["length"], row["n"]) for row in rows})
    print("\n", "; ".join(f"{task} {length}: {n} prompts" for task, length, n in numbers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
