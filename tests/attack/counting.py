"""Counts cases and failures of each surface into the result file that BPNJAX_ATTACKS_RESULT names.

    BPNJAX_ATTACKS=200 BPNJAX_ATTACKS_RESULT=docs/results/attacks.json \\
        python -m pytest -n 0 -m '' tests/attack

Without BPNJAX_ATTACKS it counts what the quick form takes. Surfaces that were not attacked now keep
what the file has of them.
"""

import json
import os
import pathlib

import pytest
from attacks import NUMBER

_FILE = os.environ.get("BPNJAX_ATTACKS_RESULT", "")
_FOUND = {}  # of each surface


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if _FILE and report.when == "call" and not report.skipped:
        name = item.originalname.removeprefix("test_")
        found = _FOUND.setdefault(
            name, {"what": "", "cases": 0, "failed": 0, "seconds": 0.0, "names": []}
        )
        found["what"] = (item.function.__doc__ or name.replace("_", " ")).split("\n")[0]
        found["what"] = found["what"].split(":")[0].rstrip(".")
        found["cases"] += dict(item.user_properties).get("cases", 1)
        found["failed"] += report.failed
        found["seconds"] += report.duration
        params = getattr(getattr(item, "callspec", None), "params", {})
        found["names"] += [params[name] for name in ("seed", "method") if name in params]
    return report


def pytest_sessionfinish():
    if not _FOUND:
        return
    from bpnjax.methods import REGISTRY
    from bpnjax.run import results

    path = pathlib.Path(_FILE)
    file = json.loads(path.read_text()) if path.is_file() else {"name": "attacks", "ledger": {}}
    file["made"] = {
        "commit": results.commit(), "versions": results.versions(), "device": results.device_name(),
    }  # fmt: skip
    if NUMBER:
        table = file["ledger"].setdefault(
            "surfaces",
            {"header": ["test", "attack", "cases", "failures", "seeds", "commit"], "rows": []},
        )
        rows = {row[0]: row for row in table["rows"]}
        for name, found in _FOUND.items():
            seeds = found["names"]
            which = f"{min(seeds)} to {max(seeds)}" if seeds else "fixed"
            if set(seeds) & set(REGISTRY):
                which = f"fixed; {len(seeds)} of {len(REGISTRY)} methods"
            rows[f"`{name}`"] = [
                f"`{name}`", found["what"], f"{found['cases']:,}", str(found["failed"]), which,
                file["made"]["commit"],
            ]  # fmt: skip
        table["rows"] = [rows[name] for name in sorted(rows)]
    else:
        used = os.times()
        cases = sum(found["cases"] for found in _FOUND.values())
        failed = sum(found["failed"] for found in _FOUND.values())
        file["ledger"]["quick"] = {
            "header": ["cases", "failures", "seconds of CPU time"],
            "rows": [[str(cases), str(failed), f"{sum(used[:4]):.0f}"]],
        }
    path.write_text(json.dumps(file, indent=1, ensure_ascii=False) + "\n")
