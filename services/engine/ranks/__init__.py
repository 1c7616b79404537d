"""A model on several devices: one process for each rank, and a front that drives them.

The front process (bus, gRPC, scheduler and step thread) sees a `Runner`, a `RankGroup`, in place of a `ModelRunner`. It
puts each step into a `Ring` in shared memory that every rank reads; each rank applies it to its own slots, computes its
shard of the model and samples, the same token as the others from the same counters. Rank 0 alone says what was sampled.
A rank that dies takes the engine with it, by name; a front that dies takes its ranks.
"""
