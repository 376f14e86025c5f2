"""How long `import phenoseq` and `phenoseq --help` take, as shares of `import torch`."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

RUNS = 5


def seconds(*arguments: str) -> float:
    """Median wall time of a fresh interpreter, less that of one that does nothing."""
    times = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    empty = seconds("-c", "pass")
    torch = seconds("-c", "import torch") - empty
    ours = seconds("-c", "import phenoseq") - empty
    usage = seconds("-m", "phenoseq.cli", "--help") - empty
    print("| | seconds | share of `import torch` (at most 0.25) |\n|---|---|---|")
    print(f"| `import torch` | {torch:.3f} | 1 |")
    print(f"| `import phenoseq` | {ours:.3f} | {ours / torch:.3f} |")
    print(f"| `phenoseq --help` | {usage:.3f} | {usage / torch:.3f} |")


if __name__ == "__main__":
    main()
