"""Whether streams hold: clients stream through a mesh of real processes on a real broker, and things are broken at random.

python -m benchmarks.chaos --faults 200 --out benchmarks/results/chaos.json
"""
