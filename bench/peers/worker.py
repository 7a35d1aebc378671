"""A contender's process: reads one command per line of JSON on stdin, answers each with one line of JSON.

prepare   step, model, out       -> entries for the model (see prepare.py)
load      name, model, threads   -> seconds
work      path                   -> batches (an .npz with ids_0, mask_0, types_0, ids_1 ...)
run       batches                -> seconds, of the calls alone; the results are kept
padding                          -> difference, how far padding moves the result of the first batch's shortest text
results   path                   -> writes what was kept as result_0, result_1 ...
reset / memory                   -> peak_rss_bytes since the last reset
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path

import numpy as np


class Session:
    """What the commands act on."""

    def __init__(self):
        self.embed, self.batches, self.kept = None, [], {}

    def do_prepare(self, step, model, out):
        from peers.prepare import prepare

        return prepare(step, model, out)

    def do_load(self, name, model, threads):
        import importlib

        from peers.contenders import CONTENDERS

        contender = CONTENDERS[name]
        start = time.perf_counter()
        page = importlib.import_module(f"peers.{contender.page}")
        self.embed = page.load(model, threads, **dict(contender.options))
        return {"seconds": time.perf_counter() - start}

    def do_work(self, path):
        with np.load(path) as found:
            count = len(found.files) // 3
            self.batches = [[found[f"{kind}_{index}"] for kind in ("ids", "mask", "types")] for index in range(count)]
        self.kept = {}
        return {"batches": count}

    def do_run(self, batches):
        start = time.perf_counter()
        for index in batches:
            self.kept[index] = self.embed(*self.batches[index])
        return {"seconds": time.perf_counter() - start}

    def do_padding(self):
        ids, mask, types = self.batches[0]
        row = int(mask.sum(1).argmin())
        length = int(mask[row].sum())
        together = self.embed(ids, mask, types)
        if together is None:
            return {"difference": None}
        alone = self.embed(*(np.ascontiguousarray(array[row : row + 1, :length]) for array in (ids, mask, types)))
        return {"difference": float(np.abs(together[row] - alone[0]).max())}

    def do_results(self, path):
        kept = {f"result_{index}": result for index, result in self.kept.items() if result is not None}
        np.savez(path, **kept)
        return {"count": len(kept)}

    def do_reset(self):
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        except OSError:
            return {"reset": False}
        return {"reset": True}

    def do_memory(self):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return {"peak_rss_bytes": int(line.split()[1]) * 1024}
        return {"peak_rss_bytes": None}


def main():
    # What libraries print must not stand between the answers: they get stderr as their stdout.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    session = Session()
    for line in sys.stdin:
        message = json.loads(line)
        try:
            answer = getattr(session, f"do_{message.pop('do')}")(**message)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
