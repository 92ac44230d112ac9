"""Mesh generation: triangle meshes as sequences."""
