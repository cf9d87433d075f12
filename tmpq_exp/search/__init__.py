"""The joint search: space, objective, algorithms and their Lightning module."""
