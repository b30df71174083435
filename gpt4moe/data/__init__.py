"""Documents to packed rows: tokenizer, sources, token store, packing plan, mixture, pipeline."""
