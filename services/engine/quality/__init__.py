"""What a choice of formats costs in quality, beside the same model without it.

Models are made to compute given tokens by the layers that serve, chunk by chunk over the paged cache, as an engine computes
prompts. Each one's prediction of every token is compared with the reference's, chunk by chunk as well: logits are
never kept. Token ids go in; where they come from, and what is shown of what comes out, is for others to say.
"""
