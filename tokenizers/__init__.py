"""Raw values to token ids, patches and coefficients, and back: plain numpy and torch, no ``nn.Module``."""

# With the repository root on sys.path (`python -m ...` there), `import tokenizers` finds this folder.
if not __name__.startswith("vertebra."):
    raise ImportError(
        f"{__file__} is vertebra.tokenizers, not the library 'tokenizers'; "
        "run Python from another folder or with `python -P`."
    )
