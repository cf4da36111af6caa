"""Loading a checkpoint so that each rank reads what it will hold, and no more.

`sharded` goes through transformers' own loading and exchanges a few of its steps, `lazy` are the tensors that it is
given instead of read ones, `slices` describes the model that comes out of it.
"""
