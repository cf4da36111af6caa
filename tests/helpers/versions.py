"""What a pair of versions that does not exist keeps from being tested."""

from importlib.util import find_spec

import pytest
import transformers
from packaging.version import Version

TRANSFORMERS = Version(transformers.__version__)
#: Pinned for Python 3.10 only: later ones want Python 3.11.
FOR_PYTHON_3_10 = TRANSFORMERS < Version("5.21")
needs_sharded_loading = pytest.mark.skipif(
    TRANSFORMERS < Version("5.23"),
    reason=f"sharded_loading refuses transformers {TRANSFORMERS}, and Python 3.10 has no newer one",
)
needs_all_architectures = pytest.mark.skipif(
    FOR_PYTHON_3_10,
    reason=f"transformers {transformers.__version__} lacks some architectures, and Python 3.10 has no newer one",
)
needs_uneven_shards = pytest.mark.skipif(
    FOR_PYTHON_3_10,
    reason=f"transformers {transformers.__version__} shards no uneven vocabulary, and Python 3.10 has no newer one",
)
needs_async_trainers = pytest.mark.skipif(
    FOR_PYTHON_3_10 and find_spec("aiohttp") is None,
    reason="TRL 1.14, which Python 3.10 is pinned to, wants aiohttp for them, and nothing else here does",
)
