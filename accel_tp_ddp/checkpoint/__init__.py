"""Full files and sharded states of a model whose tensors are sharded.

Full: `export` hands the unsharded tensors to one rank, one by one, as `deferred` ones; `from_pretrained` goes through
transformers' own loading with `lazy` tensors, of which each rank reads its slices.

Sharded: `dcp` describes shards to `torch.distributed.checkpoint`, `state` turns models and optimizers into names and
tensors and back, `folder` makes a complete folder appear or none, `plain` reads checkpoints that are not sharded,
`background` lets training continue while a folder is written; `save` and `load` put them together for an
`Accelerator`, `places` says where. `description` says what the tensors belong to, so that `merge` can make an ordinary
checkpoint of them.
"""
