"""Programs that nobody here wrote, run unchanged under plain DDP and at tp x dp, and compared.

python -m benchmarks.programs --programs DIR      see `__main__.py`
"""
