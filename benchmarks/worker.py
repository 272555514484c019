"""A process that measures one peer: `worker.py PEER ORIGIN`, then a measurement a line, in and out, as JSON."""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
from typing import Any

from figures import FIGURES, Absent, Differs
from peers import PEERS, Peer


def measured(peer: Peer, figure: str, case: str, quick: bool) -> dict[str, Any]:
    """The rows of a measurement, or why there are none"""
    gc.collect()
    try:
        return {"rows": FIGURES[figure](quick).measure(peer, case)}
    except Absent as error:
        return {"absent": str(error)}
    except Differs as error:
        return {"broken": f"the result differs: {error}"}
    except Exception as error:
        return {"broken": f"{type(error).__name__}: {error}"}


def main() -> None:
    name, origin = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a peer prints is no answer
    kind = PEERS[name]
    missing = ""
    try:
        for module in kind.modules:
            importlib.import_module(module)
    except Exception as error:  # also what a module says that does not know this Python
        missing = f"cannot be imported: {error}"
    peer = kind(origin)
    for line in sys.stdin:
        answer = {"missing": missing} if missing else measured(peer, **json.loads(line))
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)  # threads that hold streams would be waited for


if __name__ == "__main__":
    main()
