"""Saving and resuming a run whose tensors are sharded.

`tensors` describes shards to `torch.distributed.checkpoint`, `objects` makes names and tensors of models and
optimizers, `ranks` lets all ranks fail together, `folder` makes a folder appear whole or not at all, `plain` reads
checkpoints that are not sharded, `background` lets training go on while a folder is written; `save` and `load` put
them together for an `Accelerator`, `places` says where. `description` says what the tensors are of, so that `merge`
can make an ordinary checkpoint of them.
"""
