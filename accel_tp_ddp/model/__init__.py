"""What `parallelize` does to one model, and the methods that have to know that its weights are sharded."""
