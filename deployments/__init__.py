"""The Ray shell around `serve`: the only package that imports ray (besides `serve.local`, which starts it)."""
