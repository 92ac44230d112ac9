"""Shared sequence backbones: features (B, *grid, D) in, features (B, *grid, D) out."""
