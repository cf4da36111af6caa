"""`accel-tp-ddp estimate`: memory and time of every layout, from the real step on fake tensors.

`depths`: which layers are simulated; `extend`: from them to all; `cards`: GPUs as data; `duration`: how long a step
takes; `layouts`: what is tried, ranked and advised; `report`: as text.
"""

from .cards import card_names
from .layouts import SWITCHES, estimate
from .report import as_text

__all__ = ["SWITCHES", "as_text", "card_names", "estimate"]
