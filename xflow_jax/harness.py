"""Forwards `python -m xflow_jax.harness` to evaluation/lm_eval_harness.py."""

from xflow_jax.evaluation.lm_eval_harness import XFlow, main

__all__ = ["XFlow", "main"]

if __name__ == "__main__":
    main()
