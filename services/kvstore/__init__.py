"""The KV store: blocks of keys and values by the hash of the prefix that they complete, for all engines that reach it.

It owns bounded memory and nothing else: no model, no file, no log. It may forget any block at any time, and never serves
a block under another name than it was put under. A block is held only while the block before it is, so the prefix that
`Lookup` finds is all there is.

    settings.py   what a store can be told
    store.py      the blocks, their order, and who goes when room is needed; plain Python
    servicer.py   KVStoreService
    metrics.py    what it tells about itself
"""
