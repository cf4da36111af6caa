"""A script that counts processes and talks to them before it has an accelerator, and after that is gone."""

import gc
import json
import os
import sys
from pathlib import Path

from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from transformers import TrainingArguments

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
state = PartialState(cpu=True)
arguments = TrainingArguments(str(folder / "out"), use_cpu=True, report_to=[])
found = {
    "state": (state.num_processes, state.process_index, state.is_main_process),
    "arguments": (arguments.world_size, arguments.process_index, arguments.should_save),
    "gathered": gather_object([rank]),
}
accelerator = Accelerator()
assert accelerator.parallelism_config is not None
del accelerator
gc.collect()
found["after"] = (state.num_processes, state.process_index)
(folder / f"{rank}.json").write_text(json.dumps(found))
