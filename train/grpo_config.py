"""Configuration of GRPO."""

from __future__ import annotations

import dataclasses
from typing import Literal

from xflow_jax.decoding import check_entry_ranges, check_policy_ranges
from xflow_jax.errors import require
from xflow_jax.training import RewardScale


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """The policy that is trained.

    Attributes:
        init: "fresh" for a new step-size policy, "entry" for a new entry policy, the file of
            either, or a flow to fit before training, like "flow:jump=0.9". A file brings its own
            width and ranges.
        width: d, neurons of a hidden layer.
        a_min: smallest step fraction.
        a_max: largest step fraction.
        kappa_min: smallest kappa.
        kappa_max: largest kappa.
        above: learned confidence above which a mask enters, of an entry policy.
        temperature: of its draws.

    Raises:
        UserError: if a value is out of range.
    """

    init: str = "fresh"
    width: int = 64
    a_min: float = 1 / 256
    a_max: float = 1.0
    kappa_min: float = 2.0
    kappa_max: float = 50.0
    above: float = 0.9
    temperature: float = 1.0

    def __post_init__(self) -> None:
        most = 2**16
        require(1 <= self.width <= most, f"width is {self.width}, but it must be 1 to {most}")
        require(
            self.init != "entry" or self.width % 4 == 0,
            f"width is {self.width}, but that of an entry policy must be a multiple of 4",
        )
        check_policy_ranges(self.a_min, self.a_max, self.kappa_min, self.kappa_max)
        check_entry_ranges(self.above, self.temperature)


@dataclasses.dataclass(frozen=True)
class GrpoConfig:
    """A run of GRPO, with B = prompts_per_step and G = group_size.

    Attributes:
        model: directory or name of the model.
        out: folder of the run.
        task: the task of the prompts.
        data: data file of the task, or None for its own source.
        problems: number of problems of its training split, 0 for all.
        solved_only: leave out problems that mask prediction does not solve at full budget.
        failed_by: a rule, or empty. Leave out problems that it solves at the budget of rollouts.
        solved: folder for the answers of these two selections.
        budget: largest share of the full number of steps in a rollout.
        switches: options of the flow, as in flow:SWITCHES.
        prompts_per_step: B, prompts of a step.
        group_size: G, decodes of each prompt.
        steps: steps of the run.
        reward: "pass", or the "share" of passed tests.
        progress_weight: reward for the final t of a position.
        pass_weight: penalty for the forward passes divided by N.
        delay_weight: penalty for the delay of a position (`training.delay`).
        speed_power: power of 1 - passes / T, which multiplies the verdict, so that a wrong answer
            earns nothing by its speed. 0: the verdict alone.
        imitate: confidence above which masks enter in the last decode of each group, instead of a
            draw. 1: it draws as the others do. Only for an entry policy.
        per_position: compare a position with the same one of its group, so that rewards of a
            position (t, delay) count for its own actions.
        scale_rewards: standard deviation that divides the advantages.
        epsilon: half width of the clipping range.
        epochs: updates on each batch.
        rate: learning rate.
        clip: largest global norm of the gradients.
        overlap: sample a batch while the one before it is judged, with a policy that is one update
            behind.
        policy: the policy.
        evaluate_every: steps between evaluations.
        evaluate_problems: held-out problems of an evaluation.
        log_every: steps between lines of metrics.
        save_every: steps between checkpoints.
        batch_size: decodes of a batch in evaluations.
        dtype: dtype of the model.
        mesh: sizes of data, fsdp and tensor, or empty for one device.
        seed: seed of the policy, the order of the problems, and the actions.

    Raises:
        UserError: if a value is out of range.
    """

    model: str
    out: str
    task: str = "microcode"
    data: str | None = None
    problems: int = 1024
    solved_only: bool = True
    failed_by: str = ""
    solved: str = "runs/grpo_solved"
    budget: str = "1/4"
    switches: str = ""
    prompts_per_step: int = 8
    group_size: int = 8
    steps: int = 300
    reward: Literal["pass", "share"] = "pass"
    progress_weight: float = 0.1
    pass_weight: float = 0.0
    delay_weight: float = 0.0
    speed_power: float = 0.0
    imitate: float = 1.0
    per_position: bool = False
    scale_rewards: RewardScale = "group"
    epsilon: float = 0.2
    epochs: int = 1
    rate: float = 3e-4
    clip: float = 1.0
    overlap: bool = True
    policy: PolicyConfig = PolicyConfig()
    evaluate_every: int = 50
    evaluate_problems: int = 128
    log_every: int = 1
    save_every: int = 25
    batch_size: int = 64
    dtype: Literal["float32", "bfloat16"] = "float32"
    mesh: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("prompts_per_step", "group_size", "steps", "epochs", "batch_size")
        for name in (*counts, "evaluate_every", "evaluate_problems", "log_every", "save_every"):
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}, but it must be at least 1")
        require(
            self.group_size >= 2,
            "group_size is 1, but an advantage is what a decode gains over others of its group",
        )
        require(self.problems >= 0, f"problems is {self.problems}, but it must not be negative")
        require(
            self.speed_power >= 0,
            f"speed_power is {self.speed_power}, but it must not be negative",
        )
        require(
            0 < self.imitate <= 1,
            f"imitate is {self.imitate}, but it must be above 0 and at most 1",
        )
        for name in ("rate", "clip"):
            value = getattr(self, name)
            require(value > 0, f"{name} is {value}, but it must be positive")
        require(
            0 < self.epsilon < 1, f"epsilon is {self.epsilon}, but it must be above 0 and below 1"
        )
