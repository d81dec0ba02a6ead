"""Several processes that run one program: their places, what ends them all, and templates."""
