"""`accelerate launch -m accel_tp_ddp.launch script.py`: runs a script that knows nothing of tensor parallelism."""

from .plugin.launch import activate, main

__all__ = ["activate", "main"]

if __name__ == "__main__":
    main()
