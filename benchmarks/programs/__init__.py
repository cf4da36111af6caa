"""Programs that nobody here wrote, run unchanged under plain DDP and at tp x dp, and compared.

python -m benchmarks.programs --programs DIR      see `__main__.py`
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read as Hugging Face's libraries are imported
