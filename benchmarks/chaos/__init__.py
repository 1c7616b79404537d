"""Whether streams hold: clients stream through a mesh of real processes on a real broker, and things are broken at random.

python -m benchmarks.chaos --faults 200 --out benchmarks/results/chaos.json
"""

import os

os.environ.setdefault(
    "GRPC_VERBOSITY", "ERROR"
)  # read when grpc is imported: it tells of every process that is started
