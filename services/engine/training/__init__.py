"""Training of small models, and of quantized ones: `python -m services.engine.training`.

`plan` says what is done, `text` what is read, `loss` what is learnt from it, `ranks` how several processes share the work, `progress`
what survives an interruption; `trainer` is the loop. Models are those of transformers, so that what is trained here is what everybody
computes, and the engine loads.
"""
