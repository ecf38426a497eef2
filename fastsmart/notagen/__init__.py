"""NotaGen (Wang et al. 2025, arXiv 2502.18008): sheet music in interleaved ABC notation, sixteen characters at a time.

The way of a piece: `styles` makes its prompt, `sampler` draws patches of characters from a `model` that `weights` has
read, `patches` makes them text, `rests` puts back the rests the text leaves out, `notation` makes notes of it.
"""
