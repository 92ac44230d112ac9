"""Text as token ids: published language models as models and backbones of ours."""
