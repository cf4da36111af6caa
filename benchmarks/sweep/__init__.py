"""Which models train right when sharded: tiny ones, group by group, compared with themselves unsharded.

    python -m benchmarks.sweep --group causal --tp 2 4 --dp 2 --jobs 2 --resume
    python -m benchmarks.sweep --group causal --only llama gpt_oss
    python -m benchmarks.sweep --table                          # docs/ARCHITECTURES.md from the saved results

A group is a module of this package with a function `cases() -> list[Case]` (`cases.py`).
"""
