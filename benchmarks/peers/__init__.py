"""One training step under this package and under its peers, interleaved in one run.

    python -m benchmarks.peers --size host-bound
    torchrun --nproc_per_node 4 --rdzv-backend c10d --rdzv-endpoint localhost:0 -m benchmarks.peers --size host-bound

| module       | holds                                                                  |
| ------------ | ---------------------------------------------------------------------- |
| `__main__`   | the command: options, ranks                                            |
| `sizes`      | the models and batches by name                                         |
| `contenders` | who takes part, a row each; a feature of this package is a row as well |
| `observe`    | what one step does: its collectives, and the memory it holds           |
| `rounds`     | steps in turn, and what follows from their times                       |
| `growth`     | how a step grows with layers and tokens                                |

What is predicted and what was measured is in `benchmarks/NOTES.md`.
"""
