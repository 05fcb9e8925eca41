"""Programs that train: `python -m train.pretrain configs/pretrain_tiny.toml` and its like, run from a checkout."""
